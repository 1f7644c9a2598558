"""Values of configurations: types from the annotations of a dataclass, bounds beside them.

A field such as `steps: Annotated[int, *bounds(at_least=1)] = 50` states its own range. The same
check serves command lines and configurations that are read from files.
"""

import contextlib
import dataclasses
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from common.errors import InputError
from common.files import read_json

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a number, or of each number of a tuple; None is no bound."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        bounds = {name.replace("_", " "): value for name, value in vars(self).items()}
        return " and ".join(
            f"{name} {value}" for name, value in bounds.items() if value is not None
        )


def bounds(
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> tuple[Bounds, object]:
    """Metadata of an Annotated number: its range, for the checks here and for --help."""
    limits = Bounds(at_least, at_most, above, below)
    in_help = tyro.conf.arg(help_behavior_hint=lambda default: f"({limits}; default: {default})")
    return limits, in_help


Count = Annotated[int, *bounds(at_least=1, at_most=10**6)]
Size = Annotated[int, *bounds(at_least=1, at_most=65536)]
"""A width, a side or a number of entries inside a network."""
Index = Annotated[int, *bounds(at_least=0, at_most=65536)]
Depth = Annotated[int, *bounds(at_least=1, at_most=256)]
"""A number of layers, heads or groups inside a network."""
Side = Annotated[int, *bounds(at_least=1, at_most=8192)]
"""The side of a picture in pixels."""
Pictures = Annotated[int, *bounds(at_least=1, at_most=10**7)]
"""A number of pictures, captions or pairs to make."""
Seed = Annotated[int, *bounds(at_least=0, at_most=2**32 - 1)]
Scale = Annotated[float, *bounds(at_least=-1000, at_most=1000)]
"""A factor of guidance or control."""
Probability = Annotated[float, *bounds(at_least=0, at_most=1)]
Fraction = Annotated[float, *bounds(at_least=0, below=1)]
NonNegative = Annotated[float, *bounds(at_least=0)]
Positive = Annotated[float, *bounds(above=0)]


def from_json(config_class: type[Config], values: Any, path: Path) -> Config:
    """The dataclass `config_class` with the values of a JSON object; lists become tuples.

    Raises InputError that names the file `path` and the key if a value is missing, unknown, of
    another type, not finite or outside its bounds.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{path} must hold a JSON object, not {_shown(values)}")
    hints = _hints(config_class)
    for name in sorted(hints.keys() - values.keys()):
        raise InputError(f"{path}: {name} is missing")
    for name in sorted(values.keys() - hints.keys()):
        raise InputError(f"{path}: {name} is unknown")
    for name, hint in hints.items():
        check_value(values[name], hint, f"{path}: {name}")
    return config_class(**{name: _to_tuples(value) for name, value in values.items()})


def check_entries(values: Mapping[str, Any], hints: Mapping[str, Any], path: Path) -> None:
    """Checks the entries of a JSON object for which `hints` has a type.

    Absent ones are skipped, and null, which stands for a library's own default. Raises InputError
    that names the file `path` and the key.
    """
    for name, hint in hints.items():
        if values.get(name) is not None:
            check_value(values[name], hint, f"{path}: {name}")


def read_entries(path: Path, hints: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    """The JSON object in a file, after `check_entries`.

    With `required` every entry of `hints` must be there. Raises InputError that names the file.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, not {_shown(values)}")
    missing = [name for name in hints if values.get(name) is None]
    if required and missing:
        raise InputError(f"{path}: {missing[0]} is missing")
    check_entries(values, hints, path)
    return values


def check_fields(config: Any, prefix: str = "--") -> None:
    """Raises InputError that names the flag if a field of the dataclass is outside its bounds.

    The fields of a dataclass inside are flags named OUTER.INNER, or INNER alone where its
    annotation says so (`tyro.conf.arg(name="")`).
    """
    if not dataclasses.is_dataclass(config):
        return
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            hidden = any(getattr(extra, "name", None) == "" for extra in get_args(hint)[1:])
            check_fields(value, prefix if hidden else f"{flag}.")
        else:
            check_value(value, hint, flag)


def check_value(value: Any, hint: Any, name: str) -> None:
    """Raises InputError, which begins with `name`, if the value does not have the type `hint`.

    Numbers must be finite and inside the `Bounds` of an Annotated type.
    """
    if problem := _problem(value, hint):
        raise InputError(f"{name} must be {problem}, not {_shown(value)}")


def _problem(value: Any, hint: Any) -> str | None:
    """What the value should be, or None if it has the type `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Bounds)]
        numbers = value if isinstance(value, list | tuple) else [value]
        return _problem(value, arguments[0]) or next(
            (
                str(limits)
                for limits in ranges
                for x in numbers
                if isinstance(x, int | float) and x not in limits
            ),
            None,
        )
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        problems = [_problem(value, argument) for argument in arguments]
        wanted = [problem for problem in problems if problem != "null"]
        return None if None in problems else " or ".join(dict.fromkeys(map(str, wanted)))
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return "a list"
        if origin is tuple and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                return f"a list of {len(arguments)}"
            each = zip(value, arguments, strict=True)
        else:
            each = ((entry, arguments[0]) for entry in value)
        return next(
            (f"a list of which each value is {p}" for x, a in each if (p := _problem(x, a))), None
        )
    if hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        return None if ok and abs(value) <= sys.float_info.max else "a finite number"
    if hint is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if hint in (None, type(None)):
        return None if value is None else "null"
    if isinstance(hint, type) and hint in NAMES:
        return None if isinstance(value, hint) else NAMES[hint]
    return None  # other types are checked where they are used


NAMES = {bool: "true or false", str: "text", dict: "an object"}


def _hints(config_class: type) -> dict[str, Any]:
    """The annotated types of a dataclass's fields, in order."""
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python shows no number of more than 4300 digits
        return "such a long number"
    return f"{text[:60]}..." if len(text) > 60 else text


@contextlib.contextmanager
def describing(path: Path, what: str) -> Iterator[None]:
    """Inside the block a network is built from the configuration in `path`, and nothing else done.

    Whatever the libraries raise on values that make no sense becomes an InputError that names the
    file.
    """
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} does not describe {what} ({error})") from None
    except Exception as error:
        from common.memory import out_of_memory  # here, because it imports torch

        if out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} does not describe {what} ({reason})") from None
