"""Personalisation over a Stable Diffusion v1.4 file of a toy's size: learned by either method,
drawn by the grader's program."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from sd_tiny import random_networks, save_published, tiny_configs
from tiny import contents, exit_code, refused
from tiny_concepts import FEW, make_world, quick

from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion.load import load_stable_diffusion
from p3_clip.personalisation import inference, templates, train
from p3_clip.personalisation.base_kind import STABLE_DIFFUSION
from p3_clip.personalisation.formats import load_concepts, save_concepts
from p3_clip.personalisation.model import load_learned
from p3_clip.personalisation.photos import Pool


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, clip/, and sd.ckpt with the configurations that fit it in configs/."""
    root = make_world(tmp_path_factory.mktemp("world"))
    save_published(root / "sd.ckpt", random_networks(tiny_configs(root / "configs")))
    return root


@pytest.fixture(autouse=True)
def tiny_sd(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    for program in (train, inference):
        monkeypatch.setattr(program, "load_base", lambda path: load(world))


def load(world: Path) -> LatentDiffusion:
    return load_stable_diffusion(world / "sd.ckpt", configs=world / "configs")


def learn(world: Path, method: str, run: Path, *flags: Any) -> Path:
    where = ("--run-dir", run, "--base", world / "sd.ckpt", "--clip", world / "clip")
    photos = (
        "--photos",
        world / "photos" / "a",
        world / "photos" / "b",
        "--words",
        "dog",
        "painting",
    )
    assert exit_code(train.main, train.Config, method, *where, *photos, *FEW, *flags) == 0
    return run / "last"


def test_words_of_any_form_are_drawn(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object and a style, in the paper's sentences; as A1111's and diffusers' files they give
    the same pictures."""
    prompts: list[list[str]] = []
    original = Pool.make
    monkeypatch.setattr(Pool, "make", lambda *rest: prompts.extend(rest[-1]) or original(*rest))
    result = learn(world, "textual-inversion", tmp_path / "run", "--styles", "<new2>")
    assert len(prompts) == 8  # two concepts, two photos, two views
    assert prompts[0] == [sentence.format("<new1>") for sentence in templates.OBJECT]
    assert prompts[-1] == [sentence.format("<new2>") for sentence in templates.STYLE]

    first, second = load_concepts(result / "model.safetensors")
    save_concepts(tmp_path / "new1.pt", [first], "a1111")
    save_concepts(tmp_path / "learned_embeds.bin", [second], "diffusers")
    own = draw(world, tmp_path, "own", result)
    assert sorted(own) == ["x/0/sourcex_prompt0_0.png", "x/0/sourcex_prompt0_1.png"]
    assert (
        draw(world, tmp_path, "others", tmp_path / "new1.pt", tmp_path / "learned_embeds.bin")
        == own
    )


def draw(
    world: Path, folder: Path, name: str, *concepts: Path, precision: str = "fp32"
) -> dict[str, bytes]:
    task = {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["A <new1> in the style of <new2>."],
    }
    task |= {"prompt_4_clip_eval": ["A dog."], "baseline": [[0, 0]]}
    (folder / "input.json").write_text(json.dumps({"x": task}))
    where = (
        "--prompts",
        folder / "input.json",
        "--output-dir",
        folder / name,
        "--checkpoint",
        world / "sd.ckpt",
    )
    flags = ("--count", 2, "--size", 32, "--steps", 2, "--chunk-size", 2, "--device", "cpu")
    flags += ("--precision", precision)
    assert exit_code(inference.main, inference.Config, *where, *flags, "--concepts", *concepts) == 0
    return contents(folder / name)


def test_custom_diffusion_adds_a_rare_word_before_the_class(world: Path, tmp_path: Path) -> None:
    result = learn(
        world, "custom-diffusion", tmp_path / "run", "--num-class-images", 2, "--views", 2
    )
    about = json.loads((result / "config.json").read_text())
    assert [entry["phrase"] for entry in about["concepts"]] == ["{} dog", "{} painting"]
    base = load(world)
    words = list(STABLE_DIFFUSION.rare_words[:2])
    rare = [ids[0] for ids in base.tokenizer(words, add_special_tokens=False).input_ids]
    starts = base.text_encoder.get_input_embeddings().weight[rare]
    learned = load_learned([result], base)
    for concept, start in zip(learned.concepts, starts, strict=True):
        assert 0.0 < (concept.vectors - start).abs().max() < 0.01
    assert learned.weights and len(draw(world, tmp_path, "out", result)) == 2
    assert all(torch.isfinite(value).all() for value in learned.weights.values())


def test_stable_diffusion_generates_its_regularisation_images(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("custom-diffusion", "--run-dir", tmp_path / "run", "--base", world / "sd.ckpt")
    flags += ("--drawn", "wine", "--class-images", "drawn")
    assert "is for the small model" in refused(capsys, train.main, train.Config, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["textual-inversion", "custom-diffusion"])
def test_frozen_weights_in_bf16(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained stays in float32, and both kinds of result are drawn in bf16."""
    seen: list[LatentDiffusion] = []
    monkeypatch.setattr(train, "load_base", lambda path: seen.append(load(world)) or seen[-1])
    AcceleratorState._reset_state(True)  # accelerate allows one precision in a process
    flags = ("--gradient-checkpointing", "--mixed-precision", "bf16", "--device-batch-size", 2)
    custom = ("--num-class-images", 2, "--views", 2) if method == "custom-diffusion" else ()
    result = learn(world, method, tmp_path / "run", *flags, *custom)
    AcceleratorState._reset_state(True)
    trained = {
        part.dtype for part in seen[0].parameters() if part.requires_grad and part.grad is None
    }
    frozen = {part.dtype for part in seen[0].unet.parameters() if not part.requires_grad}
    assert trained == {torch.float32} and frozen == {torch.bfloat16}
    learned = load_learned([result], load(world))
    assert bool(learned.weights) == (method == "custom-diffusion")
    assert all(torch.isfinite(concept.vectors).all() for concept in learned.concepts)
    assert len(draw(world, tmp_path, "out", result, precision="bf16")) == 2
