"""The self-test `p3_controlnet.train --check`: wiring and gradients, before a day is spent.

A few steps on a few pairs show what is wrong where a loss curve does not: a ControlNet that changes
the base model at step 0, a gradient that is blocked or reaches frozen weights, hints in another
range, a base model whose loss is that of a network which knows nothing. Nothing is written.
"""

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from common.data.examples import drawn_circles
from common.data.fill50k import load_fill50k
from common.devices import DTYPES
from common.diffusion.loss import LossWeighting, diffusion_loss
from common.ema import EMA
from common.images import resize, to_hint, to_model_range
from common.latent.model import LatentCondition, LatentDiffusion
from common.optimizers import make_optimizers, step_all
from common.seeds import BatchDraws, noise_seed
from common.training import Batch, micro_batches_of
from p3_controlnet.loss import latent_loss

if TYPE_CHECKING:
    from accelerate import Accelerator

    from p3_controlnet.train import Config

STEPS = 3  # until every parameter has a gradient; as many again are timed
MOST_LOSS = 0.5  # of the loss of a network that predicts 0; trained base models have less
MOST_MEMORY = 0.95  # fraction of the device's memory


class Check(NamedTuple):
    """The outcome of one check."""

    passed: bool
    what: str
    """What was measured, with the number."""


class Validation(NamedTuple):
    """A training's validation."""

    run: Callable[[int], object]
    """Validates on pictures that are drawn in this many steps."""
    sampling_steps: int
    """The steps that the training takes."""


def run_checks(
    config: "Config",
    model: LatentDiffusion,
    accelerator: "Accelerator",
    size: int,
    validation: Validation,
) -> int:
    """Prints a line PASS or FAIL for each check; returns the exit code, 0 or 1.

    `model` has a ControlNet as it is before the first step. `size` is the side of the training
    images, in pixels. The model is changed: its frozen weights are cast to the precision of
    training, and the ControlNet takes a few steps.
    """
    torch.set_float32_matmul_precision("high" if config.training.tf32 else "highest")
    passed = True
    for check in _checks(config, model, accelerator, size, validation):
        accelerator.print(f"{'PASS' if check.passed else 'FAIL'} {check.what}", flush=True)
        passed &= check.passed
    return 0 if passed else 1


def _checks(
    config: "Config",
    model: LatentDiffusion,
    accelerator: "Accelerator",
    size: int,
    validation: Validation,
) -> Iterator[Check]:
    batch, null = _encoded(config, model, size)
    model.cast(DTYPES[config.training.mixed_precision])
    with torch.no_grad(), accelerator.autocast():
        if config.init_from is None:
            yield _starts_from_base(model, batch)
        yield _loss_of_base(config, model, batch)
    hints: list[Tensor] = []
    hook = model.controlnet.register_forward_pre_hook(lambda _, inputs: hints.append(inputs[1]))
    steps = _Steps(config, model, accelerator, batch, null)
    yield from _gradients(steps)
    yield _hints_in_range(torch.cat(hints))
    hook.remove()
    hints.clear()
    yield from _cost(steps, validation)


def _encoded(config: "Config", model: LatentDiffusion, size: int) -> tuple[Batch, Tensor]:
    """One global batch of pairs, of fill50k if it is given, and the empty prompt's features."""
    count, device = config.training.batch_size, model.unet.device
    if config.fill50k:
        pairs = load_fill50k(config.fill50k, "training")
        pairs = [pairs[i % len(pairs)] for i in range(count)]
        images = torch.stack([resize(pair.read_target(), size, "area") for pair in pairs])
        hints = torch.stack([resize(pair.read_source(), size, "area")[:1] for pair in pairs])
        captions = [pair.prompt for pair in pairs]
    else:
        images, captions, hints = dataclasses.astuple(drawn_circles(count, size, 0))
    latents = [model.encode(to_model_range(image[None]).to(device)) for image in images]
    batch = {
        "latent": torch.cat(latents),
        "context": model.encode_text(captions),
        "hint": hints.to(device),
    }
    return batch, model.encode_text([""])[0]


def _hints_in_range(hints: Tensor) -> Check:
    """Of hints [N, 3, H, W] as the ControlNet got them."""
    low, high = hints.min().item(), hints.max().item()
    # A thin white outline, averaged over areas, is grey; 1 / 255 is a hint that was divided twice.
    return Check(
        low >= 0.0 and 0.1 < high <= 1.0,
        f"hints lie in [{low:.3f}, {high:.3f}]; [0, 1] is expected",
    )


def _starts_from_base(model: LatentDiffusion, batch: Batch) -> Check:
    x_t, t = batch["latent"][:1], torch.full((1,), 500, device=model.unet.device)
    hint = to_hint(batch["hint"][:1]).expand(-1, 3, -1, -1)
    controlled = LatentCondition(batch["context"][:1], hint)
    outputs = [
        model.apply_model(x_t, t, condition)
        for condition in (controlled, controlled.without_control())
    ]
    difference = (outputs[0] - outputs[1]).abs().max()
    return Check(
        difference.item() == 0.0,
        f"before training the output differs from the base model's by {difference.item():g}",
    )


def _loss_of_base(config: "Config", model: LatentDiffusion, batch: Batch) -> Check:
    """The base model's plain loss beside that of a network that predicts 0, on the same draws."""
    losses, zero = [], []
    for i in range(len(batch["latent"])):
        x0, context = batch["latent"][i : i + 1], batch["context"][i : i + 1]
        for network, found in ((model.apply_model, losses), (_nothing, zero)):
            draws = BatchDraws(noise_seed(config.training.seed, i), 1, x0.device)
            found.append(
                diffusion_loss(
                    network,
                    model.schedule,
                    x0,
                    LatentCondition(context),
                    draws.part(slice(0, 1)),
                    parameterization=model.parameterization,
                ).item()
            )
    loss, nothing = sum(losses) / len(losses), sum(zero) / len(zero)
    return Check(
        math.isfinite(loss) and loss < MOST_LOSS * nothing,
        f"the base model's loss is {loss:.3f} on {len(losses)} images, {loss / nothing:.2f} of that"
        f" of predicting 0; below {MOST_LOSS} is expected (a wrong base, scale of latents or text"
        " gives about 1)",
    )


