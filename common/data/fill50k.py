"""The pairs of fill50k in the homework's layout:
`fill50k/{training,testing}/{source,target,prompt.json}`, 512x512 RGB."""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from torch import Tensor

from common.colour import CSS_COLOURS
from common.errors import InputError
from common.images import read_rgb

SIZE = 512
Part = Literal["training", "testing"]
FIELDS = ("source", "target", "prompt")
NO_TEXT = re.compile(
    r"[\0\ud800-\udfff]"
)  # JSON can spell what no file name and no tokenizer takes


@dataclass(frozen=True)
class Pair:
    """One line of prompt.json: the control picture (white outline on black), the circle to be
    drawn, and its description."""

    source: Path
    target: Path
    prompt: str

    @property
    def colours(self) -> tuple[str, str]:
        """The names of the circle's and the background's colour, from the prompt. Raises InputError
        if it says something else."""
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
        """The circle, uint8 [3, 512, 512]."""
        return read_rgb(self.target, (SIZE, SIZE))


def load_fill50k(root: Path, part: Part = "training") -> list[Pair]:
    """The pairs of a part, in the order of its lines. Raises InputError that names the line: not
    JSON, a field missing, a file missing, a target that came before.

    File names may stand with or without their folder ("source/0.png" or "0.png"), in both parts.
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

    With `targets_exist` off the targets are files still to be written, and keep a folder that their
    name starts with.
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
    """The name relative to its folder, whether or not it starts with it."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts:  # "." is the folder itself
        raise InputError(f"{where}: {name!r} is no file name")
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: the file name {name!r} leads out of its folder")
    return (
        PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 and path.parts[0] == folder else path
    )
