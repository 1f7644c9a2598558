"""The zero-shot classifier: from class names and templates to one matrix."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.clip.model import Clip
from common.errors import InputError

DATA = Path(__file__).resolve().parent / "data"


def zero_shot_classifier(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The classifier's matrix float32 [D, C]: for each class the mean of its unit prompt vectors,
    made a unit vector again (Section 3.1.4 of Radford et al. 2021, arXiv:2103.00020). Logits are
    `clip.scale * image_features @ matrix`."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = clip.encode_texts(prompts).view(len(names), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1).T.contiguous()


# ----------------------------------------------------------------------------
# Class names and templates.


def spaced(name: str) -> str:
    """The name with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def class_names(classes: Mapping[str, str], overrides: Any) -> tuple[list[str], int]:
    """The words for the classes, and how many differ from the labels' names. Raises InputError on
    an unknown override."""
    if not isinstance(overrides, dict) or not all(
        isinstance(words, str) and words for words in overrides.values()
    ):
        raise InputError("class-name overrides must be a JSON object of class id or name to words")
    known = {key for class_id, name in classes.items() for key in (class_id, name, spaced(name))}
    if unknown := [key for key in overrides if key not in known]:
        raise InputError(
            f"the class-name override {unknown[0]!r} is neither an id nor a name of the labels"
        )
    names = []
    for class_id, name in classes.items():
        keys = [key for key in (class_id, name, spaced(name)) if key in overrides]
        names.append(overrides[keys[0]] if keys else spaced(name))
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the class-name overrides give two classes the same name, {double!r}")
    return names, sum(new != old for new, old in zip(names, classes.values(), strict=True))


def check_template(template: str, source: str) -> str:
    """The template with {} for the class name; {object} and the like mean the same. Raises
    InputError if it has none."""
    plain = re.sub(r"\{\w*\}", "{}", template.strip())
    if plain.count("{}") != 1:
        problem = (
            "is empty"
            if not plain
            else f"{template!r} must hold {{}} once, in the place of the class name"
        )
        raise InputError(f"{source}: the template {problem}")
    return plain


def read_templates(path: Path) -> list[str]:
    """The templates of a file, one in each line; lines that start with # are notes. Raises
    InputError that names the line."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        raise InputError(f"the template file {path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file") from None
    templates = [
        check_template(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if not line.startswith("#")
    ]
    if not templates:
        raise InputError(f"{path} holds no template")
    return templates


def default_templates(clip: Clip) -> Path:
    """The model folder's templates.txt if there is one, else OpenAI's seven."""
    own = clip.folder / "templates.txt" if clip.folder else None
    return own if own and own.is_file() else DATA / "templates" / "openai_7.txt"


def template_hash(templates: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that name the list of templates."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]
