"""The training loop: exact resumption after any interruption, many processes, and what it promises
about its parameters."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CONFIG, contents, environment, exit_code, refused, tiny_network
from torch import Tensor, nn
from under_torchrun import LINE, line_fit

from common.checkpoint import load_tensors, save_tensors
from common.ema import EMA, Place
from common.errors import InputError, Terminated
from common.files import ROOT
from common.seeds import Draws, batch_seed
from common.training import (
    Batch,
    TrainingConfig,
    fit,
    learning_rate,
    micro_batches_of,
    new_network,
    refuse_compile,
    refuse_slices,
)
from p1_diffusion import inference, train

SMALL = TrainingConfig(
    steps=6,
    batch_size=4,
    gradient_accumulation_steps=2,
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

    def get_batch(self, step: int, generator: torch.Generator) -> Batch:
        x = torch.randn(SMALL.batch_size, 3, generator=torch.Generator().manual_seed(step))
        return {"index": torch.arange(SMALL.batch_size) + 10 * step, "x": x}

    def loss(self, batch: Batch, draws: Draws) -> Tensor:
        self.path.append(self.weight.detach().clone())
        kept = torch.rand(3) < 0.9  # like a dropout layer, by the global generator
        noise = 0.1 * draws.randn()
        return (batch["x"] @ (self.weight * kept) - self.bystander + noise).square().mean()

    def validate(self) -> dict[str, float]:
        self.seen.append(self.weight.detach().clone())
        return {"loss": self.weight.detach().square().sum().item()}

    def save(self, folder: Path) -> None:
        self.seen.append(self.weight.detach().clone())
        folder.mkdir(exist_ok=True)
        save_tensors(folder / "model.safetensors", {"weight": self.weight})

    def fit(
        self,
        run_dir: Path,
        config: TrainingConfig = SMALL,
        get_batch: Callable[..., Batch] | None = None,
    ) -> None:
        fit(
            {"weight": self.weight},
            self.loss,
            get_batch or self.get_batch,
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


def test_a_crash_at_any_file_operation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, steps=4, validate_every=2)
    Line().fit(tmp_path / "whole", config)
    expected = contents(tmp_path / "whole")
    assert {
        "state.safetensors",
        "last/model.safetensors",
        "best/model.safetensors",
        "metrics.jsonl",
    } <= expected.keys()
    for fatal in itertools.count():
        countdown = itertools.count(fatal, -1)
        folder = tmp_path / f"cut_{fatal}"
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync"):
                patch.setattr(os, name, cut_at_zero(getattr(os, name), countdown))
            try:
                Line().fit(folder, config)
                break
            except PowerCut:
                pass
        Line().fit(folder, config)
        assert contents(folder) == expected, f"differs after a crash at file operation {fatal}"
    assert fatal > 15


def test_metrics_after_the_checkpoint_and_a_torn_line_are_cut_back(tmp_path: Path) -> None:
    Line().fit(tmp_path / "whole")

    def broken(step: int, generator: torch.Generator) -> Batch:
        if step == 5:
            raise PowerCut
        return Line().get_batch(step, generator)

    with pytest.raises(PowerCut):
        Line().fit(tmp_path / "torn", get_batch=broken)
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

        def get_batch(step: int, generator: torch.Generator) -> Batch:
            if step == stop:
                raise PowerCut
            step_now[0] = step
            return {"x": torch.ones(4, 2)}

        def loss(batch: Batch, draws: Draws) -> Tensor:
            return (batch["x"] * early).square().mean() + (
                (late - 3.0).square().sum() if step_now[0] >= 3 else 0.0
            )

        fit({"early": early, "late": late}, loss, get_batch, SMALL, folder)
        return late.detach()

    expected = run(tmp_path / "whole", None)
    with pytest.raises(PowerCut):
        run(tmp_path / "halves", 2)
    assert torch.equal(run(tmp_path / "halves", None), expected)
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


STEPS = 120  # long enough that a kill after the first checkpoint, at step 7, comes before the end


def tiny_arguments(data: Path, run_dir: Path, **flags: object) -> list[str]:
    """A command line of `p1_diffusion.train` that takes seconds."""
    values = {
        "data": data,
        "run-dir": run_dir,
        "model.channels": "16 32",
        "model.blocks": "1 1",
        "model.attention": "1",
        "model.embedding": 32,
        "model.heads": 2,
        "model.dropout": 0.1,
        "steps": STEPS,
        "batch-size": 4,
        "gradient_accumulation_steps": 2,
        "warmup": 4,
        "log-every": 3,
        "validate-every": 1000,
        "preview-every": 1000,
        "checkpoint-every": 7,
        "device": "cpu",
        **{name.replace("_", "-"): value for name, value in flags.items()},
    }
    return [
        part for name, value in values.items() for part in (f"--{name}", *str(value).split(" "))
    ]


@pytest.fixture(autouse=True, scope="module")
def _quick_looks() -> Iterator[None]:
    """Little to validate and to preview; a killed process never comes to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VALIDATION_IMAGES", 10)
        patch.setattr(train, "SamplingConfig", lambda: inference.SamplingConfig(steps=1))
        yield


