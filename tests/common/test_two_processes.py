"""Training and sampling under torchrun, in two processes on the CPU, against the same in one."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import contents, exit_code, run_process
from tiny_base import tiny_base
from tiny_pairs import write_pairs
from under_torchrun import (
    LINE,
    control_arguments,
    inference_arguments,
    line_fit,
    train_arguments,
)

from common.checkpoint import load_tensors
from common.latent.small import save_model
from p1_diffusion import inference, train
from p3_controlnet import train as control_train


def losses(run_dir: Path) -> list[float]:
    """The losses in a run folder's metrics."""
    return [
        json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def control_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small base model's folder, and a folder of fill50k."""
    root = tmp_path_factory.mktemp("control_data")
    save_model(root / "base", tiny_base(), zero_terminal=True)
    write_pairs(root / "fill50k" / "training", 3)
    return root / "base", root / "fill50k"


@pytest.fixture(scope="module")
def two(
    digits_root: Path,
    digit_checkpoint: Path,
    control_data: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """What two processes wrote, with `stdout.txt`, what they said."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    script = Path(__file__).parents[1] / "under_torchrun.py"
    result = run_process([*launcher, script, folder, digits_root, digit_checkpoint, *control_data])
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    yield folder
    shutil.rmtree(folder)


def test_each_process_takes_its_slice_of_one_global_batch(two: Path) -> None:
    """Batches of 8 in two micro-batches: the first process gets images 0, 1 and then 4, 5."""
    for rank in (0, 1):
        report = json.loads((two / f"report{rank}.json").read_text())
        assert report["processes"] == 2
        assert (
            report["seen"] == [[2 * rank, 2 * rank + 1], [4 + 2 * rank, 5 + 2 * rank]] * LINE.steps
        )


def test_two_processes_give_the_losses_of_one(two: Path, tmp_path: Path) -> None:
    line_fit(tmp_path, dataclasses.replace(LINE, gradient_accumulation_steps=1))
    assert len(losses(tmp_path)) == 20
    assert losses(two / "whole") == pytest.approx(losses(tmp_path), abs=1e-5)


def test_ctrl_c_at_one_process_stops_both_and_loses_nothing(two: Path) -> None:
    assert json.loads((two / "report0.json").read_text())["interrupted"]
    assert json.loads((two / "report1.json").read_text())["interrupted"]
    assert "stopped at step 8 of 20" in (two / "stdout.txt").read_text()
    assert contents(two / "halves") == contents(two / "whole")


def test_the_digit_model_trains_in_two_processes_as_in_one(
    two: Path, digits_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "processes: 2, from step 0" in (two / "stdout.txt").read_text()
    monkeypatch.setattr(train, "VALIDATION_IMAGES", 10)
    monkeypatch.setattr(train, "SamplingConfig", lambda: inference.SamplingConfig(steps=1))
    assert exit_code(train.main, train.Config, *train_arguments(tmp_path, digits_root)) == 0
    assert len(losses(tmp_path)) == 20
    assert losses(two / "train") == pytest.approx(losses(tmp_path), abs=3e-4)


def test_controlnet_streams_in_two_processes_as_in_one(
    two: Path, control_data: tuple[Path, Path], tmp_path: Path
) -> None:
    """The main process encodes; each reads its slices of the batch from the same files."""
    arguments = control_arguments(tmp_path, *control_data)
    assert exit_code(control_train.main, control_train.Config, *arguments) == 0
    assert len(losses(tmp_path)) == 4
    assert losses(two / "control") == pytest.approx(losses(tmp_path), abs=1e-5)
    assert contents(two / "control" / "latent_cache") == contents(tmp_path / "latent_cache")
    # The run's state: the weights in last/ are rounded to float16, whose steps may be larger.
    one, other = (load_tensors(x / "state.safetensors")[0] for x in (tmp_path, two / "control"))
    weights = [name for name in one if name.startswith("ema/")]
    assert weights and all(torch.allclose(one[name], other[name], atol=1e-4) for name in weights)


def test_two_processes_sample_the_same_files(
    two: Path, digit_checkpoint: Path, tmp_path: Path
) -> None:
    assert (
        exit_code(
            inference.main, inference.Config, *inference_arguments(tmp_path, digit_checkpoint)
        )
        == 0
    )
    files = contents(two / "digits")
    assert len(files) == 150 and files == contents(tmp_path)
