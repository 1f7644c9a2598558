"""The self-test of the training's wiring: what it prints on a sound model, and each defect that it
finds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import exit_code
from tiny_base import tiny_base
from tiny_pairs import write_pairs

from common.files import ROOT
from common.latent.model import LatentDiffusion
from common.latent.small import save_model
from p3_controlnet import check, loss, train

SHIPPED = ROOT / "checkpoints" / "ldm_shapes"
QUICK = ("--check", "--device", "cpu", "--batch-size", 2, "--validation-pictures", 1)
TINY = (*QUICK, "--hint-channels", 4, 8, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder; its weights are random."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, tiny_base(), zero_terminal=True)
    return folder


@pytest.fixture(autouse=True)
def other_precisions() -> Iterator[None]:
    """accelerate allows one precision in a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def lines(
    capsys: pytest.CaptureFixture[str], base: Path, *flags: Any, expected: int
) -> dict[str, str]:
    """What the self-test prints, {PASS or FAIL and the first words: the line}."""
    run = Path("no-such-folder") / "run"
    code = exit_code(train.main, train.Config, "--run-dir", run, "--base", base, *flags)
    printed = [line for line in capsys.readouterr().out.splitlines() if line[:5].isupper()]
    assert code == expected, printed
    assert not run.parent.exists()
    return {" ".join(line.split()[:3]): line for line in printed}


def test_a_sound_training_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """On the shipped base model: its loss is far below that of a network that predicts 0."""
    said = lines(capsys, SHIPPED, *QUICK, expected=0)
    assert all(line.startswith("PASS") for line in said) and len(said) == 9
    assert "differs from the base model's by 0" in said["PASS before training"]
    assert "hints lie in [0.000, 0." in said["PASS hints lie"]
    assert "0 frozen weights have a gradient" in said["PASS 0 frozen"]
    assert f"{train.TRAINING.steps} steps take" in said["PASS a step"]
    assert "every 250 steps: " in said["PASS a validation"]


def test_a_base_that_knows_nothing_fails(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real pair, with micro-batches, gradient checkpointing and frozen weights in bf16. In
    the first step only the zero convolutions have a gradient, then all but the hint encoder."""
    flags = ("--device-batch-size", 1, "--gradient-checkpointing", "--mixed-precision", "bf16")
    write_pairs(tmp_path / "training", 1)
    said = lines(capsys, base, *TINY, *flags, "--fill50k", tmp_path, expected=1)
    assert "FAIL the base" in said and sum(line.startswith("FAIL") for line in said) == 1
    control = train.new_control(train.Config(Path(), base, hint_channels=(4, 8, 8)), tiny_base())
    count, zero = len(list(control.parameters())), 2 * control.num_residuals
    hint = len(list(control.controlnet_cond_embedding.parameters())) - 2
    expected = f"of {count} parameters {count - zero}, {hint}, 0 lack a gradient at steps 1, 2, 3"
    assert expected in said[f"PASS of {count}"]
    assert "(2 micro-batches)" in said["PASS a step"]


def trained_base(monkeypatch: pytest.MonkeyPatch) -> None:
    original = check._Steps.__init__

    def thawed(steps: Any, config: Any, model: LatentDiffusion, *rest: Any) -> None:
        model.unet.conv_out.requires_grad_(True)
        original(steps, config, model, *rest)

    monkeypatch.setattr(check._Steps, "__init__", thawed)


def blocked_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LatentDiffusion, "apply_model", torch.no_grad()(LatentDiffusion.apply_model)
    )


def other_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "to_hint", lambda hint: hint.float() / 127.5 - 1.0)


@pytest.mark.parametrize(
    ("defect", "found"),
    [
        (trained_base, "FAIL 2 frozen"),
        (blocked_gradient, "FAIL of"),
        (other_range, "FAIL hints lie"),
    ],
)
def test_a_defect_is_named(
    defect: Callable[[pytest.MonkeyPatch], None],
    found: str,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defect(monkeypatch)
    said = lines(capsys, base, *TINY, expected=1)
    assert any(line.startswith(found) for line in said), said
