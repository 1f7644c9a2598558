"""What several test files share: tiny data and tiny models on disk, made once in a session. Copy
them before changing them."""

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny import tiny_network
from tiny_faces import save_noises, save_photos, tiny_faces

from common.data.digits import DATASETS, NUM_DIGITS, SIZE

if TYPE_CHECKING:
    from common.clip.model import Clip

IMAGES_PER_CLASS = 6

# A shell's background jobs ignore Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`{mnistm,svhn}/{data,train.csv}`: 6 images of every digit, rows in random order."""
    root = tmp_path_factory.mktemp("digits")
    for index, dataset in enumerate(DATASETS):
        rng = np.random.default_rng(index)
        (root / dataset / "data").mkdir(parents=True)
        labels = rng.permutation(np.arange(IMAGES_PER_CLASS * NUM_DIGITS) % NUM_DIGITS)
        names = [f"{i:05d}.png" for i in range(len(labels))]
        for name, label in zip(names, labels.tolist(), strict=True):
            _drawn_digit(label, dataset, rng).save(root / dataset / "data" / name)
        table = pd.DataFrame({"image_name": names, "label": labels}).sample(
            frac=1, random_state=index
        )
        table.to_csv(root / dataset / "train.csv", index=False)
    return root


@pytest.fixture(scope="session")
def digit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of Problem 1."""
    folder = tmp_path_factory.mktemp("digit_checkpoint")
    tiny_network().save(folder)
    return folder


@pytest.fixture(scope="session")
def face_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of Problem 2."""
    folder = tmp_path_factory.mktemp("face_checkpoint")
    tiny_faces().save(folder)
    return folder


@pytest.fixture(scope="session")
def noises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three noise files."""
    return save_noises(tmp_path_factory.mktemp("noises"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ of faces."""
    return save_photos(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="session")
def clip_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP in model/, pictures in val/ and id2label.json."""
    from clip_tiny import pictures, tiny_folder  # takes seconds to import

    root = tmp_path_factory.mktemp("clip_world")
    tiny_folder(root / "model")
    pictures(root)
    return root


@pytest.fixture(scope="session")
def clip(clip_world: Path) -> "Clip":
    """That CLIP, loaded."""
    from common.clip.loading import load_clip

    return load_clip(str(clip_world / "model"), device="cpu")[0]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and empty caches."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def _drawn_digit(label: int, dataset: str, rng: np.random.Generator) -> Image.Image:
    """Light on a dark, noisy colour for mnistm; dark on a light, plain colour for svhn."""
    dark, light = rng.integers(0, 90, size=3), rng.integers(160, 256, size=3)
    ground, ink = (dark, light) if dataset == "mnistm" else (light, dark)
    noise = rng.integers(0, 60 if dataset == "mnistm" else 1, size=(SIZE, SIZE, 3))
    image = Image.fromarray((ground + noise).clip(0, 255).astype(np.uint8))
    at = (8 + int(rng.integers(-2, 3)), 2 + int(rng.integers(-2, 3)))
    ImageDraw.Draw(image).text(
        at, str(label), fill=tuple(ink.tolist()), font=ImageFont.load_default(22)
    )
    return image


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the rows of tests/faults that were checked, of all workers of pytest-xdist."""
    programs = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    if programs:
        terminalreporter.write_line(
            f"faults: {len(programs)} inputs, {len(set(programs))} programs"
        )
