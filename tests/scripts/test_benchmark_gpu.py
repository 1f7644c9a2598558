"""The benchmark of a GPU, rehearsed with tiny networks: each kind of row runs and is written."""

from pathlib import Path

import pytest
import torch
from tiny import exit_code, refused

from common.files import read_json, write_json
from scripts import benchmark_gpu as benchmark

ROWS = (
    "p1 train, bf16, batch 128",
    "p1 draw, tf32",
    "p2 step, bf16, *",
    "sd14 draw, bf16, batch 1,*",
    "sd14 train, bf16, batch 1,*",
    "sd14 train, fp32, batch 4, this project",
)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_each_kind_of_row_is_measured_in_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file with results of a GPU is not touched."""
    monkeypatch.setattr(benchmark, "RESULT", tmp_path / "never.json")
    path = tmp_path / "gpu.json"
    flags = ("--rehearse", "--rows", *ROWS, "--result", path)
    assert exit_code(benchmark.main, benchmark.Config, *flags) == 0
    result = read_json(path)
    assert result["rehearsal"] and result["card"]
    names = [row["name"] for row in result["rows"]]
    assert len(names) == 11 and names == [row.name for row in benchmark.ROWS if row.name in names]
    assert all(row["seconds"] > 0.0 and row["steps"] == 1 for row in result["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in names)
    assert exit_code(benchmark.main, benchmark.Config, "--rehearse", "--rows", "p1 draw, tf32") == 0
    assert not (tmp_path / "never.json").exists()


def test_names_are_unique_and_each_has_its_counterpart() -> None:
    names = [row.name for row in benchmark.ROWS]
    assert len(set(names)) == len(names)
    ours = {name.removesuffix(benchmark.OWN) for name in names if name.endswith(benchmark.OWN)}
    assert ours == {
        name.removesuffix(benchmark.THEIRS) for name in names if name.endswith(benchmark.THEIRS)
    }


def test_rows_are_kept_replaced_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full memory is a row's result; another card's rows are dropped; time ends the run."""

    def full(device: torch.device, rehearse: bool) -> benchmark.Step:
        raise torch.OutOfMemoryError

    empty = benchmark.Row("a", 3, "fp32", lambda device, rehearse: lambda: None)
    monkeypatch.setattr(benchmark, "ROWS", (empty, benchmark.Row("b", 1, "bf16", full)))
    path = tmp_path / "gpu.json"
    flags = ("--rehearse", "--result", path)
    write_json(path, {"card": "another", "rows": [{"name": "c"}]})
    for rows in (("b",), ("a", "b")):
        assert exit_code(benchmark.main, benchmark.Config, *flags, "--rows", *rows) == 0
    a, b = sorted(read_json(path)["rows"], key=lambda row: row["name"])
    assert a["images_per_second"] == pytest.approx(3 / a["seconds"])
    assert b == {"name": "b", "images": 1, "error": "out of memory"}
    capsys.readouterr()
    assert exit_code(benchmark.main, benchmark.Config, "--rehearse", "--seconds", "1e-9") == 0
    assert "no time was left for: a; b" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, said in (
        ((), "no CUDA device is present"),
        (("--rows", "p9 *"), "--rows fits none of: p1 train, bf16, batch 128"),
        (("--seconds", 0), "must be above 0"),
    ):
        assert said in refused(capsys, benchmark.main, benchmark.Config, *flags)
