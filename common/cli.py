"""Command-line programs: arguments are parsed into one dataclass, errors end with exit code 2."""

import contextlib
import dataclasses
import inspect
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import tyro

from common.config import check_fields
from common.devices import this_process
from common.errors import InputError, Terminated, interruption_behind, raises_terminated
from common.files import claimed
from common.memory import out_of_memory
from common.progress import close_all

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named set of values for a program's flags, chosen by `--preset NAME`."""

    what: str
    """Purpose, cost and expected numbers of the preset; shown by --help."""
    settings: Mapping[str, Any]
    """Values of the program's dataclass fields that differ from the defaults, by field name."""
    by_memory: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Further values for GPUs of so many GB of memory, chosen by `--memory GB` or else from the
    GPU at hand."""


def run(
    program: Callable[[Config], None], config_class: type[Config], argv: Sequence[str] | None = None
) -> None:
    """Parses `argv` into `config_class` and calls `program` with the result.

    `argv` None stands for the arguments of this process.

    Bad input (`InputError`), failed file access (`OSError`) and exhausted memory are printed to
    stderr as one sentence, with exit code 2. Ctrl-C exits with 130, SIGTERM with 143, a closed pipe
    (as of `| head`) with 141. Any other exception is a defect of this project and keeps its
    traceback, with exit code 70; 1 is left to grades below the bar.

    Fields are checked against their bounds (`common.config`). The folder in a field `run_dir` or
    `output_dir` is made, and no other program run in this way may write there meanwhile
    (`common.files.claimed`). Floats below 1e-38, with which a CPU computes many times slower, count
    as 0.

    `config_class` may have

    - `translate_arguments(arguments)`, a static method that converts other spellings of the
      arguments, such as the homework's, into the program's own;
    - `PRESETS`, a class variable that maps each name of `--preset NAME` to a `Preset`. Other flags
      on the command line override the preset's values. `--memory GB` goes with a preset that has
      values for several sizes of GPU; without it, the largest that the GPU has is taken, and the
      smallest where there is no CUDA device;
    - `GRADES`, a class variable that is true for a program that grades: its last line on stdout is
      PASS or FAIL and the reason, also where nothing can be graded.
    """
    _use_utf8(restart=argv is None)
    config = None
    given = list(sys.argv[1:] if argv is None else argv)
    config_class, given, prog = _subcommand(config_class, given)
    grades = getattr(config_class, "GRADES", False)
    try:
        try:
            config = _parse(config_class, given, prog)
            check_fields(config)
            torch.set_flush_denormal(True)  # before PyTorch starts its threads, which inherit it
            with _claimed_folder(config), raises_terminated():
                program(config)
        finally:
            torch.set_flush_denormal(False)
            sys.stdout.flush()
    except SystemExit as end:
        if grades and end.code == 2:  # from tyro, which has printed why
            _say_ungraded("the flags are wrong, as said above")
        raise
    except InputError as error:
        _fail(str(error), grades)
    except BrokenPipeError:
        # Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        where = error.filename or _full_output()
        _fail(f"{where}: {error.strerror or error}" if where else str(error), grades)
    except (KeyboardInterrupt, Exception) as error:
        if stopped := interruption_behind(error):
            _say_stopped(config)
            number = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
            raise SystemExit(128 + number) from None
        if out_of_memory(error):
            _fail(
                "there is not enough memory: use a smaller --chunk-size, batch size, model or"
                f" picture size ({error})",
                grades,
            )
        traceback.print_exc()
        raise SystemExit(os.EX_SOFTWARE) from None


def _say_stopped(config: Any) -> None:
    """Says what is left after Ctrl-C or SIGTERM by a program that makes files; trainers say it."""
    if this_process().rank == 0 and (folder := getattr(config, "output_dir", None)):
        close_all()
        print(f"stopped: what is in {folder} is whole; the same command goes on", file=sys.stderr)


def _claimed_folder(config: Any) -> contextlib.AbstractContextManager[None]:
    """The claim on the folder that the program writes to; empty if it has none."""
    for name in ("run_dir", "output_dir"):
        if isinstance(folder := getattr(config, name, None), Path):
            return claimed(folder, main=this_process().rank == 0)
    return contextlib.nullcontext()


def _use_utf8(restart: bool) -> None:
    """Makes file names UTF-8 in any locale, and prints what a terminal's encoding lacks as escapes.

    The encoding of file names is fixed when Python starts. Where a locale such as C has set another
    one and Python's UTF-8 mode is off, `restart` replaces this process by the same in UTF-8 mode.
    """
    if restart and sys.getfilesystemencoding().lower() != "utf-8" and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed: the number is kept from other files
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _subcommand(config_class: Any, arguments: list[str]) -> tuple[Any, list[str], str | None]:
    """The class, arguments and name of the subcommand chosen; the same if there are none."""
    for variant in get_args(config_class):  # a union of subcommands with a class each
        own_class, subcommand = get_args(variant) or (variant, None)
        if subcommand and arguments[:1] == [subcommand.name]:
            return own_class, arguments[1:], f"{sys.argv[0]} {subcommand.name}"
    return config_class, arguments, None


def _parse(config_class: type[Config], arguments: list[str], prog: str | None) -> Config:
    arguments = getattr(config_class, "translate_arguments", list)(arguments)
    presets: Mapping[str, Preset] = getattr(config_class, "PRESETS", {})
    if not presets:
        return tyro.cli(config_class, args=arguments, prog=prog)
    name, arguments = _take_preset(arguments, list(presets))
    chosen, settings = "Flags override the values of a preset.", {}
    if name:
        chosen = f"The defaults below are those of the preset {name}."
        settings = presets[name].settings
    sized = [known for known in presets if presets[known].by_memory]
    if sized and name not in sized and any(a.startswith("--memory") for a in arguments):
        raise InputError(f"--memory goes with --preset {' or '.join(sized)} only")
    if name and presets[name].by_memory:
        memory, arguments = _take_memory(arguments, list(presets[name].by_memory))
        chosen = f"{chosen[:-1]} for a GPU of {memory} GB."
        settings = {**settings, **presets[name].by_memory[memory]}
    required = [
        field.name
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    default = config_class(**{**dict.fromkeys(required, tyro.MISSING), **settings})
    listed = "\n".join(f"- {preset}: {presets[preset].what}" for preset in presets)
    # Under python -OO a dataclass has its signature for a docstring.
    about = config_class.__doc__ or ""
    about = "" if about.startswith(f"{config_class.__name__}(") else about
    description = f"{about}\n\nPresets, by --preset NAME:\n\n{listed}\n\n{chosen}"
    return tyro.cli(
        config_class, args=arguments, prog=prog, default=default, description=description
    )


def _joined_lines(text: str) -> str:
    """Help text without the line breaks of the source; items and examples keep theirs.

    tyro's own function of this purpose meets the lines with the indentation of the source and
    keeps their breaks, so that sentences are broken in the middle.
    """
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines: list[str] = []
        for line in filter(None, paragraph.split("\n")):
            if lines and not line.startswith((" ", "- ")) and not lines[-1].startswith(" "):
                lines[-1] += f" {line}"
            elif lines and line.startswith("  ") and lines[-1].startswith("- "):
                lines[-1] += f" {line.strip()}"
            else:
                lines.append(line)
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


with contextlib.suppress(ImportError):
    from tyro import _strings

    _strings.remove_single_line_breaks = _joined_lines


def _take_preset(arguments: list[str], known: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--preset` (None if it is not given) and the remaining arguments."""
    return _take("--preset", arguments, known)


