"""The training loop; it handles optimisation, files and time, and is independent of diffusion.

Every random draw is a function of (seed, optimiser step). A run that stops at any point, even
killed, therefore resumes from its last checkpoint with the same numbers, and several processes
compute what one would. Losses are read from the device a few times a second, so the CPU does not
wait for the device in each step.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from common.config import (
    Count,
    Fraction,
    Positive,
    Seed,
    bounds,
    check_fields,
    describing,
)
from common.devices import (
    available_memory,
    check_memory,
    make_accelerator,
    pick_device,
    this_process,
)
from common.ema import EMA, Place
from common.errors import InputError, Interrupted, Terminated, interruption_behind
from common.files import make_folder
from common.memory import keep_freed_memory
from common.optimizers import OptimizerName, check_optimizer, make_optimizers, step_all
from common.progress import Progress
from common.run_folder import (
    METRICS,
    STATE,
    RunProgress,
    append_metrics,
    check_settings,
    check_tensorboard,
    claim_run_folder,
    cut_metrics,
    load_state,
    save_state,
    tensorboard_writer,
    update_settings,
)
from common.seeds import BatchDraws, Draws, batch_seed, derive_seed, layers_seed, noise_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)
BatchSize = Annotated[int, *bounds(at_least=1, at_most=2**20)]
COOL_DOWN = 0.2  # fraction of a run in which the learning rate falls, for the schedule "constant"
SECONDS_BETWEEN_READINGS = 0.5  # of the losses, and of whether another process was told to stop
STEPS_BETWEEN_READINGS = 50  # the most, however fast the steps are
LARGE_SLICE = 256  # examples of a micro-batch on a CPU; above it, its memory is measured beforehand
MEASURED_EXAMPLES = (8, 16)  # the two sizes at which it is measured


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimisation settings, and intervals of logging, validation, previews and checkpoints."""

    steps: Annotated[int, *bounds(at_least=1, at_most=10**9)] = 10_000
    """Optimiser steps in total; may change when a run is resumed."""
    batch_size: BatchSize = 64
    """Images per optimiser step, over all processes and micro-batches."""
    gradient_accumulation_steps: BatchSize = 1
    """Micro-batches per optimiser step and process; more of them need less memory."""
    device_batch_size: BatchSize | None = None
    """Most images that a process computes at once: a larger share of the batch is cut into more
    micro-batches than --gradient-accumulation-steps says."""
    optimizer: OptimizerName = "adamw"
    """AdamW for all weights (adamw), the same with moments of 8 bits, which saves 6 bytes per
    parameter and needs CUDA and the package bitsandbytes (adamw8bit), or Muon for the matrices of
    hidden layers and AdamW for the rest (muon)."""
    lr: Annotated[float, *bounds(at_least=0, at_most=100)] = 1e-3
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine down to 0, or constant with a linear decay to 0
    over the last fifth of the steps."""
    warmup: Annotated[int, *bounds(at_least=0, at_most=10**6)] = 200
    """Optimiser steps over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, *bounds(at_least=0, at_most=100)] = 0.01
    """Decoupled weight decay."""
    beta2: Fraction = 0.99
    """Decay rate of AdamW's second moment."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global L2 norm."""
    ema_decay: Fraction = 0.999
    """Decay of the parameters' exponential moving average per optimiser step."""
    ema: Place = "device"
    """Where the moving average is kept: on the training device, in the CPU's memory, which saves 4
    bytes per parameter on the device and makes steps slower, or nowhere (none); then validations,
    previews and saved models have the parameters themselves."""
    seed: Seed = 0
    """Seed of all random draws."""
    log_every: Count = 50
    """Optimiser steps between lines of metrics.jsonl."""
    validate_every: Annotated[int, *bounds(at_least=0)] = 1000
    """Optimiser steps between validations; 0: none."""
    preview_every: Annotated[int, *bounds(at_least=0)] = 1000
    """Optimiser steps between preview pictures; 0: none."""
    checkpoint_every: Count = 500
    """Optimiser steps between checkpoints."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast dtype; no computes in float32. fp16 and bf16 are for CUDA, bf16 also for a CPU with
    bf16 matrix instructions (AMX)."""
    tf32: bool = False
    """On CUDA, multiply float32 matrices with factors rounded to 10 bits of mantissa (TF32), which
    is faster. PyTorch's convolutions do so in any case."""
    channels_last: bool = True
    """Memory format channels_last for images and convolutions, which is faster on most devices;
    Problems 1 and 2 only."""
    compile: bool = False
    """Compile the network with torch.compile: takes minutes at the start, and makes steps faster;
    Problems 1 and 2 and the U-Net of the small latent-diffusion model."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Training device; auto is CUDA if present, else MPS, else the CPU."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run folder (needs the package tensorboard)."""


