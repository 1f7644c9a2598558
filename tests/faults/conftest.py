"""The campaign's small models and data."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import PROGRAMS, TASK, Fault, arguments, check_fault
from tiny import exit_code

from common.metrics.classifier import DigitClassifier


@pytest.fixture(scope="session")
def parts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a part of the world, made when it is first asked for. Copy it."""
    root = tmp_path_factory.mktemp("parts")
    fixtures = {
        "digits": "digits_root",
        "p1": "digit_checkpoint",
        "p2": "face_checkpoint",
        "noises": "noises",
        "faces": "photos",
        "clip": "clip_world",
    }

    @functools.cache
    def part(name: str) -> Path:
        if name in fixtures:
            return request.getfixturevalue(fixtures[name])
        MAKERS[name](root / name, part)
        return root / name

    return part


@pytest.fixture
def check(
    parts: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> Callable[[Fault], None]:
    """`check_fault`, counted."""

    def checked(fault: Fault) -> None:
        record_property("fault", fault.program)
        check_fault(fault, parts, tmp_path, monkeypatch, capsys)

    return checked


def _grader(folder: Path, _: Callable[[str], Path]) -> None:
    DigitClassifier().save(folder)


def _models(folder: Path, _: Callable[[str], Path]) -> None:
    """base/ and control/."""
    from tiny_base import save_small_models  # takes seconds to import

    save_small_models(folder)


def _pairs(folder: Path, _: Callable[[str], Path]) -> None:
    from tiny_pairs import write_pairs

    write_pairs(folder, 3, ("{}.png", "{}.png"))


def _photos(folder: Path, _: Callable[[str], Path]) -> None:
    from PIL import Image

    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 52), (80 * i, 0, 90)).save(folder / f"{i}.jpg")


def _words(folder: Path, _: Callable[[str], Path]) -> None:
    """learned/, one word of the small model, and input.json."""
    from p3_clip.personalisation.concepts import Concept
    from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult
    from p3_clip.personalisation.model import save_learned

    about = {"concepts": [{"token": "<new1>", "word": "red", "phrase": "{}"}]}
    vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    learned = CustomDiffusionResult({}, [Concept("<new1>", vectors)])
    save_learned(folder / "learned", learned, about)
    (folder / "input.json").write_text(json.dumps({"0": TASK}))


def _clip_run(folder: Path, part: Callable[[str], Path]) -> None:
    """A finished run of p3_clip.inference."""
    from p3_clip import inference

    clip = part("clip")
    flags = ("--images", clip / "val", "--labels", clip / "id2label.json", "--model")
    flags = (*flags, clip / "model", "--device", "cpu", "--workers", 1, "--no-use-cache")
    assert exit_code(inference.main, inference.Config, *flags, "--output-dir", folder) == 0


def _run(folder: Path, part: Callable[[str], Path]) -> None:
    """A finished run of p1_diffusion.train, two steps, in out/."""
    from p1_diffusion import train

    folder.mkdir()
    shutil.copytree(part("digits"), folder / "digits")
    flags = f"{PROGRAMS['p1_diffusion.train'][1]} --steps 2 --log-every 1"
    assert exit_code(train.main, train.Config, *arguments(flags, folder)) == 0
    shutil.rmtree(folder / "digits")


MAKERS = {
    "grader": _grader,
    "models": _models,
    "pairs": _pairs,
    "photos": _photos,
    "words": _words,
    "clip_run": _clip_run,
    "run": _run,
}
