"""Training the face model: what is drawn, that it learns, and that inference reads what it
writes."""

import json
from pathlib import Path

import torch
from PIL import Image
from tiny import contents, exit_code
from tiny_faces import save_noises

from common.data.faces import load_faces
from p2_ddim import inference, train
from p2_ddim.model import FaceUNet
from p2_ddim.train import draw_faces

SMALL = [
    "--model.channels",
    "32",
    "64",
    "--model.attention",
    "1",
    "--model.embedding",
    "32",
    "--model.patch",
    "2",
]
QUICK = [
    "--steps",
    "30",
    "--batch-size",
    "4",
    "--warmup",
    "2",
    "--optimizer",
    "adamw",
    "--lr-schedule",
    "cosine",
    "--timesteps",
    "uniform",
    "--lr",
    "3e-3",
    "--log-every",
    "5",
    "--device",
    "cpu",
]
LOOKS = ["--validate-every", "10", "--preview-every", "30", "--checkpoint-every", "30"]


def test_a_draw_is_a_function_of_its_seed(photos: Path) -> None:
    data = load_faces(photos)
    first, again, other = (
        draw_faces(data, 16, torch.Generator().manual_seed(seed), True) for seed in (5, 5, 6)
    )
    assert torch.equal(first["image"], again["image"]) and torch.equal(
        first["index"], again["index"]
    )
    assert not torch.equal(first["index"], other["index"])


def test_half_of_the_photos_are_mirrored_if_asked(photos: Path) -> None:
    data = load_faces(photos)
    batch, plain = (
        draw_faces(data, 400, torch.Generator().manual_seed(0), flip) for flip in (True, False)
    )
    originals = data.images[batch["index"]]
    same = (batch["image"] == originals).flatten(1).all(1)
    mirrored = (batch["image"] == originals.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 150 < int(mirrored.sum()) < 250
    assert torch.equal(plain["image"], data.images[plain["index"]])


def test_training_learns_and_its_weights_sample(photos: Path, tmp_path: Path) -> None:
    arguments = ("--run-dir", tmp_path / "run", "--data", photos, *SMALL, *QUICK, *LOOKS)
    assert exit_code(train.main, train.Config, *arguments) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(validations) == 3 and validations == sorted(validations, reverse=True)
    with Image.open(tmp_path / "run" / "samples" / "0000030.png") as image:
        assert image.width > 8 * 16

    config = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert config["parameterization"] == "v" and config["patch"] == 2
    assert FaceUNet.load(tmp_path / "run" / "last").side_multiple == 4
    noises = save_noises(tmp_path / "noises", 2)
    flags = ("--checkpoint", tmp_path / "run" / "last", "--device", "cpu", "--steps", 3)
    arguments = ("--noises", noises, "--output-dir", tmp_path / "out", *flags)
    assert exit_code(inference.main, inference.Config, *arguments) == 0
    assert sorted(contents(tmp_path / "out")) == ["00.png", "01.png"]
