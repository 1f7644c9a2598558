"""Progress in a log file: whole lines, of which the first and the last are always there."""

import sys

import pytest

from common import progress
from common.progress import Progress, close_all


def test_a_log_file_gets_the_first_and_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Progress(range(1000), desc="counting", unit="sheep"):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("counting: 0 of 1000 sheep, 00:00 passed")
    assert last.startswith("counting: 1000 of 1000 sheep, 00:00 passed, 00:00 left")


def test_lines_come_by_time_and_when_the_work_changes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress(desc="training", unit="steps", total=2) as bar:
        bar.doing("validating")
        bar.set_postfix_str("loss 1")  # too early for a line
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        bar.set_postfix_str("loss 2")
    said = capsys.readouterr().err
    assert "\r" not in said
    assert [line.rpartition(", ")[2] for line in said.splitlines()] == [
        "? left",
        "validating",
        "loss 2",
        "loss 2",
    ]


def test_an_error_begins_on_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(desc="sampling", unit="steps", total=9)
    close_all()
    print("error: no", file=sys.stderr)
    assert capsys.readouterr().err.splitlines()[-1] == "error: no"
    assert bar.disable


def test_a_hidden_bar_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(desc="sampling", unit="steps", total=9, disable=True) as bar:
        bar.update()
        bar.doing("something")
    assert capsys.readouterr().err == ""
