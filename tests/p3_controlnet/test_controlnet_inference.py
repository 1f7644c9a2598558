"""From prompt.json to OUT/<target> by the grader's command: names, sizes, repeats, reruns, and
whatever can be wrong."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sd_tiny import random_networks, save_published, tiny_configs
from tiny import contents, environment, exit_code, refused, run_process
from tiny_base import save_small_models
from tiny_pairs import write_pairs

from common.checkpoint import save_tensors
from common.data.fill50k import Pair
from common.devices import DTYPES
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.images import read_rgb, write_png
from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion.naming import WEIGHTS_FILE
from p3_controlnet import inference, loading
from p3_controlnet.hints import read_hint, resize_hint
from p3_controlnet.inference import Config, main
from p3_controlnet.loading import ModelConfig, find_base, load_model

QUICK = ("--steps", 2, "--chunk-size", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and control/, the small models, and data/ with three pairs. Copy it before changing
    it."""
    root = save_small_models(tmp_path_factory.mktemp("world"))
    write_pairs(root / "data", 3)
    return root


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """A copy of the pairs."""
    return Path(shutil.copytree(world / "data", tmp_path / "data"))


@pytest.fixture(scope="module")
def loaded(world: Path) -> LatentDiffusion:
    return load_model(ModelConfig(world / "control", world / "base"))


@pytest.fixture
def quickly(loaded: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not read again for each call."""
    monkeypatch.setattr(inference, "load_model", lambda config: loaded)


def arguments(world: Path, data: Path, out: Path, *flags: Any) -> tuple[Any, ...]:
    files = ("--prompts", data / "prompt.json", "--sources", data / "source", "--output-dir", out)
    return (*files, "--checkpoint", world / "control", "--base", world / "base", *QUICK, *flags)


def draw(world: Path, data: Path, out: Path, *flags: Any) -> dict[str, bytes]:
    assert exit_code(main, Config, *arguments(world, data, out, *flags)) == 0
    return contents(out)


def sentence(
    capsys: pytest.CaptureFixture[str], world: Path, data: Path, out: Path, *flags: Any
) -> str:
    """What it said on refusing before anything was written."""
    said = refused(capsys, main, Config, *arguments(world, data, out, *flags))
    assert not out.exists()
    return said


def write_lines(data: Path, *lines: Any) -> None:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (data / "prompt.json").write_text("\n".join(text) + "\n")


LINE = {"source": "0.png", "target": "0.png", "prompt": "red circle with blue background"}


# ----------------------------------------------------------------------------
# The grader's command.


def test_hw2_3_draws_every_line_and_a_rerun_keeps_them(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder, to 512x512 RGB at OUT/<target>, literally; the same bytes in this
    process."""
    out = tmp_path / "an output folder"
    data = world / "data"
    command = [
        "bash",
        ROOT / "hw2_3.sh",
        data / "prompt.json",
        data / "source",
        out,
        world / "control",
        *QUICK,
    ]
    result = run_process([*command, "--base", world / "base"], cwd="/")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"3 pictures in {out}"
    files = contents(out)
    assert sorted(files) == [f"target/{k}.png" for k in range(3)]
    for name in files:
        with Image.open(out / name) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.size == (512, 512)
    assert (
        draw(world, data, out) == files
        and "3 of 3 pictures are there already" in capsys.readouterr().out
    )
    assert draw(world, data, tmp_path / "here") == files


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["prompt.json", "S"], 2, "usage: bash hw2_3.sh prompt.json SOURCE_DIR OUT CKPT"),
        (["a", "b", "c", "d", "e"], 2, "usage: bash hw2_3.sh"),
        (["a", "b", "c", ""], 2, "usage: bash hw2_3.sh"),
        ([], 2, "usage: bash hw2_3.sh"),
    ],
)
def test_hw2_3_counts_its_arguments(words: list[str], status: int, said: str) -> None:
    result = run_process(["bash", ROOT / "hw2_3.sh", *words])
    assert result.returncode == status and result.stderr.startswith(said)
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def test_the_scripts_pass_their_flags_on(tmp_path: Path) -> None:
    echo = tmp_path / "python that echoes"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)

    def said(script: str, *words: str) -> list[str]:
        result = run_process(
            ["bash", ROOT / script, *words], env=environment(PYTHON=str(echo), RUNS_DIR="RUNS")
        )
        return result.stdout.splitlines()

    files = ["--prompts", "a b", "--sources", "s", "--output-dir", "o"]
    program = ["-m", "p3_controlnet.inference"]
    assert said("hw2_3.sh", "a b", "s", "o", "c", "--seed", "3") == [
        *program,
        *files,
        "--checkpoint",
        "c",
        "--seed",
        "3",
    ]
    assert said("scripts/inference_controlnet.sh", "a b", "s", "o", "--seed", "3") == [
        *program,
        *files,
        "--seed",
        "3",
    ]
    train = ["-m", "p3_controlnet.train", "--run-dir", "RUNS/controlnet_circles", "--steps", "3"]
    assert said("scripts/train_controlnet.sh", "--steps", "3") == train
    first = [
        "-m",
        "p3_controlnet.base.train_autoencoder",
        "--run-dir",
        "RUNS/ldm_autoencoder",
        "--seed",
        "1",
    ]
    second = ["-m", "p3_controlnet.base.train_text", "--run-dir", "RUNS/ldm_text"]
    third = ["-m", "p3_controlnet.base.train_unet", "--run-dir", "RUNS/ldm_unet"]
    third += [
        "--autoencoder",
        "RUNS/ldm_autoencoder/last",
        "--text-encoder",
        "RUNS/ldm_text/last",
        "--seed",
        "1",
    ]
    assert said("scripts/train_ldm.sh", "--seed", "1") == [
        *second,
        *("--seed", "1"),
        *first,
        *third,
    ]
    assert said("scripts/train_ldm.sh", "autoencoder", "--seed", "1") == first
    assert said("scripts/train_ldm.sh", "text", "--steps", "3") == [*second, "--steps", "3"]
    assert said("scripts/train_ldm.sh", "unet", "--seed", "1") == third