def _take_memory(arguments: list[str], sizes: list[int]) -> tuple[int, list[str]]:
    """The value of `--memory`, in GB, by default for the GPU at hand, and the other arguments."""
    value, arguments = _take("--memory", arguments, [str(size) for size in sizes])
    if value:
        return int(value), arguments
    from common.devices import gpu_memory

    # A card sold with 24 GB shows 22.5 to 24 GiB.
    return max(
        (size for size in sizes if gpu_memory() >= 0.9 * size), default=min(sizes)
    ), arguments


def _take(flag: str, arguments: list[str], known: list[str]) -> tuple[str | None, list[str]]:
    """The value of `flag`, one of `known` (None if it is not given), and the other arguments."""
    for at, argument in enumerate(arguments):
        name, joined, value = argument.partition("=")
        if name == flag:
            rest = arguments[at + 1 :]
            if not joined:
                value, rest = rest[0] if rest else "", rest[1:]
            if value not in known:
                raise InputError(f"{flag} must be one of {', '.join(known)}, not {value!r}")
            return value, arguments[:at] + rest
    return None, arguments


def _full_output() -> str:
    """The name of standard output if nothing more can be written to it, else an empty text.

    Python does not name it in the error, and drops what it could not write.
    """
    try:
        os.write(1, b"\n")
    except OSError:
        # Python would write once more at its end, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "standard output"
    return ""


def _fail(sentence: str, grades: bool) -> None:
    close_all()
    sentence = " ".join(sentence.split())
    try:
        print(f"error: {sentence}", file=sys.stderr)
    except OSError:  # a full disk
        # Python would write once more at its end, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    if grades:
        _say_ungraded(sentence)
    raise SystemExit(2)


def _say_ungraded(reason: str) -> None:
    with contextlib.suppress(OSError):
        print(f"FAIL: nothing is graded: {reason}", flush=True)
