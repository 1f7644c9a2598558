"""Atomic writing of files (a reader never sees an incomplete one), folders and JSON."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
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

    See `replacing`.
    """
    with replacing(path, staging) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yields the name of a temporary file; what is written to it inside the block becomes `path`.

    The temporary file is in a folder of its own, where the library that writes it may have more of
    them, as safetensors does. That folder is in `staging`, on the same disk as `path` (default: the
    folder of `path`). Graders list output folders, so images are staged one level above. Raises
    OSError and removes the temporary folder on failure, and InputError if `path` is a device or a
    pipe. A killed process leaves it behind; the next process that writes the same path removes it.
    """
    path = Path(path)
    _check_regular(path)
    folder = staging or path.parent
    _sweep(folder, path.name)
    own = folder / _temporary_name(path.name)
    try:
        own.mkdir(exist_ok=True)
        temporary = own / path.name
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None or str(own) in str(error.filename):  # such as a full disk
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _temporary_name(name: str) -> str:
    return f".{name}.{os.uname().nodename}.{os.getpid()}.partial"


def _sweep(folder: Path, name: str) -> None:
    """Removes the temporary folders of `name` whose processes have ended.

    Other hosts may share the disk. Their folders are left alone, since only processes of this host
    can be checked.
    """
    ours = re.compile(
        rf"\.{re.escape(name)}\.{re.escape(os.uname().nodename)}\.(\d{{1,9}})\.partial"
    )
    for left in folder.glob(".*.partial"):
        if (match := ours.fullmatch(left.name)) and not _is_running(int(match[1])):
            shutil.rmtree(left, ignore_errors=True)


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


@contextlib.contextmanager
def claimed(folder: Path, *, main: bool = True) -> Iterator[None]:
    """Inside the block the folder exists, can be written to, and is locked against other jobs.

    The lock is held on the folder itself: it leaves no file behind and ends with the process, even
    if workers that it forked live longer. File systems without locks are used without one. Of a job
    with several processes, the main one locks, and the others (`main` False) take over when it ends
    before them. Raises InputError if another job holds the lock, and OSError if the folder cannot
    be written to. Folders that were made here and are still empty after an error are removed.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor, ended = None, threading.Event()
    try:
        descriptor = os.open(make_folder(folder), os.O_RDONLY)
        _locks.add(descriptor)
        if main:
            _lock(descriptor, folder)
        else:
            waiting = (os.dup(descriptor), ended)
            _locks.add(waiting[0])
            threading.Thread(target=_take_over, args=waiting, daemon=True).start()
        with tempfile.TemporaryFile(dir=folder):  # without a name where the system can do so
            pass
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        ended.set()
        if descriptor is not None:
            _close_lock(descriptor)


LOCK_TRIES, LOCK_PAUSE = 10, 0.05  # times and seconds between them
_locks: set[int] = set()  # descriptors of locked folders


def _close_lock(descriptor: int) -> None:
    if descriptor in _locks:  # it is not in a forked process
        _locks.remove(descriptor)
        os.close(descriptor)


def _close_all_locks() -> None:
    while _locks:
        os.close(_locks.pop())


# A forked process shares its parent's locks: a worker would hold them until it sees, after seconds,
# that its parent was killed.
os.register_at_fork(after_in_child=_close_all_locks)


def _lock(descriptor: int, folder: Path) -> None:
    """Locks the folder; tries again, as a process in `_take_over` may hold it for an instant."""
    for remaining in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not remaining:
                raise InputError(
                    f"another job is writing to {folder}: wait until it has ended, or choose"
                    " another folder"
                ) from None
            time.sleep(LOCK_PAUSE)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            return


def _take_over(descriptor: int, ended: threading.Event) -> None:
    """Waits until the main process has locked the folder and released it, then shares the lock."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(BlockingIOError):  # the main process has locked it
            while not ended.is_set():
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                ended.wait(LOCK_PAUSE)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        ended.wait()
    _close_lock(descriptor)


def check_targets(paths: Collection[str]) -> None:
    """Raises InputError if one of these files cannot be written beside the others.

    A name may be too long for the file system (files are written in a folder first whose name is
    longer), an existing folder may have it, or another of the files may be needed as a folder.
    """
    longest = 255 - len(os.fsencode(_temporary_name("")))
    folders: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if len(os.fsencode(name)) > longest:
            raise InputError(
                f"the file name {name} is too long: it has {len(os.fsencode(name))} bytes, but at"
                f" most {longest} are possible"
            )
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder, but a file is to be written there")
        folders.setdefault(folder, path)
    known = set(paths)
    for folder, path in folders.items():
        for parent in (Path(folder), *Path(folder).parents):
            if str(parent) in known:
                raise InputError(f"{parent} cannot be both a file and the folder of {path}")
        check_folder(Path(folder))


def check_files(*paths: Path | None, inputs: Sequence[Path] = ()) -> None:
    """Checks, before any work is done, that results and pages can be written to the paths.

    Raises InputError if one cannot, if it is a file of `inputs`, or if a file is there that holds
    neither a JSON object nor a page.
    """
    for path in filter(None, paths):
        check_folder(path.parent)
        if path.is_dir():
            raise InputError(f"cannot write the file {path}: it is a folder")
        _check_regular(path)
        if any(same_file(path, given) for given in inputs):
            raise InputError(f"{path} is read by this program, which would replace it")
        if path.is_file():
            with open(path, "rb") as file:
                start = file.read(100).removeprefix(b"\xef\xbb\xbf").strip()
            if start and start[:1] not in (b"{", b"<"):
                raise InputError(
                    f"{path} is there already and holds no result of this program, which would"
                    " replace it: choose another file, or move it away"
                )


def _check_regular(path: Path) -> None:
    """Raises InputError for a device or a pipe, which a new file would replace."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"cannot write the file {path}: it is a device or a pipe")


def same_file(path: Path, other: Path) -> bool:
    """Whether both are one existing file or folder."""
    return path.exists() and other.exists() and path.samefile(other)


def check_same(path: Path, data: bytes) -> None:
    """Raises InputError if the file exists and holds something other than `data`."""
    if path.exists() and (not path.is_file() or path.read_bytes() != data):
        raise InputError(
            f"{path} is there already with another content and is not changed: remove it first, or"
            " give another --output-dir"
        )


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; makes parent folders."""
    make_folder(Path(path).parent)
    atomic_write(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError if it is missing or is not JSON, with the line.

    See `parse_json`.
    """
    return parse_json(read_text(path), str(path))
