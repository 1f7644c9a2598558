"""What is said of Problem 2 follows from its results, which the programs themselves write here on small models."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import exit_code
from tiny_faces import CONFIG

from common.files import ROOT, read_json, write_json
from common.images import write_png
from p2_ddim import evaluate
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
def results(
    face_checkpoint: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """The content of every file that the programs of scripts/study_p2.sh and the benchmark write, at a toy's size."""
    folder = tmp_path_factory.mktemp("p2_results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.study_steps, "__defaults__", (STEPS, 10))
        patch.setattr(study.study_eta, "__defaults__", (SamplingConfig(steps=2), colours, (0.0, 1.0)))
        patch.setattr(study.study_paths, "__defaults__", (SamplingConfig(steps=1), colours, (0.0, 0.5, 1.0)))
        common = ("--checkpoint", face_checkpoint, "--results", folder, "--count", 2, "--side", 16, "--device", "cpu")
        for name, flags in (("steps", ()), ("eta", ("--photos", photos)), ("paths", ("--photos", photos))):
            assert exit_code(study.main, study.Config, name, *common, *flags) == 0
        benchmark = script("benchmark_p2")
        patch.setattr(benchmark, "FaceUNetConfig", lambda: CONFIG)
        flags = ("--side", 32, "--rounds", 1, "--device", "cpu", "--result", folder / "p2_speed.json")
        assert exit_code(benchmark.main, benchmark.Config, *flags) == 0

    generator = torch.Generator().manual_seed(0)
    (folder / "faces").mkdir()
    for number in range(4):
        image = torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8)
        write_png(folder / "faces" / f"{number}.png", image)
    FaceFeatures().save(folder / "features")
    common = ("--photos", photos, "--features", folder / "features")
    flags = ("--images", folder / "faces", "--result", folder / "p2_faces.json")
    assert exit_code(evaluate.main, evaluate.Config, *common, *flags) == 0
    flags = ("--result", folder / "p2_features.json")
    assert exit_code(evaluate_features.main, evaluate_features.Config, *common, *flags) == 0
    yield {path.stem: read_json(path) for path in folder.glob("p2_*.json")}


def save(folder: Path, results: dict[str, dict[str, Any]]) -> Path:
    for name, content in results.items():
        write_json(folder / f"{name}.json", content)
    return folder


def said(folder: Path, results: dict[str, dict[str, Any]]) -> str:
    return "\n\n".join(report.section(save(folder, results)))


def test_nothing_is_said_while_there_are_no_results(tmp_path: Path) -> None:
    assert report.section(tmp_path) == [] and report.readme_rows(tmp_path) == [] and report.cards(tmp_path) == {}


