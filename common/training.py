"""The one training loop. It knows optimisation, files and time, and nothing about diffusion.

Every draw is a function of (seed, optimiser step), so a run that is stopped anywhere, even killed, goes on from its last
checkpoint as if nothing had happened, and many processes compute what one would.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm import tqdm

from common.checkpoint import load_tensors, save_tensors
from common.devices import make_accelerator
from common.ema import EMA
from common.errors import InputError
from common.files import atomic_write, make_folder, read_json, write_json
from common.seeds import ImageGenerators, derive_seed, derive_seeds

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How to optimise, and how often to look."""

    steps: int = 10_000
    """Optimiser steps in all; the one setting that may change when a run is resumed."""
    batch_size: int = 64
    """Images in one optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches that one step of one process is cut into, to save memory."""
    lr: float = 1e-3
    """Peak learning rate; it falls to 0 along a cosine."""
    warmup: int = 200
    """Optimiser steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's decay of squared gradients."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the parameters' moving average for one step."""
    seed: int = 0
    """Seed of every random draw."""
    log_every: int = 50
    """Optimiser steps between lines of metrics.jsonl."""
    validate_every: int = 1000
    """Optimiser steps between validations."""
    preview_every: int = 1000
    """Optimiser steps between preview pictures."""
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast: on CUDA, or bf16 on a CPU that multiplies matrices of it (AMX)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes CUDA if present."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs the package tensorboard)."""


@dataclasses.dataclass
class _Progress:
    """What a run remembers beside its tensors; stored in the checkpoint."""

    step: int = 0
    ema_updates: int = 0
    best: float = math.inf
    loss_sum: float = 0.0
    loss_count: int = 0


class _Objective(nn.Module):
    """The loss as a module over the trained parameters, which is the form in which data parallelism synchronises gradients."""

    def __init__(self, params: Mapping[str, Parameter], loss_fn: Callable[[Batch, ImageGenerators], Tensor]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params.values())
        self.loss_fn = loss_fn

    def forward(self, batch: Batch, generators: ImageGenerators) -> Tensor:
        return self.loss_fn(batch, generators)


