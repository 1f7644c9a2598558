"""Saves and loads learned concepts, and applies them to a base model.

Textual inversion learns words; Custom Diffusion learns words and the key and value matrices of the
cross-attention. A result's folder holds config.json, which records how the result was made, and
model.safetensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import tensor_names
from common.errors import InputError
from common.files import make_folder, read_json, write_json
from common.latent.load import base_hash
from common.latent.model import LatentDiffusion
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.concepts import Concept, with_concepts
from p3_clip.personalisation.custom_diffusion import (
    CustomDiffusionResult,
    apply_weights,
    load_delta,
    projections,
    save_delta,
)
from p3_clip.personalisation.formats import load_concepts, save_concepts

KIND = "p3_clip.personalisation"
FILE = "model.safetensors"


def save_learned(folder: Path, learned: CustomDiffusionResult, about: Mapping[str, Any]) -> None:
    """Writes the folder of a result; `about` becomes its config.json.

    Without matrices, model.safetensors has the form "own" of `formats.py`.
    """
    make_folder(folder)
    if learned.weights:
        save_delta(folder / FILE, learned)
    else:
        save_concepts(folder / FILE, learned.concepts)
    write_json(folder / "config.json", {"kind": KIND, **about})


def load_learned(paths: Sequence[Path], base: LatentDiffusion) -> CustomDiffusionResult:
    """Loads the results in folders or files and joins their words and matrices.

    Words may have any form of `formats.py`; at most one path may hold matrices, which must be
    trained on the base model `base`. Raises InputError if that is not so, or if a file holds
    something else.
    """
    own: Mapping[str, Tensor] = projections(base.unet)
    parts = [_load(Path(path), own) for path in paths]
    with_weights = [path for path, part in zip(paths, parts, strict=True) if part.weights]
    for path in with_weights:
        made_on = read_json(Path(path) / "config.json").get("base") if Path(path).is_dir() else None
        if made_on not in (None, base_hash(base)):
            raise InputError(
                f"{path} was trained on another base model: its matrices do not fit this one"
            )
    if len(with_weights) > 1:
        raise InputError(
            f"{with_weights[0]} and {with_weights[1]} both hold matrices of Custom Diffusion:"
            " merge them with python3 -m p3_clip.personalisation.merge"
        )
    weights = next((part.weights for part in parts if part.weights), {})
    return CustomDiffusionResult(weights, [concept for part in parts for concept in part.concepts])


def _load(path: Path, own: Mapping[str, Tensor]) -> CustomDiffusionResult:
    file = path / FILE if path.is_dir() else path
    if file.suffix == ".safetensors" and any(
        name.startswith("unet/") for name in tensor_names(file)
    ):
        return load_delta(file, own)
    return CustomDiffusionResult({}, load_concepts(file))


def personalise(model: LatentDiffusion, learned: CustomDiffusionResult) -> None:
    """Adds the learned words, and the matrices if there are any, to the model, in place.

    Raises InputError as `with_concepts` does.
    """
    concepts: list[Concept] = learned.concepts
    model.text_encoder, model.tokenizer = with_concepts(
        model.text_encoder, model.tokenizer, concepts
    )
    apply_weights(model.unet, learned.weights)


def usual_words(model: LatentDiffusion, kind: BaseKind) -> Tensor:
    """Returns the token embeddings [V, D] that the base model's training changed.

    They are those of `kind.vocabulary`, or the whole table if that is None.
    """
    table = model.text_encoder.get_input_embeddings().weight.detach().cpu()
    if kind.vocabulary is None:
        return table
    ids = model.tokenizer(list(kind.vocabulary), add_special_tokens=False).input_ids
    return table[sorted({i for word in ids for i in word})]
