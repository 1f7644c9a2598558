"""Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488): trained matrices, merging and files.

Text reaches the U-Net only through the matrices that project it to the keys and values of the
cross-attention. Those matrices are trained, together with the embedding of a new word; all other
weights stay frozen. Several concepts are trained jointly, or separately and then merged in closed
form. Only the trained matrices and words are saved.
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

# diffusers' names: attn2 is the cross-attention to the text.
PROJECTIONS = (".attn2.to_k.weight", ".attn2.to_v.weight")
Weights = Mapping[str, Tensor]


class CustomDiffusionResult(NamedTuple):
    """What was learned: matrices and words, or, by textual inversion, words only."""

    weights: Weights
    """Key and value matrices of the cross-attention, [out, D] each, by the U-Net's names; may be
    empty."""
    concepts: list[Concept]
    """The learned words."""


def projections(unet: nn.Module) -> dict[str, Parameter]:
    """Returns the key and value matrices of the U-Net's cross-attention, by name."""
    return {name: param for name, param in unet.named_parameters() if name.endswith(PROJECTIONS)}


def merge(
    base: Weights, learned: Sequence[tuple[Weights, Tensor]], regularization: Tensor
) -> dict[str, Tensor]:
    """Merges the matrices of concepts that were trained separately, in closed form.

    Equation 4, Section 3.2 of the paper. `base` holds the base model's matrices W0. `learned`
    holds, for each result, its matrices and the text features C [n, D] that must keep the keys and
    values V that these matrices give. `regularization` C_reg [m, D] are the features of other
    texts, whose keys and values should change least. Each merged matrix W [out, D] minimises
    |W C_reg^T - W0 C_reg^T| subject to W C^T = V, with C and V of all results stacked:

        W = W0 + (V - W0 C^T) (d C^T)^-1 d,    d = C (C_reg^T C_reg)^-1

    Computed in float64. Pseudo-inverses leave out the directions that the features do not span, so
    rows of C may repeat. Raises ValueError if the names of the matrices differ.
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
    """Writes matrices and words, all that differs from the base model, to a safetensors file."""
    weights = {f"unet/{name}": value for name, value in learned.weights.items()}
    save_tensors(
        path,
        weights | {f"concept/{concept.token}": concept.vectors for concept in learned.concepts},
    )


def load_delta(path: Path, base: Weights) -> CustomDiffusionResult:
    """Reads a file written by `save_delta`, for a U-Net with the matrices `base`.

    Raises InputError if it holds anything else, or matrices of other names or shapes than `base`.
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
        raise InputError(f"{path} is not a result of Custom Diffusion")
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
    """Copies the matrices into a U-Net, in place."""
    own = dict(unet.named_parameters())
    for name, value in weights.items():
        own[name].copy_(value)