def fit(
    params: Mapping[str, Parameter],
    loss_fn: Callable[[Batch, ImageGenerators], Tensor],
    draw: Callable[[int], Batch],
    config: TrainingConfig,
    run_dir: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    save: Callable[[Path], None] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    preview: Callable[[Path], None] | None = None,
) -> None:
    """Minimises `loss_fn` over `params` (and nothing else) with AdamW, and resumes if `run_dir` holds a checkpoint.

    - `draw(step)` gives the step's global batch, a dict of tensors [N, ...]; it must depend on `step` alone. A tensor "index",
      if there is one, names the batch in the message about a non-finite loss.
    - `loss_fn(batch, generators)` gives the mean loss of the slice that this process and micro-batch got, on its device;
      `generators` has one generator for each of the slice's images.
    - `validate()` gives numbers, of which "loss" (lower is better) chooses the best checkpoint.
    - `save(folder)` writes the model as inference reads it, into `last` and `best` of the run folder; `preview(path)` writes a
      picture. These three run on the main process and see the averaged parameters.

    `settings` is saved beside `config` in the run folder; resuming with other ones is refused, but for `steps`: a run may be
    made longer or shorter, and its learning rate goes on along the new cosine. The run folder gets
    `config.json`, `metrics.jsonl`, `state.safetensors`, `last/`, `best/` and `samples/`. Raises InputError on a non-finite
    loss, on a device that is not there, and on a run folder of another run or past `steps`; KeyboardInterrupt after Ctrl-C, with
    the state saved.
    """
    _check_config(config)
    accelerator = make_accelerator(config.device, config.mixed_precision)
    main = accelerator.is_main_process
    shards = accelerator.num_processes * config.accumulation
    if config.batch_size % shards:
        raise InputError(
            f"the batch size {config.batch_size} is not a multiple of processes times accumulation, {shards}"
        )
    run_dir = Path(run_dir)
    if main:
        _claim_run_folder(run_dir, {**dataclasses.asdict(config), **(settings or {})})
    accelerator.wait_for_everyone()

    # The optimiser sees the named parameters alone; the moving average starts where they start.
    optimizer = torch.optim.AdamW(
        params.values(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
    )
    ema = EMA(params, config.ema_decay)
    progress = _load_state(run_dir / "state.safetensors", params, ema, optimizer, accelerator.device)
    if progress.step > config.steps:
        raise InputError(f"{run_dir} has come to step {progress.step} already, past --steps {config.steps}")
    if main:
        _cut_metrics(run_dir / "metrics.jsonl", progress.step)
        _set_steps(run_dir, progress.step, config.steps)
    objective, prepared = accelerator.prepare(_Objective(params, loss_fn), optimizer)
    writer = _tensorboard_writer(run_dir) if config.tensorboard and main else None

    # Ctrl-C and SIGTERM end the run at the next step's end, with everything saved.
    interrupted = []
    handlers = {
        s: signal.signal(s, lambda number, _: interrupted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    bar = tqdm(total=config.steps, initial=progress.step, disable=not main, unit="step", dynamic_ncols=True)
    if main:
        bar.write(
            f"training on {accelerator.device}, processes: {accelerator.num_processes}, from step {progress.step}"
        )
    started, started_at = time.monotonic(), progress.step
    try:
        stop = False
        while progress.step < config.steps and not stop:
            step = progress.step
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_factor(step, config.warmup, config.steps)

            # Layers that draw for themselves, like dropout, use the global generator.
            torch.manual_seed(derive_seed(config.seed, step, 2, accelerator.process_index))

            # One global batch, of which each process and micro-batch takes an equal, contiguous slice.
            batch = draw(step)
            seeds = derive_seeds(config.seed, step, count=config.batch_size)
            size = config.batch_size // shards
            loss_value = torch.zeros((), device=accelerator.device)
            for micro in range(config.accumulation):
                shard = micro * accelerator.num_processes + accelerator.process_index
                part = slice(shard * size, (shard + 1) * size)
                inputs = {name: value[part].to(accelerator.device) for name, value in batch.items()}
                last_micro = micro == config.accumulation - 1
                with contextlib.nullcontext() if last_micro else accelerator.no_sync(objective):
                    with accelerator.autocast():
                        loss = objective(inputs, ImageGenerators(seeds[part], accelerator.device))
                    accelerator.backward(loss / config.accumulation)
                loss_value += loss.detach() / config.accumulation
            # Processes agree on the loss, and on stopping: a signal may reach one of them a step before another.
            flag = torch.tensor(float(bool(interrupted)), device=accelerator.device)
            loss_value, stop = accelerator.reduce(torch.stack([loss_value, flag]), "mean").tolist()
            if not math.isfinite(loss_value):
                images = batch["index"].tolist() if "index" in batch else "unknown"
                raise InputError(
                    f"the loss is {loss_value} at step {step}, on the batch of images {images}; the last checkpoint is kept"
                )

            accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
            prepared.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(params)
            progress.step += 1
            progress.ema_updates = ema.updates
            progress.loss_sum += loss_value
            progress.loss_count += 1
            if not main:
                continue

            # What is looked at from time to time, on the averaged parameters.
            bar.update()
            line: dict[str, Any] = {}
            if _due(progress.step, config.log_every, config.steps):
                line |= {"loss": progress.loss_sum / progress.loss_count, "lr": optimizer.param_groups[0]["lr"]}
                progress.loss_sum, progress.loss_count = 0.0, 0
                rate = config.batch_size * (progress.step - started_at) / (time.monotonic() - started)
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:.0f} images/s")
            with ema.applied_to(params) if _looks(config, progress.step) else contextlib.nullcontext():
                if validate and _due(progress.step, config.validate_every, config.steps):
                    numbers = validate()
                    line |= {f"validation_{name}": value for name, value in numbers.items()}
                    if numbers["loss"] < progress.best:
                        progress.best = numbers["loss"]
                        if save:
                            save(run_dir / "best")
                if preview and _due(progress.step, config.preview_every, config.steps):
                    preview(make_folder(run_dir / "samples") / f"{progress.step:07d}.png")
                if save and _due(progress.step, config.checkpoint_every, config.steps):
                    save(run_dir / "last")
            if line:
                _append_metrics(run_dir / "metrics.jsonl", progress.step, line, writer)
            if _due(progress.step, config.checkpoint_every, config.steps):
                _save_state(run_dir / "state.safetensors", params, ema, optimizer, progress)
        if stop:
            if main:
                _save_state(run_dir / "state.safetensors", params, ema, optimizer, progress)
                bar.write(f"stopped at step {progress.step} of {config.steps}; run the same command again to go on")
            raise KeyboardInterrupt
    finally:
        bar.close()
        if writer:
            writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    accelerator.wait_for_everyone()


def settings_of(config: Any, *left_out: str, **more: Any) -> dict[str, Any]:
    """A trainer's own settings for `fit`: the fields of its dataclass but `training`, `run_dir` and those left out (places of
    data, which may move), and more."""
    values = dataclasses.asdict(config)
    return {key: values[key] for key in values if key not in ("training", "run_dir", *left_out)} | more


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """The learning rate at `step` as a part of its peak: a linear rise, then half a cosine down to 0 (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _check_config(config: TrainingConfig) -> None:
    derive_seed(config.seed)
    for name in (
        "steps",
        "batch_size",
        "accumulation",
        "log_every",
        "validate_every",
        "preview_every",
        "checkpoint_every",
    ):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _looks(config: TrainingConfig, step: int) -> bool:
    return any(
        _due(step, every, config.steps)
        for every in (config.validate_every, config.preview_every, config.checkpoint_every)
    )


# ----------------------------------------------------------------------------
# The run folder.


def _claim_run_folder(run_dir: Path, settings: dict[str, Any]) -> None:
    """Writes config.json into a new run folder, or checks that an old one belongs to the same run."""
    settings = json.loads(json.dumps(settings, default=str))
    path = make_folder(run_dir) / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path)
    changed = sorted(
        name for name in before.keys() | settings.keys() if name != "steps" and before.get(name) != settings.get(name)
    )
    if changed:
        name = changed[0]
        raise InputError(
            f"{run_dir} holds a run with {name} = {before.get(name)}, not {settings.get(name)}: resume it with the same settings, "
            "or choose another run folder (and --init-from to start from its weights)"
        )


def _set_steps(run_dir: Path, step: int, steps: int) -> None:
    """Notes in config.json and, with the step at which it happened, in metrics.jsonl that the run has another length now."""
    settings = read_json(run_dir / "config.json")
    if settings["steps"] != steps:
        write_json(run_dir / "config.json", settings | {"steps": steps})
        _append_metrics(run_dir / "metrics.jsonl", step, {"steps": steps}, None)


def _save_state(
    path: Path, params: Mapping[str, Parameter], ema: EMA, optimizer: torch.optim.AdamW, progress: _Progress
) -> None:
    tensors = {}
    for name, param in params.items():
        tensors[f"param/{name}"] = param
        tensors[f"ema/{name}"] = ema.average[name]
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[param].items()}
    # JSON has no infinity; a run that never validated has no best.
    values = dataclasses.asdict(progress)
    save_tensors(path, tensors, values | {"best": None if math.isinf(progress.best) else progress.best})


def _load_state(
    path: Path, params: Mapping[str, Parameter], ema: EMA, optimizer: torch.optim.AdamW, device: torch.device
) -> _Progress:
    for param in params.values():
        param.data = param.data.to(device)
    ema.average = {name: value.to(device) for name, value in ema.average.items()}
    if not path.exists():
        return _Progress()
    tensors, values = load_tensors(path)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(tensors[f"param/{name}"])
            ema.average[name].copy_(tensors[f"ema/{name}"])
            for key in ("exp_avg", "exp_avg_sq", "step"):
                # A parameter that never got a gradient has no optimiser state.
                if (value := tensors.get(f"{key}/{name}")) is not None:
                    # The fused step walks raw memory: moments must be laid out as their parameter is (channels_last or not).
                    moment = torch.empty_like(param) if key != "step" else torch.empty((), device=device)
                    optimizer.state[param][key] = moment.copy_(value)
    progress = _Progress(**(values | {"best": math.inf if values["best"] is None else values["best"]}))
    ema.updates = progress.ema_updates
    return progress


def _append_metrics(path: Path, step: int, line: dict[str, Any], writer: Any) -> None:
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **line}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if writer:
        for name, value in line.items():
            writer.add_scalar(name, value, step)


def _cut_metrics(path: Path, step: int) -> None:
    """Drops the lines that were written after the checkpoint that the run resumes from, a torn last line included."""
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


def _tensorboard_writer(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(run_dir)
