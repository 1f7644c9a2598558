"""The programs around CLIP that are run by hand: the benchmark and the bash entries."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from clip_tiny import pictures, tiny_folder
from tiny import environment, exit_code, refused

from common.files import ROOT
from scripts import benchmark_clip as benchmark


def test_the_benchmark_times_three_ways_to_the_same_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = pictures(tmp_path)
    flags = [
        "--images",
        images,
        "--model",
        tiny_folder(tmp_path / "model"),
        "--device",
        "cpu",
        "--batch-size",
        "5",
    ]
    flags += ["--repeats", "1"]
    assert (
        exit_code(benchmark.main, benchmark.Config, *flags, "--result", tmp_path / "speed.json")
        == 0
    )
    assert capsys.readouterr().out.count("s, median of 1") == 6
    result = json.loads((tmp_path / "speed.json").read_text())
    ways = {"open_clip loop", "this project, first run", "this project, second run"}
    assert set(result["seconds"]) == {
        *ways,
        "imports alone",
        "program, first run",
        "program, second run",
    }
    assert "holds no image" in refused(
        capsys, benchmark.main, benchmark.Config, "--images", tmp_path / "model", *flags[2:]
    )
    assert "--random needs --model" in refused(
        capsys, benchmark.main, benchmark.Config, "--images", images, "--random"
    )


@pytest.mark.parametrize("script", ["train_clip.sh", "inference_clip.sh", "study_clip.sh"])
def test_the_bash_entries_are_sound(script: str) -> None:
    assert os.access(ROOT / "scripts" / script, os.X_OK)
    assert (
        subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=False).returncode == 0
    )


def test_inference_without_arguments_says_how(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "inference_clip.sh"), "images"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("usage: bash scripts/inference_clip.sh IMAGES LABELS OUT")
