"""Arrays in files that grow by rows, survive a kill, and are mapped into memory when read.

A folder holds a file NAME.bin for each array, its rows one after another, and header.json:

    {"made_from": {...}, "complete": true,
     "arrays": {NAME: {"dtype": "float16", "row": [4, 64, 64], "rows": 50000, "crc32": 123}, ...}}

The header counts the rows whose data is on disk, so a kill loses what came after the last `commit`.
"""

import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import make_folder, read_json, write_json

BUFFER = 2**24  # bytes read at a time to check what was written


def read_header(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """The header in `folder`; None if there is none.

    Raises InputError if the arrays were made from something else than `made_from`, which describes
    their source; the message names the first key that differs.
    """
    path = Path(folder) / "header.json"
    if not path.is_file():
        return None
    header = read_json(path)
    if not isinstance(header, dict) or not header.keys() >= {"made_from", "arrays", "complete"}:
        raise InputError(f"{path} is not the header of a cache: delete the folder to make it anew")
    before = header["made_from"]
    for key, value in made_from.items():
        if before.get(key) != value:
            raise InputError(
                f"{folder} was made from other data or by another model (its {key} is"
                f" {before.get(key)}, not {value}): choose another run folder, or delete it"
            )
    return header


def is_complete(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether all rows are there; raises InputError as `read_header` does."""
    header = read_header(folder, made_from)
    return header is not None and header["complete"]


def map_arrays(folder: Path, made_from: Mapping[str, Any]) -> dict[str, np.memmap]:
    """The arrays of a complete folder by name, mapped read-only.

    Raises InputError as `read_header` does, and if a file has another size than the header says.
    """
    header = read_header(folder, made_from)
    if header is None or not header["complete"]:
        raise InputError(f"{folder} is not complete")
    arrays = {}
    for name, array in header["arrays"].items():
        path, shape = folder / f"{name}.bin", (array["rows"], *array["row"])
        if not path.is_file() or path.stat().st_size != _row_bytes(array) * array["rows"]:
            raise InputError(_damaged(path))
        arrays[name] = np.memmap(path, array["dtype"], "r", shape=shape)
    return arrays


def read_ahead(array: np.memmap, first: int, last: int) -> None:
    """Asks the kernel to read the rows `first` to `last` - 1 of a mapped array in the background.

    Returns at once. It is only a hint: without it the rows are read when they are used.
    """
    row = array.dtype.itemsize * int(np.prod(array.shape[1:]))
    start = first * row // mmap.PAGESIZE * mmap.PAGESIZE
    if isinstance(array.base, mmap.mmap) and last > first:
        array.base.madvise(mmap.MADV_WILLNEED, start, last * row - start)


class ArrayWriter:
    """Appends rows to the arrays in a folder, and continues after the last `commit`.

    Raises InputError as `read_header` does, and if what was written before has changed since.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self._folder = make_folder(folder)
        self._header = read_header(folder, made_from) or {
            "made_from": dict(made_from),
            "complete": False,
            "arrays": {},
        }
        arrays = self._header["arrays"]
        for name, array in arrays.items():
            _check_written(self._path(name), array)
        self._files = {name: _opened(self._path(name), array) for name, array in arrays.items()}

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def rows(self, name: str) -> int:
        """Number of rows of an array so far."""
        return self._header["arrays"].get(name, {"rows": 0})["rows"]

    def size(self) -> int:
        """Bytes of all rows so far."""
        return sum(array["rows"] * _row_bytes(array) for array in self._header["arrays"].values())

    def read(self, name: str) -> np.ndarray:
        """The rows of an array so far."""
        array = self._header["arrays"][name]
        shape = (array["rows"], *array["row"])
        return np.fromfile(self._path(name), array["dtype"]).reshape(shape)

    def append(self, **rows: np.ndarray) -> None:
        """Appends rows [n, ...] to the arrays of these names: to all of them, or to none."""
        arrays = dict(self._header["arrays"])
        for name, values in rows.items():
            new = {"dtype": str(values.dtype), "row": list(values.shape[1:]), "rows": 0, "crc32": 0}
            array = arrays.get(name, new)
            if name not in self._files:
                self._files[name] = _opened(self._path(name), array)
            file, data = self._files[name], memoryview(np.ascontiguousarray(values)).cast("B")
            file.seek(array["rows"] * _row_bytes(array))
            crc32, left = zlib.crc32(data, array["crc32"]), data
            while left:
                left = left[file.write(left) :]
            arrays[name] = array | {"rows": array["rows"] + len(values), "crc32": crc32}
        self._header["arrays"] = arrays

    def commit(self, *, complete: bool = False) -> None:
        """Writes the rows and then the header to the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        self._header["complete"] = complete
        write_json(self._folder / "header.json", self._header)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.bin"


def _check_written(path: Path, array: Mapping[str, Any]) -> None:
    """Raises InputError if the counted rows of a file are not there or have another checksum."""
    left, crc32 = array["rows"] * _row_bytes(array), 0
    if path.is_file():
        with open(path, "rb") as file:
            while left and (data := file.read(min(left, BUFFER))):
                left, crc32 = left - len(data), zlib.crc32(data, crc32)
    if left or crc32 != array["crc32"]:
        raise InputError(_damaged(path))


def _opened(path: Path, array: Mapping[str, Any]) -> Any:
    """The file, opened for writing, cut off after its counted rows; made if it does not exist."""
    file = open(path, "r+b" if path.is_file() else "w+b", buffering=0)  # noqa: SIM115
    file.truncate(array["rows"] * _row_bytes(array))
    return file


def _row_bytes(array: Mapping[str, Any]) -> int:
    return np.dtype(array["dtype"]).itemsize * int(np.prod(array["row"], dtype=np.int64))


def _damaged(path: Path) -> str:
    return f"{path} is damaged: delete the folder {path.parent} to make it anew"
