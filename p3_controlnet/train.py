"""Trains a ControlNet on pairs of circles and their outlines, for a frozen latent-diffusion model.

    python3 -m p3_controlnet.train --run-dir runs/controlnet_circles --fill50k hw2_data/fill50k
    python3 -m p3_controlnet.train --preset sd14 --run-dir runs/controlnet_sd14 \
        --base sd-v1-4.ckpt --fill50k hw2_data/fill50k

Running the same command again resumes. Images and captions are encoded once, before the first step,
into mapped files, so a step computes the U-Net and the ControlNet only. RUN_DIR/last and
RUN_DIR/best are diffusers ControlNet folders; they hold the ControlNet's weights only.
"""

import dataclasses
import functools
import operator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor

from common import cli
from common.cli import Preset
from common.colour import colour_difference
from common.config import Count, Probability, Side, Size, bounds
from common.data.examples import DrawnCircles, ExampleDataset, RealPairs, drawn_circles
from common.devices import DTYPES, check_memory, make_accelerator, this_process
from common.diffusion.loss import LossWeight, LossWeighting, TimestepDistribution
from common.errors import InputError
from common.files import ROOT
from common.grid import labelled_grid
from common.images import resize, to_uint8, write_png
from common.latent.control import ControlText
from common.latent.generate import ControlledGenerationConfig, Request, generate
from common.latent.load import base_hash, kind_of, load_base
from common.latent.model import LatentDiffusion
from common.metrics.segmentation import (
    NO_OBJECT_ERROR,
    inner_region,
    iou,
    median_colour,
    object_mask,
)
from common.seeds import Draws, derive_seeds
from common.text_files import read_records
from common.training import (
    Batch,
    TrainingConfig,
    fit,
    micro_batches_of,
    refuse_compile,
    settings_of,
)
from p3_controlnet.check import Validation, run_checks
from p3_controlnet.formats import load_controlnet
from p3_controlnet.latent_cache import CachedBatches, LatentCache
from p3_controlnet.loss import latent_loss
from p3_controlnet.model import SD_HINT_CHANNELS, ControlNet

VALIDATION_SEED = 1
PREVIEW_EXAMPLES = 12  # at most
HINT_CHANNELS = (8, 16, 32, 64)  # of small models
DRAWN_PAIRS = 20_000  # by default, for the small model
CONVERGED = 0.5  # validation IoU that counts as sudden convergence
TRAINING = TrainingConfig(
    steps=2000,
    batch_size=32,
    optimizer="muon",
    lr=3e-3,
    lr_schedule="constant",
    warmup=200,
    ema_decay=0.999,
    validate_every=250,
    preview_every=500,
    checkpoint_every=500,
)
SD14 = TrainingConfig(
    steps=20_000,
    batch_size=4,
    lr=1e-5,
    lr_schedule="constant",
    warmup=0,
    weight_decay=0.01,
    beta2=0.999,
    ema="none",
    mixed_precision="bf16",
    tf32=True,
    validate_every=1000,
    preview_every=1000,
    checkpoint_every=1000,
)


