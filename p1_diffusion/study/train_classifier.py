"""Trains the digit classifier that replaces the course's classifiers in the grader's replica.

    python3 -m p1_diffusion.study.train_classifier --data hw2_data/digits \
        --run-dir runs/p1_classifier

One network classifies the digits of both datasets. It is trained without the held-out tenth
(`common.data.split.is_held_out`), on which its accuracy is measured at the end. RUN_DIR/last holds
the classifier and the reference statistics of real digits for `p1_diffusion.evaluate`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from common import cli
from common.checkpoint import tensors_hash
from common.data.digits import DATASETS, BalancedDraw, Digits, load_digits
from common.files import ROOT
from common.images import to_model_range
from common.metrics.classifier import DigitClassifier, classify
from common.seeds import Draws
from common.training import Batch, TrainingConfig, fit, prepare_network
from p1_diffusion.quality import make_reference

CALIBRATION_IMAGES = 2000  # for the statistics of batch normalisation


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the digit classifier that replaces the course's classifiers."""

    run_dir: Path
    """Folder of the run: checkpoints and metrics."""
    data: Path = ROOT / "hw2_data" / "digits"
    """Folder of the digits, in the homework's layout."""
    init_from: Path | None = None
    """Classifier folder with the initial weights; they are random if none is given."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=6000, batch_size=64, lr=3e-3, weight_decay=0.05, beta2=0.999, preview_every=10**9
    )


def main(config: Config) -> None:
    """Trains the classifier, or resumes, and prints its accuracy on held-out digits."""
    torch.manual_seed(config.training.seed)
    model = (
        DigitClassifier.load(config.init_from).train() if config.init_from else DigitClassifier()
    )
    network = prepare_network(model, config.training)
    device = next(model.parameters()).device
    data = load_digits(config.data, "train").to(device)
    held_out = load_digits(config.data, "held_out").to(device)
    balanced = BalancedDraw(data)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        indices = balanced(config.training.batch_size, generator)
        return {"index": indices, "image": data.images[indices], "digit": data.digits[indices]}

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        images = augment(to_model_range(batch["image"]), draws)
        return F.cross_entropy(network(images), batch["digit"], label_smoothing=0.05)

    typical = data.images[balanced(CALIBRATION_IMAGES, torch.Generator(device).manual_seed(0))]

    def save(folder: Path) -> None:
        model.recalibrate(typical)
        model.save(folder)

    def validate() -> dict[str, float]:
        model.recalibrate(typical)
        model.eval()
        accuracies = {
            f"accuracy_{name}": value
            for name, value in accuracy_by_dataset(model, held_out).items()
        }
        model.train()
        return {"loss": 1.0 - sum(accuracies.values()) / len(accuracies), **accuracies}

    fit(
        dict(model.named_parameters()),
        loss_fn,
        get_batch,
        config.training,
        config.run_dir,
        settings={
            "init_from": config.init_from,
            "data_hash": tensors_hash(data.images, data.digits),
        },
        save=save,
        validate=validate,
        next_command="python3 -m p1_diffusion.evaluate --images OUT --grader LAST",
    )
    final = DigitClassifier.load(config.run_dir / "last")
    data, held_out = data.to(torch.device("cpu")), held_out.to(torch.device("cpu"))
    make_reference(final, data, held_out, config.run_dir / "last" / "reference.safetensors")
    for name, value in accuracy_by_dataset(final, held_out).items():
        print(f"{name}: {value:.2%} of the held-out digits classified correctly")


def accuracy_by_dataset(model: DigitClassifier, data: Digits) -> dict[str, float]:
    """Accuracy in [0, 1] for each dataset."""
    correct = classify(model, data.images) == data.digits
    return {
        name: correct[data.datasets == i].double().mean().item() for i, name in enumerate(DATASETS)
    }


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Augments images [N, 3, H, W] in [-1, 1] at random: affine map, colours and Cutout."""
    n, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.rand()

    # Affine map: rotation by up to 12 degrees, scale of each axis, shear, shift of up to 7 % of the
    # side (2 pixels).
    angle, shear = uniform(-math.pi / 15, math.pi / 15), uniform(-0.15, 0.15)
    scale_x, scale_y = uniform(0.87, 1.15), uniform(0.87, 1.15)
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 1] = scale_x * angle.cos(), scale_x * (shear - angle.sin())
    theta[:, 1, 0], theta[:, 1, 1] = scale_y * angle.sin(), scale_y * angle.cos()
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.14, 0.14), uniform(-0.14, 0.14)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    # Colour: half of the images get a random channel permutation and a quarter are negated; all
    # get a random contrast and brightness. None of these changes which digit is shown.
    order = torch.where(
        (draws.rand() < 0.5)[:, None],
        draws.randn(3).argsort(1),
        torch.arange(3, device=images.device),
    )
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    sign = torch.where(draws.rand() < 0.25, -1.0, 1.0)
    images = images * (sign * uniform(0.6, 1.3)).view(n, 1, 1, 1) + uniform(-0.25, 0.25).view(
        n, 1, 1, 1
    )

    # Cutout (arXiv:1708.04552): an 8x8 square of zeros in three images of ten.
    rows, columns = uniform(0, height), uniform(0, width)
    inside_rows = (torch.arange(height, device=images.device) - rows[:, None]).abs() < 4
    inside_columns = (torch.arange(width, device=images.device) - columns[:, None]).abs() < 4
    blot = (
        inside_rows[:, :, None] & inside_columns[:, None, :] & (draws.rand() < 0.3)[:, None, None]
    )
    return images.masked_fill(blot[:, None], 0.0)


if __name__ == "__main__":
    cli.run(main, Config)