class _Objective(nn.Module):
    """The loss as a module that owns the trained parameters.

    Data parallelism synchronises the gradients of a module's parameters.
    """

    def __init__(
        self, params: Mapping[str, Parameter], loss_fn: Callable[[Batch, Draws], Tensor]
    ) -> None:
        super().__init__()
        self.params = nn.ParameterList(params.values())
        self.loss_fn = loss_fn

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """The loss of a batch, a scalar."""
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
    judged_by: str = "",
    next_command: str = "",
) -> None:
    """Minimises `loss_fn` over `params`; resumes if `run_dir` holds a checkpoint.

    - `params` are the trained parameters by name; nothing else is changed.
    - `get_batch(step, generator)` returns the global batch of a step, a dict of tensors [N, ...] on
      any device. It must depend on its arguments only. The generator is on the training device and
      seeded by the step. A tensor "index", if present, names the images in the error about a
      non-finite loss. A value may also be an object of which only slices are tensors, so that a
      process reads only its own. If reading raises InputError, a single process saves its state.
    - `loss_fn(batch, draws)` returns the mean loss, a scalar, of the slice of the batch that this
      process and micro-batch gets, on the training device. `draws` gives the random numbers of that
      slice.
    - `validate()` returns numbers by name; "loss" (lower is better) selects the best checkpoint.
      `judged_by` identifies what computes it, if a resumed run may have another; the best
      checkpoint is then chosen anew.
    - `save(folder)` writes the model for inference, to `last` and `best` in the run folder.
    - `preview(path)` writes a picture. `validate`, `save` and `preview` run on the main process and
      see the EMA parameters.
    - `settings` are saved with `config` in the run folder. A run is resumed only with equal
      settings, except for those that cannot change the result (`run_folder.CHANGEABLE`) and
      `steps`: a changed length is allowed, and the learning rate follows the new schedule.
    - `next_command`, a command that uses the weights, is printed at the end; the word LAST stands
      for their folder.

    The run folder gets `config.json`, `metrics.jsonl`, `state.safetensors`, `last/`, `best/` and
    `samples/`. Raises InputError if the loss is not finite, if the device is not present, or if the
    run folder belongs to another run, was changed, or is past `steps`. Raises KeyboardInterrupt
    after Ctrl-C or SIGTERM, which interrupt the current work, with the state saved.
    """
    _check_config(config)
    accelerator = make_accelerator(config.device, config.mixed_precision)
    main, processes = accelerator.is_main_process, accelerator.num_processes
    device = accelerator.device
    micro_batches, run_dir = micro_batches_of(config, accelerator), Path(run_dir)
    settings = {**dataclasses.asdict(config), **(settings or {})}
    if device.type == "cpu" and not config.compile:
        _check_slice_memory(loss_fn, get_batch, config, micro_batches, accelerator)
    before = settings
    if main:
        defaults = dataclasses.asdict(TrainingConfig())
        before = {**defaults, **claim_run_folder(run_dir, settings, defaults)}
    accelerator.wait_for_everyone()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if device.type == "cpu":
        keep_freed_memory()

    # The optimisers get the named parameters only; the moving average starts from their values.
    for param in params.values():
        param.data = param.data.to(device)
    optimizers = make_optimizers(
        params, config.optimizer, lr=config.lr, beta2=config.beta2, weight_decay=config.weight_decay
    )
    ema = EMA(params, config.ema_decay, config.ema)
    progress = load_state(run_dir / STATE, params, ema, optimizers, settings)
    if progress.judged_by not in ("", judged_by):
        progress.best = math.inf
        if main:
            print("best/ is chosen anew: checkpoints are compared in another way than before")
    progress.judged_by = judged_by
    if progress.step > config.steps:
        raise InputError(
            f"{run_dir} is already at step {progress.step}, past --steps {config.steps}"
        )
    if main:
        cut_metrics(run_dir / METRICS, progress.step - (not progress.looked), progress.logged)
        update_settings(run_dir, progress.step, settings)
    objective, *prepared = accelerator.prepare(
        _Objective(params, loss_fn), *[each for each, _ in optimizers]
    )
    progress.restore_scale(accelerator.scaler)
    losses = _Losses(progress, accelerator, lambda step: batch_of(step).get("index"))

    def batch_of(step: int) -> Batch:
        return get_batch(step, torch.Generator(device).manual_seed(batch_seed(config.seed, step)))

    def take_step(step: int) -> None:
        """One step of the optimisers on one global batch."""
        # Layers that draw for themselves, like dropout, use the global generator.
        _seed_layers(device, layers_seed(config.seed, step, accelerator.process_index))
        # With one process a signal may interrupt the step, as nothing changes before the optimisers
        # step. Several processes must finish it together.
        with interrupts.at_once() if processes == 1 else contextlib.nullcontext():
            draws = BatchDraws(noise_seed(config.seed, step), config.batch_size, device)
            batch = batch_of(step)
            loss = _backward(objective, batch, draws, micro_batches, accelerator)
        losses.add(loss)
        norm = accelerator.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
        for optimizer in prepared:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
        step_all(prepared, accelerator.scaler, norm)
        ema.update(params)
        progress.step, progress.ema_updates, progress.looked = step + 1, ema.updates, False

    def save_now() -> None:
        progress.keep_scale(accelerator.scaler)
        save_state(run_dir / STATE, params, ema, optimizers, progress, settings)

    accelerator.wait_for_everyone()
    if main and not (run_dir / STATE).exists():
        save_now()  # a run folder with results but without a state has then lost it
    # In each turn: observe the last step if due, end if a signal was received, take the next step.
    with _Interrupts() as interrupts, _Observer(config, run_dir, progress, main) as observer:
        if main:
            observer.say(f"training on {device}, processes: {processes}, from step {progress.step}")
            for name in ("device", "compile"):
                now = getattr(config, name)
                if (then := before.get(name, now)) != now:
                    observer.say(
                        f"this run was begun with {name} = {then}: results will not be bit-equal to"
                        " those of an uninterrupted run"
                    )
        stop = False
        while not stop:
            due = not progress.looked and observer.due(progress.step)
            if due or losses.due() or (interrupts.received and processes == 1):
                stop = losses.read(interrupts.received)
            if due and not stop:
                _check_weights(params, progress.step)
                if main:
                    with contextlib.suppress(Interrupted):
                        observer.look(ema.applied_to(params), interrupts, save, validate, preview)
                        progress.looked = True
                        if _due(progress.step, config.checkpoint_every, config.steps):
                            save_now()
                stop = losses.read(interrupts.received)
            if stop or progress.step == config.steps:
                break
            try:
                with contextlib.suppress(Interrupted):
                    take_step(progress.step)
                    observer.bar.update()
            except InputError:  # the step's data cannot be read; nothing has changed yet
                if processes == 1:  # with several, the others wait for this one's gradients
                    losses.read(interrupts.received)
                    save_now()
                raise
        if stop:
            _check_weights(params, progress.step)
            if main:
                save_now()
                observer.say_stopped()
            raise Terminated if interrupts.terminated else KeyboardInterrupt
    accelerator.wait_for_everyone()
    if main and save:
        print(f"the weights are in {run_dir / 'last'}")
        if next_command:
            print(f"next: {next_command.replace('LAST', str(run_dir / 'last'))}")