def _on_gpu(device_batch_size: int, gradient_checkpointing: bool) -> dict[str, Any]:
    """The settings of the preset sd14 that depend on the GPU's memory; the results do not.

    Estimates for 512x512 pixels, in GiB: trained weights, their gradients and moments 5.4; U-Net
    and text encoder in bf16 1.8, autoencoder 0.3, autocast's copies of the trained weights 0.7;
    activations 1.1 an image, with checkpointing 0.5; CUDA and its workspaces 1. Together 13.6 for
    4 images, 11.4 for 2, 9.7 for 1 with checkpointing.
    """
    return {
        "gradient_checkpointing": gradient_checkpointing,
        "training": dataclasses.replace(SD14, device_batch_size=device_batch_size),
    }


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
    size: Side | None = None
    """Side of the training images, in pixels; None is the base's own, 128 or 512."""
    pictures: Annotated[int | None, *bounds(at_least=0, at_most=10**7)] = None
    """Number of drawn pairs of circle and outline; None is 20,000 for the small model and 0 for
    Stable Diffusion, which is trained on --fill50k."""
    several_fraction: Probability = 0.4
    """Fraction of the drawn pairs with two or three circles; the rest show one, as in fill50k."""
    blank_fraction: Probability = 0.1
    """Fraction of the drawn pairs without outlines, whose picture is the background alone, so that
    nothing is drawn where the control image is black: a patch of a larger canvas may have none."""
    control_text: ControlText | None = None
    """Text that the ControlNet reads: the full prompt, as in the paper, or the empty one. Without
    text it learns where things are and leaves their colours to the base model, which reads the full
    prompt in either case. By default that of --init-from, else the empty one."""
    hint_channels: tuple[Size, ...] | None = None
    """Channels of the hint encoder. From each entry to the next, the hint's sides are halved.
    Stable Diffusion's own are 16 32 96 256; None is 8 16 32 64, as many as the base needs."""
    cond_drop_prob: Probability = 0.3
    """Probability that a caption is replaced by the empty prompt, so that ControlNet learns to use
    the hint without text (Section 3.3 of the paper)."""
    loss_weight: LossWeight = "learned"
    """Loss weight of the noise levels. learned: by a learned log-variance; min_snr: min(SNR + 1, 5)
    on the x0 error (min(SNR, 5) with eps prediction); none: the plain error of the U-Net's output,
    as in the paper."""
    timesteps: TimestepDistribution = "mixed"
    """Distribution of the timesteps t in training. mixed: half uniform, half logit-normal; shifted:
    denser at high noise. The paper's is uniform."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them, to save memory."""
    check: bool = False
    """Only test wiring and gradients, on a few steps, and tell the time and memory of a step; exit
    code 0 if all is well, else 1. Nothing is written."""
    validation_pictures: Count = 32
    """Pictures drawn for a validation; a preview shows the first twelve of them."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults, for the small model: an hour on two CPU cores; expect sudden"
            " convergence (an IoU above 0.5) before step 500 and an IoU of 0.98 at the end",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4 (--base is required) on one GPU of 24, 16 or 12 GB"
            " (--memory, by default what the GPU has; older ones than NVIDIA's Ampere need"
            " --mixed-precision fp16). As in the paper (arXiv:2302.05543) and diffusers' recipe:"
            " learning rate 1e-5, AdamW, half of the captions empty, 4 images per step, no"
            " moving average, frozen networks in bf16, attention by"
            " scaled_dot_product_attention. The memory sets only how the 4 images are computed:"
            " all at once for 24 GB (14 GiB are estimated), 2 for 16 GB (11.5), 1 with gradient"
            " checkpointing for 12 GB (9.7; --optimizer adamw8bit leaves 2 more). Costs 9 TFLOP"
            " a step, 12 with checkpointing: 20,000 steps take 1.5 to 3.5 hours on a card that"
            " sustains 40 to 20 TFLOP/s; 4.4 GB of disk for the state, 1.5 GB for each of best/"
            " and last/. Validations and previews take some 2 % of the time (4 pictures of 46"
            " TFLOP every 1,000 steps). Expect pictures that ignore the outline until a sudden"
            " convergence at about step 6,000 (Figure 4 of the paper); never run here on the"
            " real weights. --check tests the wiring first",
            {
                "base": tyro.MISSING,
                "hint_channels": SD_HINT_CHANNELS,
                "control_text": "full",
                "pictures": 0,
                "cond_drop_prob": 0.5,
                "loss_weight": "none",
                "timesteps": "uniform",
                "validation_pictures": 4,
            },
            by_memory={24: _on_gpu(4, False), 16: _on_gpu(2, False), 12: _on_gpu(1, True)},
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
    pictures, count = drawn_pictures(config), config.validation_pictures
    accelerator = make_accelerator(config.training.device, config.training.mixed_precision)
    refuse_compile(config.training)
    micro_batches_of(config.training, accelerator)  # refuses what would not divide, before encoding
    torch.manual_seed(config.training.seed)
    model = load_base(config.base).to(accelerator.device)
    size = config.size or model.side
    if size % model.downscale:
        raise InputError(
            f"--size must be a multiple of {model.downscale}, the pixels per latent, not {size}"
        )
    control = new_control(config, model).to(accelerator.device)
    model.controlnet = control.train()
    model.choose_attention(config.training.mixed_precision)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    held_out = drawn_circles(count, size, config.training.seed + VALIDATION_SEED)
    validated: list[Tensor] = []  # pictures of the last validation, until the weights change
    sampling = ControlledGenerationConfig()

    def sample_held_out(count: int, steps: int = sampling.steps) -> Tensor:
        """Images uint8 [count, 3, S, S] for held-out control images, with the same noise always."""
        hints = held_out.hints[:count].expand(-1, 3, -1, -1)
        seeds = derive_seeds(VALIDATION_SEED, count=count)
        requests = [
            Request(*values) for values in zip(held_out.captions[:count], seeds, hints, strict=True)
        ]
        chunk_size = min(sampling.chunk_size, count)
        settings = dataclasses.replace(sampling, steps=steps, chunk_size=chunk_size)
        latent_side = size // model.downscale
        control.eval()
        with accelerator.autocast():
            drawn = generate(model, requests, settings, latent_side, show_progress=False)
            chunks = [x for _, x in drawn]
        control.train()
        return to_uint8(torch.cat(chunks))

    def validate(steps: int = sampling.steps) -> dict[str, float]:
        """Mean IoU of the circle and mean CIEDE2000 of the colours on held-out drawn pairs.

        The entry "loss", (1 - IoU) + CIEDE2000 / 100, chooses RUN_DIR/best; lower is better.
        """
        pictures = sample_held_out(count, steps)
        validated[:] = pictures
        scores = [compare(a, b) for a, b in zip(pictures, held_out.images, strict=True)]
        mean_iou, colour_error = (sum(values) / len(scores) for values in zip(*scores, strict=True))
        return {
            "loss": 1.0 - mean_iou + colour_error / 100.0,
            "iou": mean_iou,
            "colour_error": colour_error,
        }

    def preview(path: Path) -> None:
        """Writes a grid of held-out control images, targets and results, with their prompts."""
        shown = min(PREVIEW_EXAMPLES, count)
        pictures = torch.stack(validated[:shown]) if validated else sample_held_out(shown)
        hints = held_out.hints[:shown].expand(-1, 3, -1, -1)
        rows = torch.stack([hints, held_out.images[:shown], pictures], 1).flatten(0, 1)
        captions = held_out.captions[:shown]
        grid = labelled_grid(
            rows,
            columns=6,
            row_labels=["\n".join(captions[i : i + 2]) for i in range(0, shown, 2)],
            column_labels=["hint", "target", "result"] * 2,
            title=f"step {int(path.stem)}",
            scale=2 if size <= 128 else 1,
        )
        write_png(path, grid)

    if config.check:
        validation = Validation(validate, sampling.steps)
        raise SystemExit(run_checks(config, model, accelerator, size, validation))
    frozen, small = base_hash(model), kind_of(config.base) == "small"

    check_memory(control.parameters())
    cache = LatentCache.cached(
        config.run_dir / "latent_cache",
        model,
        training_pairs(config, pictures, size),
        {"base": frozen},
    )
    null = cache.null.to(accelerator.device)
    weighting = LossWeighting(config.loss_weight, model.parameterization, config.timesteps).to(
        accelerator.device
    )
    model.cast(DTYPES[config.training.mixed_precision])

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        validated.clear()
        drop = config.cond_drop_prob
        return latent_loss(model, batch, null, draws, cond_drop_prob=drop, **weighting.options)

    fit(
        dict(control.named_parameters()) | dict(weighting.named_parameters("weighting")),
        loss_fn,
        CachedBatches(cache, config.training.batch_size, config.training.seed),
        config.training,
        config.run_dir,
        settings=settings_of(
            config,
            "check",
            "validation_pictures",
            fill50k=bool(config.fill50k),
            pictures=pictures,
            size=size,
            hint_channels=control.hint_channels,
            control_text=control.control_text,
            base=frozen,
        ),
        save=lambda folder: control.save(folder, torch.float16 if small else torch.float32),
        validate=validate,
        preview=preview,
        judged_by=f"{count} pictures",
        next_command=f"bash hw2_3.sh prompt.json SOURCES OUT LAST --base {config.base}",
    )
    if this_process().rank == 0:
        step = convergence(config.run_dir / "metrics.jsonl")
        found = f"reached {CONVERGED} at step {step}" if step else f"never reached {CONVERGED}"
        print(f"sudden convergence: the IoU {found}")


def drawn_pictures(config: Config) -> int:
    """The number of drawn pairs; raises InputError if there would be no pairs at all."""
    pictures = config.pictures
    if pictures is None:
        pictures = DRAWN_PAIRS if kind_of(config.base) == "small" else 0
    if pictures == 0 and not config.fill50k:
        raise InputError("--pictures must be at least 1, or --fill50k must be given")
    return pictures


def training_pairs(config: Config, pictures: int, size: int) -> ExampleDataset:
    """The drawn pairs, if any, then those of fill50k, if given."""
    fractions = config.several_fraction, config.blank_fraction
    drawn = [DrawnCircles(pictures, size, config.training.seed, *fractions)] if pictures else []
    real = [RealPairs(config.fill50k, size)] if config.fill50k else []
    return functools.reduce(operator.add, [*drawn, *real])


def new_control(config: Config, model: LatentDiffusion) -> ControlNet:
    """The ControlNet in `config.init_from`, or a new one from a copy of the base's encoder.

    Raises InputError if its hint encoder does not bring a hint to the size of the base's latents,
    or has other channels than `config.hint_channels`.
    """
    unet, start = model.unet, config.init_from
    channels = config.hint_channels or HINT_CHANNELS[: model.downscale.bit_length()]
    control = load_controlnet(start, unet) if start else ControlNet.from_unet(unet, channels)
    control.control_text = config.control_text or (control.control_text if start else "empty")
    if config.hint_channels not in (None, control.hint_channels):
        raise InputError(
            f"--init-from {start} has the hint channels {list(control.hint_channels)}, so"
            " --hint-channels does not apply: leave it out"
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
