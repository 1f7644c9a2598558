"""Trains the conditional diffusion model of Problem 1 on MNIST-M and SVHN digits.

    python3 -m p1_diffusion.train --data hw2_data/digits --run-dir runs/p1_digits
    # two processes on a CPU; use `accelerate launch` on several GPUs
    torchrun --nproc_per_node 2 -m p1_diffusion.train --device cpu ...

Running the same command again resumes. RUN_DIR/last holds the EMA weights as a model folder for
`p1_diffusion.inference --checkpoint`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from common import cli
from common.checkpoint import tensors_hash
from common.cli import Preset
from common.config import NonNegative, Probability, bounds
from common.data.digits import DATASETS, NUM_DIGITS, BalancedDraw, Digits, load_digits
from common.diffusion.guidance import drop_context
from common.diffusion.loss import (
    Discrimination,
    LossWeight,
    LossWeighting,
    TimestepDistribution,
    TrainedGuidance,
    diffusion_loss,
)
from common.diffusion.sampling import Timesteps
from common.diffusion.schedule import make_schedule
from common.errors import InputError
from common.files import ROOT
from common.grid import labelled_grid
from common.images import to_model_range, write_png
from common.seeds import Draws
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
from p1_diffusion.augment import AUGMENTATION, augment
from p1_diffusion.model import NULL_DIGIT, ContextUNet, ContextUNetConfig
from p1_diffusion.sampling import SamplingConfig, sample_digits

VALIDATION_IMAGES = 1000
TOLD = slice(None, None, 4)  # the images that --discriminate applies to: every fourth
FOLLOWING = {"augmentation": 0, "datasets": 2}  # of the sizes, what follows from other settings
TRAINING = TrainingConfig(
    steps=40_000,
    batch_size=128,
    optimizer="muon",
    lr=1e-2,
    lr_schedule="constant",
    ema_decay=0.9995,
    log_every=100,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains the conditional diffusion model of Problem 1."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics and preview images."""
    data: Path = ROOT / "hw2_data" / "digits"
    """Folder of the digits, in the homework's layout."""
    init_from: Path | None = None
    """Model folder with the initial weights; they are random if none is given."""
    cond_drop_prob: Probability = 0.1
    """Probability that an image's digit is replaced by the null condition, which classifier-free
    guidance needs."""
    loss_weight: LossWeight = "learned"
    """Loss weight of the noise levels. learned: by a learned log-variance; min_snr: min(SNR + 1, 5)
    on the x0 error; none: the plain error of the network's output."""
    timesteps: TimestepDistribution = "mixed"
    """Distribution of the timesteps t in training. mixed: half uniform, half logit-normal; shifted:
    denser at high noise."""
    guidance_scale: Annotated[float, *bounds(at_least=1, at_most=1000)] = 1.0
    """Guidance scale that the network learns to imitate (Model Guidance), so that sampling needs no
    guidance; 1 is off. Meant for the last steps of a training, with --init-from."""
    guidance_interval: Timesteps = SamplingConfig().guidance_interval
    """Lowest and highest timestep t to which --guidance-scale applies."""
    discriminate: NonNegative = 0.0
    """Weight of the loss of telling the right digit from a wrong one by the errors of the network's
    output (common.diffusion.loss.Discrimination), for every fourth image; 0 is off."""
    augment: Probability = 0.15
    """Probability of each augmentation (colour permutation, negation, shift with scaling), which
    the network receives as an input; 0 is no augmentation."""
    model: ContextUNetConfig = ContextUNetConfig()
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: 3.3 million weights, 5 million training images, about 7 hours on two CPU"
            " cores with --mixed-precision bf16; expect a held-out error of v of 0.10 after 64,000"
            " images (docs/experiments.md)",
            {},
        ),
        "smoke": Preset(
            "tests the installation: a tiny network for 20 steps, half a minute on a CPU; expect a"
            " held-out error of v of about 0.4",
            {
                "model": ContextUNetConfig(
                    channels=(16, 32), blocks=(1, 1), attention=(1,), heads=2, embedding=32
                ),
                "training": dataclasses.replace(
                    TRAINING, steps=20, batch_size=16, warmup=5, log_every=10
                ),
            },
        ),
    }


