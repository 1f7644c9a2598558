"""A trainer and a drawing program of each problem are killed and run again, once by each signal;
scripts/study_faults.sh does the same for every trainer, many times."""

from pathlib import Path

import pytest

from scripts.study_faults import SIGNALS, differences, prepare, study

PROGRAMS = (
    *("p1_diffusion.train", "p2_ddim.train", "p3_controlnet.train", "p3_clip.train"),
    *("p1_diffusion.inference", "p2_ddim.inference", "p3_controlnet.inference"),
    "p3_clip.personalisation.inference",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("study") / "data")


@pytest.mark.kills
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_program_ends_as_if_nothing_had_happened(
    program: str, data: Path, tmp_path: Path
) -> None:
    rows = study(program, data, tmp_path, times=1, seed=0)
    assert [row["signal"] for row in rows] == list(SIGNALS)
    assert [failure for row in rows for failure in row["failures"]] == []


def test_what_differs_is_said() -> None:
    whole = {"out/a.png": b"a", "out/metrics.jsonl": [{"step": 1, "loss": 2.0, "seconds": 3.0}]}
    assert not list(differences(whole, whole))
    later = {**whole, "out/metrics.jsonl": [{"step": 1, "loss": 2.0, "seconds": 4.0}]}
    assert not list(differences(later, whole))
    twice = {**whole, "out/metrics.jsonl": 2 * whole["out/metrics.jsonl"]}
    assert len(list(differences(twice, whole))) == 1
    assert list(differences({**whole, "out/a.png": b"b"}, whole)) == ["out/a.png differs"]
    assert list(differences({**whole, ".a.partial": b""}, whole)) == [".a.partial is left over"]
    assert len(list(differences({}, whole))) == 2
