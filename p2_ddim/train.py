"""Trains the face model of Problem 2 on photos.

    python3 -m p2_ddim.train --data hw2_data/face --run-dir runs/p2_faces
    # two processes on a CPU; use `accelerate launch` on several GPUs
    torchrun --nproc_per_node 2 -m p2_ddim.train --device cpu ...

Running the same command again resumes. RUN_DIR/last holds the EMA weights in float16, as a model
folder for `p2_ddim.inference --checkpoint`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from common import cli
from common.checkpoint import tensors_hash
from common.cli import Preset
from common.data.faces import Faces, load_faces
from common.diffusion.loss import LossWeight, LossWeighting, TimestepDistribution, diffusion_loss
from common.diffusion.schedule import linear_schedule
from common.errors import InputError
from common.files import ROOT
from common.grid import labelled_grid
from common.images import to_model_range, to_uint8, write_png
from common.seeds import Draws, StackedRandomGenerator, derive_seeds, random_indices
from common.training import (
    Batch,
    TrainingConfig,
    check_sizes_of_start,
    fit,
    new_network,
    prepare_network,
    settings_of,
)
from common.validation import held_out_loss
from p2_ddim.model import FaceUNet, FaceUNetConfig
from p2_ddim.sampling import SamplingConfig, sample_faces

PREVIEW_IMAGES, PREVIEW_COLUMNS = 32, 8
TRAINING = TrainingConfig(
    steps=16_000,
    batch_size=64,
    optimizer="muon",
    lr=5e-3,
    lr_schedule="constant",
    ema_decay=0.9995,
)
PREVIEW_SAMPLING = SamplingConfig(
    sampler="dpmpp_2m", steps=20, chunk_size=PREVIEW_IMAGES, spacing="trailing"
)

SIZES = FaceUNetConfig(
    channels=(128, 160, 192),
    blocks=1,
    attention=(1, 2),
    heads=4,
    embedding=256,
    patch=4,
    refine=32,
    parameterization="v",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the face model of Problem 2."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics and preview images."""
    data: Path = ROOT / "hw2_data" / "face"
    """Folder with photos/, square photos of one size."""
    init_from: Path | None = None
    """Model folder with the initial weights; they are random if none is given."""
    flip: bool = True
    """Mirror each photo left to right with probability 1/2."""
    loss_weight: LossWeight = "learned"
    """Loss weight of the noise levels. learned: by a learned log-variance; min_snr: min(SNR + 1, 5)
    on the x0 error (min(SNR, 5) with eps prediction); none: the plain error of the network's
    output."""
    timesteps: TimestepDistribution = "mixed"
    """Distribution of the timesteps t in training. mixed: half uniform, half logit-normal; shifted:
    denser at high noise."""
    model: FaceUNetConfig = SIZES
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: 64x64 faces, one million of them, some 5 hours on two CPU cores with"
            " --mixed-precision bf16; the recipe is the one that docs/experiments.md found for"
            " digits",
            {},
        ),
        "homework": Preset(
            "the homework's network, 114 million weights, for photos of 256x256: days on one GPU;"
            " untested",
            {
                "model": FaceUNetConfig(),
                "timesteps": "uniform",
                "training": TrainingConfig(
                    steps=500_000, batch_size=64, lr=1e-4, warmup=1000, ema_decay=0.9999
                ),
            },
        ),
        "smoke": Preset(
            "tests the installation: a tiny network for 20 steps, half a minute on a CPU; expect a"
            " held-out error of v of about 0.4",
            {
                "model": FaceUNetConfig(
                    channels=(32, 64),
                    blocks=1,
                    attention=(1,),
                    embedding=32,
                    patch=4,
                    parameterization="v",
                ),
                "training": dataclasses.replace(
                    TRAINING, steps=20, batch_size=8, warmup=5, log_every=10
                ),
            },
        ),
    }


def main(config: Config) -> None:
    """Trains the network, or resumes the run in `run_dir`."""
    torch.manual_seed(config.training.seed)
    schedule = linear_schedule()
    if config.init_from:
        model = FaceUNet.load(config.init_from).train()
        check_sizes_of_start(config.init_from, config.model, SIZES, model.config)
    else:
        model = new_network(lambda: FaceUNet(config.model))
    network = prepare_network(model, config.training)
    device = next(model.parameters()).device
    weighting = LossWeighting(config.loss_weight, model.parameterization, config.timesteps).to(
        device
    )
    data = load_faces(config.data, "train").to(device)
    held_out = load_faces(config.data, "held_out").to(device)
    side = data.images.shape[-1]
    if side % model.side_multiple:
        raise InputError(
            f"the photos are {side}x{side}, but this network needs a multiple of"
            f" {model.side_multiple}"
        )

    def loss_of(batch: Batch, draws: Draws, **options: Any) -> torch.Tensor:
        return diffusion_loss(
            lambda x_t, t, _: network(x_t, t),
            schedule,
            to_model_range(batch["image"]),
            {},
            draws,
            parameterization=model.parameterization,
            **options,
        )

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        return draw_faces(data, config.training.batch_size, generator, config.flip)

    def validate() -> dict[str, float]:
        """Unweighted error of the network's output on all held-out photos."""
        return {"loss": held_out_loss(model, loss_of, {"image": held_out.images})}

    def preview(path: Path) -> None:
        """Writes a grid of samples from the same noises each time."""
        noise = StackedRandomGenerator(derive_seeds(0, count=PREVIEW_IMAGES)).randn(3, side, side)
        named_noises = [(f"{i:02d}", noise[i]) for i in range(PREVIEW_IMAGES)]
        model.eval()
        device = next(model.parameters()).device
        ((_, x0),) = sample_faces(
            model, named_noises, PREVIEW_SAMPLING, device, show_progress=False
        )
        model.train()
        write_png(path, labelled_grid(to_uint8(x0), PREVIEW_COLUMNS))

    fit(
        dict(model.named_parameters()) | dict(weighting.named_parameters("weighting")),
        lambda batch, draws: loss_of(batch, draws, **weighting.options),
        get_batch,
        config.training,
        config.run_dir,
        settings=settings_of(config, "data", data_hash=tensors_hash(data.images)),
        save=lambda folder: model.save(folder, torch.float16),
        validate=validate,
        preview=preview,
        next_command="bash hw2_2.sh NOISE_DIR OUT LAST",
    )


def draw_faces(data: Faces, count: int, generator: torch.Generator, flip: bool) -> Batch:
    """Draws a batch of `count` photos, uint8 [count, 3, S, S], with replacement.

    With `flip` each is mirrored with probability 1/2. Data and generator are on one device.
    """
    index = random_indices(len(data), count, generator)
    mirrored = torch.rand(count, generator=generator, device=generator.device) < 0.5
    images = data.images[index]
    if flip:
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    return {"index": index, "image": images}


if __name__ == "__main__":
    cli.run(main, Config)
