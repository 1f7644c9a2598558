"""Run folders that were touched: named in one sentence, and left as they are."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import contents
from under_torchrun import LINE, line_fit

from common.checkpoint import load_tensors, save_tensors
from common.errors import InputError

CONFIG = dataclasses.replace(LINE, steps=4, checkpoint_every=2, preview_every=2)
LONGER = dataclasses.replace(CONFIG, steps=6)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run of four steps."""
    line_fit(tmp_path / "run", CONFIG)
    return tmp_path / "run"


def edit_state(
    run_dir: Path, tensors: dict[str, torch.Tensor] | None = None, **values: object
) -> None:
    before, metadata = load_tensors(run_dir / "state.safetensors")
    save_tensors(run_dir / "state.safetensors", before | (tensors or {}), metadata | values)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / name).write_text(text)


def delete(name: str) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / name).unlink()


def cut_to_half(name: str) -> Callable[[Path], None]:
    def cut(run_dir: Path) -> None:
        data = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(data[: len(data) // 2])

    return cut


def drop_line(number: int) -> Callable[[Path], None]:
    def drop(run_dir: Path) -> None:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_text("".join(lines[:number] + lines[number + 1 :]))

    return drop


TOUCHES = {
    "config.json is deleted": (delete("config.json"), "config.json is missing"),
    "config.json is empty": (write("config.json", ""), "config.json"),
    "config.json is a list": (write("config.json", "[]"), "config.json"),
    "config.json is cut": (cut_to_half("config.json"), "config.json"),
    "config.json is edited": (
        lambda run_dir: edit_json(run_dir / "config.json", lr=7.0),
        "config.json is of a run with lr = 7.0, not 0.05",
    ),
    "the state is deleted": (delete("state.safetensors"), "state.safetensors, from which"),
    "the state is empty": (write("state.safetensors", ""), "state.safetensors"),
    "the state is cut": (cut_to_half("state.safetensors"), "state.safetensors"),
    "the state is no metadata": (
        lambda run_dir: save_tensors(
            run_dir / "state.safetensors", {"param/weight": torch.ones(3)}
        ),
        "state.safetensors is not the state of a run",
    ),
    "a tensor of another shape": (
        lambda run_dir: edit_state(run_dir, {"param/weight": torch.ones(1)}),
        r"param/weight is \[1\] of torch.float32, but torch.float32 \[3\]",
    ),
    "a tensor of another type": (
        lambda run_dir: edit_state(run_dir, {"ema/weight": torch.ones(3, dtype=torch.int64)}),
        "ema/weight is",
    ),
    "a tensor too many": (
        lambda run_dir: edit_state(run_dir, {"param/other": torch.ones(3)}),
        "unknown tensor param/other",
    ),
    "a moment of another shape": (
        lambda run_dir: edit_state(run_dir, {"exp_avg/weight": torch.ones(3, 1)}),
        "exp_avg/weight is",
    ),
    "a tensor that is not finite": (
        lambda run_dir: edit_state(run_dir, {"param/weight": torch.full((3,), torch.nan)}),
        "param/weight is not finite",
    ),
    "a step that is text": (lambda run_dir: edit_state(run_dir, step="4"), "step must be a whole"),
    "a negative step": (lambda run_dir: edit_state(run_dir, step=-1), "step must be at least 0"),
    "an unknown entry": (lambda run_dir: edit_state(run_dir, colour=1), "colour is unknown"),
    "the state of another run": (
        lambda run_dir: edit_state(run_dir, settings={"lr": 0.5}),
        "state.safetensors is of a run with lr = 0.5, not 0.05",
    ),
    "metrics.jsonl is deleted": (delete("metrics.jsonl"), "metrics.jsonl lacks the line of step 4"),
    "metrics.jsonl is empty": (write("metrics.jsonl", ""), "metrics.jsonl lacks"),
    "metrics.jsonl is cut": (cut_to_half("metrics.jsonl"), "metrics.jsonl lacks"),
    "metrics.jsonl lacks its last line": (drop_line(3), "metrics.jsonl lacks the line of step 4"),
    "metrics.jsonl is text": (
        lambda run_dir: (run_dir / "metrics.jsonl").write_text(
            "hello\n" + (run_dir / "metrics.jsonl").read_text()
        ),
        "metrics.jsonl, line 1 is not",
    ),
    "metrics.jsonl is in disorder": (
        lambda run_dir: (run_dir / "metrics.jsonl").write_text(
            "".join(reversed((run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)))
        ),
        "metrics.jsonl, line 2 is not",
    ),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touched_run_folder_is_refused_and_kept(touch: str, run_dir: Path) -> None:
    change, sentence = TOUCHES[touch]
    change(run_dir)
    before = contents(run_dir)
    with pytest.raises(InputError, match=sentence) as error:
        line_fit(run_dir, LONGER)
    assert str(run_dir) in str(error.value) and "\n" not in str(error.value)
    assert contents(run_dir) == before


def test_a_run_killed_before_its_first_state_starts_again(tmp_path: Path) -> None:
    line_fit(tmp_path / "whole", CONFIG)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    line_fit(tmp_path / "run", CONFIG)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_state_of_an_earlier_version_resumes(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had neither the settings nor the last line of metrics."""
    tensors, values = load_tensors(run_dir / "state.safetensors")
    old = {name: value for name, value in values.items() if name not in ("settings", "logged")}
    save_tensors(run_dir / "state.safetensors", tensors, old)
    capsys.readouterr()
    line_fit(run_dir, LONGER)
    assert f"from step {values['step']}" in capsys.readouterr().out and values["step"] > 0
    assert load_tensors(run_dir / "state.safetensors")[1]["step"] == 6


def test_what_cannot_change_the_result_may_change(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line_fit(tmp_path / "whole", LONGER)
    capsys.readouterr()
    other = {"log_every": 3, "preview_every": 5, "checkpoint_every": 1, "device": "auto"}
    line_fit(run_dir, dataclasses.replace(LONGER, **other))
    assert "begun with device = cpu: results will not be bit-equal" in capsys.readouterr().out
    config = json.loads((run_dir / "config.json").read_text())
    assert {name: config[name] for name in other} == other
    ours, theirs = (
        load_tensors(folder / "state.safetensors")[0] for folder in (run_dir, tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
