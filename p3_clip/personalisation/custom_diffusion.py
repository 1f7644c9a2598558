"""Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488): the keys and values of the
cross-attention, and nothing else of the U-Net.

What a picture shows comes in through the text alone, and text comes in through the matrices that
make keys and values of it: those are trained, with a learned word, and everything else stays.
Several concepts are trained jointly, or each by itself and then merged in closed form. Only the
trained matrices and words are saved.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from common.checkpoint import load_tensors, save_tensors
from common.errors import InputError
from p3_clip.personalisation.concepts import Concept

PROJECTIONS = (
    ".attn2.to_k.weight",
    ".attn2.to_v.weight",
)  # diffusers' names: attn2 is the attention to the text
Weights = Mapping[str, Tensor]


class CustomDiffusionResult(NamedTuple):
    """What Custom Diffusion learns."""

    weights: Weights
    """The key and value matrices of the cross-attention, by the U-Net's names, [out, D] each."""
    concepts: list[Concept]
    """The learned words."""


def projections(unet: nn.Module) -> dict[str, Parameter]:
    """The key and value matrices of the U-Net's cross-attention, by name."""
    return {name: param for name, param in unet.named_parameters() if name.endswith(PROJECTIONS)}


def merge(
    base: Weights, learned: Sequence[tuple[Weights, Tensor]], regularization: Tensor
) -> dict[str, Tensor]:
    """One set of matrices for several concepts that were trained apart (Equation 4 of the paper,
    Section 3.2).

    `learned` holds, for each concept, its matrices and the text features C [n, D] that should give
    its own keys and values; `regularization` [m, D] are features of other texts, whose keys and
    values should change least. For each matrix W [out, D] that minimises |W C_reg^T - W0 C_reg^T|
    subject to W C^T = V, with C and V of all concepts stacked: W = W0 + (V - W0 C^T) (d C^T)^-1 d,
    d = C (C_reg^T C_reg)^-1. In float64; directions that the features do not fill are left out by
    pseudo-inverses, so rows of C may repeat. Raises ValueError if the matrices' names differ.
    """
    if any(weights.keys() != base.keys() for weights, _ in learned):
        raise ValueError("the concepts were trained on other matrices")
    targets = torch.cat([features for _, features in learned]).double()  # [n, D]
    regularization = regularization.double()
    d = targets @ torch.linalg.pinv(regularization.T @ regularization, hermitian=True)  # [n, D]
    inverse = torch.linalg.pinv(d @ targets.T, hermitian=True)  # [n, n]
    merged = {}
    for name, weight in base.items():
        values = torch.cat(
            [features.double() @ weights[name].double().T for weights, features in learned]
        )  # [n, out]
        change = (values - targets @ weight.double().T).T @ inverse @ d  # [out, D]
        merged[name] = (weight.double() + change).to(weight.dtype)
    return merged


# ----------------------------------------------------------------------------
# Files.


def save_delta(path: Path, learned: CustomDiffusionResult) -> None:
    """Writes the trained matrices and the learned words as one safetensors file: all in which the
    model differs from its base."""
    weights = {f"unet/{name}": value for name, value in learned.weights.items()}
    save_tensors(
        path,
        weights | {f"concept/{concept.token}": concept.vectors for concept in learned.concepts},
    )


def load_delta(path: Path, base: Weights) -> CustomDiffusionResult:
    """Reads a file of `save_delta` for a U-Net with the matrices `base`.

    Raises InputError if it holds something else, or was trained on a U-Net of other sizes.
    """
    tensors, _ = load_tensors(path)
    weights = {
        name.removeprefix("unet/"): value
        for name, value in tensors.items()
        if name.startswith("unet/")
    }
    words = {
        name.removeprefix("concept/"): value
        for name, value in tensors.items()
        if name.startswith("concept/")
    }
    if not weights or len(weights) + len(words) < len(tensors):
        raise InputError(f"{path} holds nothing that Custom Diffusion trains")
    for name in sorted(weights.keys() | base.keys()):
        shapes = [list(state[name].shape) if name in state else None for state in (weights, base)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{path} was trained on another U-Net: {name} is {shapes[0]} in it, but {shapes[1]}"
                " here"
            )
    return CustomDiffusionResult(weights, [Concept(token, rows) for token, rows in words.items()])


@torch.no_grad()
def apply_weights(unet: nn.Module, weights: Weights) -> None:
    """Puts the matrices into a U-Net."""
    own = dict(unet.named_parameters())
    for name, value in weights.items():
        own[name].copy_(value)
