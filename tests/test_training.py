"""The training loop: exact resumption after any interruption, many processes, and what it promises about its parameters."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import CONFIG, contents, environment, exit_code, refused, run_process, tiny_network, two_processes
from torch import Tensor, nn
from two_processes import CONFIG as LINE_CONFIG
from two_processes import line_fit

from common.checkpoint import load_tensors, save_tensors
from common.ema import EMA
from common.errors import InputError
from common.files import ROOT
from common.seeds import ImageGenerators
from common.training import Batch, TrainingConfig, fit, lr_factor
from p1_diffusion import train

SMALL = TrainingConfig(
    steps=6,
    batch_size=4,
    accumulation=2,
    lr=0.05,
    warmup=2,
    log_every=1,
    validate_every=3,
    preview_every=3,
    checkpoint_every=2,
    device="cpu",
)


class Line:
    """A fit of three weights to noisy data, with everything that `fit` can be given."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.bystander = nn.Parameter(torch.ones(()))  # used by the loss, not given to fit
        self.path: list[Tensor] = []  # the weights at each call of the loss
        self.seen: list[Tensor] = []  # the weights that validate and save met

    def draw(self, step: int) -> Batch:
        x = torch.randn(SMALL.batch_size, 3, generator=torch.Generator().manual_seed(step))
        return {"index": torch.arange(SMALL.batch_size) + 10 * step, "x": x}

    def loss(self, batch: Batch, generators: ImageGenerators) -> Tensor:
        self.path.append(self.weight.detach().clone())
        kept = torch.rand(3) < 0.9  # like a dropout layer, by the global generator
        noise = 0.1 * generators.randn()
        return (batch["x"] @ (self.weight * kept) - self.bystander + noise).square().mean()

    def validate(self) -> dict[str, float]:
        self.seen.append(self.weight.detach().clone())
        return {"loss": self.weight.detach().square().sum().item()}

    def save(self, folder: Path) -> None:
        self.seen.append(self.weight.detach().clone())
        folder.mkdir(exist_ok=True)
        save_tensors(folder / "model.safetensors", {"weight": self.weight})

    def fit(self, run_dir: Path, config: TrainingConfig = SMALL, draw: Callable[[int], Batch] | None = None) -> None:
        fit(
            {"weight": self.weight},
            self.loss,
            draw or self.draw,
            config,
            run_dir,
            save=self.save,
            validate=self.validate,
            preview=lambda path: path.write_bytes(self.weight.detach().numpy().tobytes()),
        )


# ----------------------------------------------------------------------------
# Resumption.


class PowerCut(BaseException):
    """Ends a run at a chosen file operation."""


def cut_at_zero(operation: Callable, countdown: Iterator[int]) -> Callable:
    """The operation, with a power cut in its place when the countdown reaches 0."""

    def cut(*arguments: object) -> object:
        if next(countdown) == 0:
            raise PowerCut
        return operation(*arguments)

    return cut


