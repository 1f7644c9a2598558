"""Runs a program: its command line comes from one dataclass, its errors end in one sentence and exit code 2."""

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from common.errors import InputError

Config = TypeVar("Config")


def run(program: Callable[[Config], None], config_class: type[Config], argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (default: the process's arguments) into `config_class` and calls `program` with it.

    Bad input (`InputError`) and failures of files and disks (`OSError`) are printed to stderr as one sentence, exit code 2.
    Ctrl-C exits with 130. Any other exception is a defect of this project and keeps its traceback.
    """
    config = tyro.cli(config_class, args=argv)
    try:
        program(config)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _fail(sentence: str) -> None:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)
