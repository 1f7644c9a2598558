"""Resumable measurements: finished rows are saved, and a rerun measures the missing rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json, write_json

Row = dict[str, Any]
WEIGHTS = "weights"
"""Entry of a row's key that identifies the measured weights, if there is one. A row of other
weights is replaced."""


def measured_rows(
    path: Path,
    command: str,
    plan: Sequence[tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]],
    shown: tuple[str, ...] = (),
) -> list[Row]:
    """The rows of the study file at `path`, after measuring the planned rows that it lacks.

    Each row of the plan has a key, which identifies it, and a function that measures it. Rows are
    saved one by one; a row that replaces another takes its place. The file holds `rows` and the
    `command` that makes it. The entries `shown` of each new row are printed.
    """

    def rows_there() -> list[Row]:
        return read_json(path)["rows"] if path.exists() else []

    rows = rows_there()
    for number, (key, measure) in enumerate(plan, 1):
        key = json.loads(json.dumps(key))  # tuples become lists, as in the rows read back
        if any(_agrees(row, key) for row in rows):
            continue
        row = key | dict(measure())
        settings = {name: value for name, value in key.items() if name != WEIGHTS}
        # Read again: another job may have measured other rows meanwhile.
        rows = rows_there()
        replaced = [i for i, other in enumerate(rows) if _describes(other, settings)]
        place = replaced[0] if replaced else len(rows)
        rows = [other for i, other in enumerate(rows) if i not in replaced]
        rows.insert(place, row)
        write_json(path, {"command": command, "rows": rows})
        print(
            f"{number} of {len(plan)}:",
            ", ".join(f"{name} {_short(row[name])}" for name in shown),
            flush=True,
        )
    return rows


def _agrees(row: Row, key: Mapping[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in key.items())


def _describes(row: Row, settings: Mapping[str, Any]) -> bool:
    """Whether the row is of these settings, as far as it knows them: one may be newer than it."""
    return all(
        _describes(row[name], value) if isinstance(value, Mapping) else row[name] == value
        for name, value in settings.items()
        if name in row
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
