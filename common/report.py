"""Fills the slots of Markdown documents from results/*.json and checks their claims.

A person writes the sentences; this module writes the numbers and tables between HTML comments,
which Markdown does not show:

    <!-- = p1_evaluation_2024 datasets.svhn.accuracy percent1 -->97.6 %<!-- / -->    a number
    <!-- claim: p1_evaluation_2024 datasets.svhn.accuracy >= 0.97 -->                a comparison
    <!-- table: p1_guidance --> ... <!-- end -->              lines that a problem's report.py makes
    <!-- frames: p2_eta -->                   the place of a slider in the page (report_page.py)

A number slot holds `EXPRESSION FORMAT`, where FORMAT is a key of `FORMATS`. A claim consists of
expressions joined by < <= > >= == !=; several claims in one comment are separated by semicolons. An
expression is one operand, or two operands joined by + - * /. Operators need spaces around them. An
operand is

- a number;
- `FILE PATH`: the name of a file in results/ without .json, and a path inside it;
- min(FILE PATH), max(FILE PATH) or count(FILE PATH) over all values that the path selects.

A path consists of keys joined by dots. A key with characters other than letters, digits, _ and - is
quoted: methods."textual inversion".images. After a list or an object, [3] selects one item, [*] all
items, and [eta=0, sampling.steps<=50] the items that meet every condition. Outside min, max and
count a path must select exactly one value. The value in a condition is a number, true, false, null
or text without commas.

Links and images must point to existing files. Slots inside code are left unchanged.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from common.text_files import read_text

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
OVER_ALL: dict[str, Callable[[list[Any]], Any]] = {"min": min, "max": max, "count": len}
FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "number": "{:g}".format,
    **{f"number{digits}": f"{{:.{digits}f}}".format for digits in range(5)},
    "digits3": "{:.3g}".format,
    "thousands": "{:,.0f}".format,
    "percent": lambda value: f"{100 * value:.0f} %",
    "percent1": lambda value: f"{100 * value:.1f} %",
    "percent2": lambda value: f"{100 * value:.2f} %",
    "points": lambda value: f"{100 * value:+.1f}",
    "decibel": "{:.1f} dB".format,
    "seconds": "{:.1f} s".format,
}

_SIGN = "<=|>=|==|!=|=|<|>"
_KEY = r'(?:[\w-]+|"[^"]*")'
_PATH = rf"{_KEY}(?:\.{_KEY}|\[[^\]]*\])*"
_STEP = re.compile(r'\.?(?:(?P<key>[\w-]+)|"(?P<quoted>[^"]*)")|\[(?P<inside>[^\]]*)\]')
_CONDITION = re.compile(rf'(?P<path>[^\s<>=!]+)\s*(?P<sign>{_SIGN})\s*"?(?P<value>[^"]+)"?')
_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_OPERAND = re.compile(
    rf"(?P<number>{_NUMBER})(?=\s|$)"
    rf"|(?P<over>min|max|count)\(\s*(?P<files>\w+)\s+(?P<paths>{_PATH})\s*\)"
    rf"|(?P<file>[A-Za-z]\w*)\s+(?P<path>{_PATH})(?=\s|$)"
)
_ARITHMETIC = re.compile(r"\s+([-+*/])\s+")
_COMPARE = re.compile(rf"\s+({_SIGN})\s+")
_SLOT = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)"
    r"|<!-- table: (?P<table>\S+) -->\n(?:(?!<!--)[^\n]*\n)*?<!-- end -->"
    r"|<!-- = (?P<number>[^\n]*?) -->(?:(?!<!--)[^\n])*<!-- / -->"
    r"|<!-- claim: (?P<claim>.*?) -->"
    r"|<!-- frames: (?P<frames>\S+) -->"
    r"|(?P<stray><!-- *(?:\w+:|=|/ |end )[^\n]*)"
    r"|\]\((?!\w+:|#)(?P<link>[^)#\s]+)[^)]*\)",
    re.DOTALL | re.MULTILINE,
)


class Results:
    """The JSON files of a folder, by name without .json; each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The content of NAME.json. Raises InputError if it is missing or is not JSON."""
        if name not in self._read:
            self._read[name] = read_json(self.folder / f"{name}.json")
        return self._read[name]


Tables = Mapping[str, Callable[[Results], str]]
"""Functions that make Markdown tables, by the name that documents use."""
Columns = Mapping[str, str | Callable[[Any], str]]
"""Columns of a table by heading. A column is a function of the row, or "PATH FORMAT" inside the
row; with "FORMAT?" the value may be missing, and the cell is then "-"."""


# ----------------------------------------------------------------------------
# Paths, expressions and claims.


def select(value: Any, path: str) -> list[Any]:
    """All values that `path` selects in `value`. Raises InputError if a key is missing."""
    if not re.fullmatch(_PATH, path):
        raise InputError(f"{path!r} is not a path")
    found = [value]
    for step in _STEP.finditer(path):
        if step["inside"] is None:
            key = step["quoted"] if step["key"] is None else step["key"]
            found = [_item(item, key) for item in found]
        else:
            found = [item for items in found for item in _items(items, step["inside"].strip())]
    return found


def only(value: Any, path: str) -> Any:
    """The single value that `path` selects. Raises InputError if it selects none or several."""
    found = select(value, path)
    if len(found) != 1:
        raise InputError(f"{path} selects {len(found)} values, not one")
    return found[0]


def _item(container: Any, key: str) -> Any:
    """The item of an object by key, or of a list by index."""
    if isinstance(container, dict) and key in container:
        return container[key]
    if isinstance(container, list) and re.fullmatch(r"-?\d+", key):
        if -len(container) <= int(key) < len(container):
            return container[int(key)]
        raise InputError(f"there is no item {key} in a list of {len(container)}")
    keys = f", only {', '.join(container)}" if isinstance(container, dict) else ""
    raise InputError(f"there is no {key!r}{keys}")


def _items(container: Any, inside: str) -> list[Any]:
    """The items that the text inside brackets selects."""
    if re.fullmatch(r"-?\d+", inside):
        return [_item(container, inside)]
    if not isinstance(container, dict | list):
        raise InputError(f"[{inside}] needs a list or an object, not {container!r}")
    items = list(container.values()) if isinstance(container, dict) else container
    if inside == "*":
        return items
    conditions = [_CONDITION.fullmatch(part.strip()) for part in inside.split(",")]
    if not all(conditions):
        raise InputError(f"[{inside}] is neither a number, * nor conditions such as [eta=0]")
    return [item for item in items if all(_meets(item, condition) for condition in conditions)]


def _meets(item: Any, condition: re.Match[str]) -> bool:
    """Whether the item has the value that a condition names and the comparison holds."""
    try:
        value = only(item, condition["path"])
    except InputError:
        return False
    wanted: Any = condition["value"]
    if wanted in ("true", "false", "null"):
        wanted = {"true": True, "false": False, "null": None}[wanted]
    elif re.fullmatch(_NUMBER, wanted):
        wanted = float(wanted)
    if condition["sign"] in ("=", "==", "!="):
        same = value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
        return same != (condition["sign"] == "!=")
    numbers = isinstance(value, int | float) and isinstance(wanted, float)
    return numbers and COMPARISONS[condition["sign"]](value, wanted)


def evaluate(text: str, results: Results) -> Any:
    """The value of an expression. Raises InputError if it is malformed or selects nothing."""
    value, at = _expression(text, 0, results)
    if at != len(text):
        raise InputError(f"cannot read {text[at:].strip()!r} in {text!r}")
    return value


def check_claim(text: str, results: Results) -> None:
    """Raises InputError if a comparison of the claim is false or cannot be parsed."""
    for claim in text.split(";"):
        claim = " ".join(claim.split())
        value, at = _expression(claim, 0, results)
        if at == len(claim):
            raise InputError(f"the claim {claim!r} compares nothing")
        while at < len(claim):
            if not (sign := _COMPARE.match(claim, at)):
                raise InputError(f"cannot read {claim[at:].strip()!r} in the claim {claim!r}")
            other, at = _expression(claim, sign.end(), results)
            try:
                holds = COMPARISONS[sign[1]](value, other)
            except TypeError:
                raise InputError(f"{value!r} and {other!r} cannot be compared") from None
            if not holds:
                raise InputError(f"the claim {claim!r} is false: {value!r} {sign[1]} {other!r}")
            value = other


def _expression(text: str, at: int, results: Results) -> tuple[Any, int]:
    """The value of the expression that starts at index `at`, and the index at which it ends."""
    value, at = _operand(text, at, results)
    if sign := _ARITHMETIC.match(text, at):
        other, at = _operand(text, sign.end(), results)
        try:
            value = ARITHMETIC[sign[1]](value, other)
        except (TypeError, ZeroDivisionError):
            raise InputError(f"{value!r} {sign[1]} {other!r} is not a number") from None
    return value, at


def _operand(text: str, at: int, results: Results) -> tuple[Any, int]:
    match = _OPERAND.match(text, at)
    if not match:
        raise InputError(f"cannot read {text[at:].strip()!r}: a number or FILE PATH is expected")
    if match["number"]:
        return float(match["number"]), match.end()
    name = match["file"] or match["files"]
    try:
        if match["over"]:
            found = select(results[name], match["paths"])
            if not found and match["over"] != "count":
                raise InputError(f"{match['paths']} selects nothing")
            return OVER_ALL[match["over"]](found), match.end()
        return only(results[name], match["path"]), match.end()
    except (InputError, TypeError) as error:
        raise InputError(f"{name}: {error}") from None


def formatted(value: Any, name: str) -> str:
    """The value as text in the named format.

    Raises InputError if there is no such format or the value has the wrong type for it.
    """
    if name not in FORMATS:
        raise InputError(f"there is no format {name!r}, only {', '.join(FORMATS)}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number == (name == "text"):
        raise InputError(f"{value!r} cannot be written as {name}")
    return FORMATS[name](value)


# ----------------------------------------------------------------------------
# Tables.


def table(rows: Sequence[Any], columns: Columns) -> str:
    """A Markdown table with one line for each row."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(row, column) for column in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def listing(source: str, columns: Columns) -> Callable[[Results], str]:
    """A function that makes the table of the rows that `source` selects, given as "FILE PATH"."""
    name, path = source.split(" ", 1)
    return lambda results: table(select(results[name], path), columns)


