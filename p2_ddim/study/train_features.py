"""Trains the network of the face features (p2_ddim/study/features.py) on photos without labels.

    python3 -m p2_ddim.study.train_features --data hw2_data/face --run-dir runs/p2_features

Running the same command again resumes. The held-out tenth of the photos is not used for training.
The contrastive loss compares all views of a batch with each other, so a batch cannot be split:
`--gradient-accumulation-steps` must be 1, and the training runs in one process.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from common import cli
from common.checkpoint import tensors_hash
from common.config import Positive
from common.contrastive import contrastive_loss
from common.data.faces import load_faces
from common.errors import InputError
from common.files import ROOT
from common.seeds import Draws, StackedRandomGenerator, derive_seeds
from common.training import Batch, TrainingConfig, fit, prepare_network, refuse_slices
from p2_ddim.study.features import FaceFeatures, recognised, view_cosines

CALIBRATION_IMAGES = 2000  # for the statistics of batch normalisation
VALIDATION_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the network of the face features by contrastive learning."""

    run_dir: Path
    """Folder of the run: checkpoints and metrics."""
    data: Path = ROOT / "hw2_data" / "face"
    """Folder with photos/, square photos of one size."""
    init_from: Path | None = None
    """Model folder with the initial weights; they are random if none is given."""
    temperature: Positive = 0.1
    """Temperature of the contrastive loss: cosine similarities are divided by it."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=700,
        batch_size=128,
        lr=2e-3,
        weight_decay=0.05,
        beta2=0.999,
        validate_every=200,
        preview_every=10**9,
    )


def main(config: Config) -> None:
    """Trains the network, or resumes the run in `run_dir`."""
    refuse_slices(config.training, "a contrastive loss")
    torch.manual_seed(config.training.seed)
    model = FaceFeatures.load(config.init_from).train() if config.init_from else FaceFeatures()
    network = prepare_network(model, config.training)
    device = next(model.parameters()).device
    data = load_faces(config.data, "train").to(device)
    held_out = load_faces(config.data, "held_out").to(device)
    if len(data) < config.training.batch_size:
        raise InputError(
            f"a step takes {config.training.batch_size} different photos, but there are"
            f" {len(data)}: give a smaller --batch-size"
        )
    typical = data.images[
        torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    ]

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        # Without replacement: a photo must not be its own negative example.
        index = torch.randperm(len(data), generator=generator, device=device)[
            : config.training.batch_size
        ]
        return {"index": index, "image": data.images[index]}

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        return contrastive_loss(view_cosines(network, batch["image"], draws) / config.temperature)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """Loss and recognition rate (see `recognised`) on held-out photos."""
        model.recalibrate(typical)
        model.eval()
        images = held_out.images[:VALIDATION_IMAGES]
        similar = view_cosines(
            model, images, StackedRandomGenerator(derive_seeds(0, count=len(images)), images.device)
        )
        model.train()
        return {
            "loss": contrastive_loss(similar / config.temperature).item(),
            "recognised": recognised(similar),
        }

    def save(folder: Path) -> None:
        model.recalibrate(typical)
        model.save(folder)

    fit(
        dict(model.named_parameters()),
        loss_fn,
        get_batch,
        config.training,
        config.run_dir,
        settings={
            "init_from": config.init_from,
            "temperature": config.temperature,
            "data_hash": tensors_hash(data.images),
        },
        save=save,
        validate=validate,
        next_command="python3 -m p2_ddim.evaluate --images OUT --photos FACES --features LAST",
    )


if __name__ == "__main__":
    cli.run(main, Config)