def test_a_crash_at_any_file_operation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Line().fit(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert {"state.safetensors", "last/model.safetensors", "best/model.safetensors", "metrics.jsonl"} <= expected.keys()
    for fatal in itertools.count():
        countdown = itertools.count(fatal, -1)
        folder = tmp_path / f"cut_{fatal}"
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync"):
                patch.setattr(os, name, cut_at_zero(getattr(os, name), countdown))
            try:
                Line().fit(folder)
                break
            except PowerCut:
                pass
        Line().fit(folder)
        assert contents(folder) == expected, f"differs after a crash at file operation {fatal}"
    assert fatal > 20


def test_metrics_after_the_checkpoint_and_a_torn_line_are_cut_back(tmp_path: Path) -> None:
    Line().fit(tmp_path / "whole")

    def broken_draw(step: int) -> Batch:
        if step == 5:
            raise PowerCut
        return Line().draw(step)

    with pytest.raises(PowerCut):
        Line().fit(tmp_path / "torn", draw=broken_draw)
    metrics = tmp_path / "torn" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 5  # the checkpoint is that of step 4
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    Line().fit(tmp_path / "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    Line().fit(tmp_path)
    before = contents(tmp_path)
    line = Line()
    line.fit(tmp_path)
    assert contents(tmp_path) == before
    assert not line.path


def test_a_parameter_without_gradient_so_far_survives_resumption(tmp_path: Path) -> None:
    """Behind a zero convolution the first gradients may be missing altogether."""

    def run(folder: Path, stop: int | None) -> Tensor:
        early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        step_now = [0]

        def draw(step: int) -> Batch:
            if step == stop:
                raise PowerCut
            step_now[0] = step
            return {"x": torch.ones(4, 2)}

        def loss(batch: Batch, generators: ImageGenerators) -> Tensor:
            return (batch["x"] * early).square().mean() + ((late - 3.0).square().sum() if step_now[0] >= 3 else 0.0)

        fit({"early": early, "late": late}, loss, draw, SMALL, folder)
        return late.detach()

    expected = run(tmp_path / "whole", None)
    with pytest.raises(PowerCut):
        run(tmp_path / "halves", 2)
    assert torch.equal(run(tmp_path / "halves", None), expected)
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def tiny_arguments(data: Path, run_dir: Path, **flags: object) -> list[str]:
    """A command line of `p1_diffusion.train` that takes seconds."""
    values = {
        "data": data,
        "run-dir": run_dir,
        "model.channels": "16 32",
        "model.embedding": 32,
        "model.heads": 2,
        "model.dropout": 0.1,
        "steps": 60,
        "batch-size": 8,
        "accumulation": 2,
        "warmup": 4,
        "log-every": 3,
        "validate-every": 1000,
        "preview-every": 1000,
        "checkpoint-every": 7,
        "device": "cpu",
        **{name.replace("_", "-"): value for name, value in flags.items()},
    }
    return [part for name, value in values.items() for part in (f"--{name}", *str(value).split(" "))]


@pytest.fixture(scope="module")
def whole(digits_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert exit_code(train.main, train.Config, *tiny_arguments(digits_root, folder)) == 0
    return folder


def start_and_stop(command: list[str], run_dir: Path, number: signal.Signals) -> tuple[int, str]:
    """Starts a training, sends it a signal some time after its next checkpoint; returns its exit code and output."""
    state = run_dir / "state.safetensors"
    before = state.stat().st_ino if state.exists() else None
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.stat().st_ino != before:
                break
            time.sleep(0.002)
        time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output


def test_killed_then_interrupted_then_continued_gives_the_same_bits(
    whole: Path, digits_root: Path, tmp_path: Path
) -> None:
    """SIGKILL at an arbitrary moment, Ctrl-C in the continuation, and the same command once more; with accumulation."""
    command = [sys.executable, "-m", "p1_diffusion.train", *tiny_arguments(digits_root, tmp_path)]
    code, output = start_and_stop(command, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    killed_at = load_tensors(tmp_path / "state.safetensors")[1]["step"]
    assert 0 < killed_at < 60 and killed_at % 7 == 0

    code, output = start_and_stop(command, tmp_path, signal.SIGINT)
    assert code == 130, output
    assert f"from step {killed_at}" in output
    stopped_at = load_tensors(tmp_path / "state.safetensors")[1]["step"]
    assert killed_at < stopped_at < 60
    assert f"stopped at step {stopped_at} of 60; run the same command again to go on" in output
    assert "Traceback" not in output

    finished = run_process(command, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    for name in ("state.safetensors", "last/model.safetensors", "best/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    samples = Path("samples") / "0000060.png"
    assert (tmp_path / samples).read_bytes() == (whole / samples).read_bytes()


def test_resuming_with_other_settings_is_refused(
    whole: Path, digits_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    for flag, value, name in (("lr", "0.5", "lr = 0.001"), ("drop-digit", "0.3", "drop_digit = 0.1")):
        sentence = refused(capsys, train.main, train.Config, *tiny_arguments(digits_root, whole, **{flag: value}))
        assert name in sentence and value in sentence and "same settings" in sentence
    assert contents(whole) == before


def test_the_run_folder_explains_itself(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["steps"] == 60 and config["model"]["channels"] == [16, 32]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(3, 61, 3))
    assert all(math.isfinite(line["loss"]) and line["lr"] >= 0.0 for line in lines)
    assert math.isfinite(lines[-1]["validation_loss"])
    assert not list(whole.rglob("*.partial"))


def test_ctrl_c_ends_at_the_next_step_and_gives_the_signals_back(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    line = Line()

    def draw(step: int) -> Batch:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return line.draw(step)

    with pytest.raises(KeyboardInterrupt):
        line.fit(tmp_path, draw=draw)
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# ----------------------------------------------------------------------------
# Many processes.


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_share_one_global_batch_and_stop_together(tmp_path: Path) -> None:
    result = run_process(two_processes(str(Path(__file__).parent / "two_processes.py"), str(tmp_path)))
    assert result.returncode == 0, result.stderr
    reports = [json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in (0, 1)]
    for rank, report in enumerate(reports):
        assert report["processes"] == 2
        assert report["seen"] == [[2 * rank, 2 * rank + 1], [4 + 2 * rank, 5 + 2 * rank]] * LINE_CONFIG.steps
        assert report["interrupted"]

    # One process, without micro-batches, computes the same losses.
    line_fit(tmp_path / "one", dataclasses.replace(LINE_CONFIG, accumulation=1))
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    # Stopping both processes when the signal reached one of them loses nothing.
    assert "stopped at step 8 of 20" in result.stdout
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_torchrun_gives_the_losses_of_one_process(digits_root: Path, tmp_path: Path) -> None:
    flags = {"steps": 20, "accumulation": 1, "log_every": 1, "lr": 1e-3, "model.dropout": 0.0}
    arguments = tiny_arguments(digits_root, tmp_path / "two", **flags)
    result = run_process(two_processes("-m", "p1_diffusion.train", *arguments), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "processes: 2" in result.stdout
    assert exit_code(train.main, train.Config, *tiny_arguments(digits_root, tmp_path / "one", **flags)) == 0
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_a_batch_that_does_not_split_evenly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch size 4 is not a multiple of processes times accumulation, 3"):
        Line().fit(tmp_path / "run", dataclasses.replace(SMALL, accumulation=3))
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------
# Optimisation.


def test_lr_factor_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    assert [lr_factor(step, 4, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 4, 100) == 1.0
    assert lr_factor(52, 4, 100) == pytest.approx(0.5)  # half-way between 4 and 100
    assert lr_factor(100, 4, 100) == pytest.approx(0.0, abs=1e-12)
    assert lr_factor(0, 0, 1) == 1.0
    factors = [lr_factor(step, 10, 50) for step in range(50)]
    assert factors[9:] == sorted(factors[9:], reverse=True) and factors[:10] == sorted(factors[:10])


def test_only_the_given_parameters_change(tmp_path: Path) -> None:
    line = Line()
    line.fit(tmp_path)
    assert line.bystander.item() == 1.0
    assert not torch.equal(line.weight, Line().weight)
    assert {name.split("/")[1] for name in load_tensors(tmp_path / "state.safetensors")[0]} == {"weight"}


def test_validate_and_save_see_the_average(tmp_path: Path) -> None:
    """The average is d a + (1 - d) p after each step, with d = min(decay, (1 + n) / (10 + n)); the loss sees p itself."""
    line = Line()
    line.fit(tmp_path, dataclasses.replace(SMALL, accumulation=1, validate_every=6, checkpoint_every=6))
    weights = [*line.path, line.weight.detach()]  # before the first step, and after each
    assert len(weights) == 7
    average = weights[0]
    for n, weight in enumerate(weights[1:]):
        decay = min(0.999, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    assert len(line.seen) == 3  # validate, best, last
    for seen in line.seen:
        torch.testing.assert_close(seen, average)
    assert not torch.allclose(line.weight, average, atol=1e-3)
    assert torch.equal(load_tensors(tmp_path / "last" / "model.safetensors")[0]["weight"], line.seen[0])


def test_the_moving_average_forgets_its_start_and_then_keeps_to_its_decay() -> None:
    param = torch.zeros(2)
    ema = EMA({"p": param}, decay=0.5)
    param.fill_(1.0)
    expected = 0.0
    for n in range(20):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + 1.0 - decay
        ema.update({"p": param})
        assert ema.average["p"].tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert param.tolist() == [1.0, 1.0]


def test_the_moving_average_is_taken_off_after_an_error() -> None:
    param = nn.Parameter(torch.ones(2))
    ema = EMA({"p": param}, decay=0.9)
    with torch.no_grad():
        param.fill_(3.0)
    with pytest.raises(PowerCut), ema.applied_to({"p": param}):
        assert param.tolist() == [1.0, 1.0]
        raise PowerCut
    assert param.tolist() == [3.0, 3.0]


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    for accumulation in (1, 2, 4):
        line_fit(tmp_path / str(accumulation), dataclasses.replace(LINE_CONFIG, accumulation=accumulation))
    for accumulation in ("2", "4"):
        assert losses(tmp_path / accumulation) == pytest.approx(losses(tmp_path / "1"), abs=1e-6)


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    line = Line()
    saved = []
    numbers = iter([3.0, 1.0, 2.0])
    fit(
        {"weight": line.weight},
        line.loss,
        line.draw,
        dataclasses.replace(SMALL, validate_every=2, checkpoint_every=6),
        tmp_path,
        save=lambda folder: saved.append((folder.name, len(line.path))),
        validate=lambda: {"loss": next(numbers)},
    )
    assert [name for name, _ in saved] == ["best", "best", "last"]
    assert [calls // 2 for _, calls in saved] == [2, 4, 6]


def test_a_non_finite_loss_stops_with_step_and_images(tmp_path: Path) -> None:
    line = Line()

    def draw(step: int) -> Batch:
        batch = line.draw(step)
        return batch | {"x": batch["x"] * math.inf} if step == 3 else batch

    with pytest.raises(InputError, match=r"step 3, on the batch of images \[30, 31, 32, 33\]; the last checkpoint is"):
        line.fit(tmp_path, draw=draw)
    tensors, values = load_tensors(tmp_path / "state.safetensors")
    assert values["step"] == 2 and bool(tensors["param/weight"].isfinite().all())
    assert bool(line.weight.isfinite().all())


def test_init_from_starts_from_those_weights(digits_root: Path, tmp_path: Path) -> None:
    """At learning rate 0 the trained network is the one it started from, whatever the model flags say."""
    network = tiny_network()
    network.save(tmp_path / "start")
    arguments = tiny_arguments(
        digits_root, tmp_path / "run", init_from=tmp_path / "start", steps=2, lr=0.0, **{"model.embedding": 48}
    )
    assert exit_code(train.main, train.Config, *arguments) == 0
    assert contents(tmp_path / "run" / "last") == contents(tmp_path / "start")
    assert json.loads((tmp_path / "start" / "config.json").read_text())["embedding"] == CONFIG.embedding


def test_tensorboard_is_asked_for_by_name_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="needs the package tensorboard"):
        Line().fit(tmp_path, dataclasses.replace(SMALL, tensorboard=True))
