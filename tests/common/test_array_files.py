"""Arrays in files: what is appended is there after any end, and nothing else."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from common.array_files import ArrayWriter, is_complete, map_arrays, read_ahead
from common.errors import InputError
from common.files import read_json

ROWS = np.arange(12, dtype=np.float16).reshape(4, 3)
SOURCE = {"seed": 0}


def test_rows_of_several_arrays_are_mapped_as_they_were_appended(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path, SOURCE) as writer:
        writer.append(a=ROWS, b=np.arange(2))
        writer.append(a=ROWS[:1])
        assert (writer.rows("a"), writer.rows("b"), writer.rows("c")) == (5, 2, 0)
        assert writer.size() == 5 * 6 + 2 * 8
        writer.commit()
        assert not is_complete(tmp_path, SOURCE)
        with pytest.raises(InputError, match="is not complete"):
            map_arrays(tmp_path, SOURCE)
        writer.commit(complete=True)
    arrays = map_arrays(tmp_path, SOURCE)
    assert np.array_equal(arrays["a"], np.concatenate([ROWS, ROWS[:1]]))
    assert arrays["a"].dtype == np.float16 and arrays["b"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        arrays["a"][0] = 1.0


def test_rows_after_the_last_commit_are_written_again(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path, SOURCE) as writer:
        writer.append(a=ROWS[:2])
        writer.commit()
        writer.append(a=ROWS[:1])
        writer.append(late=ROWS)
    with ArrayWriter(tmp_path, SOURCE) as writer:
        assert writer.rows("a") == 2 and writer.rows("late") == 0
        assert np.array_equal(writer.read("a"), ROWS[:2])
        writer.append(a=ROWS[2:])
        writer.commit(complete=True)
    arrays = map_arrays(tmp_path, SOURCE)
    assert arrays.keys() == {"a"} and np.array_equal(arrays["a"], ROWS)


def test_the_header_explains_itself(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path, SOURCE) as writer:
        writer.append(a=ROWS)
        writer.commit(complete=True)
    header = read_json(tmp_path / "header.json")
    assert header["made_from"] == SOURCE and header["complete"]
    array = header["arrays"]["a"]
    assert (array["dtype"], array["row"], array["rows"]) == ("float16", [3], 4)


def test_reading_ahead_takes_any_rows_of_a_mapped_array(tmp_path: Path) -> None:
    rows = np.zeros((3, mmap.PAGESIZE // 2 + 8), np.uint8)
    with ArrayWriter(tmp_path, SOURCE) as writer:
        writer.append(a=rows)
        writer.commit(complete=True)
    array = map_arrays(tmp_path, SOURCE)["a"]
    assert isinstance(array.base, mmap.mmap)
    for first in range(3):
        for last in range(first, 4):
            read_ahead(array, first, last)
