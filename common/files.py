"""Writing files so that a reader never meets a half-written one, and JSON."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""


def shown(path: Path) -> str:
    """A path as results show it: below the checkout relative to it, elsewhere absolute."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def atomic_write(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Writes `data` to `path` through a temporary file that is renamed at the end, or not at all.

    `staging` is the folder of the temporary file, on the same disk as `path` (default: the folder
    of `path`); graders look into output folders, so images are staged one level above. Raises
    OSError, with nothing left behind; what a killed process left of the same file is swept by the
    next one that writes it.
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
    """Removes the temporary files of `name` whose writers are dead. Other machines may share the
    disk: theirs are left alone, since only processes of this one can be asked for."""
    ours = re.compile(
        rf"\.{re.escape(name)}\.{re.escape(os.uname().nodename)}\.(\d{{1,9}})\.partial"
    )
    for file in folder.glob(".*.partial"):
        if (match := ours.fullmatch(file.name)) and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def make_folder(path: Path) -> Path:
    """Makes the folder and its parents. Raises InputError if a regular file stands in the way."""
    path = Path(path)
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_folder(path: Path) -> None:
    """Raises InputError if a regular file stands in the way of the folder; makes nothing."""
    for ancestor in (path, *path.parents):
        if ancestor.exists() and not ancestor.is_dir():
            raise InputError(f"cannot make the folder {path}: {ancestor} is a regular file")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically, making parent folders."""
    make_folder(Path(path).parent)
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises InputError if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
