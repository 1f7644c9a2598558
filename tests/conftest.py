"""What the tests share: a tiny set of digits in the homework's layout, drawn in a second."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont

from common.data.digits import DATASETS, NUM_DIGITS, SIZE

IMAGES_PER_CLASS = 6


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`{mnistm,svhn}/{data,train.csv}`: 6 images of every digit, rows in random order. Copy it before changing it."""
    root = tmp_path_factory.mktemp("digits")
    for index, dataset in enumerate(DATASETS):
        rng = np.random.default_rng(index)
        (root / dataset / "data").mkdir(parents=True)
        labels = rng.permutation(np.arange(IMAGES_PER_CLASS * NUM_DIGITS) % NUM_DIGITS)
        names = [f"{i:05d}.png" for i in range(len(labels))]
        for name, label in zip(names, labels.tolist(), strict=True):
            _drawn_digit(label, dataset, rng).save(root / dataset / "data" / name)
        table = pd.DataFrame({"image_name": names, "label": labels}).sample(frac=1, random_state=index)
        table.to_csv(root / dataset / "train.csv", index=False)
    return root


def _drawn_digit(label: int, dataset: str, rng: np.random.Generator) -> Image.Image:
    """Light on a dark, noisy colour for mnistm; dark on a light, plain colour for svhn."""
    dark, light = rng.integers(0, 90, size=3), rng.integers(160, 256, size=3)
    ground, ink = (dark, light) if dataset == "mnistm" else (light, dark)
    noise = rng.integers(0, 60 if dataset == "mnistm" else 1, size=(SIZE, SIZE, 3))
    image = Image.fromarray((ground + noise).clip(0, 255).astype(np.uint8))
    at = (8 + int(rng.integers(-2, 3)), 2 + int(rng.integers(-2, 3)))
    ImageDraw.Draw(image).text(at, str(label), fill=tuple(ink.tolist()), font=ImageFont.load_default(22))
    return image
