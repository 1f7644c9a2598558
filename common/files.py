"""Atomic writing of files (a reader never sees an incomplete one), folders and JSON."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.text_files import parse_json, read_text

ROOT = Path(__file__).resolve().parent.parent
"""The project's root folder."""


def shown(path: Path) -> str:
    """A path as results show it: relative to the project's root if below it, else absolute."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def atomic_write(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Writes `data` to `path` through a temporary file that is renamed at the end, or not at all.

    `staging` is the folder of the temporary file, on the same disk as `path` (default: the folder
    of `path`). Graders list output folders, so images are staged one level above. Raises OSError
    and removes the temporary file on failure. A killed process leaves its temporary file behind;
    the next process that writes the same path removes it.
    """
    path = Path(path)
    folder = staging or path.parent
    _sweep(folder, path.name)
    temporary = folder / f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sweep(folder: Path, name: str) -> None:
    """Removes the temporary files of `name` whose processes have ended.

    Other hosts may share the disk. Their files are left alone, since only processes of this host
    can be checked.
    """
    ours = re.compile(
        rf"\.{re.escape(name)}\.{re.escape(os.uname().nodename)}\.(\d{{1,9}})\.partial"
    )
    for file in folder.glob(".*.partial"):
        if (match := ours.fullmatch(file.name)) and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(process, 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to another user
        pass
    return True


def make_folder(path: Path) -> Path:
    """Makes the folder and its parents. Raises InputError if a regular file is in the way."""
    path = Path(path)
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_folder(path: Path) -> None:
    """Raises InputError if a regular file is in the way of the folder; makes nothing."""
    for ancestor in (path, *path.parents):
        if ancestor.exists() and not ancestor.is_dir():
            raise InputError(f"cannot make the folder {path}: {ancestor} is a regular file")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; makes parent folders."""
    make_folder(Path(path).parent)
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError if it is missing or is not JSON, with the line.

    See `parse_json`.
    """
    return parse_json(read_text(path), str(path))
