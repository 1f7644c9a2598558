"""The pairs of fill50k in the homework's layout, 512x512 RGB.

The files are `fill50k/{training,testing}/{source,target}/*.png` and `prompt.json` beside them.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from common.colour import colour_name
from common.errors import InputError
from common.images import read_rgb
from common.text_files import read_records

SIZE = 512
Part = Literal["training", "testing"]
FIELDS = ("source", "target", "prompt")


@dataclass(frozen=True, slots=True)
class Pair:
    """One line of prompt.json; the paths are text, which needs a fifth of a Path's memory."""

    source_path: str
    """Path of the control picture, a white outline on black."""
    target_path: str
    """Path of the target picture, the circle."""
    prompt: str
    """Caption of the target picture."""
    line: int = field(default=0, compare=False)
    """Number of the line, from 1."""

    @property
    def source(self) -> Path:
        """File of the control picture."""
        return Path(self.source_path)

    @property
    def target(self) -> Path:
        """File of the target picture."""
        return Path(self.target_path)

    @property
    def colours(self) -> tuple[str, str]:
        """The colours of the circle and of the background, by their names in `CSS_COLOURS`.

        Raises InputError if the prompt has another form.
        """
        circle, _, rest = self.prompt.partition(" circle with ")
        colours = colour_name(circle), colour_name(rest.removesuffix(" background"))
        if not rest.endswith(" background") or None in colours:
            raise InputError(
                f"the prompt {self.prompt!r} is not of the form COLOUR circle with COLOUR"
                " background"
            )
        return colours

    def read_source(self) -> Tensor:
        """The control picture, uint8 [3, 512, 512]; what is transparent is black."""
        return read_rgb(self.source, (SIZE, SIZE), ground="black")

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
    """The pairs of a prompt.json, with files in the given folders; see `load_fill50k`.

    The file has one object on each line (JSON Lines) or is one array of objects. With
    `targets_exist` off the targets are files still to be written, and a folder in their names is
    kept.
    """
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, value in read_records(path):
        where = f"{path}, line {number}"
        source, target, prompt = _fields(value, where)
        pair = Pair(
            _below(sources, source, "source", where),
            _below(targets, target, "target" if targets_exist else "", where),
            prompt,
            number,
        )
        for file in (pair.source_path, pair.target_path)[: 2 if targets_exist else 1]:
            if not os.path.isfile(file):
                raise InputError(f"{where}: {file} does not exist")
        if pair.target_path in seen:
            before = seen[pair.target_path]
            raise InputError(f"{where}: the target {target!r} is that of line {before} as well")
        seen[pair.target_path] = number
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path} is empty")
    return pairs


def _fields(value: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object with {', '.join(FIELDS)}")
    for name in FIELDS:
        if not isinstance(value.get(name), str) or not value[name].strip():
            raise InputError(f"{where}: {name!r} is missing or is not text")
    return [value[name] for name in FIELDS]


def _below(root: Path, name: str, folder: str, where: str) -> str:
    """The path of a file in `root`, whether or not its name begins with the name of `folder`."""
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts:  # "." is the folder itself
        raise InputError(f"{where}: {name!r} is no file name")
    if name.startswith("/") or ".." in parts:
        raise InputError(f"{where}: the file name {name!r} leads out of its folder")
    if len(parts) > 1 and parts[0] == folder:
        del parts[0]
    return os.path.join(root, *parts)
