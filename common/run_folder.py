"""What a run leaves on disk: its settings, metrics and state, from which it resumes."""

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
from common.optimizers import NamedOptimizer


@dataclasses.dataclass
class RunProgress:
    """What a run remembers beside its tensors; stored in the checkpoint."""

    step: int = 0
    ema_updates: int = 0
    best: float = math.inf
    loss_sum: float = 0.0
    loss_count: int = 0
    looked: bool = True
    """Whether this step's validation, preview and metrics are done (no, if a signal broke them
    off)."""


def claim_run_folder(run_dir: Path, settings: dict[str, Any]) -> None:
    """Writes config.json into a new run folder, or checks that an old one belongs to the same
    run."""
    settings = json.loads(json.dumps(settings, default=str))
    path = make_folder(run_dir) / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path)
    changed = sorted(
        name
        for name in before.keys() | settings.keys()
        if name != "steps" and before.get(name) != settings.get(name)
    )
    if changed:
        name = changed[0]
        raise InputError(
            f"{run_dir} holds a run with {name} = {before.get(name)}, not {settings.get(name)}:"
            " resume it with the same settings, or choose another run folder (and --init-from to"
            " start from its weights)"
        )


def set_steps(run_dir: Path, step: int, steps: int) -> None:
    """Notes in config.json and, with the step at which it happened, in metrics.jsonl that the run
    has another length now."""
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
    """Writes all that a run goes on from: parameters, their average, the optimisers' moments, and
    the progress."""
    tensors = {f"param/{name}": param for name, param in params.items()}
    tensors |= {f"ema/{name}": ema.average[name] for name in params}
    for optimizer, own in optimizers:
        for name, param in own.items():
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[param].items()}
    # JSON has no infinity; a run that never validated has no best.
    values = dataclasses.asdict(progress)
    save_tensors(
        path, tensors, values | {"best": None if math.isinf(progress.best) else progress.best}
    )


def load_state(
    path: Path, params: Mapping[str, Parameter], ema: EMA, optimizers: list[NamedOptimizer]
) -> RunProgress:
    """Reads what `save_state` wrote into the parameters, the average and the optimisers; a fresh
    progress if there is no file."""
    if not path.exists():
        return RunProgress()
    tensors, values = load_tensors(path)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(tensors[f"param/{name}"])
            ema.average[name].copy_(tensors[f"ema/{name}"])
    for optimizer, own in optimizers:
        for name, param in own.items():
            for key in ("exp_avg", "exp_avg_sq", "step", "momentum_buffer"):
                # A parameter that never got a gradient has no optimiser state.
                if (value := tensors.get(f"{key}/{name}")) is not None:
                    # The fused step walks raw memory: moments must be laid out as their parameter
                    # is (channels_last or not).
                    moment = (
                        torch.empty((), device=param.device)
                        if key == "step"
                        else torch.empty_like(param.detach())
                    )
                    optimizer.state[param][key] = moment.copy_(value)
    progress = RunProgress(
        **(values | {"best": math.inf if values["best"] is None else values["best"]})
    )
    ema.updates = progress.ema_updates
    return progress


def append_metrics(path: Path, step: int, line: dict[str, Any], writer: Any) -> None:
    """Adds a line to metrics.jsonl, on disk when this returns, and to the TensorBoard writer if
    there is one."""
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **line}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if writer:
        for name, value in line.items():
            writer.add_scalar(name, value, step)


def cut_metrics(path: Path, step: int) -> None:
    """Drops the lines that were written after the checkpoint that the run resumes from, a torn last
    line included."""
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


def tensorboard_writer(run_dir: Path) -> Any:
    """A writer of TensorBoard events. Raises InputError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from None
    return SummaryWriter(run_dir)
