"""Files of a training run: settings, metrics, and the state from which it resumes."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from common.checkpoint import all_finite, open_tensors, save_tensors
from common.config import NonNegative, bounds, from_json
from common.ema import EMA
from common.errors import InputError
from common.files import atomic_write, check_folder, make_folder, read_json, write_json
from common.optimizers import STATES_8BIT, NamedOptimizer
from common.text_files import parse_json

if TYPE_CHECKING:
    from torch.amp import GradScaler

CHANGEABLE = (
    "steps",
    "log_every",
    "preview_every",
    "checkpoint_every",
    "tensorboard",
    "device",
    "compile",
    "device_batch_size",
    "gradient_checkpointing",
)
"""Settings that may change when a run is resumed: all but `steps` cannot change the result, except
for rounding on another device, when compiled, and with other micro-batches."""
CONFIG, METRICS, STATE = "config.json", "metrics.jsonl", "state.safetensors"
FOLDERS = ("last", "best", "samples")
ADVICE = "restore it, or choose another run folder"


@dataclasses.dataclass
class RunProgress:
    """State of a run besides its tensors; saved in the checkpoint."""

    step: Annotated[int, *bounds(at_least=0)] = 0
    """Number of finished optimiser steps."""
    ema_updates: Annotated[int, *bounds(at_least=0)] = 0
    """Number of updates of the moving average."""
    best: float = math.inf
    """Lowest validation loss so far."""
    judged_by: str = ""
    """What gave the validation losses; empty if that cannot change or is not known."""
    loss_sum: float = 0.0
    """Sum of the training losses since the last line of metrics."""
    loss_count: Annotated[int, *bounds(at_least=0)] = 0
    """Number of training losses in `loss_sum`."""
    looked: bool = True
    """Whether validation, preview and metrics of this step are done; False if a signal interrupted
    them."""
    logged: Annotated[int, *bounds(at_least=0)] = 0
    """Last step with a line in metrics.jsonl; 0 if there is none."""
    loss_scale: NonNegative = 0.0
    """Factor of the loss in fp16; 0 if it is not scaled."""
    loss_scale_steps: Annotated[int, *bounds(at_least=0)] = 0
    """Steps since the factor last changed."""

    def keep_scale(self, scaler: "GradScaler | None") -> None:
        """Notes the state of the loss's scaling, if there is one."""
        if scaler is not None:
            state = scaler.state_dict()
            self.loss_scale, self.loss_scale_steps = state["scale"], state["_growth_tracker"]

    def restore_scale(self, scaler: "GradScaler | None") -> None:
        """Sets the scaling of the loss as it was noted; a new run keeps the scaler's own."""
        if scaler is not None and self.loss_scale:
            noted = {"scale": self.loss_scale, "_growth_tracker": self.loss_scale_steps}
            scaler.load_state_dict({**scaler.state_dict(), **noted})


