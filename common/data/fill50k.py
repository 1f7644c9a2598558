"""The pairs of fill50k in the homework's layout, 512x512 RGB.

The files are `fill50k/{training,testing}/{source,target}/*.png` and `prompt.json` beside them.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from torch import Tensor

from common.colour import CSS_COLOURS
from common.errors import InputError
from common.images import read_rgb

SIZE = 512
Part = Literal["training", "testing"]
FIELDS = ("source", "target", "prompt")
NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
"""Characters that JSON can encode but file names and tokenizers reject."""


@dataclass(frozen=True)
class Pair:
    """One line of prompt.json."""

    source: Path
    """File of the control picture, a white outline on black."""
    target: Path
    """File of the target picture, the circle."""
    prompt: str
    """Caption of the target picture."""
    line: int = field(default=0, compare=False)
    """Number of the line, from 1."""

    @property
    def colours(self) -> tuple[str, str]:
        """The colour names of the circle and of the background, from the prompt.

        Raises InputError if the prompt has another form.
        """
        circle, _, rest = self.prompt.partition(" circle with ")
        background = rest.removesuffix(" background")
        if not rest.endswith(" background") or {circle, background} - CSS_COLOURS.keys():
            raise InputError(
                f"the prompt {self.prompt!r} is not of the form COLOUR circle with COLOUR"
                " background"
            )
        return circle, background

    def read_source(self) -> Tensor:
        """The control picture, uint8 [3, 512, 512]."""
        return read_rgb(self.source, (SIZE, SIZE))

    def read_target(self) -> Tensor:
        """The target picture, uint8 [3, 512, 512]."""
        return read_rgb(self.target, (SIZE, SIZE))


def load_fill50k(root: Path, part: Part = "training") -> list[Pair]:
    """The pairs of a part, in the order of the lines of prompt.json.

    File names may include their folder or not ("source/0.png" or "0.png"). Raises InputError that
    names the line if it is not JSON, if a field or a file is missing, or if its target is that of
    an earlier line.
    """
    folder = Path(root) / part
    if not (folder / "prompt.json").is_file():
        raise InputError(
            f"the pairs of fill50k are not there: {folder / 'prompt.json'} does not exist; "
            "get them with `bash scripts/get_dataset.sh 2025`"
        )
    return read_prompts(folder / "prompt.json", folder / "source", folder / "target")


def read_prompts(
    path: Path, sources: Path, targets: Path, targets_exist: bool = True
) -> list[Pair]:
    """The pairs of a prompt.json (JSON Lines), with files in the given folders; see `load_fill50k`.

    With `targets_exist` off the targets are files still to be written, and a folder in their names
    is kept.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file") from None
    pairs: list[Pair] = []
    seen: dict[Path, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        source, target, prompt = _fields(line, where)
        pair = Pair(
            sources / _below(source, "source", where),
            targets / _below(target, "target" if targets_exist else "", where),
            prompt,
            number,
        )
        for file in (pair.source, pair.target) if targets_exist else (pair.source,):
            if not file.is_file():
                raise InputError(f"{where}: {file} does not exist")
        if (before := seen.setdefault(pair.target, number)) != number:
            raise InputError(f"{where}: the target {target!r} is that of line {before} as well")
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path} is empty")
    return pairs


def _fields(line: str, where: str) -> list[str]:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object with {', '.join(FIELDS)}")
    for name in FIELDS:
        if (
            not isinstance(value.get(name), str)
            or not value[name].strip()
            or NO_TEXT.search(value[name])
        ):
            raise InputError(f"{where}: {name!r} is missing or is not text")
    return [value[name] for name in FIELDS]


def _below(name: str, folder: str, where: str) -> PurePosixPath:
    """The file name relative to `folder`, whether or not it begins with that folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts:  # "." is the folder itself
        raise InputError(f"{where}: {name!r} is no file name")
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: the file name {name!r} leads out of its folder")
    return (
        PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 and path.parts[0] == folder else path
    )