def main(config: Config) -> None:
    """Trains the network, or resumes the run in `run_dir`."""
    dataclasses.replace(SamplingConfig(), guidance_interval=config.guidance_interval).check()
    if any(getattr(config.model, name) != value for name, value in FOLLOWING.items()):
        raise InputError(
            "--model.augmentation and --model.datasets follow from --augment and the data: leave"
            " them out"
        )
    torch.manual_seed(config.training.seed)
    if config.init_from:
        model = ContextUNet.load(config.init_from).train()
        of_start = dataclasses.replace(model.config, **FOLLOWING)
        check_sizes_of_start(config.init_from, config.model, ContextUNetConfig(), of_start)
    else:
        augmentation = AUGMENTATION if config.augment else 0
        sizes = dataclasses.replace(config.model, augmentation=augmentation, datasets=len(DATASETS))
        model = new_network(lambda: ContextUNet(sizes))
    if config.augment and model.config.augmentation != AUGMENTATION:
        raise InputError(f"{config.init_from} takes no augmentation vector: give --augment 0")
    network = prepare_network(model, config.training)
    device = next(model.parameters()).device
    weighting = LossWeighting(
        config.loss_weight, model.config.parameterization, config.timesteps
    ).to(device)
    schedule = make_schedule(model.config.schedule)
    data = load_digits(config.data, "train").to(device)
    held_out = load_digits(config.data, "held_out").to(device)
    balanced = BalancedDraw(data)

    def loss_of(batch: Batch, draws: Draws, training: bool = False) -> torch.Tensor:
        """The loss of training; otherwise the plain error, of whole and unchanged images."""
        options: dict[str, Any] = dict(weighting.options) if training else {}
        drop = config.cond_drop_prob if training else 0.0
        digit = drop_context(batch["digit"], NULL_DIGIT, drop, draws)
        images, vectors = to_model_range(batch["image"]), None
        if training and config.augment:
            images, vectors = augment(images, config.augment, draws)

        def condition(
            digit: torch.Tensor, part: slice = slice(None)
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            context = torch.stack([digit, batch["dataset"]], dim=1)[part]
            return context, None if vectors is None else vectors[part]

        if training and config.guidance_scale > 1.0:
            null = condition(torch.full_like(digit, NULL_DIGIT))
            interval = config.guidance_interval
            options["guidance"] = TrainedGuidance(config.guidance_scale, null, interval)
        if training and config.discriminate:
            if len(digit) % TOLD.step:
                raise InputError(
                    f"--discriminate takes every fourth image: the {len(digit)} that are computed"
                    " at once must be a multiple of 4"
                )
            other = (batch["digit"] + 1 + draws.randint(NUM_DIGITS - 1)) % NUM_DIGITS
            wrong = condition(other, TOLD)
            options["discrimination"] = Discrimination(config.discriminate, TOLD, wrong)
        return diffusion_loss(
            lambda x_t, t, condition: network(x_t, t, *condition),
            schedule,
            images,
            condition(digit),
            draws,
            parameterization=model.config.parameterization,
            **options,
        )

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        return batch_of(data, balanced(config.training.batch_size, generator))

    def validate() -> dict[str, float]:
        """Unweighted error of the network's output on held-out images.

        The images and their noise are the same each time; no digit is dropped and no image is
        augmented.
        """
        drawn = BalancedDraw(held_out)(VALIDATION_IMAGES, torch.Generator(device).manual_seed(0))
        return {"loss": held_out_loss(model, loss_of, batch_of(held_out, drawn))}

    def preview(path: Path) -> None:
        """Writes a grid of samples from the same noise each time.

        Rows are digits; of each dataset there are three columns, MNIST-M on the left.
        """
        keys = [
            (dataset, digit, number)
            for digit in range(NUM_DIGITS)
            for dataset in DATASETS
            for number in (1, 2, 3)
        ]
        model.eval()
        drawn = sample_digits(model, keys, SamplingConfig(), show_progress=False)
        images = torch.cat([images for _, images in drawn])
        model.train()
        write_png(
            path,
            labelled_grid(
                images,
                columns=3 * len(DATASETS),
                row_labels=[str(d) for d in range(NUM_DIGITS)],
                scale=2,
            ),
        )

    fit(
        dict(model.named_parameters()) | dict(weighting.named_parameters("weighting")),
        functools.partial(loss_of, training=True),
        get_batch,
        config.training,
        config.run_dir,
        settings=settings_of(
            config, "data", data_hash=tensors_hash(data.images, data.digits, data.datasets)
        ),
        save=model.save,
        validate=validate,
        preview=preview,
        next_command="bash hw2_1.sh OUT --checkpoint LAST",
    )


def batch_of(data: Digits, indices: torch.Tensor) -> Batch:
    """The batch of the digits at `indices` [N]: their index, image, digit and dataset."""
    return {
        "index": indices,
        "image": data.images[indices],
        "digit": data.digits[indices],
        "dataset": data.datasets[indices],
    }


if __name__ == "__main__":
    cli.run(main, Config)
