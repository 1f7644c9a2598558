"""Bad input to Problem 1's programs: one sentence, exit code 2, nothing half-written, and no code
from a file is ever run."""

import contextlib
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    Malice,
    contents,
    environment,
    exit_code,
    refusal,
    refused,
    run_process,
    tiny_network,
)

from common.errors import Terminated
from common.files import ROOT
from common.metrics.classifier import DigitClassifier
from p1_diffusion import evaluate, inference, train
from p1_diffusion.study import figures, train_classifier

SMALL = [
    "--model.channels",
    "16",
    "32",
    "--model.blocks",
    "1",
    "1",
    "--model.attention",
    "1",
    "--model.embedding",
    "32",
    "--model.heads",
    "2",
    "--batch-size",
    "4",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_network().save(folder)
    return folder


@pytest.fixture
def sampling(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs inference with flags that it must refuse before it writes anything; returns its
    sentence."""

    def refuse(*flags: Any) -> str:
        # Of a flag given twice the last one counts.
        arguments = (
            "--output-dir",
            tmp_path / "out",
            "--checkpoint",
            checkpoint,
            "--device",
            "cpu",
            *flags,
        )
        sentence = refused(capsys, inference.main, inference.Config, *arguments)
        assert not (tmp_path / "out").exists()
        return sentence

    return refuse


# ----------------------------------------------------------------------------
# Numbers and names.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--steps 0", "--steps must be between 1 and 1000, not 0"),
        ("--steps -3", "--steps must be between 1 and 1000, not -3"),
        ("--steps 1001", "--steps must be between 1 and 1000, not 1001"),
        ("--seed -1", "--seed must be between 0 and 4294967295, not -1"),
        ("--chunk-size 0", "--chunk-size must be between 1 and 4096, not 0"),
        ("--guide-w nan", "--guidance-scale must be a finite number, not nan"),
        ("--guide_w=inf", "--guidance-scale must be a finite number, not inf"),
        ("--guide-w much", "--guide-w needs a number, not 'much'"),
        ("--guidance-scale nan", "--guidance-scale must be a finite number, not nan"),
        ("--guidance_scale -inf", "--guidance-scale must be a finite number, not -inf"),
        ("--guide-w 2 --guidance-scale 2", "--guide-w and --guidance-scale set the same value"),
        (
            "--guidance-interval 700 150",
            "--guidance-interval must give the lowest t and then the highest",
        ),
        ("--eta nan", "--eta must be a finite number, not nan"),
        ("--eta 0.5", "--eta applies to DDIM only: with --sampler dpmpp_2m it must be 0"),
        ("--classes svhn/10", "the edition 2025 has no class 'svhn/10'"),
        (
            "--classes mnistm/3",
            "the edition 2025 has no class 'mnistm/3'",
        ),  # an odd digit is SVHN's
        ("--edition 2024 --classes mnistm/3 usps/1", "the edition 2024 has no class 'usps/1'"),
    ],
)
def test_numbers_and_names_that_make_no_sense(
    flags: str, sentence: str, sampling: Callable[..., str]
) -> None:
    assert sentence in sampling(*flags.split())


@pytest.mark.parametrize(
    "flags", ["--edition 2023", "--sampler euler", "--steps many", "--device tpu", "--colour red"]
)
def test_what_the_parser_refuses_is_a_box(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--output-dir", tmp_path / "out", *flags.split())
    assert exit_code(inference.main, inference.Config, *arguments) == 2
    printed = capsys.readouterr()
    assert flags.split()[-1] in printed.err and "Traceback" not in printed.err
    assert not printed.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--steps 0", "--steps must be between 1 and 1000000000, not 0"),
        ("--steps -5", "--steps must be between 1 and 1000000000, not -5"),
        ("--batch-size 0", "--batch-size must be between 1 and 1048576, not 0"),
        (
            "--gradient-accumulation-steps 0",
            "--gradient-accumulation-steps must be between 1 and 1048576, not 0",
        ),
        ("--cond-drop-prob 7", "--cond-drop-prob must be between 0 and 1, not 7"),
        ("--augment -0.1", "--augment must be between 0 and 1, not -0.1"),
        ("--log-every 0", "--log-every must be between 1 and 1000000, not 0"),
        ("--checkpoint-every -1", "--checkpoint-every must be between 1 and 1000000, not -1"),
        (
            "--gradient-accumulation-steps 3",
            "--batch-size 4 must be a multiple of processes times gradient accumulation steps, 3",
        ),
    ],
)
def test_trainings_that_make_no_sense(
    flags: str, sentence: str, digits_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data",
        digits_root,
        "--run-dir",
        tmp_path / "run",
        "--device",
        "cpu",
        *SMALL,
        *flags.split(),
    )
    assert sentence in refused(capsys, train.main, train.Config, *arguments)
    assert not (tmp_path / "run").exists()


def test_cuda_asked_for_but_absent(
    sampling: Callable[..., str],
    digits_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "--device cuda was given, but no CUDA device is present"
    assert sampling("--device", "cuda") == expected
    arguments = ("--data", digits_root, "--run-dir", tmp_path / "run", "--device", "cuda")
    assert refused(capsys, train.main, train.Config, *arguments, *SMALL) == expected
    assert refused(capsys, train_classifier.main, train_classifier.Config, *arguments) == expected
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------
# Folders and disks.


@pytest.mark.parametrize("below", ["file", "file/out", "file/a/b"])
def test_an_output_path_below_a_regular_file(
    below: str,
    checkpoint: Path,
    digits_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    reason = f"{tmp_path / 'file'} is a regular file"
    sample = ("--output-dir", tmp_path / below, "--checkpoint", checkpoint, "--device", "cpu")
    assert reason in refused(capsys, inference.main, inference.Config, *sample)
    fit = ("--data", digits_root, "--run-dir", tmp_path / below, "--device", "cpu", *SMALL)
    assert reason in refused(capsys, train.main, train.Config, *fit)
    draw = ("--images", tmp_path, "--output-dir", tmp_path / below, "--checkpoint", checkpoint)
    assert reason in refused(capsys, figures.main, figures.Config, *draw)
    assert contents(tmp_path) == {"file": b"mine"}


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Inside the block no file can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sampling_onto_a_full_disk_leaves_no_half_image(checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user would meet it."""
    arguments = (
        "--output-dir",
        tmp_path,
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--steps",
        1,
    )
    result = run_process(
        [sys.executable, "-m", "p1_diffusion.inference", *arguments],
        cwd=ROOT,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )
    assert result.returncode == 2
    assert "File too large" in refusal(result.stderr)
    assert contents(tmp_path) == {}


def test_training_onto_a_full_disk_keeps_what_is_whole(
    digits_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json fits, the weights do not."""
    arguments = ("--data", digits_root, "--run-dir", tmp_path, "--device", "cpu", *SMALL)
    with full_disk(20_000):
        code = exit_code(
            train.main, train.Config, *arguments, "--checkpoint-every", 2, "--log-every", 1
        )
    assert code == 2
    sentence = refusal(capsys.readouterr().err)
    assert sentence.startswith(f"{tmp_path / 'state.safetensors'} could not be written")
    assert "File too large" in sentence
    assert contents(tmp_path).keys() == {"config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 4


def test_a_full_disk_is_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def program(config: inference.Config) -> None:
        raise OSError(28, "No space left on device", str(config.output_dir))

    sentence = refused(capsys, program, inference.Config, "--output-dir", tmp_path)
    assert sentence == f"{tmp_path}: No space left on device"


def test_a_defect_keeps_its_traceback_ctrl_c_is_130_and_sigterm_143(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def defect(config: inference.Config) -> None:
        raise ZeroDivisionError

    def interrupt(config: inference.Config) -> None:
        raise KeyboardInterrupt

    def terminate(config: inference.Config) -> None:
        raise Terminated

    assert exit_code(defect, inference.Config, "--output-dir", tmp_path) == 70
    assert "Traceback" in capsys.readouterr().err
    assert exit_code(interrupt, inference.Config, "--output-dir", tmp_path) == 130
    assert exit_code(terminate, inference.Config, "--output-dir", tmp_path) == 143


# ----------------------------------------------------------------------------
# Weight files.


def test_a_checkpoint_that_is_missing_or_broken(
    checkpoint: Path, sampling: Callable[..., str], tmp_path: Path
) -> None:
    assert "the checkpoint folder" in sampling("--checkpoint", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty/config.json does not exist" in sampling("--checkpoint", empty)

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights, config = copy / "model.safetensors", copy / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is not a complete safetensors file" in sampling("--checkpoint", copy)
    weights.unlink()
    assert "model.safetensors does not exist" in sampling("--checkpoint", copy)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:40])
    assert "config.json, line 3 is not valid JSON" in sampling("--checkpoint", copy)


def test_a_checkpoint_of_another_kind(sampling: Callable[..., str], tmp_path: Path) -> None:
    DigitClassifier().save(tmp_path / "classifier")
    sentence = sampling("--checkpoint", tmp_path / "classifier")
    assert "kind 'common.DigitClassifier', but 'p1_diffusion.ContextUNet' is expected" in sentence
    tiny_network().save(tmp_path / "model")
    DigitClassifier().save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    sentence = sampling("--checkpoint", tmp_path / "model")
    assert "do not fit the model" in sentence and "unexpected" in sentence


def test_a_pickle_that_would_run_code_as_checkpoint(
    checkpoint: Path, sampling: Callable[..., str], tmp_path: Path
) -> None:
    """As the checkpoint itself, and in the place of the weights in a model folder."""
    trace = tmp_path / "it_ran"
    torch.save({"state_dict": Malice(trace)}, tmp_path / "evil.pth")
    assert "evil.pth is a file, but a model folder" in sampling(
        "--checkpoint", tmp_path / "evil.pth"
    )
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.copy(tmp_path / "evil.pth", copy / "model.safetensors")
    assert "a PyTorch file, not safetensors" in sampling("--checkpoint", copy)
    assert not trace.exists()


def test_a_pickle_that_would_run_code_as_classifier(
    digits_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = tmp_path / "it_ran"
    torch.save({"state_dict": Malice(trace)}, tmp_path / "evil.pth")
    DigitClassifier().save(tmp_path / "grader")
    monkeypatch.setattr(evaluate, "read_output", lambda folder: ("2025", *[torch.zeros(1)] * 3))
    monkeypatch.setattr(evaluate, "find_published_svhn", lambda: None)
    arguments = (
        "--images",
        tmp_path,
        "--grader",
        tmp_path / "grader",
        "--classifier",
        tmp_path / "evil.pth",
    )
    assert "evil.pth was refused" in refused(capsys, evaluate.main, evaluate.Config, *arguments)
    assert not trace.exists()
    (tmp_path / "evil.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:100])
    assert "evil.pth" in refused(capsys, evaluate.main, evaluate.Config, *arguments)
    arguments = (*arguments[:-1], tmp_path / "none.pth")
    assert "none.pth does not exist" in refused(capsys, evaluate.main, evaluate.Config, *arguments)


def test_a_grader_that_is_missing_or_of_another_kind(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "read_output", lambda folder: ("2025", *[torch.zeros(1)] * 3))
    program = (capsys, evaluate.main, evaluate.Config, "--images", tmp_path, "--grader")
    assert "the checkpoint folder" in refused(*program, tmp_path / "none")
    assert "'common.DigitClassifier' is expected" in refused(*program, checkpoint)


def test_initial_weights_that_are_missing_or_of_another_kind(
    digits_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DigitClassifier().save(tmp_path / "classifier")
    arguments = ("--data", digits_root, "--run-dir", tmp_path / "run", "--device", "cpu")
    for start, sentence in (("none", "does not exist"), ("classifier", "ContextUNet' is expected")):
        assert sentence in refused(
            capsys, train.main, train.Config, *arguments, "--init-from", tmp_path / start
        )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_whose_state_is_truncated(
    digits_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data",
        digits_root,
        "--run-dir",
        tmp_path,
        "--device",
        "cpu",
        "--steps",
        1,
        *SMALL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VALIDATION_IMAGES", 10)
        patch.setattr(
            train, "SamplingConfig", lambda: inference.SamplingConfig(steps=1)
        )  # of the preview
        assert exit_code(train.main, train.Config, *arguments) == 0
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    before = contents(tmp_path)
    sentence = refused(capsys, train.main, train.Config, *arguments)
    assert "state.safetensors is not a complete safetensors file" in sentence
    assert contents(tmp_path) == before


def test_digits_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, config in (
        (train.main, train.Config),
        (train_classifier.main, train_classifier.Config),
    ):
        sentence = refused(
            capsys, program, config, "--data", tmp_path / "none", "--run-dir", tmp_path / "run"
        )
        assert "the digits are not there" in sentence and "scripts/get_dataset.sh" in sentence
    assert not (tmp_path / "run").exists()


def test_figures_of_an_empty_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--images",
        tmp_path / "none",
        "--output-dir",
        tmp_path / "out",
        "--checkpoint",
        checkpoint,
    )
    assert "holds no complete set of digits" in refused(
        capsys, figures.main, figures.Config, *arguments
    )
