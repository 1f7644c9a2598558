"""Reading text files: UTF-8 in any locale, lines that end at newlines only, and strict JSON.

A file may begin with a byte-order mark, and its lines may end with LF or CRLF. Python's
`splitlines` also splits at characters that prompts and JSON texts may hold, and its JSON reader
takes more than JSON allows.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError

POINTER = "version https://git-lfs"
"""Beginning of what Git LFS leaves in place of a file that was not fetched."""
POINTER_ADVICE = (
    "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or download the"
    " file from its page"
)


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, without a byte-order mark.

    Raises InputError if the file is missing, has another encoding, holds a NUL character, or is a
    pointer of Git LFS.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise InputError(f"{path} is text in UTF-32: save it as UTF-8")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is text in UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not a text file in UTF-8: line {line} holds the byte"
            f" 0x{data[error.start]:02x}"
        ) from None
    if text.startswith(POINTER):
        raise InputError(f"{path} is {POINTER_ADVICE}")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}, line {line} holds a NUL character, which no text file has")
    return text


def text_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line without its end) for each line; the last end may be missing."""
    start, number = 0, 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        number += 1
        yield number, text[start:end].removesuffix("\r")
        start = end + 1


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number of the line, value) for each value of a list in a JSON file.

    The list has one value on each line (JSON Lines; empty lines are left out) or is one array.
    Raises InputError as `read_text` and `parse_json` do.
    """
    text = read_text(path)
    if re.match(r"\s*\[", text):
        yield from _array_items(text, str(path))
        return
    for number, line in text_lines(text):
        words = line.strip()
        if words == "{" or words.endswith("},"):
            raise InputError(
                f"{path}, line {number} is not valid JSON: one object on each line without commas"
                " between them, or one array of objects, is expected"
            )
        if words:
            yield number, parse_json(line, str(path), number)


# ----------------------------------------------------------------------------
# Strict JSON.

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+', re.DOTALL)
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


def parse_json(text: str, source: str, first_line: int = 1) -> Any:
    """The value of a JSON text; `source` and the number of its first line are for messages.

    Raises InputError, with the line, if it is not JSON, holds a key twice in an object, a number
    that no float can hold, a NUL or half a surrogate pair, or is nested too deep.
    """
    value, end = _value_at(text, _after_space(text, 0), source, first_line)
    if (end := _after_space(text, end)) < len(text):
        line = first_line + text.count("\n", 0, end)
        raise InputError(f"{source}, line {line} is not valid JSON: it goes on after the value")
    return value


def _array_items(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """`read_records` of an array; one value at a time is in memory."""
    at = _after_space(text, text.index("[") + 1)
    line, counted = 1, 0
    more = not text.startswith("]", at)
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value_at(text, at, source)
        yield line, value
        at = _after_space(text, at)
        if more := text.startswith(",", at):
            at = _after_space(text, at + 1)
    if not text.startswith("]", at) or _after_space(text, at + 1) < len(text):
        line = 1 + text.count("\n", 0, at)
        raise InputError(f"{source}, line {line} is not valid JSON: the array does not end here")


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _value_at(text: str, at: int, source: str, first_line: int = 1) -> tuple[Any, int]:
    """The JSON value that begins at index `at`, and the index after it."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if text.find(r"\u", at, end) >= 0 and _holds_no_text(value):
            raise ValueError("NUL and half a surrogate pair are no characters of a text")
        return value, end
    except json.JSONDecodeError as error:
        line, reason = error.lineno, error.msg if text.strip() else "it is empty"
    except RecursionError:
        line, reason = 1 + text.count("\n", 0, at), "it is nested too deep"
    except ValueError as error:
        line, reason = _line_of_problem(text, at), str(error)
    raise InputError(f"{source}, line {first_line + line - 1} is not valid JSON: {reason}")


def _line_of_problem(text: str, start: int) -> int:
    """The line of the first token from `start` on that the functions below refuse."""
    keys: list[set[str]] = []
    tokens = list(_TOKEN.finditer(text, start))
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        word = token[0]
        try:
            if word == "{":
                keys.append(set())
            elif word == "}":
                keys.pop()
            elif word[0] == '"':
                value = json.loads(word)
                if _holds_no_text(value) or (after and after[0] == ":" and value in keys[-1]):
                    raise ValueError
                if after and after[0] == ":":
                    keys[-1].add(value)
            elif word[0] in "-0123456789NI":
                _finite_float(word)
        except ValueError:
            return 1 + text.count("\n", 0, token.start())
    return 1 + text.count("\n", 0, start)


def _holds_no_text(value: Any) -> bool:
    """Whether a string in the value holds a character that file names and tokenizers reject."""
    if isinstance(value, str):
        return bool(_NO_TEXT.search(value))
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(_holds_no_text(part) for part in parts)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {double!r} occurs twice in one object")
    return result


def _finite_float(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        shortened = word if len(word) <= 20 else f"{word[:17]}... of {len(word)} characters"
        raise ValueError(f"the number {shortened} is not finite or too large")
    return value


def _finite_int(word: str) -> int:
    _finite_float(word)
    return int(word)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number in JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_repeats,
    parse_int=_finite_int,
    parse_float=_finite_float,
    parse_constant=_no_constant,
)