def _cell(row: Any, column: str | Callable[[Any], str]) -> str:
    if callable(column):
        return column(row)
    path, name = column.rsplit(" ", 1)
    try:
        value = only(row, path)
    except InputError:
        if name.endswith("?"):
            return "-"
        raise
    return formatted(value, name.removesuffix("?"))


# ----------------------------------------------------------------------------
# Documents.


def fill(path: Path, results: Results, tables: Tables) -> tuple[str, list[str], list[str]]:
    """The text of a document with its slots filled, a list of errors and a list of outdated slots.

    Each entry of the two lists is "LINE: a sentence". A slot that cannot be filled keeps its text.
    """
    text = read_text(path)
    wrong: list[str] = []
    stale: list[str] = []

    def filled(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 1
        try:
            new = _filled(match, path, results, tables)
        except InputError as error:
            wrong.append(f"{line}: {error}")
            return match[0]
        if new != match[0]:
            stale.append(f"{line}: {match[0].split(' -->')[0][5:]} is out of date")
        return new

    return _SLOT.sub(filled, text), wrong, stale


def _filled(match: re.Match[str], path: Path, results: Results, tables: Tables) -> str:
    """The text that replaces a match of `_SLOT`."""
    if match["number"] or match["claim"]:
        _check_place(match)
    if match["stray"]:
        raise InputError(
            f"{match['stray']!r} is not a slot, or its opening or closing comment is missing"
        )
    if match["link"] and not (path.parent / match["link"]).exists():
        raise InputError(f"the link points to {match['link']}, which does not exist")
    if match["frames"] and not (results.folder / "frames" / f"{match['frames']}.json").is_file():
        raise InputError(f"there are no frames {match['frames']!r} in {results.folder}/frames")
    if match["claim"]:
        check_claim(match["claim"], results)
    if match["number"]:
        expression, _, name = match["number"].rpartition(" ")
        value = evaluate(expression.strip(), results)
        return f"<!-- = {match['number']} -->{formatted(value, name)}<!-- / -->"
    if name := match["table"]:
        if name not in tables:
            raise InputError(f"there is no table {name!r}, only {', '.join(tables)}")
        try:
            content = tables[name](results)
        except (KeyError, TypeError, IndexError, StopIteration) as error:
            raise InputError(f"the table {name} does not fit its results: {error!r}") from None
        return f"<!-- table: {name} -->\n{content}\n<!-- end -->"
    return match[0]


def _check_place(match: re.Match[str]) -> None:
    """Raises InputError if the slot begins a line, where Markdown would end the paragraph.

    Markdown takes a line that begins with a comment for HTML. A claim may begin a line that follows
    an empty one.
    """
    before = match.string[: match.start()]
    alone = not before.strip() or before.endswith("\n\n")
    if not before.rsplit("\n", 1)[-1].strip() and not (match["claim"] and alone):
        raise InputError("a slot must not begin a line, where Markdown would end the paragraph")
