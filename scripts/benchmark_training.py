"""Times what the training loop itself costs a step: an empty model on 2,048 digits, beside the work that any loop must do.

    python3 scripts/benchmark_training.py                  (two minutes on one CPU core)
    python3 scripts/benchmark_training.py --device cuda

The work is that of one step of Problem 1: its noise by a plain `torch.randn`, the gather of its images and their conversion to
[-1, 1]. Loop and work take turns, and the medians are compared. Leave the machine alone meanwhile.
"""

import dataclasses
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs in a checkout that is not installed

from common import cli
from common.data.digits import DATASETS, NUM_DIGITS, SIZE, BalancedDraw, Digits
from common.devices import DeviceName, pick_device
from common.diffusion.guidance import drop_context
from common.diffusion.schedule import make_schedule
from common.files import ROOT, write_json
from common.images import to_model_range
from common.seeds import Draws, random_indices
from common.training import Batch, TrainingConfig, fit
from p1_diffusion.model import NULL_DIGIT
from p1_diffusion.train import batch_of

IMAGES = 20_000  # as many as a dataset of the homework has, of random pixels


@dataclasses.dataclass(frozen=True)
class Config:
    """Times what the training loop costs a step, beside the work that any loop must do."""

    batch_size: int = 2048
    """Digits in one step."""
    steps: int = 40
    """Steps of the loop in each round, the first of which warms up."""
    rounds: int = 3
    """Rounds of loop and work."""
    threads: int = 1
    """CPU threads."""
    device: DeviceName = "cpu"
    """Where to compute."""
    result: Path | None = ROOT / "results" / "training_overhead.json"
    """JSON file to write."""


class EmptyModel(nn.Module):
    """One weight, so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return x_t[:, :, :1, :1] * self.weight


def main(config: Config) -> None:
    """Prints and writes the medians."""
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    generator = torch.Generator().manual_seed(0)
    data = Digits(
        torch.randint(256, (IMAGES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        torch.arange(IMAGES) % NUM_DIGITS,
        torch.arange(IMAGES) // NUM_DIGITS % len(DATASETS),
        [str(k) for k in range(IMAGES)],
    ).to(device)
    loop, work = [], []
    for _ in range(config.rounds):
        loop += time_loop(config, data, device)
        work += time_work(config, data, device)
    rows = {"loop_ms": 1e3 * statistics.median(loop), "work_ms": 1e3 * statistics.median(work)}
    rows["overhead_ms"] = rows["loop_ms"] - rows["work_ms"]
    print(", ".join(f"{name} {value:.2f}" for name, value in rows.items()))
    if config.result:
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        about = {"batch_size": config.batch_size, "threads": config.threads, "hardware": hardware}
        write_json(config.result, {"command": "python3 scripts/benchmark_training.py", **about, **rows})


def time_loop(config: Config, data: Digits, device: torch.device) -> list[float]:
    """Seconds of each step of `fit`, from one batch to the next."""
    model, schedule, balanced = EmptyModel().to(device), make_schedule("cosine"), BalancedDraw(data)
    started: list[float] = []

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        started.append(time.perf_counter())
        return batch_of(data, balanced(config.batch_size, generator))

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        # The loss of Problem 1 up to the network's input; the target is left out, since the work beside it has none either.
        x0, digit = to_model_range(batch["image"]), drop_context(batch["digit"], NULL_DIGIT, 0.1, draws)
        t, eps = draws.randint(schedule.num_timesteps), draws.randn(*x0.shape[1:])
        signal, noise = schedule.rates_like(t, x0)
        corner = (slice(None), slice(None), slice(1), slice(1))
        x_t = signal * x0[corner] + noise * eps[corner]
        return (model(x_t, t, digit) - eps[corner]).square().mean()

    training = TrainingConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        log_every=10**9,
        checkpoint_every=10**9,
        device="cuda" if device.type == "cuda" else "cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(dict(model.named_parameters()), loss_fn, get_batch, training, Path(folder))
    return [b - a for a, b in zip(started[1:], started[2:], strict=False)]


def time_work(config: Config, data: Digits, device: torch.device) -> list[float]:
    """Seconds of the noise, the gather and the conversion of a batch."""
    generator, seconds = torch.Generator(device).manual_seed(0), []
    for _ in range(config.steps):
        before = time.perf_counter()
        index = random_indices(IMAGES, config.batch_size, generator)
        to_model_range(data.images[index])
        torch.randn(config.batch_size, 3, SIZE, SIZE, generator=generator, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return seconds[1:]


if __name__ == "__main__":
    cli.run(main, Config)
