"""From input.json to OUT/KEY/INDEX/sourceKEY_promptINDEX_N.png by the grader's command: names,
repeats, and whatever can be wrong."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import contents, environment, exit_code, refused, run_process
from tiny_concepts import make_world
from tiny_latent import seeded
from torch import nn

from common.checkpoint import save_tensors
from common.errors import InputError
from common.files import ROOT
from common.latent.load import load_base
from common.latent.model import LatentDiffusion
from p3_clip.personalisation import inference
from p3_clip.personalisation.concepts import Concept
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult, projections
from p3_clip.personalisation.formats import save_concepts
from p3_clip.personalisation.inference import COUNT, SIZE, Config, main
from p3_clip.personalisation.model import save_learned
from p3_clip.personalisation.task import read_tasks

QUICK = ("--steps", 2, "--chunk-size", 4, "--device", "cpu")
TASKS = {
    "0": {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["A <new1> on red.", "A <new1> next to a <new2>."],
        "prompt_4_clip_eval": ["A dog on red.", "A dog."],
        "baseline": [[79, 34], [74, 35.5]],
    },
    "a style": {
        "src_image": "David Revoy",
        "token_name": "<new2>",
        "prompt": ["A square in the style of <new2>."],
        "prompt_4_clip_eval": ["A square."],
        "baseline": [[70, 30]],
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, words/ (two words) and matrices/ (the same words and other matrices)."""
    root = make_world(tmp_path_factory.mktemp("world"))
    base = load_base(root / "base")
    concepts = [Concept(f"<new{k}>", seeded(nn.Linear, 16, k).weight.detach()) for k in (1, 2)]
    weights = {name: weight.detach() * 1.5 for name, weight in projections(base.unet).items()}
    about = {
        "concepts": [
            {"token": concept.token, "word": "red", "phrase": "{}"} for concept in concepts
        ]
    }
    save_learned(root / "words", CustomDiffusionResult({}, concepts), about)
    save_learned(root / "matrices", CustomDiffusionResult(weights, concepts), about)
    return root


@pytest.fixture(scope="module")
def loaded(world: Path) -> LatentDiffusion:
    return load_base(world / "base")