def _check_weights(params: Mapping[str, Tensor], step: int) -> None:
    """Raises InputError if the update of the last step made a weight infinite or NaN."""
    finite = torch.stack([param.detach().sum().isfinite() for param in params.values()])
    if not bool(finite.all()):
        raise InputError(
            f"the weights are not finite after step {step}: try a lower --lr or --weight-decay; the"
            " last checkpoint is kept"
        )


def _seed_layers(device: torch.device, seed: int) -> None:
    """Seeds the global generators of the CPU and of the device.

    `torch.manual_seed` seeds those of all devices, which takes half a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _backward(
    objective: nn.Module,
    batch: Batch,
    draws: BatchDraws,
    micro_batches: Sequence[slice],
    accelerator: "Accelerator",
) -> Tensor:
    """Adds the gradients of this process's micro-batches; returns their mean loss, a scalar."""
    total = torch.zeros((), device=accelerator.device)
    for micro, part in enumerate(micro_batches, 1):
        inputs = {name: _moved(value[part], accelerator.device) for name, value in batch.items()}
        # Processes exchange gradients after the last micro-batch only.
        last = micro == len(micro_batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(objective):
            with accelerator.autocast():
                loss = objective(inputs, draws.part(part))
            accelerator.backward(loss / len(micro_batches))
        total += loss.detach() / len(micro_batches)
    return total


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From pinned memory the CPU need not wait until it is copied."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def check_resumable(config: TrainingConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError if a run in the folder had other settings, as `fit` does."""
    defaults = dataclasses.asdict(TrainingConfig())
    check_settings(run_dir, {**dataclasses.asdict(config), **settings}, defaults)


def check_sizes_of_start(folder: Path, sizes: Any, default: Any, of_start: Any) -> None:
    """Raises InputError if flags `--model.*` ask for other sizes than the network in `folder` has.

    `sizes`, `default` and `of_start` are configurations: given, without flags, and of the network
    that --init-from names.
    """
    if sizes not in (default, of_start):
        raise InputError(
            f"--init-from {folder} brings a network of its own sizes, so --model.* does not apply:"
            " leave it out"
        )


def settings_of(config: Any, *left_out: str, **more: Any) -> dict[str, Any]:
    """A trainer's own settings for `fit`: the fields of its dataclass `config`, and `more`.

    The fields `training`, `run_dir` and `left_out` are omitted; `left_out` are paths of data, which
    may move, and what does not change the trained weights.
    """
    values = dataclasses.asdict(config)
    return {
        key: values[key] for key in values if key not in ("training", "run_dir", *left_out)
    } | more


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate at `step`, after a linear warm-up.

    "cosine" is half a cosine down to 0 (arXiv:1608.03983). "constant" falls linearly to 0 over the
    last fraction COOL_DOWN of the run (arXiv:2405.18392); the fall can thus begin at any
    checkpoint.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr * min(1.0, (config.steps - step) / max(COOL_DOWN * config.steps, 1.0))
    through = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * through))


