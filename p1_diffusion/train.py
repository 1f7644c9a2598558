"""Trains the conditional diffusion model of Problem 1 on MNIST-M and SVHN digits.

    python3 -m p1_diffusion.train --data hw2_data/digits --run-dir runs/p1
    torchrun --nproc_per_node 2 -m p1_diffusion.train --device cpu ...    (`accelerate launch` on several GPUs)

The same command again resumes. The averaged weights are in RUN_DIR/last, ready for `p1_diffusion.inference --checkpoint`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro

from common import cli
from common.data.digits import DATASETS, NUM_DIGITS, BalancedDraw, Digits, load_digits
from common.diffusion import diffusion_loss, drop_context
from common.files import ROOT
from common.grid import labelled_grid
from common.images import to_model_range, write_png
from common.schedule import make_schedule
from common.seeds import ImageGenerators, derive_seed
from common.training import Batch, TrainingConfig, fit, settings_of
from common.validation import held_out_loss
from p1_diffusion.inference import SamplingConfig, sample_digits
from p1_diffusion.model import NULL_DIGIT, ContextUNet, ContextUNetConfig

VALIDATION_IMAGES = 1000


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the conditional diffusion model of Problem 1."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews."""
    data: Path = ROOT / "hw2_data" / "digits"
    """The digits in the homework's layout."""
    init_from: Path | None = None
    """Model folder to start from, instead of random weights."""
    drop_digit: float = 0.1
    """Probability that an image's digit is hidden from the network, for classifier-free guidance."""
    min_snr_gamma: float | None = 5.0
    """Gamma of the loss weight min(SNR + offset, gamma) on the x0 error; None for the plain loss."""
    snr_offset: float = 1.0
    """Offset of that weight; 0 is the published min-SNR, 1 keeps v prediction's weight at high noise."""
    model: ContextUNetConfig = ContextUNetConfig()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=9000, batch_size=32, preview_every=1500, validate_every=1500
    )


def main(config: Config) -> None:
    """Trains, or resumes."""
    torch.manual_seed(config.training.seed)
    model = ContextUNet.load(config.init_from).train() if config.init_from else ContextUNet(config.model)
    model.to(memory_format=torch.channels_last)
    schedule = make_schedule(model.config.schedule)
    data = load_digits(config.data, "train")
    held_out = load_digits(config.data, "held_out")
    balanced = BalancedDraw(data)

    def loss_of(batch: Batch, generators: ImageGenerators, drop: float) -> torch.Tensor:
        digit = drop_context(batch["digit"], NULL_DIGIT, drop, generators)
        context = torch.stack([digit, batch["dataset"]], dim=1)
        return diffusion_loss(
            model,
            schedule,
            to_model_range(batch["image"]),
            context,
            generators,
            parameterization=model.config.parameterization,
            min_snr_gamma=config.min_snr_gamma,
            snr_offset=config.snr_offset,
        )

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(derive_seed(config.training.seed, step, 1))
        return _batch(data, balanced(config.training.batch_size, generator))

    def validate() -> dict[str, float]:
        """The loss on the same held-out images each time, none of their digits hidden."""
        images = _batch(held_out, BalancedDraw(held_out)(VALIDATION_IMAGES, torch.Generator().manual_seed(0)))
        return {"loss": held_out_loss(model, lambda batch, generators: loss_of(batch, generators, 0.0), images)}

    def preview(path: Path) -> None:
        """A picture from the same noise each time: rows are digits, the left columns MNIST-M, the right SVHN."""
        jobs = [(dataset, digit, number) for digit in range(NUM_DIGITS) for dataset in DATASETS for number in (1, 2, 3)]
        images = torch.cat([images for _, images in sample_digits(model, jobs, SamplingConfig(), show_progress=False)])
        write_png(path, labelled_grid(images, columns=6, row_labels=[str(d) for d in range(NUM_DIGITS)], scale=2))

    fit(
        dict(model.named_parameters()),
        lambda batch, generators: loss_of(batch, generators, config.drop_digit),
        draw,
        config.training,
        config.run_dir,
        settings=settings_of(config, "data"),
        save=model.save,
        validate=validate,
        preview=preview,
    )


def _batch(data: Digits, indices: torch.Tensor) -> Batch:
    return {
        "index": indices,
        "image": data.images[indices],
        "digit": data.digits[indices],
        "dataset": data.datasets[indices],
    }


if __name__ == "__main__":
    cli.run(main, Config)
