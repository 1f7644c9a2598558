"""The training of ControlNet over a frozen base: what it changes, what it leaves alone, and what it
says."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import exit_code, refused, stop_after
from tiny_base import tiny_base
from tiny_pairs import write_pairs

from common import devices
from common.checkpoint import load_tensors, state_hash
from common.data.examples import drawn_circles
from common.errors import InputError
from common.files import read_json
from common.latent.generate import ControlledGenerationConfig
from common.latent.load import kind_of, load_base
from common.latent.small import save_model
from common.metrics.segmentation import NO_OBJECT_ERROR
from p3_controlnet import train
from p3_controlnet.formats import load_controlnet
from p3_controlnet.model import WEIGHTS_FILE, ControlNet

FEW = (
    *(
        "--steps",
        4,
        "--pictures",
        10,
        "--validation-pictures",
        2,
        "--batch-size",
        4,
        "--warmup",
        1,
        "--device",
        "cpu",
        "--hint-channels",
        4,
        8,
        8,
    ),
    *("--log-every", 1, "--checkpoint-every", 2, "--validate-every", 2, "--preview-every", 4),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's folder."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, tiny_base(), zero_terminal=True)
    return folder


@pytest.fixture(autouse=True)
def small_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps for the pictures to look at."""
    monkeypatch.setattr(
        train,
        "ControlledGenerationConfig",
        lambda: ControlledGenerationConfig(steps=2, chunk_size=2),
    )


def run(folder: Path, base: Path, *flags: Any) -> int:
    return exit_code(train.main, train.Config, "--run-dir", folder, "--base", base, *FEW, *flags)


def test_it_trains_the_control_alone_resumes_and_saves_a_controlnet_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import ControlNetModel

    seen = []
    monkeypatch.setattr(train, "load_base", lambda path: seen.append(load_base(path)) or seen[-1])
    before = state_hash(load_base(base).unet)
    write_pairs(tmp_path / "fill50k" / "training", 2)
    flags = ("--fill50k", tmp_path / "fill50k")
    assert run(tmp_path / "whole", base, *flags) == 0
    assert "sudden convergence: the IoU " in capsys.readouterr().out

    # The base is untouched and got no gradient; the control network moved in every part.
    model = seen[0]
    assert state_hash(model.unet) == before and all(p.grad is None for p in model.unet.parameters())
    start = ControlNet.from_unet(model.unet, (4, 8, 8)).state_dict()
    last = tmp_path / "whole" / "last"
    assert kind_of(last) == "controlnet"
    control = load_controlnet(last, model.unet)
    assert [
        name for name, value in control.state_dict().items() if torch.equal(value, start[name])
    ] == []
    theirs = ControlNetModel.from_pretrained(last).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in control.state_dict().items())
    assert not any(name.startswith(("unet", "autoencoder")) for name in theirs)

    # What is written down, for drawn and real pairs.
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "validation_iou" in line] == [2, 4]
    assert 0.0 <= lines[-1]["validation_iou"] <= 1.0 and lines[-1]["validation_colour_error"] >= 0.0
    assert (tmp_path / "whole" / "samples" / "0000004.png").is_file()
    header = read_json(tmp_path / "whole" / "latent_cache" / "header.json")
    assert header["arrays"]["hint_ends"]["rows"] == 12 and header["made_from"]["size"] == 64

    # Stopped after two of four steps, then gone on with: the same weights.
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stop_after(train.fit, 2))
        assert run(tmp_path / "run", base, *flags) == 130
    assert run(tmp_path / "run", base, *flags) == 0
    assert state_hash(load_controlnet(tmp_path / "run" / "last", model.unet)) == state_hash(control)


