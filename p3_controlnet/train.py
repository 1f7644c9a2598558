"""Trains a ControlNet on pairs of circles and their outlines, for a frozen latent-diffusion model.

    python3 -m p3_controlnet.train --run-dir runs/controlnet_circles --fill50k hw2_data/fill50k
    python3 -m p3_controlnet.train --preset sd14 --run-dir runs/controlnet_sd14 \
        --base sd-v1-4.ckpt --fill50k hw2_data/fill50k

Running the same command again resumes. Images and captions are encoded once, before the first step,
so a step computes the U-Net and the ControlNet only. RUN_DIR/last and RUN_DIR/best are diffusers
ControlNet folders; they hold the ControlNet's weights only.
"""

import dataclasses
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
from common.text_files import read_records
from common.training import Batch, TrainingConfig, fit, settings_of
from p3_controlnet.formats import load_controlnet
from p3_controlnet.latent_cache import LatentCache, make_latent_cache
from p3_controlnet.loss import latent_loss
from p3_controlnet.model import SD_HINT_CHANNELS, ControlNet

VALIDATION_SEED, VALIDATION_EXAMPLES = 1, 32
PREVIEW_EXAMPLES = 12
CONVERGED = 0.5  # validation IoU that counts as sudden convergence
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
    """Trains a ControlNet on circles and their outlines, for a frozen latent-diffusion model."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews, and the cache of latents, hints and text
    features."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The frozen base model: a Stable Diffusion v1.4 file or folder, or a small model's folder."""
    fill50k: Path | None = None
    """Folder of fill50k, in the homework's layout, whose training pairs are added to the drawn
    ones; None for drawn pairs only."""
    init_from: Path | None = None
    """ControlNet file or folder to start from, instead of a copy of the base's encoder."""
    size: int | None = None
    """Side of the training images, in pixels; None is the base's own, 64 or 512."""
    pictures: int = 20_000
    """Number of drawn pairs of circle and outline."""
    hint_channels: tuple[int, ...] = (8, 16, 32)
    """Channels of the hint encoder. From each entry to the next, the hint's sides are halved.
    Stable Diffusion needs four entries; its own are 16 32 96 256."""
    cond_drop_prob: float = 0.3
    """Probability that a caption is replaced by the empty prompt, so that ControlNet learns to use
    the hint without text (Section 3.3 of the paper)."""
    min_snr_gamma: float | None = 5.0
    """Gamma of the loss weight min(SNR + snr_offset, gamma) on the x0 error; None for no weight. A
    base with eps prediction, such as Stable Diffusion, is always trained without, as in the
    paper."""
    snr_offset: float = 0.1
    """Offset in that weight; 0 is min-SNR as published (arXiv:2303.09556). The small base model was
    trained with the default."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them, to save memory."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults, for the small model: one hour on two CPU cores; expect sudden"
            " convergence (an IoU above 0.5) before step 1,000 and an IoU of 0.95 at the end",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4 on one GPU with 24 GB: learning rate, batch size and"
            " probability of empty prompts as in the paper (arXiv:2302.05543), no drawn pairs;"
            " sudden convergence is reported at about 6,000 steps; not yet run on the real weights",
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
            "checks the installation: two steps on 64 drawn pairs with the small model, under one"
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
    """Trains from the start, or resumes the run in `config.run_dir`."""
    if config.pictures < 0 or config.pictures == 0 and not config.fill50k:
        raise InputError("--pictures must be at least 1, or --fill50k must be given")
    accelerator = make_accelerator(config.training.device, config.training.mixed_precision)
    torch.manual_seed(config.training.seed)
    model = load_base(config.base).to(accelerator.device)
    size = config.size or model.side
    if size % model.downscale:
        raise InputError(
            f"--size must be a multiple of {model.downscale}, the pixels per latent, not {size}"
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
        """Images uint8 [count, 3, S, S] for held-out control images, with the same noise always."""
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
        """Mean IoU of the circle and mean CIEDE2000 of the colours on held-out drawn pairs.

        The entry "loss", (1 - IoU) + CIEDE2000 / 100, chooses RUN_DIR/best; lower is better.
        """
        pictures = sample_held_out(VALIDATION_EXAMPLES)
        scores = [compare(a, b) for a, b in zip(pictures, held_out.images, strict=True)]
        mean_iou, colour_error = (sum(values) / len(scores) for values in zip(*scores, strict=True))
        return {
            "loss": 1.0 - mean_iou + colour_error / 100.0,
            "iou": mean_iou,
            "colour_error": colour_error,
        }

    def preview(path: Path) -> None:
        """Writes a grid of held-out control images, targets and results."""
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
        found = f"reached {CONVERGED} at step {step}" if step else f"never reached {CONVERGED}"
        print(f"sudden convergence: the IoU {found}")


def new_control(config: Config, model: LatentDiffusion) -> ControlNet:
    """The ControlNet in `config.init_from`, or a new one from a copy of the base's encoder.

    Raises InputError if its hint encoder does not bring a hint to the size of the base's latents.
    """
    unet, start = model.unet, config.init_from
    control = (
        load_controlnet(start, unet) if start else ControlNet.from_unet(unet, config.hint_channels)
    )
    if control.downscale != model.downscale:
        raise InputError(
            f"the hint encoder's channels {list(control.hint_channels)} divide the hint's sides by"
            f" {control.downscale}, but one latent spans {model.downscale} pixels: choose other"
            " --hint-channels, for Stable Diffusion by --preset sd14"
        )
    return control


def compare(image: Tensor, target: Tensor) -> tuple[float, float]:
    """IoU of the filled circles in two images uint8 [3, S, S], and their colour error.

    The colour error is the mean of the CIEDE2000 between the median colours of the two circles and
    of the two backgrounds. If `image` shows no circle, the IoU is 0 and the colour error is
    `NO_OBJECT_ERROR`.
    """
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
    """The first step in metrics.jsonl whose validation IoU reaches `CONVERGED`, None if none does.

    `metrics` is the path of the file.
    """
    for _, line in read_records(metrics):
        if line.get("validation_iou", 0.0) >= CONVERGED:
            return line["step"]
    return None


if __name__ == "__main__":
    cli.run(main, Config)
