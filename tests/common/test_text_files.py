"""Text as people have it is read in any locale; what is no text or no JSON is named with its
line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from common.files import ROOT, read_json
from common.text_files import parse_json, read_records, read_text, text_lines

ROWS = [{"a": 1}, {"a": "x\u2028y\x85z\x0b\x0c"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES),
        "\r\n".join(LINES) + "\r\n\r\n",
        "\ufeff" + "\n\n".join(LINES),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4).replace("\n", "\r\n"),
        "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False) + "\n",
    ],
    ids=["lines", "CRLF", "BOM", "array", "pretty", "array with BOM"],
)
def test_a_list_is_lines_or_one_array(tmp_path: Path, content: str) -> None:
    assert [row for _, row in read_records(written(tmp_path / "x", content))] == ROWS


def test_lines_end_at_newlines_only() -> None:
    assert list(text_lines("a\u2028\x85\x0bb\r\n\nc\rd")) == [
        (1, "a\u2028\x85\x0bb"),
        (2, ""),
        (3, "c\rd"),
    ]
    assert list(text_lines("")) == []


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert read_json(written(tmp_path / "x", '\ufeff{"0": "red circle"}')) == {"0": "red circle"}


BAD: dict[str, tuple[str | bytes, str]] = {
    "twice": (
        '{"b": [\n{"a": 1,\n"a": 2}]}',
        "x, line 3 is not valid JSON: the key 'a' occurs twice",
    ),
    "NaN": ('{"a": "NaN",\n"b": NaN}', "x, line 2 is not valid JSON: NaN is no number"),
    "-Infinity": ("[\n-Infinity]", "x, line 2 is not valid JSON: -Infinity is no number"),
    "1e999": ("[1,\n\n1e999]", "x, line 3 is not valid JSON: the number 1e999 is not finite"),
    "5000 digits": (
        "[\n" + "9" * 5000 + "]",
        "x, line 2 .* 9{17}... of 5000 characters is not finite",
    ),
    "400 digits": ("[-" + "9" * 400 + "]", "x, line 1 .* is not finite or too large"),
    "half a pair": ('{"a": "\\\\ud800",\n"b": "\\ud800"}', "x, line 2 .* half a surrogate pair"),
    "half a pair as key": ('\n{"\\udc00": 1}', "x, line 2 .* half a surrogate pair"),
    "escaped NUL": ('["a\\u0000b"]', "x, line 1 .* NUL"),
    "NUL": ("{\n\0}", "x, line 2 holds a NUL character"),
    "deep": ("[" * 100_000, "x, line 1 is not valid JSON: it is nested too deep"),
    "deep objects": ('{"a":' * 100_000, "x, line 1 is not valid JSON: it is nested too deep"),
    "empty": ("", "x, line 1 is not valid JSON: it is empty"),
    "more": ("{}\n{}", "x, line 2 is not valid JSON: it goes on after the value"),
    "Latin-1": (b'{"a":\n"\xe9"}', "x is not a text file in UTF-8: line 2 holds the byte 0xe9"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "x is text in UTF-16: save it as UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_json_is_named_with_its_line(tmp_path: Path, kind: str) -> None:
    content, reason = BAD[kind]
    with pytest.raises(InputError, match=reason) as caught:
        read_json(written(tmp_path / "x", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1},\n', "x, line 1 .* without commas between them, or one array"),
        ('{\n"a": 1}', "x, line 1 .* one object on each line"),
        ('{"a": 1}\n{"a": NaN}', "x, line 2 .* NaN is no number"),
        ('[{"a": 1},\n{"a": NaN}]', "x, line 2 .* NaN is no number"),
        ('[{"a": 1}\n{"a": 2}]', "x, line 2 .* the array does not end here"),
        ('[{"a": 1},\n]', "x, line 2 .* Expecting value"),
        ('[{"a": 1}', "x, line 1 .* the array does not end here"),
        ('[{"a": 1}]\n3', "x, line 1 .* the array does not end here"),
    ],
)
def test_what_is_no_list_is_named_with_its_line(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        list(read_records(written(tmp_path / "x", content)))


@pytest.mark.parametrize(
    "value", [{"a": ["é", 1, -2.5e-3, None, True, "\U0001f600", "\\ud800"]}, 10**300, "", []]
)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only), "x") == value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_text, read_json, lambda path: list(read_records(path))):
        with pytest.raises(InputError, match="none does not exist"):
            read(tmp_path / "none")


PROGRAM = """
import dataclasses
from pathlib import Path
from common import cli
from common.errors import InputError
from common.files import read_json

@dataclasses.dataclass(frozen=True)
class Config:
    path: Path

def main(config):
    name = read_json(config.path)["name"]
    print(name, (config.path.parent / name).read_text(encoding="utf-8"))
    raise InputError(f"{name} is bad")

cli.run(main, Config)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "POSIX"},
    ],
    ids=lambda environment: " ".join(environment),
)
def test_programs_work_in_any_locale(tmp_path: Path, environment: dict[str, str]) -> None:
    """File names on the command line and inside files are UTF-8, and printing never fails."""
    folder = tmp_path / "größe 图"
    folder.mkdir()
    (folder / "ö😀.txt").write_text("inhalt ü", encoding="utf-8")
    (folder / "x.json").write_text('{"name": "ö😀.txt"}', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--path", folder / "x.json"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    utf8 = "PYTHONIOENCODING" not in environment
    name = "ö😀.txt".encode() if utf8 else b"\\xf6\\U0001f600.txt"
    assert done.stdout.startswith(name) and done.stderr.endswith(name + b" is bad\n")
