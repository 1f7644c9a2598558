"""Reads and writes files of learned words: own, diffusers, A1111's web UI, CompVis (paper's code).

| form | file | content |
| --- | --- | --- |
| own | .safetensors | {token: [k, D]}, any number of concepts |
| diffusers | learned_embeds .bin or .safetensors | {token: [D] or [k, D]}, one concept |
| A1111 | .pt | {"string_to_token": {"*": 265}, "string_to_param": {"*": [k, D]}, "name": name} |
| A1111 | .safetensors | {"emb_params": [k, D]} |
| CompVis | .pt | {"string_to_token": {token: id}, "string_to_param": {token: [k, D]}} |

In CompVis's files the id is a tensor and "string_to_param" a ParameterDict. Diffusers stores
several vectors as several words, token, token_1, token_2; they are joined into one concept. A1111's
and CompVis's word "*" is called by the name of its file, as in the web UI, whatever name is inside:
dog.pt holds <dog>. A name without angle brackets gets them.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.checkpoint import check_finite, is_plain_float, load_pickle, load_tensors, save_tensors
from common.errors import InputError
from common.files import atomic_write
from common.weights import is_safetensors, say
from p3_clip.personalisation.concepts import Concept, is_placeholder

Form = Literal["own", "diffusers", "a1111", "a1111_safetensors", "compvis"]
ANY = "*"  # the placeholder in A1111's files
A1111_TOKEN_ID = 265  # id of "*" in CLIP's vocabulary, which A1111 writes beside it
STUBS = {"torch.nn.modules.container.ParameterDict": nn.ParameterDict}
"""Classes of PyTorch in files of learned words."""
OTHER_MODELS = {
    "t5xxl": "Stable Diffusion 3 or Flux (t5xxl)",
    "clip_g": "Stable Diffusion XL (clip_l and clip_g)",
    "clip_l": "Stable Diffusion XL or Flux (clip_l)",
}
"""Names of tensors in the learned words of models with several text encoders."""
LORA = re.compile(r"lora_|\.lora\.|hada_w|lokr_w")
"""In the names of tensors of a LoRA."""


def save_concepts(path: Path, concepts: Sequence[Concept], form: Form = "own") -> None:
    """Writes concepts to a file, float32, atomically.

    Raises InputError if the form holds only one concept and another number is given.
    """
    if form in ("a1111", "a1111_safetensors", "diffusers") and len(concepts) != 1:
        raise InputError(f"a file of the form {form} holds one concept, not {len(concepts)}")
    vectors = {concept.token: concept.vectors.float().contiguous() for concept in concepts}
    if form == "own":
        save_tensors(path, vectors)
    elif form == "a1111_safetensors":
        save_tensors(path, {"emb_params": next(iter(vectors.values()))})
    elif form == "diffusers":
        save_pickle(
            path, {token: rows[0] if len(rows) == 1 else rows for token, rows in vectors.items()}
        )
    elif form == "a1111":
        token, rows = next(iter(vectors.items()))
        save_pickle(
            path,
            {
                "string_to_token": {ANY: A1111_TOKEN_ID},
                "string_to_param": {ANY: rows},
                "name": token.strip("<>"),
            },
        )
    else:
        ids = {token: torch.tensor(A1111_TOKEN_ID) for token in vectors}
        rows_of = nn.ParameterDict({token: nn.Parameter(rows) for token, rows in vectors.items()})
        save_pickle(path, {"string_to_token": ids, "string_to_param": rows_of})


def load_concepts(path: Path, token: str | None = None) -> list[Concept]:
    """Reads the concepts of a file of any of the forms; see `named_concepts`."""
    return named_concepts(read_file(path), path, token)


def named_concepts(content: Any, path: Path, token: str | None = None) -> list[Concept]:
    """The concepts in the content of the file `path`.

    `token` replaces the placeholder of a file's only concept. Raises InputError if the file is
    missing, damaged, would run code when unpickled, or holds something else.
    """
    path = Path(path)
    found = _named_vectors(content, path)
    if token is not None:
        if len(found) != 1:
            raise InputError(
                f"{path} holds {len(found)} concepts ({', '.join(found)}): only a single one can be"
                f" renamed to {token}"
            )
        found = {token: next(iter(found.values()))}
    for name, rows in found.items():
        check_finite(rows, f"the learned word {name} in {path}")
    return [Concept(_placeholder(name, path), rows) for name, rows in found.items()]


def _placeholder(name: str, path: Path) -> str:
    if name == ANY:
        name = path.stem
    elif not is_placeholder(name):
        say(f"the word {name!r} in {path} is written <{name}> in prompts")
    return name if is_placeholder(name) else f"<{name}>"


def read_file(path: Path) -> Any:
    """The content of a file of learned words or matrices, a pickle or safetensors."""
    return load_tensors(path)[0] if is_safetensors(path) else load_pickle(path, STUBS)


def _named_vectors(content: Any, path: Path) -> dict[str, Tensor]:
    """Returns the vectors [k, D] by token. Raises InputError if there are none."""
    for name, model in OTHER_MODELS.items():
        if isinstance(content, Mapping) and name in content:
            raise InputError(f"{path} holds a learned word for {model}, not for this text encoder")
    if isinstance(content, Mapping) and any(
        LORA.search(name) for name in map(str, content) if not is_placeholder(name)
    ):
        raise InputError(f"{path} is a LoRA, which changes a network's weights, not a learned word")
    if isinstance(content, Mapping) and "string_to_param" in content:
        values = _parameters(content["string_to_param"])
    elif isinstance(content, Mapping) and "emb_params" in content:
        values = {ANY: content["emb_params"]}
    elif isinstance(content, Mapping):
        values = _joined(content, path)
    else:
        values = {}
    rows = {
        name: _rows(value)
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not rows or len(rows) != len(values) or any(value is None for value in rows.values()):
        raise InputError(f"{path} holds no learned words")
    return rows


def _parameters(content: Any) -> dict[str, Any]:
    """Returns the entries of string_to_param.

    PyTorch before 1.12 stores the entries of a ParameterDict as the parameters of a module.
    """
    if isinstance(content, nn.ParameterDict) and "_keys" not in vars(content):
        return dict(vars(content)["_parameters"])
    return dict(content) if isinstance(content, Mapping | nn.ParameterDict) else {}


def _rows(value: Tensor) -> Tensor | None:
    """Returns the vectors as [k, D], float32 if they are floats; None if it has another shape."""
    value = value.detach().float() if is_plain_float(value) else value.detach()
    value = value[None] if value.dim() == 1 else value
    return value if value.dim() == 2 and len(value) else None


def _joined(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Joins diffusers' token, token_1 and token_2 into one concept of several vectors, by number.

    Raises InputError if a number is missing between them.
    """
    result: dict[str, Any] = {}
    numbered: dict[str, dict[int, Tensor]] = {}
    for name, value in content.items():
        found = re.fullmatch(r"(<.+>)_([1-9]\d{0,3})", name) if isinstance(name, str) else None
        if found and _is_vector(content.get(found[1])) and _is_vector(value):
            numbered.setdefault(found[1], {})[int(found[2])] = value
        else:
            result[name] = value
    for token, rows in numbered.items():
        missing = next(number for number in range(1, len(rows) + 2) if number not in rows)
        if missing <= len(rows):
            raise InputError(
                f"{path} holds {token}_{max(rows)} but not {token}_{missing}: the vectors of a word"
                " are numbered from 1"
            )
        vectors = [result[token], *(rows[number] for number in sorted(rows))]
        if len({len(vector) for vector in vectors}) > 1:
            raise InputError(f"the vectors of {token} in {path} have different lengths")
        result[token] = torch.stack(vectors)
    return result


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1


def save_pickle(path: Path, content: Any) -> None:
    """Writes a PyTorch file, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(Path(path), buffer.getvalue())