# ----------------------------------------------------------------------------
# What a picture depends on.


def test_both_forms_of_names_give_the_same_pictures(
    world: Path, quickly: None, tmp_path: Path
) -> None:
    named = draw(world, world / "data", tmp_path / "named")
    write_pairs(tmp_path / "data", 3, ("{}.png", "{}.png"))
    bare = draw(world, tmp_path / "data", tmp_path / "bare")
    assert bare == {name.removeprefix("target/"): value for name, value in named.items()}
    assert len({*bare.values()}) == 3


def test_any_share_of_the_work_gives_the_same_bytes(
    world: Path, quickly: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw(world, world / "data", tmp_path / "whole")
    for rank, expected in (
        (1, ["target/1.png"]),
        (0, ["target/0.png", "target/1.png", "target/2.png"]),
    ):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert sorted(draw(world, world / "data", tmp_path / "shared")) == expected
    assert contents(tmp_path / "shared") == whole


def test_other_settings_draw_again_and_a_damaged_picture_is_mended(
    world: Path, quickly: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = draw(world, data, tmp_path / "out")
    (tmp_path / "out" / "target" / "1.png").write_bytes(first["target/1.png"][:1000])
    assert draw(world, data, tmp_path / "out") == first
    assert "2 of 3 pictures are there already" in capsys.readouterr().out
    write_png(data / "source" / "2.png", 255 - read_rgb(data / "source" / "2.png"))
    changed = draw(world, data, tmp_path / "out")
    assert "2 of 3 pictures are there already" in capsys.readouterr().out
    assert [name for name in first if first[name] != changed[name]] == ["target/2.png"]
    reseeded = draw(world, data, tmp_path / "out", "--seed", 1)
    assert "already" not in capsys.readouterr().out and not {*reseeded.values()} & {
        *changed.values()
    }


def test_a_controlnet_that_reads_another_text_draws_again(
    world: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights, and no flag: its config.json tells the text."""
    for name in ("control", "base"):
        shutil.copytree(world / name, tmp_path / name)
    draw(tmp_path, data, tmp_path / "out")
    path = tmp_path / "control" / "config.json"
    write_json(path, read_json(path) | {"control_text": "empty"})
    draw(tmp_path, data, tmp_path / "out")
    assert "already" not in capsys.readouterr().out


def test_the_flags_of_control_act(world: Path, quickly: None, tmp_path: Path) -> None:
    flags = [
        (),
        ("--control-scales", 0),
        ("--guess-mode",),
        ("--control-end", 0.5),
        ("--guidance-scale", 1),
    ]
    results = [
        draw(world, world / "data", tmp_path / str(k), *given)["target/0.png"]
        for k, given in enumerate(flags)
    ]
    assert len({*results}) == len(flags)


def test_grey_hints_of_another_size_are_read(
    world: Path, quickly: None, data: Path, tmp_path: Path
) -> None:
    colour = draw(world, data, tmp_path / "colour")
    for path in (data / "source").iterdir():
        with Image.open(path) as image:
            image.convert("L").save(path)
    assert draw(world, data, tmp_path / "grey") == colour
    small = resize_hint(read_rgb(data / "source" / "0.png"), 64)
    write_png(data / "source" / "0.png", small)
    again = draw(world, data, tmp_path / "small")
    pixels = [read_rgb(tmp_path / name / "target" / "0.png").int() for name in ("colour", "small")]
    assert torch.equal(*pixels) and again["target/1.png"] == colour["target/1.png"]
    assert resize_hint(small, 128).shape == (3, 128, 128) and resize_hint(small, 64) is small


def test_transparent_control_pictures_are_read_as_they_are_drawn(tmp_path: Path) -> None:
    """White lines on nothing are white lines on black, in training, evaluation and drawing."""
    outline = np.zeros((512, 512, 4), np.uint8)
    outline[200:210] = 255
    Image.fromarray(outline).save(tmp_path / "0.png")
    read = Pair(str(tmp_path / "0.png"), "", "red circle").read_source()
    assert torch.equal(read, read_hint(tmp_path / "0.png"))
    assert int(read[0, 205].min()) == 255 and int(read[0, :200].max()) == 0


def test_patches_draw_a_larger_canvas(world: Path, quickly: None, tmp_path: Path) -> None:
    plain, patches = (
        draw(world, world / "data", tmp_path / str(k), *flags)
        for k, flags in enumerate(((), ("--patch-stride", 8)))
    )
    for name in plain:  # one patch covers everything; the bytes differ by the note alone
        assert torch.equal(read_rgb(tmp_path / "0" / name), read_rgb(tmp_path / "1" / name))
    write_lines(shutil.copytree(world / "data", tmp_path / "data"), LINE)
    flags = ("--patch-stride", 8, "--size", 1024, "--steps", 1)
    assert len(draw(world, tmp_path / "data", tmp_path / "large", *flags)) == 1
    assert read_rgb(tmp_path / "large" / "0.png").shape == (3, 1024, 1024)


# ----------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([LINE, "{broken"], "prompt.json, line 2 is not valid JSON"),
        (
            [LINE, {"source": "0.png", "target": "1.png"}],
            "prompt.json, line 2: 'prompt' is missing",
        ),
        ([LINE, LINE], "line 2: the target '0.png' is that of line 1 as well"),
        (
            [{**LINE, "target": "../0.png"}],
            "line 1: the file name '../0.png' leads out of its folder",
        ),
        (
            [{**LINE, "target": "/tmp/0.png"}],
            "line 1: the file name '/tmp/0.png' leads out of its folder",
        ),
        ([{**LINE, "target": "a/../../0.png"}], "leads out of its folder"),
        ([{**LINE, "source": "../source/0.png"}], "leads out of its folder"),
        ([{**LINE, "target": "."}], "line 1: '.' is no file name"),
        ([{**LINE, "target": "a\0.png"}], "line 1 is not valid JSON: NUL and half a surrogate"),
        ([{**LINE, "prompt": "red \ud800 circle"}], "line 1 is not valid JSON: NUL and half a"),
        ([LINE, {**LINE, "target": "1.png", "source": "9.png"}], "line 2: "),
        ([{**LINE, "target": "a.jpg"}], "a.jpg must end in .png, since PNG files are written"),
        ([{**LINE, "target": "x" * 250 + ".png"}], "is too long"),
        (
            [{**LINE, "target": "a.png"}, {**LINE, "target": "a.png/b.png"}],
            "cannot be both a file and the folder of",
        ),
        ([""], "prompt.json is empty"),
        (["[1, 2]"], "line 1 must be an object with source, target, prompt"),
    ],
)
def test_a_bad_line_is_named(
    lines: list[Any], said: str, world: Path, quickly: None, data: Path, tmp_path: Path, capsys: Any
) -> None:
    write_lines(data, *lines)
    assert said in sentence(capsys, world, data, tmp_path / "out")


def test_a_mark_of_byte_order_is_skipped(
    world: Path, quickly: None, data: Path, tmp_path: Path
) -> None:
    """As Windows' editors write it."""
    expected = draw(world, data, tmp_path / "plain")
    (data / "prompt.json").write_text((data / "prompt.json").read_text(), encoding="utf-8-sig")
    assert draw(world, data, tmp_path / "marked") == expected


def test_a_missing_prompt_file_is_named(
    world: Path, quickly: None, data: Path, tmp_path: Path, capsys: Any
) -> None:
    (data / "prompt.json").unlink()
    assert "prompt.json does not exist" in sentence(capsys, world, data, tmp_path / "out")


def test_a_bad_hint_is_named_when_its_turn_comes_and_a_missing_one_before(
    world: Path, quickly: None, data: Path, tmp_path: Path, capsys: Any
) -> None:
    path = data / "source" / "2.png"
    Image.fromarray(np.zeros((300, 512, 3), np.uint8)).save(path)
    for k, reason in enumerate(("2.png has 512x300 pixels, but must be square", "2.png is not a")):
        out = tmp_path / f"out{k}"
        assert reason in refused(capsys, main, Config, *arguments(world, data, out))
        assert contents(out).keys() == {"target/0.png", "target/1.png"}  # the first chunk
        path.write_bytes(b"no image")
    path.unlink()
    said = sentence(capsys, world, data, tmp_path / "out")
    assert "line 3: " in said and "2.png does not exist" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", 0), "--steps must be between 1 and 1000, not 0"),
        (("--chunk-size", 0), "--chunk-size must be between 1 and 4096, not 0"),
        (
            ("--control-start", 0.8, "--control-end", 0.2),
            "--control-start 0.8 is above --control-end 0.2",
        ),
        (("--control-scales", 1, 2), "--control-scales needs 1 number, or"),
        (("--seed", -1), "--seed must be between"),
        (("--size", 0), "--size must be between 1 and 8192, not 0"),
        (("--patch-stride", 0), "--patch-stride must be between 1 and"),
        (("--patch-stride", 99), "the side of a patch, not 99"),
    ],
)
def test_numbers_that_make_no_sense(
    flags: tuple[Any, ...], said: str, world: Path, quickly: None, tmp_path: Path, capsys: Any
) -> None:
    assert said in sentence(capsys, world, world / "data", tmp_path / "out", *flags)


def test_an_output_folder_below_a_regular_file(
    world: Path, quickly: None, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(
        capsys, main, Config, *arguments(world, world / "data", tmp_path / "file" / "out")
    )
    assert (
        f"{tmp_path / 'file'} is a regular file" in said
        and (tmp_path / "file").read_text() == "mine"
    )


def test_checkpoints_of_no_known_kind(world: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    save_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 damaged")
    for name, said in (
        ("empty", "is neither a Stable Diffusion v1.4 model, nor a ControlNet, nor a model folder"),
        (
            "other.safetensors",
            "is neither a Stable Diffusion v1.4 model, nor a ControlNet, nor a model folder",
        ),
        ("damaged.ckpt", "is not a readable PyTorch file"),
        ("none.ckpt", "does not exist"),
    ):
        assert said in sentence(
            capsys, world, data, tmp_path / "out", "--checkpoint", tmp_path / name
        )


def test_memory_that_runs_out(
    world: Path, quickly: None, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """A smaller batch is tried, then said; what was finished stays, and a rerun continues."""
    from common.latent import generate

    expected = draw(world, data, tmp_path / "whole")
    original, held = generate._generate_chunk, []

    def fragile(model: Any, part: list[Any], *rest: Any) -> Any:
        if len(part) > 1 or len(held) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.append(part)
        return original(model, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_generate_chunk", fragile)
        said = refused(capsys, main, Config, *arguments(world, data, tmp_path / "out"))
    assert said.startswith("the device's memory does not hold one image")
    assert sorted(contents(tmp_path / "out")) == ["target/0.png", "target/1.png"]
    assert draw(world, data, tmp_path / "out").keys() == expected.keys()
    assert "2 of 3 pictures are there already" in capsys.readouterr().out


# ----------------------------------------------------------------------------
# Which model.


def test_a_small_base_takes_the_shipped_control_or_the_one_given(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (
        load_model(ModelConfig(world / "base", control=world / "control")).controlnet.num_residuals
        == 5
    )
    monkeypatch.setattr(loading, "SHIPPED_CONTROL", world / "control")
    assert load_model(ModelConfig(world / "base")).controlnet.num_residuals == 5
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copytree(world / "control", tmp_path / "base" / "controlnet")
    monkeypatch.setattr(loading, "SHIPPED_CONTROL", tmp_path / "controlnet_circles")
    assert load_model(ModelConfig(tmp_path / "base")).controlnet.num_residuals == 5
    with pytest.raises(InputError, match="checkpoints/controlnet_circles is missing"):
        load_model(ModelConfig(world / "base"))
    monkeypatch.setattr(loading, "SHIPPED_BASE", tmp_path / "ldm_shapes")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="checkpoints/ldm_shapes is missing"):
        load_model(ModelConfig(Path("ldm_shapes")))


def test_where_the_base_of_a_control_comes_from(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "SHIPPED_BASE", world / "base")
    monkeypatch.delenv("SD_BASE", raising=False)
    assert find_base(world / "control", None) == world / "base"
    assert find_base(world / "control", tmp_path) == tmp_path
    assert find_base(world / "control" / WEIGHTS_FILE, None) == world / "base"
    inside, whole = (
        load_model(ModelConfig(path)).controlnet
        for path in (world / "control" / WEIGHTS_FILE, world / "control")
    )
    assert inside.hint_channels == whole.hint_channels
    save_tensors(
        tmp_path / "control.safetensors",
        {"control_model.input_hint_block.0.weight": torch.zeros(1)},
    )
    with pytest.raises(
        InputError, match="name it with --base or in the environment variable SD_BASE"
    ):
        find_base(tmp_path / "control.safetensors", None)
    monkeypatch.setenv("SD_BASE", "/sd/v1-4.ckpt")
    assert find_base(tmp_path / "control.safetensors", None) == Path("/sd/v1-4.ckpt")
    both = {
        "control_model.input_hint_block.0.weight": torch.zeros(1),
        "model.diffusion_model.x.y": torch.zeros(1),
    }
    save_tensors(tmp_path / "cldm.safetensors", both)
    assert find_base(tmp_path / "cldm.safetensors", None) == tmp_path / "cldm.safetensors"


def test_a_flag_that_has_no_place_is_refused(world: Path) -> None:
    with pytest.raises(InputError, match="is a ControlNet itself, so --control"):
        load_model(ModelConfig(world / "control", world / "base", world / "control"))
    with pytest.raises(InputError, match="is a base model itself, so --base"):
        load_model(ModelConfig(world / "base", world / "base", world / "control"))


def test_the_controlnet_in_a_pipelines_folder_is_used(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As StableDiffusionControlNetPipeline saves it, also as a repository in the hub's cache."""
    folder = tmp_path / "models--X--Y" / "snapshots" / "abc"
    for part in ("unet", "vae"):
        write_json(folder / part / "config.json", {})
    used = []
    model = SimpleNamespace(cast=lambda dtype: None)
    monkeypatch.setattr(loading, "with_control", lambda *paths: used.append(paths) or model)
    shutil.copytree(world / "control", folder / "controlnet")
    load_model(ModelConfig(folder))
    load_model(ModelConfig(tmp_path / "models--X--Y"))
    load_model(ModelConfig(folder, control=tmp_path / "own"))
    assert [control for _, control in used] == [folder / "controlnet"] * 2 + [tmp_path / "own"]
    assert "the ControlNet is that in" in capsys.readouterr().err
    shutil.copytree(world / "control", folder / "controlnet_1")
    with pytest.raises(InputError, match="holds several ControlNets"):
        load_model(ModelConfig(folder))


def test_a_control_file_of_another_kind_is_named(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t2i.safetensors", {"body.0.block1.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"t2i\.safetensors is a T2I-Adapter"):
        load_model(ModelConfig(tmp_path / "t2i.safetensors"))


def test_stable_diffusion_without_a_control_is_drawn_by_the_small_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = random_networks(tiny_configs(tmp_path / "configs"))
    path = save_published(tmp_path / "sd.ckpt", networks)
    monkeypatch.setattr(loading, "SHIPPED_BASE", world / "base")
    monkeypatch.setattr(loading, "SHIPPED_CONTROL", world / "control")
    monkeypatch.setattr(loading, "SD_CONTROL", tmp_path / "controlnet_sd14")
    monkeypatch.delenv("CONTROLNET", raising=False)
    assert load_model(ModelConfig(path)).side == 64
    said = capsys.readouterr().out
    assert said.startswith(
        "there is no ControlNet for Stable Diffusion in checkpoints/controlnet_sd14 or $CONTROLNET"
    )
    command = f"scripts/train_controlnet.sh --preset sd14 --base {path} --fill50k hw2_data/fill50k"
    assert command in said and len(said.splitlines()) == 1
    used = []
    model = SimpleNamespace(cast=lambda dtype: None)
    monkeypatch.setattr(loading, "with_control", lambda *paths: used.append(paths) or model)
    (tmp_path / "controlnet_sd14").mkdir()
    load_model(ModelConfig(path))
    monkeypatch.setenv("CONTROLNET", str(world / "control"))
    load_model(ModelConfig(path))
    load_model(ModelConfig(path, control=tmp_path / "own"))
    controls = [tmp_path / "controlnet_sd14", world / "control", tmp_path / "own"]
    assert used == [(path, control) for control in controls] and not capsys.readouterr().out
    monkeypatch.setenv("CONTROLNET", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"none, named by \$CONTROLNET, does not exist"):
        load_model(ModelConfig(path))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_what_float32_draws(
    precision: str, world: Path, data: Path, tmp_path: Path
) -> None:
    """bf16's weights and activations have 8 bits of mantissa and fp16's 11, so pictures differ by a
    few grey levels; the autoencoder and the sampler's arithmetic stay in float32."""
    model = load_model(ModelConfig(world / "control", world / "base", precision=precision))
    dtypes = {name: part.dtype for name, part in model.named_parameters()}
    autoencoder = {dtypes[name] for name in dtypes if name.startswith("autoencoder")}
    others = {dtypes[name] for name in dtypes if not name.startswith("autoencoder")}
    assert autoencoder == {torch.float32} and others == {DTYPES[precision]}
    for chosen in ("fp32", precision):
        flags = arguments(world, data, tmp_path / chosen, "--precision", chosen)
        assert exit_code(main, Config, *flags) == 0
    for file in sorted((tmp_path / "fp32").rglob("*.png")):
        one = read_rgb(file).float()
        other = read_rgb(tmp_path / precision / file.relative_to(tmp_path / "fp32")).float()
        assert (one - other).abs().mean() < 3.0 and one.std() > 5.0


def test_a_control_image_without_an_outline_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """White, black, or an outline that transparency hides; what is transparent becomes black."""
    for name, colour in (("white.png", 255), ("black.png", 0)):
        Image.new("RGB", (16, 16), (colour,) * 3).save(tmp_path / name)
    hidden = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    hidden.save(tmp_path / "hidden.png")
    for name in ("white.png", "black.png", "hidden.png"):
        hint = read_hint(tmp_path / name)
        assert "has one colour and no outline" in capsys.readouterr().err
    assert int(hint.max()) == 0
    hidden.putpixel((3, 3), (255, 255, 255, 255))
    hidden.save(tmp_path / "hidden.png")
    assert int(read_hint(tmp_path / "hidden.png").max()) == 255
    assert capsys.readouterr().err == ""
