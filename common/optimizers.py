"""Optimisers of the training loop: AdamW, and Muon for the matrices of hidden layers."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

OptimizerName = Literal["adamw", "muon"]
SMALLEST_SIDE = 16  # of a matrix that Muon gets; entrances and exits of three channels are smaller
NamedOptimizer = tuple[
    torch.optim.Optimizer, dict[str, Tensor]
]  # and its parameters as it sees them, by name


def make_optimizers(
    params: Mapping[str, Parameter],
    name: OptimizerName,
    *,
    lr: float,
    beta2: float,
    weight_decay: float,
) -> list[NamedOptimizer]:
    """The optimisers that together move every parameter: one AdamW, after a `Muon` for hidden
    matrices if that is asked for."""
    hidden = {n: p for n, p in params.items() if name == "muon" and is_hidden_matrix(n, p)}
    others = {n: p for n, p in params.items() if n not in hidden}
    optimizers: list[NamedOptimizer] = []
    if hidden:
        muon = Muon(hidden.values(), lr, weight_decay)
        optimizers.append((muon, dict(zip(hidden, muon.matrices, strict=True))))
    if others:
        adamw = torch.optim.AdamW(
            others.values(), lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True
        )
        optimizers.append((adamw, others))
    return optimizers


def is_hidden_matrix(name: str, param: Tensor) -> bool:
    """Whether the parameter is the weight of a convolution or linear layer between hidden features,
    not a table of embeddings."""
    return param.dim() >= 2 and min(param.shape[:2]) >= SMALLEST_SIDE and "embedding" not in name


class Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) over
    convolutions too.

    A convolution [O, I, k, k] is stepped as the matrix [O, I k k], a view of its memory. Updates
    are scaled to the size of AdamW's (Moonlight, arXiv:2502.16982, Section 2.2), so that one
    learning rate serves both.
    """

    def __init__(
        self, weights: "list[Parameter] | Mapping", lr: float, weight_decay: float
    ) -> None:
        self.weights = list(weights)
        self.matrices = [Parameter(_as_matrix(weight.detach(), weight)) for weight in self.weights]
        super().__init__(
            self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves the weights along their gradients."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            weight.grad = matrix.grad = None


def _as_matrix(values: Tensor, weight: Tensor) -> Tensor:
    """`values`, laid out like `weight`, as a matrix with a row for each output; a view where the
    memory allows.

    The order of columns does not matter to Muon, so it is the order in memory: channels first or
    channels last.
    """
    return values.flatten(1) if weight.is_contiguous() else values.movedim(1, -1).flatten(1)
