"""What test_two_processes.py runs under torchrun, in two processes. Arguments: folder to write
into, digits, model folder, small base model, fill50k."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed

from common import cli
from common.errors import InputError
from common.seeds import Draws
from common.training import Batch, TrainingConfig, fit
from p1_diffusion import inference, train

LINE = TrainingConfig(
    steps=20,
    batch_size=8,
    gradient_accumulation_steps=2,
    lr=0.05,
    warmup=3,
    log_every=1,
    checkpoint_every=20,
    device="cpu",
)


def line_fit(
    run_dir: Path,
    config: TrainingConfig,
    interrupt_at: int | None = None,
    unreadable_at: int | None = None,
) -> list[list[int]]:
    """Fits a line; returns the indices of the images that this process got. Sends itself Ctrl-C, or
    cannot read its data, at a step if asked."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3))
    seen = []

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        if step == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        if step == unreadable_at:
            raise InputError("line 4 of the data is unreadable")
        x = torch.randn(config.batch_size, 3, generator=torch.Generator().manual_seed(step))
        return {"index": torch.arange(config.batch_size), "x": x}

    def loss_fn(batch: Batch, draws: Draws) -> torch.Tensor:
        seen.append(batch["index"].tolist())
        return (batch["x"] @ weight - 1.0 + 0.1 * draws.randn()).square().mean()

    fit({"weight": weight}, loss_fn, get_batch, config, run_dir)
    return seen


def train_arguments(run_dir: Path, data: Path) -> list[str]:
    """Twenty steps of the digit model, small."""
    small = (
        "--model.channels 16 32 --model.blocks 1 1 --model.attention 1 --model.embedding 32"
        " --model.heads 2"
    )
    flags = f"{small} --discriminate 0.02 --steps 20 --batch-size 8 --log-every 1"
    return [*flags.split(" "), "--data", str(data), "--run-dir", str(run_dir), "--device", "cpu"]


def inference_arguments(out: Path, checkpoint: Path) -> list[str]:
    """Three chunks of digits, so that the processes' shares differ, by the cheapest sampler."""
    flags = "--classes svhn/1 mnistm/4 svhn/9 --steps 1 --device cpu"
    return [*flags.split(" "), "--output-dir", str(out), "--checkpoint", str(checkpoint)]


def control_arguments(run_dir: Path, base: Path, fill50k: Path) -> list[str]:
    """Four steps of a ControlNet on drawn and real pairs, in two micro-batches."""
    small = "--hint-channels 4 8 8 --pictures 6 --steps 4 --batch-size 4 --warmup 1 --log-every 1"
    less = "--gradient-accumulation-steps 2 --validate-every 0 --preview-every 0 --device cpu"
    # With Muon, whose iteration is in bf16, weights would agree less closely.
    flags = f"{small} {less} --optimizer adamw --lr 4e-4".split(" ")
    return [*flags, "--run-dir", str(run_dir), "--base", str(base), "--fill50k", str(fill50k)]


def quick_train(arguments: list[str]) -> None:
    """The training program, with little to validate and to preview."""
    train.VALIDATION_IMAGES, train.SamplingConfig = 10, lambda: inference.SamplingConfig(steps=1)
    cli.run(train.main, train.Config, arguments)


def main(folder: Path, data: Path, checkpoint: Path, base: Path, fill50k: Path) -> None:
    """A whole run; one in which Ctrl-C reaches the second process alone, and its continuation; then
    the programs."""
    rank = int(os.environ["RANK"])
    report = {"seen": line_fit(folder / "whole", LINE), "processes": distributed.get_world_size()}
    try:
        line_fit(folder / "halves", LINE, interrupt_at=7 if rank == 1 else None)
    except KeyboardInterrupt:
        report["interrupted"] = True
    line_fit(folder / "halves", LINE)
    quick_train(train_arguments(folder / "train", data))
    cli.run(inference.main, inference.Config, inference_arguments(folder / "digits", checkpoint))
    from p3_controlnet import train as control_train  # takes seconds, and other tests import this

    arguments = control_arguments(folder / "control", base, fill50k)
    cli.run(control_train.main, control_train.Config, arguments)
    (folder / f"report{rank}.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
