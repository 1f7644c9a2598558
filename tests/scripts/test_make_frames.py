"""The frames of the report's sliders: drawn in order from fixed seeds, and shipped whole."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_network
from tiny_faces import tiny_faces

from common.files import ROOT, read_json
from common.images import read_rgb
from scripts import make_frames
from scripts.make_frames import NAMES, Frames, save


def test_digits_change_with_guidance_and_repeat() -> None:
    network = tiny_network()
    frames = make_frames.guidance(network, weights=(0, 6.5))
    assert frames.values == ("0", "6.5") and len(frames.pictures) == 2
    assert not torch.equal(*frames.pictures)
    again = make_frames.guidance(network, weights=(6.5,))
    assert torch.equal(again.pictures[0], frames.pictures[1])


def test_the_reverse_process_ends_at_the_image() -> None:
    frames = make_frames.digit_reverse(tiny_network())
    assert frames.values[-1] == "image" and len(frames.values) == len(frames.pictures) == 21
    assert int(frames.values[0]) > int(frames.values[1]) > int(frames.values[-2])


def test_both_paths_meet_at_their_ends() -> None:
    network = tiny_faces()
    frames = make_frames.face_interpolation(network, alphas=(0.0, 0.5), side=16)
    rows = frames.pictures[..., frames.pictures.shape[-1] // 2 :]
    upper, lower = (rows[:, :, i : i + 30] for i in (26, 60))
    assert torch.equal(upper[0], lower[0]) and not torch.equal(upper[1], lower[1])


@pytest.mark.parametrize("sides", [None, ("before", "after")])
def test_frames_are_written_below_each_other(sides: tuple[str, str] | None, tmp_path: Path) -> None:
    pictures = torch.stack([torch.full((3, 16, 32), 80 * k, dtype=torch.uint8) for k in range(4)])
    values = ("a", "b") if sides else ("a", "b", "c", "d")
    save(tmp_path / "x", Frames("letter", values, pictures, "Letters.", sides=sides))
    about, strip = read_json(tmp_path / "x.json"), read_rgb(tmp_path / "x.webp")
    assert about["values"] == [*values] and (about["width"], about["height"]) == (32, 16)
    assert about["command"] == "python3 -m scripts.make_frames --only x"
    assert strip.shape == (3, 64, 32)
    assert all(abs(int(strip[0, 16 * k + 8, 5]) - 80 * k) <= 2 for k in range(4))


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_frames_are_whole(name: str) -> None:
    about = read_json(ROOT / "results" / "frames" / f"{name}.json")
    strip = read_rgb(ROOT / "results" / "frames" / f"{name}.webp")
    count = len(about["values"]) * (2 if about["sides"] else 1)
    assert strip.shape == (3, count * about["height"], about["width"])
    assert 0 <= about["start"] < len(about["values"])
    assert f"<!-- frames: {name} -->" in (ROOT / "docs" / "report.md").read_text()
