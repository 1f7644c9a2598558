"""What test_training.py runs under torchrun: a small fit in two processes. Argument: the folder to write into."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed

from common.seeds import ImageGenerators
from common.training import Batch, TrainingConfig, fit

CONFIG = TrainingConfig(
    steps=20, batch_size=8, accumulation=2, lr=0.05, warmup=3, log_every=1, checkpoint_every=20, device="cpu"
)


def line_fit(run_dir: Path, config: TrainingConfig, interrupt_at: int | None = None) -> list[list[int]]:
    """Fits a line; returns the indices of the images that this process got. Sends itself Ctrl-C at a step if asked."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3))
    seen = []

    def draw(step: int) -> Batch:
        if step == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(config.batch_size, 3, generator=torch.Generator().manual_seed(step))
        return {"index": torch.arange(config.batch_size), "x": x}

    def loss_fn(batch: Batch, generators: ImageGenerators) -> torch.Tensor:
        seen.append(batch["index"].tolist())
        return (batch["x"] @ weight - 1.0 + 0.1 * generators.randn()).square().mean()

    fit({"weight": weight}, loss_fn, draw, config, run_dir)
    return seen


def main(folder: Path) -> None:
    """An uninterrupted run; then one in which Ctrl-C reaches the second process alone, and its continuation."""
    rank = int(os.environ["RANK"])
    report = {"seen": line_fit(folder / "whole", CONFIG), "processes": distributed.get_world_size()}
    try:
        line_fit(folder / "halves", CONFIG, interrupt_at=7 if rank == 1 else None)
    except KeyboardInterrupt:
        report["interrupted"] = True
    line_fit(folder / "halves", CONFIG)
    (folder / f"report{rank}.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
