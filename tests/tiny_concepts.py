"""What the tests of personalisation share: a tiny small model with photos of two concepts, and
quick flags."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_tiny import tiny_folder
from PIL import Image
from tiny_base import tiny_base

from common.latent.generate import GenerationConfig
from common.latent.small import save_model
from p3_clip.personalisation import train

FEW = (
    *("--steps", 3, "--batch-size", 4, "--warmup", 1, "--device", "cpu", "--log-every", 1),
    *("--checkpoint-every", 2, "--validate-every", 3, "--preview-every", 3, "--weight-decay", 0.5),
    *("--held-out-pictures", 1),
)


def make_world(root: Path) -> Path:
    """base/, a small model; clip/, a tiny CLIP; photos/a and photos/b, two photos each that are not
    square."""
    save_model(root / "base", tiny_base(), zero_terminal=True)
    tiny_folder(root / "clip")
    random = np.random.default_rng(0)
    for name in "ab":
        (root / "photos" / name).mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(0, 256, (40, 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.jpg")
    return root


def photos(world: Path, *names: str) -> tuple[Any, ...]:
    """The flags of a training on these photos."""
    folders = [world / "photos" / name for name in names]
    return (
        "--base",
        world / "base",
        "--clip",
        world / "clip",
        "--photos",
        *folders,
        "--words",
        *["red"] * len(names),
    )


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and coarse pictures, and not a whole chunk of them for each."""
    monkeypatch.setattr(
        train, "GenerationConfig", functools.partial(GenerationConfig, chunk_size=2)
    )
    monkeypatch.setattr(train, "STEPS", 1)
    monkeypatch.setattr(train, "VALIDATION_ROWS", 4)
