"""Intervals, calibration, confusions, figures and the program of the 2024 grader's rule."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_tiny import CLASSES
from pages import outline
from PIL import Image
from tiny import exit_code, refused, run_process
from torch.nn import functional as F

from common.files import ROOT, read_json, write_json
from common.images import read_rgb
from p3_clip import evaluate, inference
from p3_clip.evaluate import (
    calibration,
    class_table,
    confused_pairs,
    confusion_matrix,
    fit_scale,
    reliability,
    wilson_interval,
)
from p3_clip.inference import Run
from p3_clip.study import colours, figures


@pytest.fixture(scope="module")
def finished(clip_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its features in `cache`; do not change it."""
    out = tmp_path_factory.mktemp("finished")
    images, labels, model = (clip_world / name for name in ("val", "id2label.json", "model"))
    arguments = ["--images", images, "--labels", labels, "--model", model, "--device", "cpu"]
    assert (
        exit_code(
            inference.main,
            inference.Config,
            *arguments,
            "--output-dir",
            out,
            "--cache",
            out / "cache",
        )
        == 0
    )
    return out


def small_run(predicted: list[int], labels: list[int], count: int = 3) -> Run:
    cosines = F.one_hot(torch.tensor(predicted), count).float()
    names = [f"class {i}" for i in range(count)]
    files = [f"{label}_{i}.png" for i, label in enumerate(labels)]
    return Run(
        files, torch.tensor(labels), [str(i) for i in range(count)], names, 5.0, {"single": cosines}
    )


def test_wilson_intervals_match_published_values() -> None:
    # Table I of Newcombe 1998, "Two-sided confidence intervals for the single proportion", method
    # 3.
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        assert wilson_interval(hits, count) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_classes_and_confusions() -> None:
    run = small_run([0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 0])
    assert confusion_matrix(run, "single").tolist() == [[2, 2, 1], [0, 1, 0], [0, 0, 0]]
    assert confused_pairs(run, "single") == [
        {"truth": "class 0", "prediction": "class 1", "count": 2},
        {"truth": "class 0", "prediction": "class 2", "count": 1},
    ]
    rows = class_table(run, "single").to_dict("records")
    assert len(rows) == 2  # no picture of class 2
    assert (
        rows[0]["recall"] == 0.4
        and rows[0]["precision"] == 1.0
        and rows[0]["taken_for"] == "class 1"
    )
    assert (
        rows[1]["recall"] == 1.0
        and rows[1]["precision"] == pytest.approx(0.3333)
        and rows[1]["taken_for"] == ""
    )


def test_calibration_error_by_hand() -> None:
    """Four pictures at 0.9, of which three are right, and two at 0.6, both right: (4 x 0.15 + 2 x
    0.4) / 6."""
    probabilities = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 0, 0])
    found = reliability(probabilities, labels, bins=10)
    assert found.error == pytest.approx((4 * 0.15 + 2 * 0.4) / 6)
    assert (
        found.counts.sum() == 6
        and reliability(torch.ones(2, 1), torch.zeros(2, dtype=torch.long)).error == 0.0
    )


def test_the_fitted_scale_is_the_one_that_labels_were_drawn_with() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20000, 4, generator=generator) - 0.5
    labels = torch.multinomial((8.0 * cosines).softmax(1), 1, generator=generator).flatten()
    assert fit_scale(cosines, labels) == pytest.approx(8.0, rel=0.03)
    numbers = calibration(cosines, labels, 40.0)
    assert numbers["ece_fitted"] < 0.02 < numbers["ece_unfitted"]


def test_the_report_of_a_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run", finished, "--result", tmp_path / "evaluation.json"]
    assert exit_code(evaluate.main, evaluate.Config, "zero-shot", *flags) == 0
    assert exit_code(colours.main, colours.Config, *flags, "--cache", finished / "cache") == 0
    printed = capsys.readouterr().out
    assert (
        "95 % interval" in printed
        and "expected calibration error" in printed
        and "among all 556" in printed
    )
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["acc1"]["low"] <= result["acc1"]["value"] <= result["acc1"]["high"]
    assert len(result["per_class"]) == 3 and result["colours"]["open"]["classes"] == 556
    assert sum(row["images"] for row in result["colours"]["by_distance"]) == 12


