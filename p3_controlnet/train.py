"""Trains a ControlNet on circles, over a frozen latent-diffusion model.

    python3 -m p3_controlnet.train --run-dir runs/controlnet_circles --fill50k hw2_data/fill50k
    python3 -m p3_controlnet.train --preset sd14 --run-dir runs/controlnet_sd14 \
        --base sd-v1-4.ckpt --fill50k hw2_data/fill50k

The same command again resumes. Pictures are encoded and captions read once, so a step pays for the
U-Net and the ControlNet alone. RUN_DIR/last and RUN_DIR/best hold the control weights only, as a
diffusers ControlNet folder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from torch import Tensor

from common import cli
from common.cli import Preset
from common.colour import colour_difference
from common.data.examples import Examples, drawn_circles, real_examples
from common.devices import make_accelerator, this_process
from common.errors import InputError
from common.files import ROOT
from common.grid import labelled_grid
from common.images import resize, to_uint8, write_png
from common.latent.generate import ControlledGenerationConfig, Request, generate
from common.latent.load import base_hash, load_base
from common.latent.model import LatentDiffusion
from common.metrics.segmentation import (
    NO_OBJECT_ERROR,
    inner_region,
    iou,
    median_colour,
    object_mask,
)
from common.seeds import Draws, derive_seeds, random_indices
from common.training import Batch, TrainingConfig, fit, settings_of
from p3_controlnet.formats import load_controlnet
from p3_controlnet.latent_cache import LatentCache, make_latent_cache
from p3_controlnet.loss import latent_loss
from p3_controlnet.model import SD_HINT_CHANNELS, ControlNet

VALIDATION_SEED, VALIDATION_EXAMPLES = 1, 32
PREVIEW_EXAMPLES = 12
CONVERGED = 0.5  # of the IoU
TRAINING = TrainingConfig(
    steps=3000,
    batch_size=16,
    lr=4e-4,
    warmup=200,
    validate_every=250,
    preview_every=500,
    checkpoint_every=250,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a ControlNet on circles, over a frozen latent-diffusion model."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews, and the cache of latents, hints and text
    features."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The frozen model: a Stable Diffusion v1.4 file or folder, or the folder of a small model."""
    fill50k: Path | None = None
    """Real pairs, in the homework's layout; None for drawn ones alone."""
    init_from: Path | None = None
    """ControlNet to start from, instead of a copy of the base's encoder."""
    size: int | None = None
    """Side of the pictures; the default is the base's own, 64 or 512."""
    pictures: int = 20_000
    """Drawn pairs."""
    hint_channels: tuple[int, ...] = (8, 16, 32)
    """Channels of the hint encoder, which halves the sides at each further one: 16 32 96 256 for
    Stable Diffusion."""
    cond_drop_prob: float = 0.3
    """Probability of the empty prompt in a caption's place: control must then speak for itself
    (Section 3.3 of the paper)."""
    min_snr_gamma: float | None = 5.0
    """Gamma of the loss weight min(SNR + offset, gamma) on the x0 error; None for the plain loss,
    which a base of eps prediction, such as Stable Diffusion, gets in any case (as in the paper)."""
    snr_offset: float = 0.1
    """Offset of that weight; 0 is the published min-SNR. The small model was trained with the
    same."""
    gradient_checkpointing: bool = False
    """Whether to save memory by computing activations again in the backward pass."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: for the small model, an hour on two CPU cores; expect sudden convergence"
            " (an IoU above 0.5) before step 1,000 and an IoU of 0.95 at the end",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4 on one GPU of 24 GB: the learning rate, batch and empty"
            " prompts of the paper (arXiv:2302.05543), no drawn pairs; sudden convergence is"
            " reported at about 6,000 steps; never run here on real weights",
            {
                "hint_channels": SD_HINT_CHANNELS,
                "pictures": 0,
                "cond_drop_prob": 0.5,
                "min_snr_gamma": None,
                "gradient_checkpointing": True,
                "training": TrainingConfig(
                    steps=20_000,
                    batch_size=4,
                    lr=1e-5,
                    warmup=500,
                    weight_decay=0.01,
                    beta2=0.999,
                    ema_decay=0.999,
                    mixed_precision="bf16",
                    validate_every=1000,
                    preview_every=1000,
                ),
            },
        ),
        "smoke": Preset(
            "is everything in place? Two steps on 64 drawn pairs over the small model, under a"
            " minute on a CPU",
            {
                "pictures": 64,
                "training": dataclasses.replace(
                    TRAINING, steps=2, batch_size=4, warmup=1, log_every=1
                ),
            },
        ),
    }


def main(config: Config) -> None:
    """Trains, or resumes."""
    if config.pictures < 0 or config.pictures == 0 and not config.fill50k:
        raise InputError("--pictures must be at least 1, or --fill50k must be given")
    accelerator = make_accelerator(config.training.device, config.training.mixed_precision)
    torch.manual_seed(config.training.seed)
    model = load_base(config.base).to(accelerator.device)
    size = config.size or model.side
    if size % model.downscale:
        raise InputError(
            f"--size must be a multiple of {model.downscale}, the pixels of a latent, not {size}"
        )
    control = new_control(config, model)
    model.controlnet = control.train()
    model.choose_attention(config.training.mixed_precision)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    frozen = base_hash(model)

    def examples() -> Examples:
        parts = (
            [drawn_circles(config.pictures, size, config.training.seed)] if config.pictures else []
        )
        if config.fill50k:
            parts.append(real_examples(config.fill50k, size))
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    made_from = {
        "pictures": config.pictures,
        "seed": config.training.seed,
        "fill50k": bool(config.fill50k),
        "size": size,
        "base": frozen,
    }
    with accelerator.main_process_first():
        cache = LatentCache.cached(
            config.run_dir / "latent_cache.safetensors",
            made_from,
            lambda: make_latent_cache(model, examples()),
        )
    cache = cache.resident(accelerator.device)
    held_out = drawn_circles(VALIDATION_EXAMPLES, size, config.training.seed + VALIDATION_SEED)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        return cache.take(random_indices(len(cache), config.training.batch_size, generator))

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        plain = model.parameterization == "eps"
        return latent_loss(
            model,
            batch,
            cache.null,
            draws,
            cond_drop_prob=config.cond_drop_prob,
            min_snr_gamma=None if plain else config.min_snr_gamma,
            snr_offset=0.0 if plain else config.snr_offset,
        )

    def sample_held_out(count: int) -> Tensor:
        """Pictures uint8 [count, 3, S, S] for held-out control images, from the same noise each
        time."""
        hints = held_out.hints[:count].expand(-1, 3, -1, -1)
        seeds = derive_seeds(VALIDATION_SEED, count=count)
        requests = [
            Request(*values) for values in zip(held_out.captions[:count], seeds, hints, strict=True)
        ]
        control.eval()
        latent_side = size // model.downscale
        chunks = [
            x
            for _, x in generate(
                model, requests, ControlledGenerationConfig(), latent_side, show_progress=False
            )
        ]
        control.train()
        return to_uint8(torch.cat(chunks))

    def validate() -> dict[str, float]:
        """IoU of the filled circle and CIEDE2000 of circle and background on held-out drawings. The
        best has the least sum of what is missing in IoU and of a hundredth of the colour error."""
        pictures = sample_held_out(VALIDATION_EXAMPLES)
        scores = [compare(a, b) for a, b in zip(pictures, held_out.images, strict=True)]
        mean_iou, colour_error = (sum(values) / len(scores) for values in zip(*scores, strict=True))
        return {
            "loss": 1.0 - mean_iou + colour_error / 100.0,
            "iou": mean_iou,
            "colour_error": colour_error,
        }

    def preview(path: Path) -> None:
        pictures = sample_held_out(PREVIEW_EXAMPLES)
        hints = held_out.hints[:PREVIEW_EXAMPLES].expand(-1, 3, -1, -1)
        rows = torch.stack([hints, held_out.images[:PREVIEW_EXAMPLES], pictures], 1).flatten(0, 1)
        write_png(
            path,
            labelled_grid(rows, columns=6, column_labels=["hint", "target", "result"] * 2, scale=2),
        )

    fit(
        dict(control.named_parameters()),
        loss_fn,
        get_batch,
        config.training,
        config.run_dir,
        settings=settings_of(
            config,
            fill50k=bool(config.fill50k),
            size=size,
            hint_channels=control.hint_channels,
            base=frozen,
        ),
        save=control.save,
        validate=validate,
        preview=preview,
    )
    if this_process().rank == 0:
        step = convergence(config.run_dir / "metrics.jsonl")
        found = f"passed {CONVERGED} at step {step}" if step else f"never passed {CONVERGED}"
        print(f"sudden convergence: the IoU {found}")


def new_control(config: Config, model: LatentDiffusion) -> ControlNet:
    """`config.init_from`'s, or a copy of the base's encoder. Raises InputError if its hint encoder
    does not fit the base."""
    unet, start = model.unet, config.init_from
    control = (
        load_controlnet(start, unet) if start else ControlNet.from_unet(unet, config.hint_channels)
    )
    if control.downscale != model.downscale:
        raise InputError(
            f"the hint encoder's channels {list(control.hint_channels)} divide the hint's sides by"
            f" {control.downscale}, but one latent spans {model.downscale} pixels: Stable Diffusion"
            " needs --preset sd14"
        )
    return control


def compare(image: Tensor, target: Tensor) -> tuple[float, float]:
    """IoU of the filled circles of two pictures uint8 [3, S, S], and the mean CIEDE2000 between the
    colours of circle and background; a picture without a circle scores 0 and `NO_OBJECT_ERROR`."""
    mask, truth = object_mask(image), object_mask(target)
    if not mask.any():
        return 0.0, NO_OBJECT_ERROR
    images = [resize(x, mask.shape, "nearest") for x in (image, target)]
    errors = []
    for regions in ((mask, truth), (~mask, ~truth)):
        colours = [
            median_colour(x, inner_region(region, image.shape[-1]))
            for x, region in zip(images, regions, strict=True)
        ]
        errors.append(NO_OBJECT_ERROR if None in colours else float(colour_difference(*colours)))
    return iou(mask, truth), sum(errors) / 2.0


def convergence(metrics: Path) -> int | None:
    """The first step of a run's metrics.jsonl whose validation IoU reaches `CONVERGED`; None if
    none does."""
    for line in map(json.loads, metrics.read_text().splitlines()):
        if line.get("validation_iou", 0.0) >= CONVERGED:
            return line["step"]
    return None


if __name__ == "__main__":
    cli.run(main, Config)