def new_network(
    make: Callable[[], Network], evaluate: Callable[[Network], Any] | None = None
) -> Network:
    """The network that `make` builds, to be trained from the start.

    It is first built without memory and, where libraries do not judge its sizes when it is built,
    evaluated so by `evaluate`. Raises InputError if the sizes in the flags --model.* make no
    network, or if its training needs more memory than there is.
    """
    with (
        describing(Path("--model"), "a network"),
        torch.random.fork_rng(devices=[]),  # the weights are drawn once
        torch.device("meta"),
    ):
        network = make()
        if evaluate:
            evaluate(network)
        parameters = list(network.parameters())
    check_memory(parameters)
    return make()


def prepare_network(model: nn.Module, config: TrainingConfig) -> Callable[..., Tensor]:
    """Moves the model to the training device and sets its memory format, both in place.

    Returns the network that the loss calls: the model, compiled if `config.compile` is set.
    """
    model.to(pick_device(config.device))
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return torch.compile(model) if config.compile else model


def refuse_compile(config: TrainingConfig) -> None:
    """Raises InputError if --compile is given to a trainer that does not compile its networks."""
    if config.compile:
        raise InputError(
            "--compile is for the trainers of Problems 1 and 2 and of the small U-Net: leave it out"
        )


def refuse_slices(config: TrainingConfig, what: str) -> None:
    """Raises InputError if `what`, a loss that compares the images of a batch, would see slices."""
    slices = config.gradient_accumulation_steps != 1 or this_process().count != 1
    if slices or (config.device_batch_size or config.batch_size) < config.batch_size:
        raise InputError(
            f"{what} needs its whole batch at once: train in one process, without"
            " --gradient-accumulation-steps and --device-batch-size"
        )


