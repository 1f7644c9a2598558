"""The one training loop. It knows optimisation, files and time, and nothing about diffusion.

Every draw is a function of (seed, optimiser step), so a run that is stopped anywhere, even killed, goes on from its last
checkpoint as if nothing had happened, and many processes compute what one would. The CPU does not wait for the device in each
step: losses are read a few times a second.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm import tqdm

from common.devices import make_accelerator, pick_device
from common.ema import EMA
from common.errors import InputError
from common.files import make_folder
from common.optimizers import OptimizerName, make_optimizers
from common.run_folder import (
    _append_metrics,
    _claim_run_folder,
    _cut_metrics,
    _load_state,
    _save_state,
    _set_steps,
    _tensorboard_writer,
)
from common.seeds import BatchDraws, Draws, derive_seed

Batch = dict[str, Tensor]
COOL_DOWN = 0.2  # the part of a run in which the learning rate falls, with the schedule "constant"
SECONDS_BETWEEN_READINGS = 0.5  # of the losses, and of whether another process was told to stop
STEPS_BETWEEN_READINGS = 50  # at most


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How to optimise, and how often to look."""

    steps: int = 10_000
    """Optimiser steps in all; the one setting that may change when a run is resumed."""
    batch_size: int = 64
    """Images in one optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches that one step of one process is cut into, to save memory."""
    optimizer: OptimizerName = "adamw"
    """AdamW for all weights, or Muon for the matrices of hidden layers and AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up the rate falls to 0 along a cosine, or stays constant until it falls to 0 in a line over the last fifth."""
    warmup: int = 200
    """Optimiser steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
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
    channels_last: bool = True
    """Lay images and convolutions out with channels last, which most devices multiply faster."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start, faster steps on a GPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes CUDA if present."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs the package tensorboard)."""


class _Objective(nn.Module):
    """The loss as a module over the trained parameters, which is the form in which data parallelism synchronises gradients."""

    def __init__(self, params: Mapping[str, Parameter], loss_fn: Callable[[Batch, Draws], Tensor]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params.values())
        self.loss_fn = loss_fn

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        return self.loss_fn(batch, draws)


def fit(
    params: Mapping[str, Parameter],
    loss_fn: Callable[[Batch, Draws], Tensor],
    get_batch: Callable[[int, torch.Generator], Batch],
    config: TrainingConfig,
    run_dir: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    save: Callable[[Path], None] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    preview: Callable[[Path], None] | None = None,
) -> None:
    """Minimises `loss_fn` over `params` (and nothing else), and resumes if `run_dir` holds a checkpoint.

    - `get_batch(step, generator)` gives the step's global batch, a dict of tensors [N, ...] on any device; it must depend on
      its arguments alone, and the generator, on the training device, on the step. A tensor "index", if there is one, names the
      batch in the message about a non-finite loss.
    - `loss_fn(batch, draws)` gives the mean loss of the slice that this process and micro-batch got, on its device; `draws`
      gives the random numbers of that slice.
    - `validate()` gives numbers, of which "loss" (lower is better) chooses the best checkpoint.
    - `save(folder)` writes the model as inference reads it, into `last` and `best` of the run folder; `preview(path)` writes a
      picture. These three run on the main process and see the averaged parameters.

    `settings` is saved beside `config` in the run folder; resuming with other ones is refused, but for `steps`: a run may be
    made longer or shorter, and its learning rate goes on along the new schedule. The run folder gets
    `config.json`, `metrics.jsonl`, `state.safetensors`, `last/`, `best/` and `samples/`. Raises InputError on a non-finite
    loss, on a device that is not there, and on a run folder of another run or past `steps`; KeyboardInterrupt after Ctrl-C or
    SIGTERM, which break off what is going on, with the state saved.
    """
    _check_config(config)
    accelerator = make_accelerator(config.device, config.mixed_precision)
    main, processes, device = accelerator.is_main_process, accelerator.num_processes, accelerator.device
    shards = processes * config.accumulation
    if config.batch_size % shards:
        raise InputError(
            f"the batch size {config.batch_size} is not a multiple of processes times accumulation, {shards}"
        )
    run_dir = Path(run_dir)
    if main:
        _claim_run_folder(run_dir, {**dataclasses.asdict(config), **(settings or {})})
    accelerator.wait_for_everyone()

    # The optimisers see the named parameters alone; the moving average starts where they start.
    for param in params.values():
        param.data = param.data.to(device)
    optimizers = make_optimizers(
        params, config.optimizer, lr=config.lr, beta2=config.beta2, weight_decay=config.weight_decay
    )
    ema = EMA(params, config.ema_decay)
    progress = _load_state(run_dir / "state.safetensors", params, ema, optimizers)
    if progress.step > config.steps:
        raise InputError(f"{run_dir} has come to step {progress.step} already, past --steps {config.steps}")
    if main:
        _cut_metrics(run_dir / "metrics.jsonl", progress.step - (not progress.looked))
        _set_steps(run_dir, progress.step, config.steps)
    objective, *prepared = accelerator.prepare(_Objective(params, loss_fn), *[each for each, _ in optimizers])
    writer = _tensorboard_writer(run_dir) if config.tensorboard and main else None
    bar = tqdm(total=config.steps, initial=progress.step, disable=not main, unit="step", dynamic_ncols=True)
    if main:
        bar.write(f"training on {device}, processes: {processes}, from step {progress.step}")
    started, started_at = time.monotonic(), progress.step
    unread: list[Tensor] = []  # losses, on the device
    next_reading, read_at = progress.step + 1, time.monotonic()

    def batch_of(step: int) -> Batch:
        return get_batch(step, torch.Generator(device).manual_seed(derive_seed(config.seed, step, 1)))

    def take_step(step: int) -> None:
        """One step of the optimisers on one global batch, of which each micro-batch takes an equal, contiguous slice."""
        # Layers that draw for themselves, like dropout, use the global generator.
        torch.manual_seed(derive_seed(config.seed, step, 2, accelerator.process_index))
        size = config.batch_size // shards
        loss_value = torch.zeros((), device=device)
        # One process alone may break a step off: nothing has changed before the optimisers move.
        with interrupts.at_once() if processes == 1 else contextlib.nullcontext():
            batch, draws = batch_of(step), BatchDraws(derive_seed(config.seed, step), config.batch_size, device)
            for micro in range(config.accumulation):
                shard = micro * processes + accelerator.process_index
                part = slice(shard * size, (shard + 1) * size)
                inputs = {name: value[part].to(device, non_blocking=True) for name, value in batch.items()}
                last_micro = micro == config.accumulation - 1
                with contextlib.nullcontext() if last_micro else accelerator.no_sync(objective):
                    with accelerator.autocast():
                        loss = objective(inputs, draws.part(part))
                    accelerator.backward(loss / config.accumulation)
                loss_value += loss.detach() / config.accumulation
        unread.append(loss_value)
        accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
        for optimizer in prepared:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(params)
        progress.step += 1
        progress.ema_updates = ema.updates
        progress.looked = False

    def read_losses() -> bool:
        """Waits for the device, takes in the losses since the last time, and says whether any process was told to stop."""
        nonlocal next_reading, read_at
        flags = [float(interrupts.received), time.monotonic() - read_at]
        numbers = torch.stack([*unread, *torch.tensor(flags, device=device)])
        *losses, stop, seconds = accelerator.reduce(numbers, "mean").tolist()
        first = progress.step - len(losses)
        unread.clear()
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                batch = batch_of(step)
                images = batch["index"].tolist() if "index" in batch else "unknown"
                raise InputError(
                    f"the loss is {loss} at step {step}, on the batch of images {images}; the last checkpoint is kept"
                )
            progress.loss_sum += loss
            progress.loss_count += 1
        if losses:
            pace = max(seconds / len(losses), 1e-6)
            between = min(max(int(SECONDS_BETWEEN_READINGS / pace), 1), STEPS_BETWEEN_READINGS)
            next_reading, read_at = progress.step + between, time.monotonic()
        return stop > 0.0

    def look() -> None:
        """What is looked at from time to time, on the averaged parameters."""
        step, line = progress.step, {}
        logs = _logs(config, step)
        if logs:
            line |= {"loss": progress.loss_sum / progress.loss_count, "lr": learning_rate(config, step - 1)}
            rate = config.batch_size * (step - started_at) / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:.0f} images/s")
        with ema.applied_to(params) if _looks(config, step) else contextlib.nullcontext():
            if validate and _due(step, config.validate_every, config.steps):
                with interrupts.at_once():
                    numbers = validate()
                line |= {f"validation_{name}": value for name, value in numbers.items()}
                if numbers["loss"] < progress.best:
                    if save:
                        save(run_dir / "best")
                    progress.best = numbers["loss"]
            if preview and _due(step, config.preview_every, config.steps):
                with interrupts.at_once():
                    preview(make_folder(run_dir / "samples") / f"{step:07d}.png")
            if save and _due(step, config.checkpoint_every, config.steps):
                save(run_dir / "last")
        if line:
            _append_metrics(run_dir / "metrics.jsonl", step, line, writer)
        if logs:
            progress.loss_sum, progress.loss_count = 0.0, 0
        progress.looked = True
        if _due(step, config.checkpoint_every, config.steps):
            _save_state(run_dir / "state.safetensors", params, ema, optimizers, progress)

    try:
        with _Interrupts() as interrupts:
            stop = False
            while not stop:
                due = not progress.looked and (_looks(config, progress.step) or _logs(config, progress.step))
                if due or progress.step >= next_reading or (interrupts.received and processes == 1):
                    stop = read_losses()
                if due and not stop:
                    with contextlib.suppress(_Interrupted):
                        if main:
                            look()
                    stop = read_losses()
                if stop or progress.step == config.steps:
                    break
                with contextlib.suppress(_Interrupted):
                    take_step(progress.step)
                    bar.update()
            if stop:
                if main:
                    _save_state(run_dir / "state.safetensors", params, ema, optimizers, progress)
                    bar.write(f"stopped at step {progress.step} of {config.steps}; run the same command again to go on")
                raise KeyboardInterrupt
    finally:
        bar.close()
        if writer:
            writer.close()
    accelerator.wait_for_everyone()


def settings_of(config: Any, *left_out: str, **more: Any) -> dict[str, Any]:
    """A trainer's own settings for `fit`: the fields of its dataclass but `training`, `run_dir` and those left out (places of
    data, which may move), and more."""
    values = dataclasses.asdict(config)
    return {key: values[key] for key in values if key not in ("training", "run_dir", *left_out)} | more


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate at `step`: a linear rise, then half a cosine down to 0 (arXiv:1608.03983), or a constant that falls to 0
    in a line over the last part COOL_DOWN of the run (arXiv:2405.18392), which can thus begin at any checkpoint.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr * min(1.0, (config.steps - step) / max(COOL_DOWN * config.steps, 1.0))
    through = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * through))


def prepare_network(model: nn.Module, config: TrainingConfig) -> Callable[..., Tensor]:
    """Moves the model to where it trains and lays it out, in place; returns what the loss calls: it, compiled if asked for."""
    model.to(pick_device(config.device))
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return torch.compile(model) if config.compile else model


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


def _logs(config: TrainingConfig, step: int) -> bool:
    return _due(step, config.log_every, config.steps)


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _looks(config: TrainingConfig, step: int) -> bool:
    return any(
        _due(step, every, config.steps)
        for every in (config.validate_every, config.preview_every, config.checkpoint_every)
    )


class _Interrupted(BaseException):
    """A signal broke off what was going on."""


class _Interrupts:
    """Inside the block, Ctrl-C and SIGTERM do not end the process: they are noted, and break off what runs `at_once`."""

    def __init__(self) -> None:
        self.received = False
        self._breaks = False

    def __enter__(self) -> "_Interrupts":
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        self.received = True
        if self._breaks:
            raise _Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises _Interrupted."""
        self._breaks = True
        try:
            if self.received:
                raise _Interrupted
            yield
        finally:
            self._breaks = False