def test_every_file_that_the_programs_write_has_its_part(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert sorted(results) == ["p2_eta", "p2_faces", "p2_features", "p2_paths", "p2_speed", "p2_steps"]
    text = said(tmp_path, results)
    assert text.startswith("## Problem 2: DDIM on faces")
    for title in ("Fresh noise", "Between two noises", "How few steps", "The face model", "What the features", "Speed"):
        assert f"**{title}" in text
    assert "![]" not in text  # no figure was drawn
    assert all("`" in part for part in report.section(tmp_path))  # each names a command
    assert len(report.readme_rows(tmp_path)) == 4 and all(len(row) == 5 for row in report.readme_rows(tmp_path))
    assert set(report.cards(tmp_path)) == {"p2_faces", "p2_features"}
    assert report in script("make_report").PROBLEMS


@pytest.mark.parametrize("name", ["eta", "paths", "steps", "faces", "features", "speed"])
def test_each_part_is_there_without_the_others(name: str, results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    save(tmp_path, {f"p2_{name}": results[f"p2_{name}"]})
    assert len(report.section(tmp_path)) == 2
    assert list(report.cards(tmp_path)) == ([f"p2_{name}"] if name in ("faces", "features") else [])
    assert len(report.readme_rows(tmp_path)) == (2 if name in ("faces", "speed") else 0)


def test_figures_are_shown_once_they_are_drawn(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "figures" / "p2").mkdir(parents=True)
    names = ("eta", "slerp", "lerp", "paths", "steps", "faces")
    for name in names:
        (tmp_path / "figures" / "p2" / f"{name}.png").touch()
    text = said(tmp_path, results)
    assert all(f"![](results/figures/p2/{name}.png)" in text for name in names)


# ----------------------------------------------------------------------------
# The sentences follow the numbers.


def test_what_eta_does(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = results["p2_eta"]
    plain, noisy = ({**row, "detail": 5.0, "frechet_distance": 0.5} for row in found["rows"])
    real = {"contrast": 50.0, "detail": 9.0, "frechet_distance": 0.2}
    text = said(
        tmp_path,
        {
            "p2_eta": {
                **found,
                "unrelated_mse": 100.0,
                "real": real,
                "rows": [plain, noisy | {"mse": 20.0, "detail": 6.0}],
            }
        },
    )
    assert "is 20% of that between faces of two noises (20.0 of 100.0): the first noise still decides most" in text
    assert "have more detail than at eta 0 (6.0 against 5.0, photos 9.0)" in text
    assert "smallest at eta 0 (0.500, photos 0.200)" in text
    better = noisy | {"mse": 90.0, "detail": 4.0, "frechet_distance": 0.3}
    text = said(tmp_path, {"p2_eta": {**found, "unrelated_mse": 100.0, "real": None, "rows": [plain, better]}})
    assert "the fresh noise decides most" in text and "have less detail" in text
    assert "smallest at eta 1 (0.300)." in text and "| photos |" not in text


def test_what_the_paths_do(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    def path(name: str, norm: float, half: float, distance: float) -> list[dict[str, Any]]:
        end = {"path": name, "norm": 1.0, "contrast": 50.0, "detail": 10.0, "frechet_distance": 1.0}
        middle = {"norm": norm, "contrast": 50 * half, "detail": 10 * half, "frechet_distance": distance}
        return [end | {"alpha": 0.0}, end | middle | {"alpha": 0.5}, end | {"alpha": 1.0}]

    found = results["p2_paths"]
    assert len(found["rows"]) == 6
    text = said(
        tmp_path, {"p2_paths": {**found, "rows": path("slerp", 1.0, 1.0, 1.05) + path("lerp", 0.707, 0.5, 3.0)}}
    )
    assert "1.000 sqrt(d) along slerp and 0.707 sqrt(d) along lerp" in text
    assert (
        "Halfway along slerp the images have 100% of the contrast and 100% of the detail of those at its ends" in text
    )
    assert "at most 1.05 times that of the ends (at alpha 0.5), so the quality is kept." in text
    assert "50% of the detail" in text and "at most 3.00 times" in text and "is not kept." in text
    assert "The great circle stays nearer" in text and "| lerp | 0.5 | 0.707 | 25.0 | 5.0 | 3.000 |" in text
    text = said(tmp_path, {"p2_paths": {**found, "rows": path("slerp", 1.0, 1.0, 2.0) + path("lerp", 0.7, 1.0, 1.0)}})
    assert "the straight line is no worse" in text
    assert "(1.000 and 1.000) is chance" in text and "It is smallest" not in text

    # Ends that differ by chance: what lies between is compared with what lies between them.
    rows = path("slerp", 1.0, 1.0, 2.0) + path("lerp", 0.7, 0.8, 0.5)
    for row in rows:
        if row["alpha"] == 1.0:
            row["frechet_distance"] = 3.0
    text = said(tmp_path, {"p2_paths": {**found, "rows": rows, "real": None}})
    assert "at most 1.00 times that of the ends (at alpha 0)" in text and "(1.000 and 3.000) is chance" in text
    assert (
        "It is smallest at alpha 0.5 (0.500), where the norm is 0.700 sqrt(d) and the detail 8.0 (at the end 10.0)."
        in text
    )


def test_which_steps_suffice(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = results["p2_steps"]
    homework, trailing, solver = found["rows"]
    rows = [homework | {"mse": 30.0}, trailing | {"mse": 25.0}, solver | {"mse": 12.5}]
    text = said(tmp_path, {"p2_steps": {**found, "rows": rows}})
    assert "an MSE below 20, are 5 of DPM-Solver++(2M) in trailing spacing (12.50)." in text
    assert "the trailing spacing is closer than the homework's in 1 of 1 comparisons" in text
    assert "DPM-Solver++(2M) is closer than DDIM in 1 of 1 comparisons" in text
    text = said(tmp_path, {"p2_steps": {**found, "rows": [row | {"mse": 21.0} for row in rows]}})
    assert "No row is within the homework's bar" in text and "in 0 of 1" in text


def test_whether_photos_are_copied(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = results["p2_faces"]
    near = {name: 10.0 for name in found["nearest_photo"]}
    text = said(tmp_path, {"p2_faces": {**found, "nearest_photo": near}})
    assert "10.0 away (median), about the held-out photos' 10.0" in text and "copied: no sign of it." in text
    copied = near | {"generated_median": 5.0, "generated_to_seen_median": 5.0}
    text = said(tmp_path, {"p2_faces": {**found, "nearest_photo": copied}})
    assert "50% below the held-out photos' 10.0" in text and "copied: they are." in text
    assert [row[2] for row in report.readme_rows(tmp_path)][1] == "0.50"


def test_whether_the_speed_suffices(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = results["p2_speed"]
    naive, own, theirs = (row | {"seconds": s} for row, s in zip(found["rows"], (5.0, 4.0, 6.0), strict=True))
    text = said(tmp_path, {"p2_speed": {**found, "rows": [naive, own | {"speed_over_naive": 1.25}, theirs]}})
    assert "reaches 1.1 times the naive speed (1.25) and has 1.50 times that of diffusers'" in text
    assert [row[2] for row in report.readme_rows(tmp_path)] == ["1.25", "1.50"]
    text = said(tmp_path, {"p2_speed": {**found, "rows": [naive, own | {"speed_over_naive": 1.05}, theirs]}})
    assert "misses 1.1 times" in text