def _nothing(x_t: Tensor, t: Tensor, condition: LatentCondition) -> Tensor:
    return torch.zeros_like(x_t)


class _Steps:
    """Optimiser steps as `common.training.fit` takes them, on one batch."""

    def __init__(
        self,
        config: "Config",
        model: LatentDiffusion,
        accelerator: "Accelerator",
        batch: Batch,
        null: Tensor,
    ) -> None:
        self.config, self.model, self.accelerator = config, model, accelerator
        self.batch, self.null, self.count = batch, null, 0
        self.params = dict(model.controlnet.named_parameters())
        training = config.training
        made = make_optimizers(
            self.params,
            training.optimizer,
            lr=training.lr,
            beta2=training.beta2,
            weight_decay=training.weight_decay,
        )
        self.optimizers = [accelerator.prepare(optimizer) for optimizer, _ in made]
        self.ema = EMA(self.params, training.ema_decay, training.ema)
        self.micro_batches = micro_batches_of(training, accelerator)
        self.weighting = LossWeighting(
            config.loss_weight, model.parameterization, config.timesteps
        ).to(accelerator.device)

    def gradients(self) -> float:
        """Adds the gradients of the batch; returns its loss."""
        training = self.config.training
        draws = BatchDraws(
            noise_seed(training.seed, self.count), training.batch_size, self.null.device
        )
        total = 0.0
        for part in self.micro_batches:
            with self.accelerator.autocast():
                loss = latent_loss(
                    self.model,
                    {name: value[part] for name, value in self.batch.items()},
                    self.null,
                    draws.part(part),
                    cond_drop_prob=self.config.cond_drop_prob,
                    **self.weighting.options,
                )
            if loss.requires_grad:  # else all parameters lack a gradient, which is reported
                self.accelerator.backward(loss / len(self.micro_batches))
            total += loss.item() / len(self.micro_batches)
        return total

    def update(self) -> None:
        """Changes the weights and forgets the gradients."""
        most = self.config.training.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.params.values(), most)
        step_all(self.optimizers, self.accelerator.scaler, norm)
        self.ema.update(self.params)
        self.count += 1


def _gradients(steps: _Steps) -> Iterator[Check]:
    """Which parameters have a gradient in the first steps, and that no frozen one has.

    At step 1 only the zero convolutions of the residuals have one, at step 2 all but the layers of
    the hint encoder before its own zero convolution, at step 3 all. A trained ControlNet has all
    from the start.
    """
    control = steps.model.controlnet
    hint_layers = len(list(control.controlnet_cond_embedding.parameters())) - 2
    expected = [len(steps.params) - 2 * control.num_residuals, hint_layers, 0]
    if steps.config.init_from is not None:
        expected = [0, 0, 0]
    losses, lack = [], []
    for _ in range(STEPS):
        losses.append(steps.gradients())
        lack.append(
            sum(param.grad is None or not param.grad.any() for param in steps.params.values())
        )
        steps.update()
    numbers = ", ".join(map(str, lack))
    yield Check(
        lack == expected,
        f"of {len(steps.params)} parameters {numbers} lack a gradient at steps 1, 2, 3; expected"
        f" {', '.join(map(str, expected))}",
    )
    yield Check(
        all(map(math.isfinite, losses)),
        f"the training loss is {', '.join(f'{loss:.3f}' for loss in losses)} at steps 1, 2, 3",
    )
    model = steps.model
    touched = [
        param
        for network in (model.unet, model.autoencoder, model.text_encoder)
        for param in network.parameters()
        if param.grad is not None
    ]
    yield Check(not touched, f"{len(touched)} frozen weights have a gradient")


def _cost(steps: _Steps, validation: Validation) -> Iterator[Check]:
    """Time and memory of a step and of a validation, and what the whole training takes from it."""
    device, training = steps.null.device, steps.config.training

    def take_steps() -> None:
        for _ in range(STEPS):
            steps.gradients()
            steps.update()

    seconds = _seconds(take_steps, device) / STEPS
    hours = seconds * training.steps / 3600.0
    yield Check(
        math.isfinite(seconds),
        f"a step of {training.batch_size} images ({len(steps.micro_batches)} micro-batches) takes"
        f" {seconds:.2f} s: {training.steps} steps take {hours:.1f} hours without validations",
    )
    if training.validate_every:
        # A validation of 1 step has all that one of many has, but for the other sampling steps.
        validation.run(1)  # the first one prepares, and takes longer
        one, two = (_seconds(lambda count=count: validation.run(count), device) for count in (1, 2))
        whole = one + (validation.sampling_steps - 1) * max(two - one, 0.0)
        share = whole / (whole + training.validate_every * seconds)
        yield Check(
            math.isfinite(share),
            f"a validation of {steps.config.validation_pictures} pictures takes {whole:.1f} s,"
            f" every {training.validate_every} steps: {100.0 * share:.1f} % of the time",
        )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device) / 2**30
        held = torch.cuda.get_device_properties(device).total_memory / 2**30
        yield Check(
            peak <= MOST_MEMORY * held, f"the peak of memory is {peak:.1f} of {held:.1f} GiB"
        )
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield Check(peak > 0.0, f"the peak of memory is {peak:.1f} GiB")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time that `work` takes, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - start