def claim_run_folder(
    run_dir: Path, settings: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes config.json into a new run folder, or compares an existing one with `settings`.

    A setting that config.json lacks, because the program got it later, has its value in `defaults`;
    if that has none, it is not compared. Returns the settings of the run so far, as JSON. Raises
    InputError if a setting that is not CHANGEABLE differs, or if files of the run are missing.
    """
    path = make_folder(run_dir) / CONFIG
    for name in FOLDERS:
        check_folder(run_dir / name)
    found = [name for name in (STATE, METRICS, "last", "best") if (run_dir / name).exists()]
    if not path.exists():
        if found:
            raise InputError(
                f"{run_dir} holds {found[0]} of a run, but {path} is missing: {ADVICE}"
            )
        write_json(path, _as_json(settings))
        return _as_json(settings)
    if found and STATE not in found:
        raise InputError(
            f"{run_dir} holds {found[0]} of a run, but {run_dir / STATE}, from which it would"
            f" resume, is missing: {ADVICE}"
        )
    before = read_json(path)
    if not isinstance(before, dict) or not isinstance(before.get("steps"), int):
        raise InputError(f"{path} does not hold the settings of a run: {ADVICE}")
    _compare({**_as_json(defaults or {}), **before}, settings, path)
    return before


def check_settings(
    run_dir: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Raises InputError if a run in the folder had other settings, see `claim_run_folder`.

    For what a trainer does before `fit` claims the folder. Nothing is written.
    """
    path = run_dir / CONFIG
    before = read_json(path) if path.is_file() else None
    if isinstance(before, dict):
        _compare({**_as_json(defaults or {}), **before}, settings, path)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are read back from JSON."""
    return json.loads(json.dumps(settings, default=str))


def _compare(before: Mapping[str, Any], settings: Mapping[str, Any], source: Path) -> None:
    """Raises InputError if a run in `source` had other settings.

    Settings that `before` lacks were added to the program since then and are not compared.
    """
    settings = _as_json(settings)
    for name in sorted(before.keys() - set(CHANGEABLE)):
        if before[name] != settings.get(name):
            raise InputError(
                f"{source} is of a run with {name} = {before[name]}, not {settings.get(name)}:"
                " resume it with the same settings, or choose another run folder (with --init-from"
                " to start from these weights)"
            )


def update_settings(run_dir: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Writes the settings to config.json if a CHANGEABLE one has changed.

    A changed length of the run is also noted in metrics.jsonl, with the step at which it happened.
    """
    before, now = read_json(run_dir / CONFIG), _as_json(settings)
    if before != now:
        write_json(run_dir / CONFIG, now)
        if before.get("steps") != now["steps"]:
            append_metrics(run_dir / METRICS, step, {"steps": now["steps"]}, None)


def save_state(
    path: Path,
    params: Mapping[str, Parameter],
    ema: EMA,
    optimizers: list[NamedOptimizer],
    progress: RunProgress,
    settings: Mapping[str, Any],
) -> None:
    """Writes what a run needs to resume: parameters, EMA, optimiser moments and progress.

    The settings are stored too, so that the file of another run is recognised.
    """
    tensors = {f"param/{name}": param for name, param in params.items()}
    tensors |= {f"ema/{name}": value for name, value in ema.average.items()}
    for optimizer, own in optimizers:
        for name, param in own.items():
            for key, value in optimizer.state[param].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
    values = dataclasses.asdict(progress)
    # JSON has no infinity, so `best` of a run without validation is stored as null.
    values["best"] = None if math.isinf(progress.best) else progress.best
    fixed = {name: value for name, value in settings.items() if name not in CHANGEABLE}
    save_tensors(path, tensors, {**values, "settings": _as_json(fixed)})


def load_state(
    path: Path,
    params: Mapping[str, Parameter],
    ema: EMA,
    optimizers: list[NamedOptimizer],
    settings: Mapping[str, Any],
) -> RunProgress:
    """Reads a file of `save_state` into the parameters, the EMA and the optimisers.

    Returns the progress; a new one if the file does not exist. Raises InputError, before anything
    is changed, if the file is of a run with other settings or parameters.
    """
    if not path.exists():
        return RunProgress()
    # One tensor at a time: all together are as large as what they are copied into.
    with open_tensors(path) as (read, names, values), torch.no_grad():
        progress = _progress(values, settings, path)
        targets = {f"param/{name}": param.detach() for name, param in params.items()}
        targets |= {f"ema/{name}": average for name, average in ema.average.items()}
        moments = {
            f"{key}/{name}": (optimizer, key, param)
            for optimizer, own in optimizers
            for name, param in own.items()
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step", *STATES_8BIT)
        }
        # A parameter that never got a gradient has no optimiser state.
        there = set(names)
        moments = {name: moment for name, moment in moments.items() if name in there}
        shapes: dict[str, Sequence[int] | None] = {
            name: target.shape for name, target in targets.items()
        }
        for name, (_, key, param) in moments.items():
            shapes[name] = () if key == "step" else None if key in STATES_8BIT else param.shape
        _check_tensors(read, names, shapes, {k: v.dtype for k, v in targets.items()}, path)
        for name, target in targets.items():
            target.copy_(read(name))
        for name, (optimizer, key, param) in moments.items():
            value: Tensor | int = read(name)
            if key == "step" and not value.is_floating_point():
                value = int(value)  # bitsandbytes counts in Python
            elif value.shape == param.shape:
                # The fused step works on raw memory, so moments need their parameter's memory
                # format (channels_last or not).
                value = torch.empty_like(param.detach(), dtype=value.dtype).copy_(value)
            else:
                value = value.to(param.device)
            optimizer.state[param][key] = value
    ema.updates = progress.ema_updates
    return progress


def _progress(values: Any, settings: Mapping[str, Any], path: Path) -> RunProgress:
    """The progress in a state file's metadata, whose settings are compared with `settings`."""
    if not isinstance(values, dict):
        raise InputError(f"{path} is not the state of a run: {ADVICE}")
    before = values.get("settings", {})
    values = {name: value for name, value in values.items() if name != "settings"}
    # Runs of earlier versions lack some numbers; `best` is null before the first validation.
    unseen = "best" in values and values["best"] is None
    before_them = {"judged_by": "", "logged": 0, "loss_scale": 0.0, "loss_scale_steps": 0}
    known = {**before_them, **values, **({"best": 0.0} if unseen else {})}
    progress = from_json(RunProgress, known, path)
    if not isinstance(before, dict):
        raise InputError(f"{path} is not the state of a run: {ADVICE}")
    for name in ("ema_updates", "loss_count", "logged"):
        if getattr(progress, name) > progress.step:
            raise InputError(
                f"{path} is damaged: {name} is {getattr(progress, name)} after {progress.step}"
                f" steps: {ADVICE}"
            )
    _compare(before, settings, path)
    return dataclasses.replace(progress, best=math.inf) if unseen else progress


def _check_tensors(
    read: Callable[[str], Tensor],
    names: Sequence[str],
    shapes: Mapping[str, Sequence[int] | None],
    dtypes: Mapping[str, torch.dtype],
    path: Path,
) -> None:
    """Raises InputError if names, shapes or dtypes differ, or if a value is not finite.

    `read` gives the tensor of a name; a shape that is None may be any. `dtypes` are those of
    parameters and averages. Moments are floats; the counts and tables of 8-bit moments may not be.
    """
    strange = sorted({*names} ^ shapes.keys())
    if strange:
        what = "has no" if strange[0] in shapes else "has an unknown"
        raise InputError(f"{path} is not the state of this run: it {what} tensor {strange[0]}")
    for name, shape in shapes.items():
        value = read(name)
        floats = not name.startswith(("step/", *(f"{key}/" for key in STATES_8BIT)))
        if (
            shape is not None
            and value.shape != tuple(shape)
            or floats
            and not value.is_floating_point()
            or value.dtype != dtypes.get(name, value.dtype)
        ):
            raise InputError(
                f"{path} is not the state of this run: {name} is {list(value.shape)} of"
                f" {value.dtype}, but {dtypes.get(name, 'floats')} {list(shape or ())} are expected"
            )
        if not all_finite(value):
            raise InputError(f"{path} is damaged: {name} is not finite: {ADVICE}")


def append_metrics(path: Path, step: int, line: dict[str, Any], writer: Any) -> None:
    """Appends a line to metrics.jsonl, flushed to disk, and to the TensorBoard writer if given."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not name the file
        error.filename = error.filename or str(path)
        raise
    if writer:
        for name, value in line.items():
            writer.add_scalar(name, value, step)


def cut_metrics(path: Path, step: int, logged: int) -> None:
    """Removes metrics lines after `step`, the step that the run resumes from.

    An incomplete last line is removed as well. Raises InputError that names any other line that is
    not one of metrics, or the line of the step `logged`, which a run that got there has written.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, steps, previous = [], {0}, 0
    for number, line in enumerate(lines, 1):
        whole = line.endswith(b"\n")
        try:
            record = parse_json(line.decode(), f"{path}, line {number}")
            at = record["step"]
            if type(at) is not int or at < previous or not _are_numbers(record.values()):
                raise ValueError
        except (InputError, ValueError, LookupError, TypeError, AttributeError):
            if not whole:  # torn by a crash
                break
            raise InputError(
                f"{path}, line {number} is not a line of finite metrics in order: {ADVICE}"
            ) from None
        previous = at
        if at <= step:
            steps.add(at)
            kept.append(line if whole else line + b"\n")
    if logged not in steps:
        raise InputError(f"{path} lacks the line of step {logged}, which the run wrote: {ADVICE}")
    if path.exists():
        atomic_write(path, b"".join(kept))


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


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
