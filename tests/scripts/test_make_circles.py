"""Pairs without any data: single circles as the trainings' are, layouts after them, in the
homework's layout."""

from pathlib import Path

import pytest
import torch
from tiny import exit_code, refused

from common.data.examples import circle_scenes
from common.data.fill50k import read_prompts
from common.data.layouts import make_layouts, render_target
from scripts import make_circles


def test_pairs_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--output-dir", tmp_path, "--circles", 2, "--layouts", "two", "--count", 1)
    assert exit_code(make_circles.main, make_circles.Config, *flags) == 0
    assert capsys.readouterr().out == f"3 pairs in {tmp_path / 'prompt.json'}\n"
    pairs = read_prompts(tmp_path / "prompt.json", tmp_path / "source", tmp_path / "target")
    scenes = [*circle_scenes(2, 2025), *make_layouts("two", 1)]
    assert [pair.prompt for pair in pairs] == [scene.caption for scene in scenes]
    assert all(
        torch.equal(pair.read_target(), render_target(scene))
        for pair, scene in zip(pairs, scenes, strict=True)
    )


def test_nothing_to_draw_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = (capsys, make_circles.main, make_circles.Config, "--output-dir", tmp_path)
    assert "nothing to draw" in refused(*program, "--circles", 0, "--layouts")
    assert "must be between 0 and" in refused(*program, "--circles", -1)
