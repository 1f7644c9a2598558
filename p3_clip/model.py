"""CLIP zero-shot classification: class names, prompt templates and the classifier matrix."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.clip.model import Clip
from common.errors import InputError
from common.text_files import read_text, text_lines

DATA = Path(__file__).resolve().parent / "data"


def zero_shot_classifier(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Returns the weight matrix of the zero-shot classifier, float32 [D, C].

    Column c is the mean of the unit text features of class c's prompts, one for each template,
    normalised to unit length again (Section 3.1.4 of Radford et al. 2021, arXiv:2103.00020). The
    logits of unit image features [N, D] are `clip.scale * image_features @ matrix`.
    """
    features = clip.encode_texts(class_prompts(names, templates))
    features = features.view(len(names), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1).T.contiguous()


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns the prompts of all classes, those of one class together."""
    return [template.replace("{}", name) for name in names for template in templates]


# ----------------------------------------------------------------------------
# Class names and templates.


def spaced(name: str) -> str:
    """Returns the name with underscores replaced by spaces and surplus white space removed."""
    return " ".join(name.replace("_", " ").split())


def class_names(
    classes: Mapping[str, str], overrides: Any, source: Path | None = None
) -> tuple[list[str], int]:
    """Returns the words used for each class, and how many of them differ from the labels' names.

    `classes` maps class ids to names, in which underscores become spaces. `overrides` maps a class
    id or name to the words to use instead; they are from the file `source`. Raises InputError if
    `overrides` is not such a mapping or names an unknown class, or if two classes have the same
    words then.
    """
    overriding = f"the class-name overrides{f' in {source}' if source else ''}"
    if not isinstance(overrides, dict) or not all(
        isinstance(words, str) and words.strip() for words in overrides.values()
    ):
        raise InputError(
            f"{overriding} must be a JSON object that maps a class id or name to words"
        )
    known = {key for class_id, name in classes.items() for key in (class_id, name, spaced(name))}
    if unknown := [key for key in overrides if key not in known]:
        raise InputError(
            f"{overriding} hold {unknown[0]!r}, which is neither an id nor a name in the labels"
        )
    names = []
    for class_id, name in classes.items():
        keys = [key for key in (class_id, name, spaced(name)) if key in overrides]
        names.append(overrides[keys[0]] if keys else spaced(name))
    seen: dict[str, str] = {}
    for class_id, name in zip(classes, names, strict=True):
        if (other := seen.setdefault(name, class_id)) != class_id:
            if {class_id, classes[class_id]} & overrides.keys():
                raise InputError(f"{overriding} give two classes the same name, {name!r}")
            raise InputError(
                f"the classes {other} and {class_id} have the same name, {name!r}: tell them apart"
                " by their ids with --names"
            )
    return names, sum(new != old for new, old in zip(names, classes.values(), strict=True))


def check_template(template: str, source: str) -> str:
    """Returns the template with `{}` in the place of the class name.

    A named placeholder, such as `{object}`, is replaced by `{}`. Raises InputError, whose message
    starts with `source`, if the template does not contain exactly one placeholder.
    """
    plain = re.sub(r"\{\w*\}", "{}", template.strip())
    if plain.count("{}") != 1:
        problem = (
            "is empty"
            if not plain
            else f"must contain {{}} exactly once, in the place of the class name: {template!r}"
        )
        raise InputError(f"{source} {problem}")
    return plain


def read_templates(path: Path) -> list[str]:
    """Reads the prompt templates of a text file, one per line, except lines that start with #.

    Raises InputError if the file is missing, is not text or holds no template, or, with the number
    of the line, if a line is empty or not a template.
    """
    templates = [
        check_template(line, f"{path}, line {number}")
        for number, line in text_lines(read_text(path))
        if not line.startswith("#")
    ]
    if not templates:
        raise InputError(f"{path} holds no template")
    return templates


def default_templates(clip: Clip) -> Path:
    """Returns the file of the prompt ensemble: the model folder's templates.txt, if it has one.

    Otherwise it is the file of the seven templates that OpenAI selected for ImageNet.
    """
    own = clip.folder / "templates.txt" if clip.folder else None
    return own if own and own.is_file() else DATA / "templates" / "openai_7.txt"


def template_hash(templates: Sequence[str]) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the templates, in their order."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]
