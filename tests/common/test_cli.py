"""Command lines: presets, what --help says, and how programs end."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import torch
import tyro
from tiny import environment, exit_code, refusal, refused, run_process

import p1_diffusion.train
import p2_ddim.train
import p3_clip.train
import p3_controlnet.base.train_autoencoder
import p3_controlnet.base.train_text
import p3_controlnet.base.train_unet
import p3_controlnet.train
from common import cli
from common.cli import Preset
from common.config import bounds
from common.errors import InputError
from common.files import ROOT, claimed
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion


@dataclasses.dataclass(frozen=True)
class Inner:
    """Settings inside."""

    steps: int = 100
    """Steps."""
    lr: float = 0.1
    """Rate."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Does nothing."""

    out: Path
    """Folder."""
    count: int = 5
    """Count, of which
    `two lines` are in the source."""
    inner: Annotated[Inner, tyro.conf.arg(name="")] = Inner()
    PRESETS: ClassVar = {
        "smoke": Preset("a try that takes seconds", {"count": 1, "inner": Inner(steps=2)}),
        "large": Preset(
            "the real thing", {"count": 500}, {24: {"inner": Inner(8)}, 12: {"inner": Inner(4)}}
        ),
    }


def parsed(*arguments: str) -> Outer:
    seen: list[Outer] = []
    cli.run(seen.append, Outer, arguments)
    return seen[0]


def test_a_preset_sets_what_it_names_and_flags_change_that() -> None:
    assert parsed("--out", "x") == Outer(Path("x"))
    assert parsed("--preset", "smoke", "--out", "x") == Outer(Path("x"), 1, Inner(2))
    assert parsed("--out", "x", "--lr", "3", "--preset=smoke") == Outer(Path("x"), 1, Inner(2, 3.0))
    large = parsed("--preset", "large", "--memory", "12", "--out", "x", "--count", "7")
    assert large == Outer(Path("x"), 7, Inner(4))


