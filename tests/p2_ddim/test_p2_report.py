"""The tables of Problem 2 fit what its programs write, here on small models."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from tiny import exit_code
from tiny_faces import CONFIG

from common.files import ROOT, read_json
from common.report import Results
from p2_ddim.sampling import SamplingConfig
from p2_ddim.study import evaluate_features, report
from p2_ddim.study import sweeps as study
from p2_ddim.study.features import FaceFeatures, colours

STEPS = [("ddim", "homework", 5), ("ddim", "trailing", 5), ("dpmpp_2m", "trailing", 5)]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(face_checkpoint: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what scripts/study_p2.sh and the benchmark write, at a toy's size."""
    folder = tmp_path_factory.mktemp("p2_results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.study_steps, "__defaults__", (STEPS, 10))
        eta = (SamplingConfig(steps=2), colours, (0.0, 1.0))
        patch.setattr(study.study_eta, "__defaults__", eta)
        paths = (SamplingConfig(steps=1), colours, (0.0, 0.5, 1.0))
        patch.setattr(study.study_paths, "__defaults__", paths)
        common = ("--checkpoint", face_checkpoint, "--results", folder, "--device", "cpu")
        common += ("--count", 2, "--side", 16)
        real = ("--photos", photos)
        for name, flags in (("steps", ()), ("eta", real), ("paths", real)):
            assert exit_code(study.main, study.Config, name, *common, *flags) == 0
        benchmark = script("benchmark_p2")
        patch.setattr(benchmark, "FaceUNetConfig", lambda: CONFIG)
        flags = ("--side", 32, "--rounds", 1, "--device", "cpu")
        flags += ("--result", folder / "p2_speed.json")
        assert exit_code(benchmark.main, benchmark.Config, *flags) == 0

    FaceFeatures().save(folder / "features")
    common = ("--photos", photos, "--features", folder / "features")
    flags = (*common, "--result", folder / "p2_features.json")
    assert exit_code(evaluate_features.main, evaluate_features.Config, *flags) == 0
    return folder


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_fits_what_the_programs_write(name: str, results: Path) -> None:
    lines = report.TABLES[name](Results(results)).splitlines()
    rows = read_json(results / f"{name}.json")["rows"]
    photos = name in ("p2_eta", "p2_paths")
    assert len(lines) == 2 + len(rows) + photos
    assert lines[-1].startswith("| photos |") == photos
    assert len({line.count("|") for line in lines}) == 1
