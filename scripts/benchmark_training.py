"""Measures the overhead of the training loop in milliseconds per step, with an empty model.

    # takes half a minute on one CPU core
    python3 -m scripts.benchmark_training
    python3 -m scripts.benchmark_training --device cuda

The overhead is the time of a step of `common.training.fit` minus that of the work which any loop
must do. This work is that of a step of Problem 1: noise by `torch.randn`, a gather of the batch's
images, and their conversion to [-1, 1]. It is timed inside the step, since the same work beside it
takes some milliseconds more or less, as the allocator finds memory; on a GPU the timing waits for
it. The median of the steps' differences is reported. No other program should run at the same time.
"""

import contextlib
import dataclasses
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common import cli
from common.data.digits import DATASETS, NUM_DIGITS, SIZE, BalancedDraw, Digits
from common.devices import DeviceName, pick_device
from common.diffusion.guidance import drop_context
from common.diffusion.schedule import make_schedule
from common.files import ROOT, write_json
from common.images import to_model_range
from common.seeds import Draws
from common.training import Batch, TrainingConfig, fit
from p1_diffusion.model import NULL_DIGIT
from p1_diffusion.train import batch_of

IMAGES = 20_000  # random images; about the size of the homework's MNIST-M


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the overhead of the training loop per step."""

    batch_size: int = 2048
    """Images in a step."""
    steps: int = 150
    """Steps of the training loop; the first one is not counted."""
    threads: int = 1
    """CPU threads."""
    device: DeviceName = "cpu"
    """Device of the computation."""
    result: Path | None = ROOT / "results" / "training_overhead.json"
    """JSON file to write."""


class EmptyModel(nn.Module):
    """A network with a single weight, so that its own time is negligible."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """`x_t` times the weight."""
        return x_t * self.weight


def main(config: Config) -> None:
    """Measures, prints and writes the median milliseconds of loop, work and overhead."""
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    generator = torch.Generator().manual_seed(0)
    data = Digits(
        torch.randint(256, (IMAGES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        torch.arange(IMAGES) % NUM_DIGITS,
        torch.arange(IMAGES) // NUM_DIGITS % len(DATASETS),
        [str(k) for k in range(IMAGES)],
    ).to(device)
    loop, work = time_steps(config, data, device)
    rows = {"loop_ms": 1e3 * statistics.median(loop), "work_ms": 1e3 * statistics.median(work)}
    rows["overhead_ms"] = 1e3 * statistics.median(a - b for a, b in zip(loop, work, strict=True))
    print(", ".join(f"{name} {value:.2f}" for name, value in rows.items()))
    if config.result:
        hardware = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        about = {"batch_size": config.batch_size, "threads": config.threads, "hardware": hardware}
        write_json(
            config.result, {"command": "python3 -m scripts.benchmark_training", **about, **rows}
        )


def time_steps(
    config: Config, data: Digits, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each step of `fit`, and of the plain work in it."""
    model, schedule, balanced = EmptyModel().to(device), make_schedule("cosine"), BalancedDraw(data)
    began: list[float] = []
    work: list[float] = []

    @contextlib.contextmanager
    def plain_work() -> Iterator[None]:
        before = now(device)
        yield
        work[-1] += now(device) - before

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        began.append(now(device))
        work.append(0.0)
        chosen = balanced(config.batch_size, generator)
        with plain_work():
            return batch_of(data, chosen)

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        # The random draws of Problem 1's loss; the model sees one pixel of the first image.
        with plain_work():
            x0 = to_model_range(batch["image"])
        digit = drop_context(batch["digit"], NULL_DIGIT, 0.1, draws)
        t = draws.randint(schedule.num_timesteps)
        with plain_work():
            eps = draws.randn(*x0.shape[1:])
        alpha_t, sigma_t = schedule.alpha_sigma_like(t, x0)
        x_t = (alpha_t[:1] * x0[:1, :, :1, :1]) + (sigma_t[:1] * eps[:1, :, :1, :1])
        return (model(x_t, t[:1], digit[:1]) - eps[:1, :, :1, :1]).square().mean()

    training = TrainingConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        log_every=10**6,
        checkpoint_every=10**6,
        device="cuda" if device.type == "cuda" else "cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(dict(model.named_parameters()), loss_fn, get_batch, training, Path(folder))
    # The first step is not counted; a step ends where the next one begins.
    return [b - a for a, b in itertools.pairwise(began[1:])], work[1:-1]


def now(device: torch.device) -> float:
    """The time in seconds, after all queued work of the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    cli.run(main, Config)