def test_checkpointing_gives_the_same_and_a_trained_control_can_be_a_start(
    base: Path, tmp_path: Path
) -> None:
    """In the backward pass it computes the same numbers again."""
    assert run(tmp_path / "plain", base, "--steps", 2) == 0
    assert run(tmp_path / "saving", base, "--steps", 2, "--gradient-checkpointing") == 0
    one, other = (
        load_tensors(tmp_path / name / "last" / WEIGHTS_FILE)[0] for name in ("plain", "saving")
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert (
        run(
            tmp_path / "next",
            base,
            "--steps",
            1,
            "--lr",
            0,
            "--init-from",
            tmp_path / "plain" / "last",
        )
        == 0
    )
    again = load_tensors(tmp_path / "next" / "last" / WEIGHTS_FILE)[0]
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_a_preview_shows_the_pictures_of_the_validation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 4 both are due, and the pictures are drawn once; at step 3 a preview alone is."""
    seen: list[tuple[str, list[str]]] = []
    original, grid = train.generate, train.labelled_grid

    def generate(*arguments: Any, **options: Any) -> Any:
        seen.append(("drawn", []))
        return original(*arguments, **options)

    def labelled(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append((options["title"], options["row_labels"]))
        return grid(*arguments, **options)

    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "labelled_grid", labelled)
    assert run(tmp_path / "run", base, "--validate-every", 2, "--preview-every", 1) == 0
    titles = [title for title, _ in seen]
    assert titles == [word for step in (1, 2, 3, 4) for word in ("drawn", f"step {step}")]
    prompts = drawn_circles(2, 64, train.VALIDATION_SEED).captions
    assert all(labels == ["\n".join(prompts)] for title, labels in seen if title != "drawn")


def test_a_control_without_text_reads_the_empty_prompt_and_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    forward = ControlNet.forward

    def spy(self: ControlNet, *inputs: torch.Tensor) -> Any:
        read.append(inputs[3].detach().clone())  # the context
        return forward(self, *inputs)

    monkeypatch.setattr(ControlNet, "forward", spy)
    null = load_base(base).encode_text([""])[0]
    once = ("--steps", 1, "--validate-every", 0, "--preview-every", 0)
    for text, flags in (("empty", ()), ("full", ("--control-text", "full"))):
        read.clear()
        assert run(tmp_path / text, base, *once, "--cond-drop-prob", 0, *flags) == 0
        same = [torch.allclose(row, null, atol=2e-3) for row in read[0]]
        assert same == [text == "empty"] * len(same)
        config = read_json(tmp_path / text / "last" / "config.json")
        assert config.get("control_text", "full") == text
        control = load_controlnet(tmp_path / text / "last", load_base(base).unet)
        assert control.control_text == text
    # Another training goes on with the text of its start, unless it is told another one.
    for start, flags, text in (
        ("full", (), "full"),
        ("empty", (), "empty"),
        ("full", ("--control-text", "empty"), "empty"),
    ):
        folder = tmp_path / f"{start}_{text}"
        assert run(folder, base, *once, "--init-from", tmp_path / start / "last", *flags) == 0
        assert read_json(folder / "last" / "config.json").get("control_text", "full") == text


def test_a_start_has_its_own_hint_channels(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "start", base, "--steps", 1, "--validate-every", 0) == 0
    start = ("--init-from", tmp_path / "start" / "last", "--hint-channels", 4, 8, 12)
    assert run(tmp_path / "next", base, *start) == 2
    assert "so --hint-channels does not apply" in capsys.readouterr().err


def test_the_convergence_is_the_first_step_at_half_the_iou(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "validation_iou": 0.49}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.convergence(path) is None
    lines += [
        {"step": 3, "validation_iou": 0.5},
        {"step": 4, "validation_iou": 0.2},
        {"step": 5, "validation_iou": 0.9},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.convergence(path) == 3


def test_pictures_are_compared_by_shape_and_colour() -> None:
    image, other = drawn_circles(2, 64, 3).images
    iou, error = train.compare(image, image)
    assert iou == 1.0 and error < 1e-6
    iou, error = train.compare(other, image)
    assert iou < 0.9 and error > 5.0
    assert train.compare(torch.full_like(image, 90), image) == (0.0, NO_OBJECT_ERROR)
    swapped = torch.where(image == image[:, :1, :1], image[:, 32:33, 32:33], image[:, :1, :1])
    assert train.compare(swapped, image)[1] > 5.0  # the shape is right, the colours are exchanged


def test_trainings_that_make_no_sense(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    write_pairs(damaged / "training", 2)
    (damaged / "training" / "target" / "1.png").write_bytes(b"")
    for flags, sentence in (
        (("--pictures", 0), "--pictures must be at least 1, or --fill50k must be given"),
        (("--pictures", -1), "--pictures must be between 0 and 10000000, not -1"),
        (("--size", 66), "--size must be a multiple of 4, the pixels per latent, not 66"),
        (("--hint-channels", 4, 8), "divide the hint's sides by 2, but one latent spans 4 pixels"),
        (("--base", base / "unet"), "is no base model"),
        (("--base", tmp_path / "none"), "does not exist"),
        (("--init-from", base), "config.json"),
        (("--fill50k", tmp_path), "the pairs of fill50k are not there"),
        (("--pictures", 0, "--fill50k", damaged), "prompt.json, line 2: "),
    ):
        arguments = ("--run-dir", tmp_path / "run", "--base", base, *FEW, *flags)
        assert sentence in refused(capsys, train.main, train.Config, *arguments), flags
        assert not (tmp_path / "run" / "config.json").exists()


def test_too_little_memory_is_said_before_encoding(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "available_memory", lambda: 10_000)
    arguments = ("--run-dir", tmp_path / "run", "--base", base, *FEW)
    sentence = refused(capsys, train.main, train.Config, *arguments)
    assert re.fullmatch(
        r"training needs about 0\.\d GB more memory, but 0\.0 GB are available", sentence
    )
    assert not (tmp_path / "run").exists()


def test_stable_diffusion_is_trained_on_real_pairs_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "kind_of", lambda path: "sd_file")
    config = train.Config(run_dir=tmp_path, base=base, fill50k=tmp_path)
    assert train.drawn_pictures(config) == 0
    assert train.drawn_pictures(dataclasses.replace(config, pictures=7)) == 7
    with pytest.raises(InputError, match="--fill50k must be given"):
        train.drawn_pictures(dataclasses.replace(config, fill50k=None))
    monkeypatch.undo()
    assert train.drawn_pictures(config) == train.DRAWN_PAIRS == 20_000


def test_a_cache_of_another_base_or_of_other_pairs_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "fill50k" / "training", 2)
    run_dir, flags = tmp_path / "run", ("--fill50k", tmp_path / "fill50k", "--steps", 1)
    assert run(run_dir, base, *flags) == 0
    capsys.readouterr()
    write_pairs(tmp_path / "fill50k" / "training", 3)
    arguments = ("--run-dir", run_dir, "--base", base, *FEW, *flags)
    sentence = refused(capsys, train.main, train.Config, *arguments)
    assert "latent_cache was made from other data" in sentence and "examples is 12" in sentence
    write_pairs(tmp_path / "fill50k" / "training", 2)
    (tmp_path / "fill50k" / "training" / "prompt.json").write_text(
        "".join(
            json.dumps({"source": f"{k}.png", "target": f"{k}.png", "prompt": "red circle"}) + "\n"
            for k in range(2)
        )
    )
    assert "(its data is" in refused(capsys, train.main, train.Config, *arguments)
    other = tiny_base()
    with torch.no_grad():
        other.unet.conv_out.weight += 1.0
    save_model(tmp_path / "other", other, zero_terminal=True)
    arguments = ("--run-dir", run_dir, "--base", tmp_path / "other", *FEW, *flags)
    assert "(its base is" in refused(capsys, train.main, train.Config, *arguments)