def _check_config(config: TrainingConfig) -> None:
    """Raises InputError on a number outside its range."""
    check_fields(config)
    derive_seed(config.seed)
    check_optimizer(config.optimizer)
    if config.tensorboard:
        check_tensorboard()


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something that comes every `every` steps is due after `step`; it never is at 0."""
    return every > 0 and (step % every == 0 or step == steps)


def micro_batches_of(config: TrainingConfig, accelerator: "Accelerator") -> list[slice]:
    """This process's slices of the global batch, equal and contiguous, one for each micro-batch.

    Their number is `config.gradient_accumulation_steps` or, with `config.device_batch_size`, the
    smallest from there on that gives equal slices of at most that size. Raises InputError if the
    batch cannot be divided so.
    """
    processes = accelerator.num_processes
    count = config.gradient_accumulation_steps
    if config.device_batch_size is not None:
        own = -(-config.batch_size // processes)  # images per process, rounded up
        fewest = max(count, -(-own // config.device_batch_size))
        count = next((n for n in range(fewest, own + 1) if own % n == 0), count)
    if config.batch_size % (processes * count):
        raise InputError(
            f"--batch-size {config.batch_size} must be a multiple of processes times gradient"
            f" accumulation steps, {processes * count}"
        )
    size = config.batch_size // (processes * count)
    firsts = [size * (micro * processes + accelerator.process_index) for micro in range(count)]
    return [slice(first, first + size) for first in firsts]


def _check_slice_memory(
    loss_fn: Callable[[Batch, Draws], Tensor],
    get_batch: Callable[[int, torch.Generator], Batch],
    config: TrainingConfig,
    micro_batches: Sequence[slice],
    accelerator: "Accelerator",
) -> None:
    """Raises InputError if the gradients of a large micro-batch need more memory than there is.

    A process that takes more is killed without a word. What the backward pass keeps of the forward
    pass is measured for two small micro-batches, and grows in a line.
    """
    size = len(range(*micro_batches[0].indices(config.batch_size)))
    if size <= LARGE_SLICE:
        return
    whole = get_batch(0, torch.Generator().manual_seed(batch_seed(config.seed, 0)))

    def kept(examples: int) -> int:
        """Bytes that the backward pass keeps of the forward pass, weights included."""
        storages: dict[int, int] = {}  # bytes by address

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        part = slice(0, examples)
        batch = {name: value[part] for name, value in whole.items()}
        draws = BatchDraws(noise_seed(config.seed, 0), examples).part(part)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            accelerator.autocast(),
        ):
            _ = loss_fn(batch, draws)  # holds the graph, so no address comes twice
        return sum(storages.values())

    few, more = MEASURED_EXAMPLES
    needed = (kept(more) - kept(few)) / (more - few) * size
    if needed > (available := available_memory()):
        raise InputError(
            f"{size} examples at once need about {needed / 1e9:.0f} GB of memory, but"
            f" {available / 1e9:.1f} GB are available: make --device-batch-size or --batch-size"
            " smaller"
        )


class _Losses:
    """Losses kept on the device and read a few times a second.

    The CPU thus does not wait for the device in each step.
    """

    def __init__(
        self,
        progress: RunProgress,
        accelerator: "Accelerator",
        images_of: Callable[[int], Tensor | None],
    ) -> None:
        self._progress, self._accelerator, self._images_of = progress, accelerator, images_of
        self._unread: list[Tensor] = []
        self._next, self._read_at = progress.step + 1, time.monotonic()

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a step, a scalar on the device."""
        self._unread.append(loss)

    def due(self) -> bool:
        """Whether it is time to read the losses."""
        return self._progress.step >= self._next

    def read(self, received: bool) -> bool:
        """Reads the losses since the last reading; returns whether any process received a signal.

        Waits for the device. Raises InputError that names the step if a loss is not finite.
        """
        flags = torch.tensor(
            [float(received), time.monotonic() - self._read_at], device=self._accelerator.device
        )
        *losses, stop, seconds = self._accelerator.reduce(
            torch.stack([*self._unread, *flags]), "mean"
        ).tolist()
        self._unread.clear()
        for step, loss in enumerate(losses, self._progress.step - len(losses)):
            if not math.isfinite(loss):
                images = self._images_of(step)
                raise InputError(
                    f"the loss is {loss} at step {step}, on the batch of images"
                    f" {'unknown' if images is None else images.tolist()}; the last checkpoint is"
                    " kept"
                )
            self._progress.loss_sum += loss
            self._progress.loss_count += 1
        if losses:
            pace = max(seconds / len(losses), 1e-6)
            between = min(max(int(SECONDS_BETWEEN_READINGS / pace), 1), STEPS_BETWEEN_READINGS)
            self._next, self._read_at = self._progress.step + between, time.monotonic()
        return stop > 0.0


