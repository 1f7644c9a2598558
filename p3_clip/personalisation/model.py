"""Saves and loads learned concepts, and applies them to a base model.

Textual inversion learns words; Custom Diffusion learns words and the key and value matrices of the
cross-attention. A result's folder holds config.json, which records how the result was made, and
model.safetensors.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import read_entries
from common.errors import InputError
from common.files import make_folder, write_json
from common.latent.load import base_hash
from common.latent.model import LatentDiffusion
from common.weights import followed, say
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.concepts import Concept, is_placeholder, with_concepts
from p3_clip.personalisation.custom_diffusion import (
    DIFFUSERS_NAME,
    CustomDiffusionResult,
    apply_weights,
    is_delta,
    load_delta,
    save_delta,
)
from p3_clip.personalisation.formats import named_concepts, read_file, save_concepts

KIND = "p3_clip.personalisation"
FILE = "model.safetensors"
WORD_SUFFIXES = (".bin", ".pt", ".safetensors", ".ckpt")


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


def load_learned(paths: Sequence[Path | str], base: LatentDiffusion) -> CustomDiffusionResult:
    """Loads the results in folders or files and joins their words and matrices.

    A path may be followed by the placeholder to use for its only word: FILE=<word>. Words may have
    any form of `formats.py` and matrices any of `save_delta`; at most one path may hold matrices,
    which must be trained on the base model `base`. Words of another base model are warned of.
    Raises InputError if that is not so, or if a file holds something else.
    """
    located = [_path_and_token(str(path)) for path in paths]
    parts = [_load(path, token, base) for path, token in located]
    with_weights = [path for (path, _), part in zip(located, parts, strict=True) if part.weights]
    for path, _ in located:
        if _base_of(path) in (None, base_hash(base)):
            continue
        if path in with_weights:
            raise InputError(
                f"{path} was trained on another base model: its matrices do not fit this one"
            )
        print(
            f"warning: {path} was trained on another base model: its words may mean something else"
            " here",
            file=sys.stderr,
        )
    if len(with_weights) > 1:
        raise InputError(
            f"{with_weights[0]} and {with_weights[1]} both hold matrices of Custom Diffusion:"
            " merge them with python3 -m p3_clip.personalisation.merge"
        )
    weights = next((part.weights for part in parts if part.weights), {})
    return CustomDiffusionResult(weights, [concept for part in parts for concept in part.concepts])


def _base_of(path: Path) -> str | None:
    """The hash of the base model of a result, a folder or the file in it; None if it is unknown."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    entries = read_entries(config, {}) if config.is_file() else {}
    return entries.get("base") if entries.get("kind") == KIND else None


def _path_and_token(text: str) -> tuple[Path, str | None]:
    """The path and the placeholder of FILE=<word>; None for a path alone."""
    file, _, token = text.rpartition("=")
    named = file and is_placeholder(token) and not Path(text).exists()
    return (followed(Path(file)), token) if named else (followed(Path(text)), None)


def _load(path: Path, token: str | None, base: LatentDiffusion) -> CustomDiffusionResult:
    """The words and matrices of one path."""
    files = _files(path) if path.is_dir() else [path]
    weights: Mapping[str, Tensor] = {}
    concepts: list[Concept] = []
    for file in files:
        content = read_file(file)
        if is_delta(content):
            weights, words = load_delta(file, content, base.unet)
            concepts += words
        else:
            concepts += named_concepts(content, file)
    if path.is_file() and not weights and (beside := _matrices(path.parent)):
        print(
            f"warning: only the word in {path} is used, not the matrices in {beside} beside it:"
            " name the folder to use both",
            file=sys.stderr,
        )
    if token is not None:
        if len(concepts) != 1:
            known = ", ".join(concept.token for concept in concepts) or "none"
            raise InputError(
                f"{path} holds {len(concepts)} concepts ({known}): only a single one can be renamed"
                f" to {token}"
            )
        concepts = [Concept(token, concepts[0].vectors)]
    return CustomDiffusionResult(weights, concepts)


def _files(folder: Path) -> list[Path]:
    """The files of a result's folder: of this project, of Custom Diffusion, of textual inversion.

    Raises InputError if the folder holds none.
    """
    if (folder / FILE).is_file():
        return [folder / FILE]
    if matrices := _matrices(folder):
        words = [file for file in sorted(folder.iterdir()) if is_placeholder(file.stem)]
        return [matrices, *(file for file in words if file.suffix in (".bin", ".safetensors"))]
    names = ("learned_embeds.safetensors", "learned_embeds.bin", "delta.bin", "delta.ckpt")
    if there := [folder / name for name in names if (folder / name).is_file()]:
        if len(there) > 1:
            say(f"{there[0]} is used, not {there[1].name} beside it")
        return there[:1]
    files = sorted(file.name for file in folder.iterdir() if file.suffix in WORD_SUFFIXES)
    hint = f"; name the file that is meant, such as {files[0]}" if files else ""
    raise InputError(
        f"{folder} holds no learned words: neither {FILE}, learned_embeds, {DIFFUSERS_NAME} nor"
        f" delta is there{hint}"
    )


def _matrices(folder: Path) -> Path | None:
    """The file in which diffusers' script of Custom Diffusion stores the matrices, or None."""
    files = (folder / f"{DIFFUSERS_NAME}{suffix}" for suffix in (".safetensors", ".bin"))
    return next((file for file in files if file.is_file()), None)


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