@pytest.mark.parametrize(
    ("gibibytes", "steps"), [(0.0, 4), (8.0, 4), (15.9, 4), (22.5, 8), (79.0, 8)]
)
def test_a_presets_size_is_that_of_the_gpu(
    gibibytes: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card of 24 GB shows 22.5 GiB or more; without a card the smallest size is taken."""
    monkeypatch.setattr("common.devices.gpu_memory", lambda: gibibytes)
    assert parsed("--preset", "large", "--out", "x").inner == Inner(steps)
    assert parsed("--preset", "large", "--memory=24", "--out", "x").inner == Inner(8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--preset", "large", "--memory", "8"), "--memory must be one of 24, 12, not '8'"),
        (("--preset", "smoke", "--memory", "12"), "--memory goes with --preset large only"),
        (("--memory", "12"), "--memory goes with --preset large only"),
    ],
)
def test_a_size_without_settings_is_refused(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(print, Outer, [*arguments, "--out", "x"])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_help_lists_presets_and_shows_the_chosen_ones_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, shown in (((), "(default: 100)"), (("--preset", "smoke"), "(default: 2)")):
        with pytest.raises(SystemExit) as ended:
            cli.run(print, Outer, [*arguments, "--help"])
        said = capsys.readouterr().out
        assert (
            ended.value.code == 0 and "- smoke: a try that takes seconds" in said and shown in said
        )


def test_help_has_no_line_breaks_of_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit):
        cli.run(print, Outer, ["--help"])
    assert "Count, of which `two lines` are in the source. (default: 5)" in capsys.readouterr().out
    text = """First line
    second line.

    - an item
      goes on
    - another

        an example
    """
    joined = "First line second line.\n\n- an item goes on\n- another\n\n    an example"
    assert cli._joined_lines(text) == joined


@pytest.mark.parametrize("arguments", [("--preset",), ("--preset", "huge"), ("--preset=",)])
def test_an_unknown_preset_is_refused_with_the_known_names(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(print, Outer, arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--preset must be one of smoke, large, not" in said


def test_a_preset_does_not_stand_in_for_what_is_required() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(print, Outer, ["--preset", "smoke"])
    assert ended.value.code == 2


TRAINERS = (
    p1_diffusion.train.Config,
    p2_ddim.train.Config,
    p3_controlnet.base.train_autoencoder.Config,
    p3_controlnet.base.train_text.Config,
    p3_controlnet.base.train_unet.Config,
    p3_controlnet.train.Config,
    p3_clip.train.Config,
    TextualInversion,
    CustomDiffusion,
)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainers_presets_fit_its_settings(
    trainer: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {field.name for field in dataclasses.fields(trainer)}
    assert {"small", "smoke"} <= set(trainer.PRESETS)
    for name, preset in trainer.PRESETS.items():
        assert set(preset.settings) <= known and preset.what
        seen: list[object] = []
        needed = [
            part
            for field in dataclasses.fields(trainer)
            if field.default is dataclasses.MISSING  # a required flag
            or preset.settings.get(field.name) is tyro.MISSING
            for part in (f"--{field.name.replace('_', '-')}", "x")
        ]
        cli.run(seen.append, trainer, ["--preset", name, *needed])
        values = {key: value for key, value in preset.settings.items() if value is not tyro.MISSING}
        assert all(getattr(seen[0], key) == value for key, value in values.items())
        for memory, more in preset.by_memory.items():
            cli.run(seen.append, trainer, ["--preset", name, "--memory", str(memory), *needed])
            assert all(getattr(seen[-1], key) == value for key, value in {**values, **more}.items())


@pytest.mark.parametrize("trainer", [p3_controlnet.train.Config, TextualInversion, CustomDiffusion])
def test_the_memory_of_a_gpu_changes_no_result(trainer: type) -> None:
    """Only how many images are computed at once, and whether activations are computed again."""
    sizes = trainer.PRESETS["sd14"].by_memory
    assert sorted(sizes) == [12, 16, 24]
    training = [
        dataclasses.replace(settings["training"], device_batch_size=None)
        for settings in sizes.values()
    ]
    assert training[0] == training[1] == training[2]
    assert all(set(more) <= {"training", "gradient_checkpointing"} for more in sizes.values())


# ----------------------------------------------------------------------------
# Folders, pipes, memory and interpreters.


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes."""

    output_dir: Path
    """Folder."""
    count: Annotated[int, *bounds(at_least=1, at_most=9)] = 1
    """Count."""


def test_the_bounds_of_a_number_are_shown_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capsys, print, Writer, "--output-dir", "x", "--count", "10")
    assert sentence == "--count must be between 1 and 9, not 10"
    with pytest.raises(SystemExit):
        cli.run(print, Writer, ["--help"])
    assert "(between 1 and 9; default: 1)" in capsys.readouterr().out


HOLD = """
import os, sys, time
from pathlib import Path
from common.files import claimed
with claimed(Path(sys.argv[1])):
    worker = os.fork()
    if worker == 0:
        os.close(1)
        time.sleep(600)
    print(worker, flush=True)
    sys.stdin.read()
"""