@pytest.fixture
def quickly(loaded: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks are not read again for each call; what a call learns is forgotten after it."""
    text_encoder, tokenizer = loaded.text_encoder, loaded.tokenizer
    state = {name: value.clone() for name, value in loaded.unet.state_dict().items()}

    def fresh(path: Path) -> LatentDiffusion:
        loaded.text_encoder, loaded.tokenizer = text_encoder, tokenizer
        loaded.unet.load_state_dict(state)
        return loaded

    monkeypatch.setattr(inference, "load_base", fresh)
    yield
    fresh(Path())


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    return write_tasks(tmp_path, TASKS)


def write_tasks(folder: Path, tasks: Any) -> Path:
    path = folder / "input.json"
    path.write_text(json.dumps(tasks))
    return path


def arguments(world: Path, tasks: Path, out: Path, *flags: Any) -> tuple[Any, ...]:
    where = ("--prompts", tasks, "--output-dir", out, "--checkpoint", world / "base")
    return (*where, "--concepts", world / "words", *QUICK, *flags)


def draw(world: Path, tasks: Path, out: Path, *flags: Any) -> dict[str, bytes]:
    assert (
        exit_code(main, Config, *arguments(world, tasks, out, "--count", 2, "--size", 32, *flags))
        == 0
    )
    return contents(out)


def names(count: int) -> list[str]:
    prompts = (("0", 0), ("0", 1), ("a style", 0))
    return sorted(
        f"{key}/{index}/source{key}_prompt{index}_{n}.png"
        for key, index in prompts
        for n in range(count)
    )


# ----------------------------------------------------------------------------
# The grader's command.


def test_hw2_3_writes_the_exact_files_and_a_fresh_process_the_same_bytes(
    world: Path, quickly: None, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the matrices of Custom Diffusion, saved and read by another process."""
    assert (COUNT, SIZE) == (25, 512)
    out = tmp_path / "an output folder"
    flags = ("--count", 2, "--concepts", world / "matrices", *QUICK)
    result = run_process(
        ["bash", ROOT / "hw2_3.sh", task_file, out, world / "base", *flags], cwd="/"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"6 pictures in {out}"
    assert "6 of 6 images" in result.stderr  # progress, with the time left
    files = contents(out)
    assert sorted(files) == names(2)
    for name in files:
        with Image.open(out / name) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.size == (512, 512)
    command = (
        "--prompts",
        task_file,
        "--output-dir",
        tmp_path / "here",
        "--checkpoint",
        world / "base",
        *flags,
    )
    assert exit_code(main, Config, *command) == 0
    assert contents(tmp_path / "here") == files
    assert draw(world, task_file, tmp_path / "words").keys() == files.keys()
    assert contents(tmp_path / "words") != files
    capsys.readouterr()
    assert exit_code(main, Config, *command) == 0
    assert (
        "6 of 6 pictures are there already" in capsys.readouterr().out
        and contents(tmp_path / "here") == files
    )


def test_25_pictures_of_512_pixels_with_a_solver_of_25_evaluations_at_most() -> None:
    default = Config(Path(), Path())
    assert (default.count, default.size) == (25, 512)
    assert default.generation.sampler == "dpmpp_2m" and default.generation.steps <= 25


def test_embeddings_are_found_by_their_token(
    world: Path, quickly: None, task_file: Path, tmp_path: Path
) -> None:
    """The order of concepts in the input and of files says nothing; a picture depends on its own
    name."""
    first = draw(world, task_file, tmp_path / "first")
    reversed_tasks = dict(reversed(TASKS.items()))
    (tmp_path / "other").mkdir()
    other = draw(world, write_tasks(tmp_path / "other", reversed_tasks), tmp_path / "second")
    assert other == first and len({*first.values()}) == 6
    reseeded = draw(world, task_file, tmp_path / "first", "--seed", 1)
    assert not {*reseeded.values()} & {*first.values()}


def test_a_damaged_picture_is_mended_and_the_others_are_kept(
    world: Path, quickly: None, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = draw(world, task_file, tmp_path / "out")
    damaged = tmp_path / "out" / names(2)[3]
    damaged.write_bytes(damaged.read_bytes()[:500])
    capsys.readouterr()
    assert draw(world, task_file, tmp_path / "out") == first
    assert "5 of 6 pictures are there already" in capsys.readouterr().out


def test_a_concept_that_no_prompt_holds_is_a_warning(
    world: Path, quickly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path, {"x": TASKS["a style"]})
    assert len(draw(world, tasks, tmp_path / "out")) == 2
    assert (
        "warning: the concept <new1> is loaded, but no prompt holds it" in capsys.readouterr().err
    )


# ----------------------------------------------------------------------------
# Which concepts.


def test_stable_diffusion_without_a_trained_concept_names_the_command(
    task_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tensors(tmp_path / "sd.safetensors", {"model.diffusion_model.out.2.bias": torch.zeros(4)})
    monkeypatch.setattr(inference, "SD_CONCEPTS", tmp_path / "concepts_sd14")
    flags = (
        "--prompts",
        task_file,
        "--output-dir",
        tmp_path / "out",
        "--checkpoint",
        tmp_path / "sd.safetensors",
    )
    said = refused(capsys, main, Config, *flags, "--device", "cpu")
    assert said.startswith("no learned concepts are shipped for Stable Diffusion")
    command = shlex.split(said.split("`")[1])
    assert (
        command[:2] == ["bash", "scripts/train_textual_inversion.sh"]
        and (ROOT / command[1]).is_file()
    )
    assert command[2:] == [
        *("--preset", "sd14"),
        *(
            "--base",
            str(tmp_path / "sd.safetensors"),
            "--photos",
            str(tmp_path / "0"),
            str(tmp_path / "a style"),
        ),
        *("--words", "dog", "David Revoy", "--tokens", "<new1>", "<new2>", "--styles", "<new2>"),
    ]
    assert not (tmp_path / "out").exists()


def test_what_is_not_shipped_yet_is_said(
    world: Path,
    task_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inference, "SHIPPED_CONCEPTS", tmp_path / "concepts_shapes")
    flags = (
        "--prompts",
        task_file,
        "--output-dir",
        tmp_path / "out",
        "--device",
        "cpu",
        "--checkpoint",
    )
    said = refused(capsys, main, Config, *flags, world / "base")
    assert said.startswith(
        "checkpoints/concepts_shapes is missing; it is part of the repository: restore it with git"
    )
    monkeypatch.setattr(inference, "SHIPPED_BASE", tmp_path / "ldm_shapes")
    said = refused(capsys, main, Config, *flags, tmp_path / "ldm_shapes")
    assert said.startswith(
        "checkpoints/ldm_shapes is missing; it is part of the repository: restore it with git"
    )


# ----------------------------------------------------------------------------
# Bad input.


def changed(**changes: Any) -> dict[str, Any]:
    """The first concept with other values; None takes one away."""
    task = {**TASKS["0"], **changes}
    return {"0": {name: value for name, value in task.items() if value is not None}}


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "must be a JSON object that maps keys to concepts"),
        ({}, "must be a JSON object that maps keys to concepts"),
        ({"0": []}, "the concept '0' must be a JSON object"),
        ({"../0": TASKS["0"]}, "the concept '../0' cannot be the name of a folder"),
        *(
            (changed(**{name: None}), f"the concept '0' needs {name}, a")
            for name in TASKS["0"]
            if name != "src_image"
        ),
        (
            changed(prompt=["A <new1>."]),
            "has 1 prompts, 2 texts in prompt_4_clip_eval and 2 baselines",
        ),
        (changed(prompt=[], prompt_4_clip_eval=[], baseline=[]), "has 0 prompts"),
        (changed(prompt=["A <new1>.", 3]), "has a prompt or text that is not a string"),
        (changed(baseline=[[1, 2], [1]]), "needs baselines of two numbers"),
        (changed(baseline=[[1, 2], ["1", "2"]]), "needs baselines of two numbers"),
        (changed(token_name="dog"), "the token 'dog' must have the form <name>"),
        (
            changed(prompt=["A <new1>.", "A dog."]),
            "the prompt 'A dog.' does not hold its token <new1>",
        ),
        ({"0": TASKS["0"], "1": TASKS["0"]}, "two concepts have the token <new1>"),
        (changed(prompt=["A <new1>.", "<new1> and <new3>"]), "holds <new3>, which is not loaded"),
    ],
)
def test_input_that_makes_no_sense_is_named_before_anything_is_written(
    world: Path,
    quickly: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tasks: Any,
    said: str,
) -> None:
    out = tmp_path / "out"
    assert said in refused(
        capsys, main, Config, *arguments(world, write_tasks(tmp_path, tasks), out)
    )
    assert not out.exists()


def test_what_only_a_grade_needs_may_be_missing_in_drawing(tmp_path: Path) -> None:
    few = {key: TASKS["0"][key] for key in ("token_name", "prompt")}
    path = write_tasks(tmp_path, {"0": few, "a style": TASKS["a style"]})
    first, second = read_tasks(path, to_grade=False)
    assert (first.source, first.texts, first.baselines) == ("0", [], [])
    assert first.prompts == TASKS["0"]["prompt"] and second.baselines == [(70.0, 30.0)]
    with pytest.raises(InputError, match="the concept '0' needs src_image, a string"):
        read_tasks(path)


def test_files_and_flags_that_make_no_sense(
    world: Path, quickly: None, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, words = tmp_path / "wide.safetensors", tmp_path / "words.safetensors"
    save_concepts(
        wide, [Concept("<new1>", torch.ones(1, 768)), Concept("<new2>", torch.ones(1, 768))]
    )
    save_concepts(words, [Concept("<|endoftext|>", torch.ones(1, 16))])
    (tmp_path / "text").write_text("hello")
    for flags, said in (
        (
            ("--concepts", wide),
            "the vectors of <new1> are 768 wide, but this text encoder's are 16",
        ),
        (
            ("--concepts", world / "words", words),
            "'<|endoftext|>' is a word that the model already knows",
        ),
        (("--concepts", tmp_path / "none.safetensors"), "does not exist"),
        (
            ("--concepts", world / "matrices", world / "matrices"),
            "both hold matrices of Custom Diffusion",
        ),
        (("--prompts", tmp_path / "none.json"), "none.json does not exist"),
        (("--prompts", tmp_path / "text"), "is not valid JSON"),
        (("--checkpoint", world / "clip"), "is neither Stable Diffusion v1.4 nor a model folder"),
        (("--checkpoint", tmp_path / "none.ckpt"), "does not exist"),
        (("--count", 0), "must be between 1 and"),
        (("--count", 10**6), "is more than 100000 pictures"),
        (("--steps", 0), "--steps must be between 1 and 1000"),
        (("--chunk-size", 0), "--chunk-size must be between 1 and 4096"),
    ):
        given = arguments(world, task_file, tmp_path / "out", *flags)
        assert said in refused(capsys, main, Config, *given), flags
        assert not (tmp_path / "out").exists()


def test_pictures_of_something_else_among_the_output_are_refused(
    world: Path, quickly: None, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grader would count them."""
    folder = tmp_path / "out" / "0" / "1"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "another.png")
    said = refused(capsys, main, Config, *arguments(world, task_file, tmp_path / "out"))
    assert "another.png is not a picture of this run, but would be graded as one" in said
    assert list(contents(tmp_path / "out")) == ["0/1/another.png"]


# ----------------------------------------------------------------------------
# Entries.


def test_the_entries_pass_their_arguments_on(tmp_path: Path) -> None:
    echo = tmp_path / "python that echoes"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)

    def said(script: str, *words: Any) -> list[str]:
        result = run_process(
            ["bash", ROOT / script, *words], env=environment(PYTHON=str(echo), RUNS_DIR="RUNS")
        )
        return result.stdout.splitlines()

    program = ["-m", "p3_clip.personalisation.inference", "--prompts", "a b", "--output-dir", "o"]
    assert said("hw2_3.sh", "a b", "o", "c", "--seed", "3") == [
        *program,
        "--checkpoint",
        "c",
        "--seed",
        "3",
    ]
    assert said("scripts/inference_textual_inversion.sh", "a b", "o", "--seed", "3") == [
        *program,
        "--seed",
        "3",
    ]
    train = ["-m", "p3_clip.personalisation.train"]
    for script, method, run in (
        ("train_textual_inversion.sh", "textual-inversion", "textual_inversion"),
        ("train_custom_diffusion.sh", "custom-diffusion", "custom_diffusion"),
    ):
        expected = [*train, method, "--run-dir", f"RUNS/{run}", "--steps", "3"]
        assert said(f"scripts/{script}", "--steps", "3") == expected
    write_tasks(tmp_path, TASKS)
    grade = said("scripts/grade.sh", "OUT", tmp_path / "input.json", "photos", "--count", "5")
    expected = [
        "--images",
        "OUT",
        "--input",
        str(tmp_path / "input.json"),
        "--references",
        "photos",
        "--count",
        "5",
    ]
    assert grade == ["-m", "p3_clip.evaluate", "personalised", *expected]
    circles = said("scripts/grade.sh", "OUT", tmp_path / "input.json", "sources", "targets")
    assert circles[:2] == ["-m", "p3_controlnet.evaluate"]