def test_colours_are_of_the_same_clip_and_prompts(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flags = ("--run", run, "--result", tmp_path / "result.json")
    write_json(tmp_path / "result.json", {"prompts": "ensemble"})
    assert "holds the numbers of --prompts ensemble, not single" in refused(
        capsys, colours.main, colours.Config, *flags
    )
    write_json(run / "results.json", read_json(run / "results.json") | {"identity": "another"})
    write_json(tmp_path / "result.json", {})
    assert "was made by another CLIP" in refused(capsys, colours.main, colours.Config, *flags)


def test_colours_need_names_of_shapes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    run = Run.load(tmp_path / "out")
    run.names[0] = "bicycle"
    run.save(tmp_path / "out")
    flags = ["--run", tmp_path / "out"]
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    assert "not 'bicycle'" in refused(capsys, colours.main, colours.Config, *flags)
    shutil.copy(finished / "cosines.safetensors", tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text("{}")
    assert "was not written by p3_clip.inference: it lacks 'settings'" in refused(
        capsys, colours.main, colours.Config, *flags
    )
    flags = ["zero-shot", "--run", tmp_path / "nothing"]
    assert "write" in refused(capsys, evaluate.main, evaluate.Config, *flags)


def test_the_nearest_colour() -> None:
    others = [
        ("azure", "star"),
        ("mint cream", "star"),
        ("light cyan", "star"),
        ("alice blue", "square"),
    ]
    assert colours._nearest(("azure", "star"), others) == pytest.approx(
        2.785, abs=1e-3
    )  # to mint cream


def test_the_figures(finished: Path, clip_world: Path, tmp_path: Path) -> None:
    flags = ["--run", finished, "--images", clip_world / "val", "--output-dir", tmp_path]
    assert exit_code(figures.main, figures.Config, *flags) == 0
    for name in ("examples.png", "confusion.png", "reliability.png"):
        picture = read_rgb(tmp_path / name)
        assert min(picture.shape[1:]) > 200 and picture.float().std() > 5


def test_figures_of_pictures_that_are_gone_leave_no_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run", finished, "--images", tmp_path / "nowhere", "--output-dir", tmp_path / "out"]
    assert "nowhere" in refused(capsys, figures.main, figures.Config, *flags)
    assert not (tmp_path / "out").exists()


def test_examples_take_other_classes_first() -> None:
    labels = torch.tensor([0] * 50 + [1, 2, 3])
    chosen = figures._choose(labels, torch.ones(53, dtype=torch.bool), seed=0)
    assert len(chosen) == 5 and set(labels[chosen].tolist()) == {0, 1, 2, 3}
    assert figures._choose(labels, torch.zeros(53, dtype=torch.bool), seed=0) == []


# ----------------------------------------------------------------------------
# The 2024 grader's rule as a program.


@pytest.fixture
def personalised(clip_world: Path, tmp_path: Path) -> list[str]:
    """25 pictures of one prompt of one concept, its photos, and baselines that nothing misses."""
    random = np.random.default_rng(0)
    for folder, count in (
        (tmp_path / "images" / "dog" / "0", 25),
        (tmp_path / "photos" / "dog", 3),
    ):
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / f"{i}.png"
            )
    write_baseline(tmp_path, [-100, -100])
    return [
        *(
            "personalised",
            "--images",
            str(tmp_path / "images"),
            "--references",
            str(tmp_path / "photos"),
        ),
        *(
            "--input",
            str(tmp_path / "input.json"),
            "--model",
            str(clip_world / "model"),
            "--device",
            "cpu",
        ),
        *("--result", str(tmp_path / "result.json")),
    ]


def write_baseline(folder: Path, pair: list[float]) -> None:
    concept = {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["A <new1>."],
        "prompt_4_clip_eval": ["A dog."],
    }
    concept["baseline"] = [pair]
    (folder / "input.json").write_text(json.dumps({"dog": concept}))


def test_the_grader_passes_and_fails(
    personalised: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(evaluate.main, evaluate.Config, *personalised) == 0
    row = json.loads((tmp_path / "result.json").read_text())["rows"][0]
    assert row["passed"] and len(row["kept"]) == 5
    write_baseline(tmp_path, [-100, 101])
    assert exit_code(evaluate.main, evaluate.Config, *personalised) == 1
    capsys.readouterr()
    (tmp_path / "images" / "dog" / "0" / "24.png").unlink()
    sentence = refused(capsys, evaluate.main, evaluate.Config, *personalised)
    assert f"{tmp_path / 'images' / 'dog' / '0'} holds 24 images; 25 are expected" in sentence
    (tmp_path / "input.json").write_text(json.dumps({"dog": {"prompt_4_clip_eval": ["A dog."]}}))
    assert "needs src_image, a string" in refused(
        capsys, evaluate.main, evaluate.Config, *personalised
    )


def test_the_grader_keeps_every_cosine(personalised: list[str], tmp_path: Path) -> None:
    assert exit_code(evaluate.main, evaluate.Config, *personalised) == 0
    row = json.loads((tmp_path / "result.json").read_text())["rows"][0]
    assert len(row["cosines"]) == 25
    kept = [row["cosines"][name] for name in row["kept"]]
    for what in ("image", "text"):
        assert 100 * np.mean([pair[what] for pair in kept]) == pytest.approx(row[what], abs=0.006)


def test_the_page_shows_every_image_with_its_scores(
    personalised: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    write_baseline(tmp_path, [-100, 101])
    assert exit_code(evaluate.main, evaluate.Config, *personalised, "--html", page) == 1
    found = outline(page.read_text())
    assert len(found.all("article", "failed")) == 25
    verdicts = re.findall(r"image ([-\d.]+) of -100, text ([-\d.]+) of 101", page.read_text())
    ranking = [float(image) + 2.5 * float(text) for image, text in verdicts]
    assert len(ranking) == 25 and all(
        a < b + 0.05 for a, b in zip(ranking, ranking[1:], strict=False)
    )
    assert page.read_text().count("one of the best") == 5


def test_only_openais_vit_b32_grades_unless_another_is_named(
    personalised: list[str], tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baselines were made with it; the small model of the project never steps in."""
    at = personalised.index("--model")
    sentence = refused(
        capsys, evaluate.main, evaluate.Config, *personalised[:at], *personalised[at + 2 :]
    )
    assert "the weights 'openai' of ViT-B-32-quickgelu are not in the local cache" in sentence
    assert not (tmp_path / "result.json").exists()


def test_grade_sh_grades_learned_concepts(personalised: list[str], tmp_path: Path) -> None:
    values = dict(zip(personalised[1::2], personalised[2::2], strict=True))
    command = [
        "bash",
        ROOT / "scripts" / "grade.sh",
        values["--images"],
        values["--input"],
        values["--references"],
    ]
    flags = ["--model", values["--model"], "--device", "cpu"]
    result = run_process([*command, *flags])
    assert result.returncode == 0 and "passed" in result.stdout, result.stderr
    write_baseline(tmp_path, [-100, 101])
    assert run_process([*command, *flags]).returncode == 1
    command[3] = tmp_path / "missing.json"
    result = run_process([*command, *flags])
    assert (
        result.returncode == 2
        and result.stderr == f"error: the file {tmp_path / 'missing.json'} does not exist\n"
    )


def test_classes_of_the_tiny_world_are_shapes() -> None:
    for name in CLASSES.values():
        colours.parse_shape(name.replace("_", " "))