def test_two_jobs_on_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first runs, whether in this process or another."""
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert first.stdout is not None
    worker = int(first.stdout.readline())
    sentence = refused(capsys, print, Writer, "--output-dir", out)
    assert sentence.startswith(f"another job is writing to {out}: ")
    first.kill()  # a dead process holds no lock, and neither does a worker that outlives it
    first.communicate()
    try:
        assert exit_code(print, Writer, "--output-dir", out) == 0
    finally:
        os.kill(worker, signal.SIGKILL)
    assert list(out.iterdir()) == []


def test_the_other_processes_of_a_job_share_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with claimed(tmp_path):
        monkeypatch.setenv("RANK", "1")
        assert exit_code(print, Writer, "--output-dir", tmp_path) == 0
        monkeypatch.setenv("RANK", "0")
        assert exit_code(print, Writer, "--output-dir", tmp_path) == 2


def test_a_job_holds_its_folder_until_its_last_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, has = threading.Event(), threading.Event()

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH:
            waits.set()
        real_flock(descriptor, operation)
        if operation == fcntl.LOCK_SH:
            has.set()

    real_flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.ExitStack() as other:
        with claimed(tmp_path):
            other.enter_context(claimed(tmp_path, main=False))
            assert waits.wait(60)
            assert not has.is_set()
        assert has.wait(60)
        assert exit_code(print, Writer, "--output-dir", tmp_path) == 2
    while exit_code(print, Writer, "--output-dir", tmp_path) == 2:
        pass  # until its thread has ended


def test_the_main_process_may_come_after_the_others(tmp_path: Path) -> None:
    with claimed(tmp_path, main=False), claimed(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_destructor_is_not_lost(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what is raised there."""

    class Worker:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def works(config: Writer) -> None:
        Worker()
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.run(works, Writer, ["--output-dir", str(tmp_path)])
    assert ended.value.code == 128 + number and time.monotonic() - started < 30
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_class_is_made_is_no_defect(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python 3.11 raises a RuntimeError from it."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(number)

    def imports(config: Writer) -> None:
        type("Imported", (), {"field": Field()})

    assert exit_code(imports, Writer, "--output-dir", tmp_path) == 128 + number
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_leaves_no_empty_folder(tmp_path: Path) -> None:
    def fails(config: Writer) -> None:
        raise InputError("no")

    assert exit_code(fails, Writer, "--output-dir", tmp_path / "a" / "b") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_was_stopped_says_what_it_leaves(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: Writer) -> None:
        signal.raise_signal(number)
        pytest.fail("went on")

    assert exit_code(stopped, Writer, "--output-dir", tmp_path) == 128 + number
    said = capsys.readouterr().err
    assert said == f"stopped: what is in {tmp_path} is whole; the same command goes on\n"


@pytest.mark.parametrize("broken", ["a file is in the way", "the disk is full"])
def test_an_output_folder_that_cannot_be_written_is_named_before_the_work(
    broken: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if broken == "a file is in the way":
        (tmp_path / "out").write_text("")
    else:

        def full(**_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out"))

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
    said = refused(capsys, pytest.fail, Writer, "--output-dir", tmp_path / "out")
    assert str(tmp_path / "out") in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_exhausted_memory_is_one_sentence(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: Writer) -> None:
        raise error

    assert refused(capsys, fails, Writer, "--output-dir", tmp_path).startswith(
        "there is not enough memory"
    )


def test_a_defect_keeps_its_traceback_and_is_no_grade(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: Writer) -> None:
        raise RuntimeError("shape mismatch")

    assert exit_code(fails, Writer, "--output-dir", tmp_path) == os.EX_SOFTWARE
    assert "Traceback" in (said := capsys.readouterr().err) and "shape mismatch" in said


def test_a_full_standard_output_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.make_noise", "--output-dir", tmp_path / "noise"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.endswith("error: standard output: No space left on device\n")


def test_help_into_a_closed_pipe_is_silent() -> None:
    command = f"'{sys.executable}' -m scripts.make_noise --help | true; echo ${{PIPESTATUS[0]}}"
    done = run_process(["bash", "-c", command])
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_without_asserts_and_docstrings(tmp_path: Path) -> None:
    command = [sys.executable, "-OO", "-m", "p1_diffusion.train", "--run-dir", tmp_path]
    done = run_process([*command, "--help"])
    assert done.returncode == 0 and "Config(" not in done.stdout
    assert "Optimiser steps in total" in done.stdout
    done = run_process([*command, "--steps", "0"])
    assert (
        done.returncode == 2
        and refusal(done.stderr) == "--steps must be between 1 and 1000000000, not 0"
    )


@pytest.mark.parametrize("while_making_a_class", [False, True])
def test_ctrl_c_during_imports_gives_no_traceback(
    while_making_a_class: bool, tmp_path: Path
) -> None:
    """A module that is imported on the way sends Ctrl-C."""
    (tmp_path / "tyro.py").write_text(
        """import signal
class Field:
    def __set_name__(self, owner, name):
        signal.raise_signal(signal.SIGINT)
class Imported:
    field = Field()
"""
        if while_making_a_class
        else "import signal\nsignal.raise_signal(signal.SIGINT)\n"
    )
    done = run_process(
        [sys.executable, "-m", "scripts.make_noise", "--help"],
        env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
    )
    assert done.returncode == -signal.SIGINT and done.stderr == ""


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"RANK": "one", "WORLD_SIZE": "2"},
            "RANK must be a whole number of at most 9 digits, not 'one'",
        ),
        (
            {"RANK": "-1", "WORLD_SIZE": "2"},
            "RANK must be a whole number of at most 9 digits, not '-1'",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0.5"}, "LOCAL_RANK must be"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, but must be below WORLD_SIZE, which is 2"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
    ],
)
def test_ranks_that_make_no_sense_are_named(
    variables: dict[str, str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sentence in refused(capsys, pytest.fail, Writer, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