@pytest.fixture(scope="module")
def whole(digits_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert exit_code(train.main, train.Config, *tiny_arguments(digits_root, folder)) == 0
    return folder


def reached_a_checkpoint(run_dir: Path) -> bool:
    path = run_dir / "state.safetensors"
    return path.exists() and load_tensors(path)[1]["step"] > 0


def start_and_kill(command: list[str], run_dir: Path) -> int:
    """Starts a program and kills it at an arbitrary moment after its first checkpoint; returns its
    exit code."""
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while (
            not reached_a_checkpoint(run_dir)
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    return process.wait(60)


def test_killed_then_interrupted_then_continued_gives_the_same_bits(
    whole: Path,
    digits_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGKILL at an arbitrary moment, Ctrl-C in the continuation, and the same command once more;
    with accumulation."""
    arguments = tiny_arguments(digits_root, tmp_path)
    code = start_and_kill([sys.executable, "-m", "p1_diffusion.train", *arguments], tmp_path)
    assert code == -signal.SIGKILL
    killed_at = load_tensors(tmp_path / "state.safetensors")[1]["step"]
    assert 0 < killed_at < STEPS and killed_at % 7 == 0

    stop_at = (killed_at + STEPS) // 2

    class Interrupted(train.BalancedDraw):
        """Ctrl-C comes while the batch of a step is drawn."""

        def __call__(self, count: int, generator: torch.Generator) -> Tensor:
            if generator.initial_seed() == batch_seed(0, stop_at):
                signal.raise_signal(signal.SIGINT)
            return super().__call__(count, generator)

    with monkeypatch.context() as patch:
        patch.setattr(train, "BalancedDraw", Interrupted)
        assert exit_code(train.main, train.Config, *arguments) == 130
    printed = capsys.readouterr().out
    assert f"from step {killed_at}" in printed
    assert f"stopped at step {stop_at} of {STEPS}; run the same command again to go on" in printed
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == stop_at

    assert exit_code(train.main, train.Config, *arguments) == 0
    # What the killed process left half-written is swept, unless another process has got its number
    # by now.
    assert {
        name: data for name, data in contents(tmp_path).items() if ".partial" not in name
    } == contents(whole)


def test_resuming_with_other_settings_is_refused(
    whole: Path, digits_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    for flag, value, name in (
        ("lr", "0.5", "lr = 0.01"),
        ("cond-drop-prob", "0.3", "cond_drop_prob = 0.1"),
    ):
        sentence = refused(
            capsys, train.main, train.Config, *tiny_arguments(digits_root, whole, **{flag: value})
        )
        assert name in sentence and value in sentence and "same settings" in sentence
    assert contents(whole) == before


def test_a_run_can_be_made_longer_and_says_where(tmp_path: Path) -> None:
    long = dataclasses.replace(SMALL, steps=9)
    stretched, whole = Line(), Line()
    stretched.fit(tmp_path / "stretched")
    stretched.fit(tmp_path / "stretched", config=long)
    whole.fit(tmp_path / "whole", config=long)
    # One loss for each micro-batch. What comes after the change of length runs on the new cosine.
    assert len(stretched.path) == len(whole.path) == long.steps * long.gradient_accumulation_steps
    lines = [
        json.loads(line)
        for line in (tmp_path / "stretched" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"step": SMALL.steps, "steps": long.steps} in lines
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    for step in range(1, long.steps + 1):
        length = SMALL.steps if step <= SMALL.steps else long.steps
        assert rates[step] == pytest.approx(
            learning_rate(dataclasses.replace(SMALL, steps=length), step - 1)
        )
    assert json.loads((tmp_path / "stretched" / "config.json").read_text())["steps"] == long.steps

    # It cannot be made shorter than it is, and nothing changes then.
    before = contents(tmp_path / "stretched")
    with pytest.raises(InputError, match="is already at step 9, past --steps 6"):
        Line().fit(tmp_path / "stretched")
    assert contents(tmp_path / "stretched") == before


def test_the_run_folder_explains_itself(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["steps"] == STEPS and config["model"]["channels"] == [16, 32]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(3, STEPS + 1, 3))
    assert all(math.isfinite(line["loss"]) and line["lr"] >= 0.0 for line in lines)
    assert math.isfinite(lines[-1]["validation_loss"])
    assert not list(whole.rglob("*.partial"))


@pytest.mark.parametrize("place", ["validate", "preview"])
def test_a_signal_breaks_off_a_validation_or_drawing_which_the_next_run_repeats(
    place: str, tmp_path: Path
) -> None:
    Line().fit(tmp_path / "whole")
    line, reached = Line(), []

    def broken_off(*arguments: Path) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the end")
        return line.validate()

    looks = {
        "validate": line.validate,
        "preview": lambda path: path.write_bytes(line.weight.detach().numpy().tobytes()),
    }
    looks[place] = broken_off
    folder = tmp_path / "halves"
    with pytest.raises(KeyboardInterrupt):
        fit(
            {"weight": line.weight},
            line.loss,
            line.get_batch,
            SMALL,
            folder,
            save=line.save,
            **looks,
        )
    assert not reached
    state = load_tensors(folder / "state.safetensors")[1]
    assert state["step"] == 3 and not state["looked"]
    Line().fit(folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_ctrl_c_breaks_off_the_step_and_gives_the_signals_back(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    line = Line()

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return line.get_batch(step, generator)

    with pytest.raises(Terminated):
        line.fit(tmp_path, get_batch=get_batch)
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == 2  # the step was broken off
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# ----------------------------------------------------------------------------
# Optimisation.


def test_a_signal_while_a_step_makes_a_class_saves_the_state(tmp_path: Path) -> None:
    """As torch.compile does, which imports when it is first called."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    class Stopped(Line):
        def loss(self, batch: Batch, draws: Draws) -> Tensor:
            type("Imported", (), {"field": Field()})
            return super().loss(batch, draws)

    line = Stopped()
    with pytest.raises(Terminated):
        fit({"weight": line.weight}, line.loss, line.get_batch, SMALL, tmp_path / "run")
    assert load_tensors(tmp_path / "run" / "state.safetensors")[1]["step"] == 0


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """The loss is that of before the update."""
    line = Line()

    def loss(batch: Batch, draws: Draws) -> Tensor:
        zero = (line.weight - line.weight.detach()).sum()
        usual = line.loss(batch, draws)
        # In step 3 (of two micro-batches each) the gradient of the square root is infinite.
        return usual + zero.sqrt() if len(line.path) == 8 else usual

    with pytest.raises(InputError, match="the weights are not finite after step 4"):
        fit(
            {"weight": line.weight},
            loss,
            line.get_batch,
            dataclasses.replace(SMALL, log_every=100, validate_every=0, preview_every=0),
            tmp_path / "run",
            save=line.save,
        )
    tensors, values = load_tensors(tmp_path / "run" / "state.safetensors")
    assert values["step"] == 2 and bool(tensors["param/weight"].isfinite().all())


def rate(step: int, warmup: int, steps: int, schedule: str = "cosine") -> float:
    """The learning rate of a peak of 1."""
    return learning_rate(
        TrainingConfig(lr=1.0, warmup=warmup, steps=steps, lr_schedule=schedule), step
    )


def test_the_learning_rate_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    assert [rate(step, 4, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(4, 4, 100) == 1.0
    assert rate(52, 4, 100) == pytest.approx(0.5)  # half-way between 4 and 100
    assert rate(100, 4, 100) == pytest.approx(0.0, abs=1e-12)
    assert rate(0, 0, 1) == 1.0
    factors = [rate(step, 10, 50) for step in range(50)]
    assert factors[9:] == sorted(factors[9:], reverse=True) and factors[:10] == sorted(factors[:10])


def test_a_constant_learning_rate_falls_in_a_line_over_the_last_fifth() -> None:
    rates = [rate(step, 4, 100, "constant") for step in range(101)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[4:81]) == {1.0}
    assert rates[80:] == pytest.approx([1.0 - k / 20 for k in range(21)])
    # A run that has come to step 400 cools down at once if its length becomes 500: at 400 nothing
    # jumps.
    assert rate(399, 4, 10_000, "constant") == rate(400, 4, 500, "constant") == 1.0
    assert rate(0, 0, 1, "constant") == 1.0


def test_a_batch_that_does_not_split_evenly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="--batch-size 4 must be a multiple of processes times gradient accumulation steps, 3",
    ):
        Line().fit(tmp_path / "run", dataclasses.replace(SMALL, gradient_accumulation_steps=3))
    assert not (tmp_path / "run").exists()


def test_only_the_given_parameters_change(tmp_path: Path) -> None:
    line = Line()
    line.fit(tmp_path)
    assert line.bystander.item() == 1.0
    assert not torch.equal(line.weight, Line().weight)
    assert {name.split("/")[1] for name in load_tensors(tmp_path / "state.safetensors")[0]} == {
        "weight"
    }


def test_validate_and_save_see_the_average(tmp_path: Path) -> None:
    """The average is d a + (1 - d) p after each step, with d = min(decay, (1 + n) / (10 + n)); the
    loss sees p itself."""
    line = Line()
    line.fit(
        tmp_path,
        dataclasses.replace(
            SMALL, gradient_accumulation_steps=1, validate_every=6, checkpoint_every=6
        ),
    )
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
    assert torch.equal(
        load_tensors(tmp_path / "last" / "model.safetensors")[0]["weight"], line.seen[0]
    )


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


def losses(run_dir: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    for accumulation in (1, 2, 4):
        line_fit(
            tmp_path / str(accumulation),
            dataclasses.replace(LINE, gradient_accumulation_steps=accumulation),
        )
    for accumulation in ("2", "4"):
        assert losses(tmp_path / accumulation) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_the_largest_micro_batch_sets_the_accumulation() -> None:
    """The smallest number of equal micro-batches that are no larger."""
    accelerator = SimpleNamespace(num_processes=2, process_index=1)
    for batch_size, at_most, steps, expected in (
        (8, 4, 1, [slice(4, 8)]),
        (8, 3, 1, [slice(2, 4), slice(6, 8)]),
        (8, 4, 2, [slice(2, 4), slice(6, 8)]),
        (12, 4, 1, [slice(3, 6), slice(9, 12)]),
        (8, 1, 1, [slice(n, n + 1) for n in (1, 3, 5, 7)]),
    ):
        config = TrainingConfig(
            batch_size=batch_size, device_batch_size=at_most, gradient_accumulation_steps=steps
        )
        assert micro_batches_of(config, accelerator) == expected
    with pytest.raises(InputError, match="must be a multiple of processes times"):
        micro_batches_of(TrainingConfig(batch_size=7, device_batch_size=1), accelerator)


@pytest.mark.parametrize("ema", ["cpu", "none"])
def test_a_run_without_an_average_on_the_device_resumes(ema: Place, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, ema=ema)
    whole, first, second = Line(), Line(), Line()
    whole.fit(tmp_path / "whole", config)
    state = load_tensors(tmp_path / "whole" / "state.safetensors")[0]
    assert ("ema/weight" in state) == (ema == "cpu")

    def until_4(step: int, generator: torch.Generator) -> Batch:
        if step == 4:
            raise InputError("unreadable")
        return first.get_batch(step, generator)

    with pytest.raises(InputError, match="unreadable"):
        first.fit(tmp_path / "halves", config, get_batch=until_4)
    second.fit(tmp_path / "halves", config)
    assert len(first.path) + len(second.path) == len(whole.path)  # nothing was computed again
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_a_run_of_before_a_setting_existed_resumes(tmp_path: Path) -> None:
    """A setting that config.json lacks had its default."""
    path = tmp_path / "config.json"
    Line().fit(tmp_path, dataclasses.replace(SMALL, steps=2))
    before = json.loads(path.read_text())
    del before["ema"], before["tf32"]
    path.write_text(json.dumps(before))
    with pytest.raises(InputError, match="is of a run with ema = device, not none"):
        Line().fit(tmp_path, dataclasses.replace(SMALL, ema="none"))
    resumed = Line()
    resumed.fit(tmp_path, SMALL)
    assert len(resumed.path) == (SMALL.steps - 2) * SMALL.gradient_accumulation_steps


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    line = Line()
    saved = []
    numbers = iter([3.0, 1.0, 2.0])
    fit(
        {"weight": line.weight},
        line.loss,
        line.get_batch,
        dataclasses.replace(SMALL, validate_every=2, checkpoint_every=6),
        tmp_path,
        save=lambda folder: saved.append((folder.name, len(line.path))),
        validate=lambda: {"loss": next(numbers)},
    )
    assert [name for name, _ in saved] == ["best", "best", "last"]
    assert [calls // 2 for _, calls in saved] == [2, 4, 6]


def test_another_judge_chooses_the_best_checkpoint_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A score of -140 would never be beaten by a loss of 2."""
    saved: list[str] = []
    for steps, judge, score in ((2, "scores", -140.0), (4, "scores", -130.0), (6, "loss", 2.0)):
        line = Line()
        fit(
            {"weight": line.weight},
            line.loss,
            line.get_batch,
            dataclasses.replace(SMALL, steps=steps, validate_every=2, checkpoint_every=2),
            tmp_path,
            save=lambda folder, steps=steps: saved.append(f"{folder.name} {steps}"),
            validate=lambda score=score: {"loss": score},
            judged_by=judge,
        )
        assert ("best/ is chosen anew" in capsys.readouterr().out) == (judge == "loss")
    assert [name for name in saved if name.startswith("best")] == ["best 2", "best 6"]


def test_a_non_finite_loss_stops_with_step_and_images(tmp_path: Path) -> None:
    line = Line()

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        batch = line.get_batch(step, generator)
        return batch | {"x": batch["x"] * math.inf} if step == 3 else batch

    with pytest.raises(
        InputError,
        match=r"step 3, on the batch of images \[30, 31, 32, 33\]; the last checkpoint is",
    ):
        line.fit(tmp_path, get_batch=get_batch)
    tensors, values = load_tensors(tmp_path / "state.safetensors")
    assert values["step"] == 2 and bool(tensors["param/weight"].isfinite().all())


def test_a_non_finite_loss_between_two_readings_is_named_and_never_saved(tmp_path: Path) -> None:
    """Losses are read a few times a second: nothing that came after the bad step may reach the
    disk."""
    line = Line()

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        batch = line.get_batch(step, generator)
        return batch | {"x": batch["x"] * math.nan} if step >= 13 else batch

    config = dataclasses.replace(
        SMALL, steps=100, log_every=100, validate_every=100, preview_every=100, checkpoint_every=10
    )
    with pytest.raises(
        InputError,
        match=r"the loss is nan at step 13, on the batch of images \[130, 131, 132, 133\]",
    ):
        line.fit(tmp_path, config, get_batch)
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == 10


def test_data_that_cannot_be_read_stops_with_the_state_saved(tmp_path: Path) -> None:
    """Between two checkpoints; the same command goes on with the same numbers."""
    config = dataclasses.replace(LINE, checkpoint_every=20, steps=6)
    line_fit(tmp_path / "whole", config)
    with pytest.raises(InputError, match="line 4 of the data"):
        line_fit(tmp_path / "halves", config, unreadable_at=3)
    assert load_tensors(tmp_path / "halves" / "state.safetensors")[1]["step"] == 3
    line_fit(tmp_path / "halves", config)
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--model.datasets", 1), "--model.datasets follow from"),
        (("--model.augmentation", 5), "--model.augmentation and"),
        (("--discriminate", 0.02, "--batch-size", 6), "the 3 that are computed at once must be a"),
        (("--mixed-precision", "fp16", "--device", "cpu"), "fp16 needs a GPU"),
    ],
)
def test_settings_that_would_be_ignored_or_mean_something_else_are_refused(
    digits_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    sentence: str,
) -> None:
    arguments = tiny_arguments(digits_root, tmp_path / "run", steps=2)
    assert exit_code(train.main, train.Config, *arguments, *flags) == 2
    assert sentence in capsys.readouterr().err


def test_init_from_starts_from_those_weights(
    digits_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At learning rate 0 the trained network is the one it started from. Flags of other sizes,
    which could not be followed, are refused."""
    network = tiny_network()
    network.save(tmp_path / "start")
    arguments = tiny_arguments(
        digits_root,
        tmp_path / "run",
        init_from=tmp_path / "start",
        steps=2,
        lr=0.0,
        augment=0.0,
        **{"model.dropout": 0.0},
    )
    assert exit_code(train.main, train.Config, *arguments, "--model.embedding", 48) == 2
    assert "so --model.* does not apply" in capsys.readouterr().err
    assert exit_code(train.main, train.Config, *arguments) == 0
    assert contents(tmp_path / "run" / "last") == contents(tmp_path / "start")
    assert (
        json.loads((tmp_path / "start" / "config.json").read_text())["embedding"]
        == CONFIG.embedding
    )


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("steps", 0, "--steps must be between 1 and 1000000000, not 0"),
        ("log_every", 0, "--log-every must be between 1 and 1000000, not 0"),
        ("checkpoint_every", 0, "--checkpoint-every must be between 1 and 1000000, not 0"),
        ("validate_every", -1, "--validate-every must be at least 0, not -1"),
        ("warmup", -3, "--warmup must be between 0 and 1000000, not -3"),
        ("weight_decay", float("nan"), "--weight-decay must be a finite number, not nan"),
        ("lr", -0.001, "--lr must be between 0 and 100, not -0.001"),
        ("lr", 1e30, "--lr must be between 0 and 100, not 1e"),
        ("warmup", 10**30, "--warmup must be between 0 and 1000000, not 10"),
        ("device_batch_size", 10**30, "--device-batch-size must be between 1 and 1048576"),
        ("lr", float("inf"), "--lr must be a finite number, not inf"),
        ("max_grad_norm", 0.0, "--max-grad-norm must be above 0, not 0.0"),
        ("beta2", 5.0, "--beta2 must be at least 0 and below 1, not 5.0"),
        ("ema_decay", float("nan"), "--ema-decay must be a finite number, not nan"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    name: str, value: float, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        Line().fit(tmp_path / "run", dataclasses.replace(SMALL, **{name: value}))
    assert not (tmp_path / "run").exists()


def test_validations_and_previews_can_be_switched_off(tmp_path: Path) -> None:
    line = Line()
    config = dataclasses.replace(SMALL, validate_every=0, preview_every=0)
    line.fit(tmp_path, config)
    assert not (tmp_path / "samples").exists() and not (tmp_path / "best").exists()
    assert (tmp_path / "last").exists()
    assert "validation" not in (tmp_path / "metrics.jsonl").read_text()


def test_compiling_is_refused_where_it_would_do_nothing() -> None:
    refuse_compile(SMALL)
    with pytest.raises(InputError, match="--compile is for the trainers of Problems 1 and 2"):
        refuse_compile(dataclasses.replace(SMALL, compile=True))


def test_a_loss_over_the_whole_batch_refuses_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataclasses.replace(SMALL, gradient_accumulation_steps=1, device_batch_size=4)
    refuse_slices(whole, "a contrastive loss")
    for change in ({"gradient_accumulation_steps": 2}, {"device_batch_size": 2}):
        with pytest.raises(InputError, match="a contrastive loss needs its whole batch at once"):
            refuse_slices(dataclasses.replace(whole, **change), "a contrastive loss")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="train in one process"):
        refuse_slices(whole, "a contrastive loss")


def test_a_run_may_go_on_with_other_micro_batches(tmp_path: Path) -> None:
    """As on a smaller GPU."""
    for steps, size, calls in ((2, None, 2 * 2), (4, 1, 2 * 4)):
        line = Line()
        line.fit(tmp_path, dataclasses.replace(SMALL, steps=steps, device_batch_size=size))
        assert len(line.path) == calls  # of two steps each


def test_tensorboard_is_asked_for_by_name_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="needs the package tensorboard"):
        Line().fit(tmp_path / "run", dataclasses.replace(SMALL, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_other_data_of_the_same_shape_is_noticed(
    digits_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = shutil.copytree(digits_root, tmp_path / "data"), tmp_path / "run"
    arguments = tiny_arguments(data, run, steps=1)
    assert exit_code(train.main, train.Config, *arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"the weights are in {run / 'last'}",
        f"next: bash hw2_1.sh OUT --checkpoint {run / 'last'}",
    ]
    before = contents(run)
    table = data / "svhn" / "train.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *(f"{line[:-1]}{9 - int(line[-1])}" for line in lines)]))
    sentence = refused(capsys, train.main, train.Config, *tiny_arguments(data, run, steps=2))
    assert "is of a run with data_hash = " in sentence and contents(run) == before


def test_a_new_network_draws_its_weights_once_and_fits_into_memory() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(3, 2)
    torch.manual_seed(0)
    assert torch.equal(new_network(lambda: nn.Linear(3, 2)).weight, expected.weight)
    with pytest.raises(InputError, match="--model does not describe a network"):
        new_network(lambda: nn.Linear(3, -2))
    with pytest.raises(InputError, match="GB more memory"):
        new_network(lambda: nn.Linear(2**20, 2**20))


def test_a_large_batch_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = 1000
    layer = nn.Linear(1, hidden)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        return {"x": torch.randn(size, 1, generator=generator)}

    def loss(batch: Batch, draws: Draws) -> Tensor:
        return layer(batch["x"]).tanh().square().mean()  # keeps tanh(x): 4000 bytes an example

    def run(**changes: object) -> None:
        config = dataclasses.replace(SMALL, batch_size=size, steps=1, **changes)
        fit(dict(layer.named_parameters()), loss, get_batch, config, tmp_path / "run")

    size, accumulate = 1000, {"gradient_accumulation_steps": 1}
    monkeypatch.setattr("common.training.available_memory", lambda: 3_900_000)
    with pytest.raises(InputError, match="1000 examples at once need about 0 GB"):
        run(**accumulate)
    assert not (tmp_path / "run").exists()
    run(device_batch_size=500)  # two slices, each of 2 MB
    monkeypatch.setattr("common.training.available_memory", lambda: 4_100_000)
    shutil.rmtree(tmp_path / "run")
    run(**accumulate)
