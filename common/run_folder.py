"""Files of a training run: settings, metrics, and the state from which it resumes."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from common.checkpoint import load_tensors, save_tensors
from common.ema import EMA
from common.errors import InputError
from common.files import atomic_write, make_folder, read_json, write_json
from common.optimizers import STATES_8BIT, NamedOptimizer


@dataclasses.dataclass
class RunProgress:
    """State of a run besides its tensors; saved in the checkpoint."""

    step: int = 0
    """Number of finished optimiser steps."""
    ema_updates: int = 0
    """Number of updates of the moving average."""
    best: float = math.inf
    """Lowest validation loss so far."""
    loss_sum: float = 0.0
    """Sum of the training losses since the last line of metrics."""
    loss_count: int = 0
    """Number of training losses in `loss_sum`."""
    looked: bool = True
    """Whether validation, preview and metrics of this step are done; False if a signal interrupted
    them."""


def claim_run_folder(
    run_dir: Path, settings: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json into a new run folder, or compares an existing one with `settings`.

    A setting that config.json lacks, because the program got it later, has its value in `defaults`.
    Raises InputError if a setting other than `steps` differs.
    """
    settings = json.loads(json.dumps(settings, default=str))
    path = make_folder(run_dir) / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    before = {**(defaults or {}), **read_json(path)}
    changed = sorted(
        name
        for name in before.keys() | settings.keys()
        if name != "steps" and before.get(name) != settings.get(name)
    )
    if changed:
        name = changed[0]
        raise InputError(
            f"{run_dir} holds a run with {name} = {before.get(name)}, not {settings.get(name)}:"
            " resume it with the same settings, or choose another run folder (with --init-from to"
            " start from these weights)"
        )


def set_steps(run_dir: Path, step: int, steps: int) -> None:
    """Updates `steps` in config.json if the run's length has changed.

    The change is also noted in metrics.jsonl, with the step at which it happened.
    """
    settings = read_json(run_dir / "config.json")
    if settings["steps"] != steps:
        write_json(run_dir / "config.json", settings | {"steps": steps})
        append_metrics(run_dir / "metrics.jsonl", step, {"steps": steps}, None)


def save_state(
    path: Path,
    params: Mapping[str, Parameter],
    ema: EMA,
    optimizers: list[NamedOptimizer],
    progress: RunProgress,
) -> None:
    """Writes what a run needs to resume: parameters, EMA, optimiser moments and progress."""
    tensors = {f"param/{name}": param for name, param in params.items()}
    tensors |= {f"ema/{name}": value for name, value in ema.average.items()}
    for optimizer, own in optimizers:
        for name, param in own.items():
            for key, value in optimizer.state[param].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
    # JSON has no infinity, so `best` of a run without validation is stored as null.
    values = dataclasses.asdict(progress)
    save_tensors(
        path, tensors, values | {"best": None if math.isinf(progress.best) else progress.best}
    )


def load_state(
    path: Path, params: Mapping[str, Parameter], ema: EMA, optimizers: list[NamedOptimizer]
) -> RunProgress:
    """Reads a file of `save_state` into the parameters, the EMA and the optimisers.

    Returns the progress; a new one if the file does not exist.
    """
    if not path.exists():
        return RunProgress()
    tensors, values = load_tensors(path)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(tensors[f"param/{name}"])
        for name, average in ema.average.items():
            average.copy_(tensors[f"ema/{name}"])
    for optimizer, own in optimizers:
        for name, param in own.items():
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step", *STATES_8BIT):
                # A parameter that never got a gradient has no optimiser state.
                if (value := tensors.get(f"{key}/{name}")) is None:
                    continue
                if key == "step" and not value.is_floating_point():
                    value = int(value)  # bitsandbytes counts in Python
                elif value.shape == param.shape:
                    # The fused step works on raw memory, so moments need their parameter's memory
                    # format (channels_last or not).
                    value = torch.empty_like(param.detach(), dtype=value.dtype).copy_(value)
                else:
                    value = value.to(param.device)
                optimizer.state[param][key] = value
    progress = RunProgress(
        **(values | {"best": math.inf if values["best"] is None else values["best"]})
    )
    ema.updates = progress.ema_updates
    return progress


def append_metrics(path: Path, step: int, line: dict[str, Any], writer: Any) -> None:
    """Appends a line to metrics.jsonl, flushed to disk, and to the TensorBoard writer if given."""
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **line}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if writer:
        for name, value in line.items():
            writer.add_scalar(name, value, step)


def cut_metrics(path: Path, step: int) -> None:
    """Removes metrics lines after `step`, the step that the run resumes from.

    An incomplete last line is removed as well.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line + "\n")
    atomic_write(path, "".join(kept).encode())


def check_tensorboard() -> None:
    """Raises InputError if the package tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from None


def tensorboard_writer(run_dir: Path) -> Any:
    """A TensorBoard writer for the run folder, where the package is installed."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir)
