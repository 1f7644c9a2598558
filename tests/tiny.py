"""Small things that several tests share: a small network, real processes, and what a refusal must
look like."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from common import cli
from common.files import ROOT
from p1_diffusion.model import ContextUNet, ContextUNetConfig

CONFIG = ContextUNetConfig(channels=(16, 32), blocks=(1, 1), attention=(1,), embedding=32, heads=2)


class Malice:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (str(self.trace), "w")


def tiny_network(config: ContextUNetConfig = CONFIG) -> ContextUNet:
    """A small network with fixed random weights; what starts at zero gets small values, so that
    every part has an effect."""
    generator = torch.Generator().manual_seed(0)
    network = ContextUNet(config)
    with torch.no_grad():
        for name, param in network.named_parameters():
            scale = 0.02 if name.startswith("conv_out") else 0.1
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                param.add_(1.0)
    return network.eval()


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process: this Python, this checkout, and as many threads as here,
    so that bits agree."""
    own = {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(ROOT / "outputs" / "no_hub"),  # not what this machine may hold
    }
    return {**os.environ, **own, **more}


def run_process(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and returns what it said."""
    options = {"env": environment(), "timeout": 300, **options}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )


def refusal(stderr: str) -> str:
    """The one sentence that a program said on refusing its input; progress bars may come before
    it."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and stderr.rstrip().splitlines()[-1] == lines[0], stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0].removeprefix("error: ")


def refused(
    capsys: pytest.CaptureFixture[str], program: Callable[[Any], None], config: type, *argv: Any
) -> str:
    """Runs a program in this process, checks that it refuses with exit code 2, and returns its
    sentence."""
    assert exit_code(program, config, *argv) == 2
    return refusal(capsys.readouterr().err)


def exit_code(program: Callable[[Any], None], config: type, *argv: Any) -> int:
    """Runs a program in this process, as its command line would, and returns the exit code."""
    try:
        cli.run(program, config, [str(argument) for argument in argv])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def stop_after(fit: Callable[..., None], steps: int) -> Callable[..., None]:
    """`common.training.fit` that is interrupted after so many steps, as by Ctrl-C."""

    def stopping(
        params: Any, loss_fn: Any, get_batch: Callable[..., Any], *rest: Any, **options: Any
    ) -> None:
        def interrupted(step: int, generator: Any) -> Any:
            if step == steps:
                os.kill(os.getpid(), signal.SIGINT)
            return get_batch(step, generator)

        fit(params, loss_fn, interrupted, *rest, **options)

    return stopping


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
