"""Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488): trained matrices, merging and files.

Text reaches the U-Net only through the matrices that project it to the keys and values of the
cross-attention. Those matrices are trained, together with the embedding of a new word; all other
weights stay frozen. Several concepts are trained jointly, or separately and then merged in closed
form. Only the trained matrices and words are saved.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from common.checkpoint import check_finite, is_plain_float, save_tensors
from common.errors import InputError
from common.files import make_folder
from common.latent.stable_diffusion.naming import UNET, unet_names
from common.weights import say
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.formats import named_concepts, save_concepts, save_pickle

# diffusers' names: attn2 is the cross-attention to the text.
PROJECTIONS = (".attn2.to_k.weight", ".attn2.to_v.weight")
Weights = Mapping[str, Tensor]
Form = Literal["own", "diffusers", "authors", "authors_compvis"]
DIFFUSERS_NAME = "pytorch_custom_diffusion_weights"
_PROCESSOR = r".processor.\1_custom_diffusion."


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


def keep_start(unet: nn.Module) -> None:
    """Keeps the matrices from learning on the start token, whose features are those of all prompts.

    The paper's code and diffusers' do the same: the keys and values of that token pass no gradient.
    Their values are unchanged. Works on the U-Net in place.
    """

    def detach_first(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    for name, module in unet.named_modules():
        if f"{name}.weight".endswith(PROJECTIONS):
            module.register_forward_hook(detach_first)


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


def save_delta(
    path: Path, learned: CustomDiffusionResult, form: Form = "own", unet: nn.Module | None = None
) -> None:
    """Writes matrices and words, all that differs from the base model, in one of the forms.

    - own: a safetensors file.
    - diffusers: the folder that diffusers' training script writes, with an empty entry for each
      self-attention of `unet`.
    - authors: delta.bin of the authors' code on diffusers.
    - authors_compvis: delta.ckpt of the authors' code on CompVis's, with CompVis's names of the
      matrices, which follow from `unet`. It holds the words' vectors without their names.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in learned.weights.items()}
    words = {concept.token: concept.vectors for concept in learned.concepts}
    if form == "own":
        matrices = {f"unet/{name}": value for name, value in weights.items()}
        save_tensors(path, matrices | {f"concept/{token}": rows for token, rows in words.items()})
    elif form == "diffusers":
        make_folder(path)
        entries: dict[str, Any] = {
            re.sub(r"\.(to_[kv])\.", _PROCESSOR, name): value for name, value in weights.items()
        }
        for name, _ in unet.named_modules():
            if name.endswith(".attn1"):
                entries[f"{name}.processor"] = {}
        save_pickle(path / f"{DIFFUSERS_NAME}.bin", entries)
        for concept in learned.concepts:
            file = path / f"{concept.token.replace('/', '_')}.bin"
            save_concepts(file, [concept], "diffusers")
    elif form == "authors":
        save_pickle(path, {"unet": weights, "modifier_token": _single(words)})
    else:
        theirs = unet_names(unet.state_dict())
        rows = torch.stack(list(_single(words).values()))
        matrices = {theirs[name]: value for name, value in weights.items()}
        save_pickle(path, {"state_dict": matrices | {"embed": rows}})


def _single(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The words' vectors [D]. Raises InputError if one has several, which the form cannot hold."""
    for token, rows in words.items():
        if len(rows) != 1:
            raise InputError(f"{token} has {len(rows)} vectors, but the form holds one for a word")
    return {token: rows[0] for token, rows in words.items()}


def is_delta(content: Any) -> bool:
    """Whether the content of a file holds matrices of Custom Diffusion, in any of the forms."""
    if not isinstance(content, Mapping):
        return False
    parts = [content, *(content.get(name) for name in ("unet", "state_dict"))]
    names = [name for part in parts if isinstance(part, Mapping) for name in part]
    return any(isinstance(name, str) and ".attn2." in name for name in names)


def load_delta(path: Path, content: Any, unet: nn.Module) -> CustomDiffusionResult:
    """The matrices and words in the content of the file `path`, in any form of `save_delta`.

    Raises InputError if it holds anything else, or matrices of other names or shapes than `unet`.
    """
    entries = _entries(content, path)
    words = {name: value for name, value in entries.items() if name.startswith("concept/")}
    base, theirs = projections(unet), unet_names(unet.state_dict(), "")
    own = {their: name for name, their in theirs.items()}
    weights: dict[str, Tensor] = {}
    for name, value in entries.items():
        if name in words or isinstance(value, Mapping) and not value:  # a self-attention
            continue
        plain = name.removeprefix("unet/").removeprefix(UNET)
        plain = re.sub(r"\.processor\.(to_\w+)_custom_diffusion\.", r".\1.", plain)
        plain = own.get(plain, plain)
        if plain not in base or not isinstance(value, Tensor):
            raise InputError(
                f"{path} holds {name}, but only the key and value matrices of this U-Net's"
                " cross-attention can be used"
            )
        if not is_plain_float(value):
            raise InputError(f"{path}: {name} is {value.dtype}, not floats")
        check_finite(value, f"{name} in {path}")
        weights[plain] = value.detach()
    for name in sorted(weights.keys() | base.keys()):
        shapes = [list(state[name].shape) if name in state else None for state in (weights, base)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{path} was trained on another U-Net: {name} is {shapes[0]} in it, but {shapes[1]}"
                " here"
            )
    concepts = (
        named_concepts(
            {name.removeprefix("concept/"): value for name, value in words.items()}, path
        )
        if words
        else []
    )
    return CustomDiffusionResult(weights, concepts)


def _entries(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The matrices by their names in the file, and the words as "concept/TOKEN".

    Raises InputError if the file holds something besides these.
    """
    content = dict(content)
    names = content.pop("modifier_token", None)
    matrices: Any = next(
        (content.pop(name) for name in ("unet", "state_dict") if name in content), None
    )
    if matrices is None:
        matrices, content = content, {}
    if not isinstance(matrices, Mapping):
        raise InputError(f"{path} holds no named matrices of Custom Diffusion")
    matrices = dict(matrices)
    if content:
        raise InputError(
            f"{path} holds {next(iter(content))} besides matrices and words, which cannot be used"
        )
    if not all(isinstance(name, str) for name in matrices):
        raise InputError(f"{path} holds matrices whose names are no text")
    embed = matrices.pop("embed", None)
    if isinstance(embed, Tensor):
        tokens = names.split("+") if isinstance(names, str) else names or []
        if not isinstance(tokens, Sequence) or not all(isinstance(each, str) for each in tokens):
            raise InputError(f"{path}: modifier_token must be the names of its words")
        if not tokens and embed.dim():
            tokens = [f"<new{k}>" for k in range(1, len(embed) + 1)]
            say(f"{path} does not name its words: they are {', '.join(tokens)}")
        if embed.dim() != 2 or len(tokens) != len(embed):
            raise InputError(
                f"{path} holds vectors {list(embed.shape)} for {len(tokens)} words, but one for"
                " each is expected"
            )
        embed = dict(zip(tokens, embed, strict=True))
    elif embed is None:
        embed = names
    words = embed if isinstance(embed, Mapping) else {}
    return matrices | {f"concept/{token}": rows for token, rows in words.items()}


@torch.no_grad()
def apply_weights(unet: nn.Module, weights: Weights) -> None:
    """Copies the matrices into a U-Net, in place."""
    own = dict(unet.named_parameters())
    for name, value in weights.items():
        own[name].copy_(value)