class _Observer:
    """Visible output of a run: progress bar, metrics, validations, previews and checkpoints."""

    def __init__(
        self, config: TrainingConfig, run_dir: Path, progress: RunProgress, main: bool
    ) -> None:
        self._config, self._run_dir, self._progress = config, run_dir, progress
        self._writer = tensorboard_writer(run_dir) if config.tensorboard and main else None
        self.bar = Progress(
            desc="training",
            unit="steps",
            total=config.steps,
            initial=progress.step,
            disable=not main,
        )
        self._started, self._started_at = time.monotonic(), progress.step
        self._shown = ""

    def __enter__(self) -> "_Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self._writer:
            self._writer.close()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        self.bar.write(line)

    def due(self, step: int) -> bool:
        """Whether metrics, a validation, a preview or a checkpoint are due after this step."""
        return self.looks(step) or _due(step, self._config.log_every, self._config.steps)

    def looks(self, step: int) -> bool:
        """Whether anything that is due after this step needs the EMA parameters."""
        config = self._config
        intervals = (config.validate_every, config.preview_every, config.checkpoint_every)
        return any(_due(step, every, config.steps) for every in intervals)

    def say_stopped(self) -> None:
        """Prints where the run stopped and how to resume it."""
        step, steps = self._progress.step, self._config.steps
        self.say(f"stopped at step {step} of {steps}; run the same command again to go on")

    def look(
        self,
        averaged: contextlib.AbstractContextManager[None],
        interrupts: "_Interrupts",
        save: Callable[[Path], None] | None,
        validate: Callable[[], dict[str, float]] | None,
        preview: Callable[[Path], None] | None,
    ) -> None:
        """Does what is due after this step and writes the line of metrics; a signal interrupts it.

        Inside `averaged` the parameters hold their EMA.
        """
        config = self._config
        progress = self._progress
        run_dir = self._run_dir
        step = self._progress.step
        line = {}
        logs = _due(step, config.log_every, config.steps)
        if logs:
            line |= {
                "loss": progress.loss_sum / progress.loss_count,
                "lr": learning_rate(config, step - 1),
            }
            rate = (
                config.batch_size * (step - self._started_at) / (time.monotonic() - self._started)
            )
            self._shown = f"loss {line['loss']:.4f}, {rate:.0f} images/s"
        with averaged if self.looks(step) else contextlib.nullcontext():
            if validate and _due(step, config.validate_every, config.steps):
                self.bar.doing("validating")
                with interrupts.at_once():
                    numbers = validate()
                line |= {f"validation_{name}": value for name, value in numbers.items()}
                if numbers["loss"] < progress.best:
                    if save:
                        save(run_dir / "best")
                    progress.best = numbers["loss"]
            if preview and _due(step, config.preview_every, config.steps):
                self.bar.doing("drawing a preview")
                with interrupts.at_once():
                    preview(make_folder(run_dir / "samples") / f"{step:07d}.png")
            if save and _due(step, config.checkpoint_every, config.steps):
                save(run_dir / "last")
        if line:
            append_metrics(run_dir / METRICS, step, line, self._writer)
            progress.logged = step
            self.bar.set_postfix_str(self._shown)
        if logs:
            progress.loss_sum, progress.loss_count = 0.0, 0


class _Interrupts:
    """Inside the block, Ctrl-C and SIGTERM are recorded and do not end the process.

    Only a block `at_once` is interrupted by them.
    """

    def __init__(self) -> None:
        self.received = self.terminated = False
        self._breaks = False

    def __enter__(self) -> "_Interrupts":
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.received = True
        self.terminated = number == signal.SIGTERM
        if self._breaks:
            raise Interrupted(number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises Interrupted at once."""
        self._breaks = True
        try:
            if self.received:
                raise Interrupted(signal.SIGTERM if self.terminated else signal.SIGINT)
            yield
        except Exception as error:
            if stopped := interruption_behind(error):
                raise stopped from None
            raise
        finally:
            self._breaks = False
