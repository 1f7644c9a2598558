"""Checks that a CLIP runs with the activation function that its weights were trained with.

The activation is GELU or QuickGELU. With the wrong one a CLIP runs without error but is less
accurate, and most weight files do not state the right one. OpenAI's archives and the config.json of
transformers do (see `require_activation`). For other files there are fingerprints: the first values
of the embedding of one text, which only the right activation reproduces. The fingerprint of
ViT-B/32 comes from a published test and was never compared with the real weights in this project.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.files import read_json

if TYPE_CHECKING:
    from common.clip.model import Clip

FINGERPRINT_TEXT = "red circle next to lime star with blue background"
KNOWN: tuple[Mapping[str, Any], ...] = (
    {
        "weights": "OpenAI's ViT-B/32",
        "quick_gelu": True,
        "width": 512,
        "text": "hello world",
        # From tests/test_text_onnx_embeddings.py of github.com/qdrant/fastembed, the model
        # Qdrant/clip-ViT-B-32-text, normalised.
        "first_values": [0.0083, 0.0103, -0.0138, 0.0199, -0.0069],
        "tolerance": 1e-3,
    },
)
"""Fingerprints of published weights."""


def fingerprint(name: str, embedding: Tensor, quick_gelu: bool) -> dict[str, Any]:
    """The fingerprint (JSON values) of the weights `name`.

    `embedding` is the unit vector [D] of FINGERPRINT_TEXT.
    """
    return {
        "weights": name,
        "quick_gelu": quick_gelu,
        "width": len(embedding),
        "text": FINGERPRINT_TEXT,
        "first_values": [round(value, 5) for value in embedding[:8].tolist()],
        "tolerance": 1e-3,
    }


def uses_quick_gelu(network: nn.Module) -> bool:
    """Whether the network's activation is QuickGELU, x sigmoid(1.702 x), as in OpenAI's models."""
    from open_clip.transformer import QuickGELU

    return any(isinstance(module, QuickGELU) for module in network.modules())


def require_activation(network: nn.Module, quick_gelu: bool, model: str, weights: str) -> None:
    """Raises InputError if the network has another activation than its weights need.

    `model` and `weights` name both in the message.
    """
    if uses_quick_gelu(network) != quick_gelu:
        activation = "QuickGELU" if quick_gelu else "GELU"
        hint = f"{model}-quickgelu" if quick_gelu else model.removesuffix("-quickgelu")
        raise InputError(f"{weights}, which need {activation}: use --model {hint}")


def check_activation(clip: "Clip", fingerprints: Sequence[Mapping[str, Any]] = KNOWN) -> bool:
    """Whether the weights are known, so that the activation is the one that they need.

    Weights are known if their fingerprint matches with one of the activations. Raises InputError if
    known weights were loaded into a model with the wrong one.
    """
    for known in fingerprints:
        if _matches(clip, known):
            return True
    other = not uses_quick_gelu(clip.network)
    for known in fingerprints:
        if known["quick_gelu"] == other and _matches(clip, known, flipped=True):
            require_activation(
                clip.network, other, clip.name, f"{clip.pretrained} holds {known['weights']}"
            )
    return False


def check_own_fingerprint(clip: "Clip", path: Path) -> None:
    """Raises InputError if the weights do not match the fingerprint in the file `path`."""
    known = read_json(path)
    try:
        fits = _matches(clip, known)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a fingerprint ({error})") from None
    if not fits:
        raise InputError(
            f"the weights in {path.parent} do not give the text embedding stored in {path.name}"
        )


def _matches(clip: "Clip", known: Mapping[str, Any], flipped: bool = False) -> bool:
    with _other_activation(clip.network) if flipped else contextlib.nullcontext():
        values = clip.encode_texts([known["text"]])[0]
    if len(values) != known["width"]:
        return False
    first = torch.tensor(known["first_values"])
    return bool((values[: len(first)] - first).abs().max() <= known["tolerance"])


@contextlib.contextmanager
def _other_activation(network: nn.Module) -> Iterator[None]:
    from open_clip.transformer import QuickGELU

    other = nn.GELU if uses_quick_gelu(network) else QuickGELU
    blocks = [
        module
        for module in network.modules()
        if isinstance(getattr(module, "gelu", None), (nn.GELU, QuickGELU))
    ]
    before = [block.gelu for block in blocks]
    for block in blocks:
        block.gelu = other()
    try:
        yield
    finally:
        for block, activation in zip(blocks, before, strict=True):
            block.gelu = activation
