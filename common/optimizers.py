"""Optimisers of the training loop: AdamW, also with 8-bit moments, and Muon for hidden matrices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from common.devices import has_bf16_products
from common.errors import InputError

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.amp import GradScaler

OptimizerName = Literal["adamw", "adamw8bit", "muon"]
STATES_8BIT = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
"""Keys of bitsandbytes' optimiser state, besides "step"."""
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of Muon's iteration, from Jordan et al. 2024."""
ITERATIONS = 5
SMALLEST_SIDE = 16  # of a matrix for Muon; excludes layers from or to the channels of an image
NamedOptimizer = tuple[torch.optim.Optimizer, dict[str, Tensor]]
"""An optimiser and its own parameters by name."""


def make_optimizers(
    params: Mapping[str, Parameter],
    name: OptimizerName,
    *,
    lr: float,
    beta2: float,
    weight_decay: float,
) -> list[NamedOptimizer]:
    """The optimisers that together update all parameters.

    "adamw" gives one AdamW, "adamw8bit" bitsandbytes' AdamW with moments of 8 bits
    (arXiv:2110.02861); "muon" gives a `Muon` for the matrices of hidden layers, then an AdamW for
    the rest. Each comes with its parameters by name.
    """
    hidden = {n: p for n, p in params.items() if name == "muon" and is_hidden_matrix(n, p)}
    others = {n: p for n, p in params.items() if n not in hidden}
    optimizers: list[NamedOptimizer] = []
    if hidden:
        optimizers.append((Muon(hidden.values(), lr, weight_decay), hidden))
    if others:
        settings = {"lr": lr, "betas": (0.9, beta2), "weight_decay": weight_decay}
        if name == "adamw8bit":
            for param in others.values():  # its step would do so, but not to the moments
                param.data = param.data.contiguous()
            adamw = _adamw8bit()(others.values(), **settings)
        else:
            adamw = torch.optim.AdamW(others.values(), **settings, fused=True)
        optimizers.append((adamw, others))
    return optimizers


def step_all(
    optimizers: "Sequence[AcceleratedOptimizer]", scaler: "GradScaler | None", norm: Tensor
) -> None:
    """Steps the optimisers and forgets the gradients, which are unscaled already.

    With the loss scaling of fp16, no optimiser steps if the `norm` of all gradients is not finite:
    they were clipped together, so an overflow in one's spoils the others'. `scaler` is updated
    once, after all of them: the optimisers of accelerate would each update it, after which the next
    one unscales a second time.
    """
    overflow = scaler is not None and not bool(norm.isfinite())
    for optimizer in () if overflow else optimizers:
        if scaler is None:
            optimizer.optimizer.step()
        else:
            scaler.step(optimizer.optimizer)
    if scaler is not None:
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def check_optimizer(name: OptimizerName) -> None:
    """Raises InputError if the optimiser needs a package that is not installed."""
    if name == "adamw8bit":
        _adamw8bit()


def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "--optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes"
        ) from None
    return AdamW8bit


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Whether the parameter is the weight of a linear or convolution layer between hidden features.

    Both of its widths are at least SMALLEST_SIDE. Embedding tables do not count.
    """
    return param.dim() >= 2 and min(param.shape[:2]) >= SMALLEST_SIDE and "embedding" not in name


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) with Nesterov momentum.

    A convolution [O, I, k, k] is updated as the matrix [O, I k k], a view of its memory. Updates
    are scaled to the size of AdamW's (Moonlight, arXiv:2502.16982, Section 2.2), so both use one
    learning rate. `torch.optim.Muon` takes matrices only.
    """

    def __init__(
        self, weights: Iterable[Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates the weights by their gradients."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                # Views are made in each step: distributed training moves weights to other memory.
                matrix, grad, average = (
                    _as_matrix(values, weight)
                    for values in (weight, weight.grad, self.state[weight]["momentum_buffer"])
                )
                average.lerp_(grad, 1.0 - momentum)
                update = orthogonalized(grad.lerp(average, momentum))
                matrix.mul_(1.0 - lr * group["weight_decay"])
                matrix.add_(update, alpha=-lr * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearly orthogonal matrix [A, B] that is nearest to the given one.

    It has the singular vectors of `matrix`, and singular values between about 0.7 and 1.2 instead
    of 1, as the quintic Newton-Schulz iteration of Jordan et al. 2024 leaves them. It is computed
    in bfloat16 where the device has instructions for it, and in float32 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.to(torch.bfloat16 if has_bf16_products(x.device) else torch.float32)
    x = x / x.norm().clamp(min=1e-7)  # singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _as_matrix(values: Tensor, weight: Tensor) -> Tensor:
    """`values`, laid out like `weight`, as a matrix with one row per output; a view if possible.

    Muon does not depend on the order of the columns, so they keep the order in memory: channels
    first or channels last.
    """
    return values.flatten(1) if weight.is_contiguous() else values.movedim(1, -1).flatten(1)
