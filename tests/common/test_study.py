"""A study's table keeps its finished rows, goes on with the missing ones, and replaces those of
other weights."""

from pathlib import Path

import pytest

from common.files import read_json
from common.study import measured_rows


def test_finished_rows_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[int] = []

    def run(*values: int, weights: str = "a", fail_at: int | None = None) -> list[dict]:
        def measure(value: int) -> dict:
            if value == fail_at:
                raise KeyboardInterrupt
            measured.append(value)
            return {"square": float(value * value)}

        plan = [
            ({"value": (value,), "weights": weights}, lambda value=value: measure(value))
            for value in values
        ]
        return measured_rows(tmp_path / "table.json", "make it", plan, ("value", "square"))

    with pytest.raises(KeyboardInterrupt):
        run(1, 2, 3, fail_at=3)
    assert capsys.readouterr().out == "1 of 3: value [1], square 1\n2 of 3: value [2], square 4\n"
    rows = run(1, 2, 3)
    assert measured == [1, 2, 3] and [row["square"] for row in rows] == [1.0, 4.0, 9.0]
    assert read_json(tmp_path / "table.json") == {"command": "make it", "rows": rows}
    rows = run(2, weights="b")
    assert [(row["value"], row["weights"]) for row in rows] == [([1], "a"), ([2], "b"), ([3], "a")]


def test_two_jobs_keep_each_others_rows(tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def measure() -> dict:
        measured_rows(path, "make it", [({"value": 1}, dict)])  # by another job, meanwhile
        return {}

    rows = measured_rows(path, "make it", [({"value": 2}, measure)])
    assert rows == read_json(path)["rows"] == [{"value": 1}, {"value": 2}]


def test_a_row_from_before_a_setting_existed_is_replaced(tmp_path: Path) -> None:
    path, old = tmp_path / "table.json", {"name": "a", "sampling": {"steps": 5}}
    plan = [({**old, "sampling": {"steps": 5, "text": text}}, dict) for text in ("full", "empty")]
    other = ({"name": "a", "sampling": {"steps": 6}}, dict)
    assert measured_rows(path, "make it", [(old, dict), other]) == [old, other[0]]
    assert measured_rows(path, "make it", plan) == [plan[0][0], other[0], plan[1][0]]
