"""Digits of MNIST-M and SVHN in the homework's layout, 28x28 RGB.

The files are `{mnistm,svhn}/data/*.png` and `{mnistm,svhn}/train.csv`.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from common.data.split import Split, is_held_out
from common.devices import this_process
from common.errors import InputError
from common.images import is_hidden, read_rgb
from common.text_files import read_text

DATASETS = ("mnistm", "svhn")
NUM_DIGITS = 10
SIZE = 28
Edition = Literal["2024", "2025"]


@dataclass(frozen=True)
class Digits:
    """All digits in memory."""

    images: Tensor
    """uint8 [N, 3, 28, 28]."""
    digits: Tensor
    """Labels 0..9, long [N]."""
    datasets: Tensor
    """Index into DATASETS, long [N]."""
    names: list[str]
    """File names, N of them."""

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> "Digits":
        """The same digits with their tensors on `device`."""
        return Digits(
            self.images.to(device), self.digits.to(device), self.datasets.to(device), self.names
        )


def pairing(edition: Edition) -> list[tuple[str, int]]:
    """The (dataset, digit) classes of an edition.

    2025: even digits from MNIST-M and odd digits from SVHN. 2024: all ten digits from both.
    """
    if edition == "2025":
        return [("mnistm", d) for d in range(0, NUM_DIGITS, 2)] + [
            ("svhn", d) for d in range(1, NUM_DIGITS, 2)
        ]
    return [(dataset, d) for dataset in DATASETS for d in range(NUM_DIGITS)]


def datasets_in(datasets: Tensor) -> list[tuple[int, str]]:
    """(index into DATASETS, name) of each dataset in `datasets`, long [N]; sorted."""
    return [(i, DATASETS[i]) for i in datasets.unique().tolist()]


def load_digits(root: Path, split: Split = "train", datasets: Sequence[str] = DATASETS) -> Digits:
    """Reads the digits of a split in the order of file names.

    `root` holds mnistm/ and svhn/. Raises InputError that names the file and row for a missing
    folder, a missing or malformed CSV file, a missing, unreadable or wrong-size image, or a label
    outside 0..9. Files that a table does not list are counted in a warning on stderr.
    """
    parts = []
    for dataset in datasets:
        table = _read_table(Path(root), dataset)
        if split != "all":
            held_out = table["image_name"].map(
                lambda name, dataset=dataset: is_held_out(dataset, name)
            )
            table = table[held_out == (split == "held_out")]
        folder = Path(root) / dataset / "data"
        images = [
            _read_digit(folder / name, row)
            for name, row in zip(table["image_name"], table["row"], strict=True)
        ]
        if not images:
            raise InputError(f"{folder.parent / 'train.csv'} lists no image of the split {split!r}")
        kinds = torch.full((len(images),), DATASETS.index(dataset))
        parts.append(
            Digits(
                torch.stack(images),
                torch.tensor(table["label"].to_numpy()),
                kinds,
                table["image_name"].tolist(),
            )
        )
    return Digits(
        torch.cat([part.images for part in parts]),
        torch.cat([part.digits for part in parts]),
        torch.cat([part.datasets for part in parts]),
        [name for part in parts for name in part.names],
    )


class BalancedDraw:
    """Draws indices so that every (dataset, digit) class present has equal probability."""

    def __init__(self, data: Digits) -> None:
        classes = data.datasets * NUM_DIGITS + data.digits
        self._members = classes.argsort(stable=True)  # class by class
        self._counts = classes.unique(return_counts=True)[1]
        self._starts = self._counts.cumsum(0) - self._counts

    def __call__(self, count: int, generator: torch.Generator) -> Tensor:
        """Random indices, long [count], with replacement.

        They are on the generator's device, which must be that of the digits.
        """
        options = {"generator": generator, "device": generator.device}
        exact = torch.float32 if generator.device.type == "mps" else torch.float64  # MPS has none
        chosen = torch.randint(len(self._counts), (count,), **options)
        uniform = torch.rand(count, dtype=exact, **options)
        return self._members[self._starts[chosen] + (uniform * self._counts[chosen]).long()]


def _read_table(root: Path, dataset: str) -> pd.DataFrame:
    path = root / dataset / "train.csv"
    if not path.is_file():
        raise InputError(
            f"the digits are not there: {path} does not exist; get them with `bash"
            " scripts/get_dataset.sh`, or generate a small set without a network with `python3 -m"
            " scripts.make_sample_data`"
        )
    try:
        table = pd.read_csv(
            io.StringIO(read_text(path)), dtype=str, keep_default_na=False, skip_blank_lines=False
        )
    except ValueError as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from None
    if list(table.columns[:2]) != ["image_name", "label"] or "label.1" in table:
        raise InputError(
            f"{path} must have the header image_name,label, not {','.join(table.columns)}"
        )
    table = table.fillna("")
    table["row"] = [f"{path}, row {i + 2}" for i in range(len(table))]
    table = table[(table["image_name"] != "") | (table["label"] != "")]  # blank lines
    for name, label, row in zip(table["image_name"], table["label"], table["row"], strict=True):
        if label not in {str(d) for d in range(NUM_DIGITS)}:
            raise InputError(f"{row}: the label must be one of 0..9, not {label!r}")
        if os.path.normpath(name) != name or name.startswith(("/", "..")):
            raise InputError(
                f"{row}: {name!r} must be the name of a file in {path.parent / 'data'}"
            )
    twice = table.drop_duplicates(["image_name", "label"])["image_name"].duplicated()
    if twice.any():
        name = table.loc[twice[twice].index[0]]
        raise InputError(f"{name['row']}: {name['image_name']} has another label in an earlier row")
    table["label"] = table["label"].astype(int)
    _warn_unlisted(path.parent / "data", frozenset(table["image_name"]))
    return table.sort_values("image_name", kind="stable")


@functools.cache  # said once, though a program may read several splits
def _warn_unlisted(folder: Path, listed: frozenset[str]) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        unlisted = [
            entry.name
            for entry in entries
            if entry.is_file() and entry.name not in listed and not is_hidden(Path(entry.name))
        ]
        if unlisted and this_process().rank == 0:
            print(
                f"warning: {len(unlisted)} of the files in {folder} are left out, since train.csv"
                f" does not list them, such as {min(unlisted)}",
                file=sys.stderr,
            )


def _read_digit(path: Path, row: str) -> Tensor:
    try:
        return read_rgb(path, (SIZE, SIZE))
    except InputError as error:
        raise InputError(f"{row}: {error}") from None
