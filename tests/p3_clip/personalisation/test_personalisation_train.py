"""Learning concepts: what a training moves and what it leaves alone, what it reads, and how it goes
on."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import contents, exit_code, refused, stop_after
from tiny_base import tiny_base
from tiny_concepts import FEW, make_world, photos, quick
from torch import distributed

from common.checkpoint import load_tensors, state_hash
from common.colour import NAMES
from common.data.examples import drawn_examples
from common.data.shapes import KINDS, held_out_classes
from common.latent.generate import GenerationConfig
from common.latent.load import base_hash, load_base
from common.latent.model import LatentDiffusion
from p3_clip.personalisation import merge, templates, train, training_views
from p3_clip.personalisation.concepts import Concept, initial_vectors
from p3_clip.personalisation.custom_diffusion import (
    PROJECTIONS,
    CustomDiffusionResult,
    projections,
)
from p3_clip.personalisation.formats import load_concepts
from p3_clip.personalisation.model import load_learned, save_learned
from p3_clip.personalisation.photos import Encoded, Pool, _latent_weights, cut_mix_views, make_views
from p3_clip.personalisation.regularisation import RegularizationImages, regularization_images
from p3_clip.personalisation.training_views import TrainingView


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def few_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[LatentDiffusion]:
    """The models that the program loads, as it leaves them."""
    models: list[LatentDiffusion] = []
    original = train.load_base
    monkeypatch.setattr(
        train, "load_base", lambda path: models.append(original(path)) or models[-1]
    )
    return models


def learn(method: str, run: Path, *flags: Any) -> int:
    return exit_code(train.main, train.Config, method, "--run-dir", run, *FEW, *flags)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------
# Textual inversion.


def test_textual_inversion_moves_the_learned_rows_and_no_other_bit(
    world: Path, tmp_path: Path, seen: list[LatentDiffusion]
) -> None:
    """Two concepts of three vectors in one run, with weight decay, which would move a table that is
    a parameter."""
    assert (
        learn("textual-inversion", tmp_path / "run", *photos(world, "a", "b"), "--vectors", 3) == 0
    )
    (model,), base = seen, load_base(world / "base")
    embedding = model.text_encoder.get_input_embeddings()
    assert torch.equal(embedding.table.weight, base.text_encoder.get_input_embeddings().weight)
    for part in ("unet", "autoencoder"):
        assert state_hash(getattr(model, part)) == state_hash(getattr(base, part))
    own, before = model.text_encoder.state_dict(), base.text_encoder.state_dict()
    assert all(
        torch.equal(own[name], value)
        for name, value in before.items()
        if "token_embedding" not in name
    )

    concepts = load_concepts(tmp_path / "run" / "last" / "model.safetensors")
    assert [(concept.token, concept.vectors.shape) for concept in concepts] == [
        ("<new1>", (3, 16)),
        ("<new2>", (3, 16)),
    ]
    word = base.tokenizer("red", add_special_tokens=False).input_ids[0]
    start = base.text_encoder.get_input_embeddings().weight[word]
    assert all(not torch.equal(concept.vectors[0], start) for concept in concepts)
    assert all(
        (concept.vectors - start).abs().max() < 0.1 for concept in concepts
    )  # it is where they start from
    about = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert about["method"] == "textual inversion" and about["concepts"][1] == {
        "token": "<new2>",
        "word": "red",
        "phrase": "{}",
    }


def test_checkpoints_are_scored_and_the_best_is_kept_by_the_stated_rule(
    world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert learn("textual-inversion", run, *photos(world, "a"), "--validate-every", 1) == 0
    lines = [line for line in metrics(run) if "validation_loss" in line]
    assert len(lines) == 3
    for line in lines:
        sum_of_scores = line["validation_image"] + 2.5 * line["validation_text"]
        assert (
            line["validation_loss"] == pytest.approx(-sum_of_scores)
            and 0.2 < line["validation_norm <new1>"] < 5.0
        )
    state = load_tensors(run / "state.safetensors")[1]
    assert state["best"] == min(line["validation_loss"] for line in lines)
    assert (run / "best" / "model.safetensors").is_file() and (
        run / "samples" / "0000003.png"
    ).is_file()


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, method in (("word", "textual-inversion"), ("matrices", "custom-diffusion")):
        flags = photos(world, "a") + (
            ("--num-class-images", 2) if method == "custom-diffusion" else ()
        )
        assert learn(method, tmp_path / name, *flags) == 0
        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", stop_after(train.fit, 2))
            assert learn(method, tmp_path / "stopped" / name, *flags) == 130
        assert learn(method, tmp_path / "stopped" / name, *flags) == 0
        assert contents(tmp_path / "stopped" / name / "last") == contents(tmp_path / name / "last")


def test_without_a_clip_the_loss_decides(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "clip_for_checkpoints", lambda model, device: None)
    flags = ("--base", world / "base", "--drawn", "wine", "--augmentation", "none")
    assert learn("textual-inversion", tmp_path / "run", *flags) == 0
    last = metrics(tmp_path / "run")[-1]
    assert last["validation_loss"] > 0.0 and "validation_image" not in last


# ----------------------------------------------------------------------------
# Custom Diffusion.


def test_custom_diffusion_moves_words_and_the_projections_alone(
    world: Path, tmp_path: Path, seen: list[LatentDiffusion], capsys: pytest.CaptureFixture[str]
) -> None:
    """Regularisation pictures are drawn once, and a second run elsewhere takes them from the
    folder."""
    flags = (
        *photos(world, "a", "b"),
        "--num-class-images",
        3,
        "--class-data-dir",
        tmp_path / "regular",
    )
    assert learn("custom-diffusion", tmp_path / "run", *flags) == 0
    (model,), base = seen, load_base(world / "base")
    own, before = model.unet.state_dict(), base.unet.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(own[name], value)}
    assert changed == projections(base.unet).keys() and all(
        name.endswith(PROJECTIONS) for name in changed
    )
    assert torch.equal(
        model.text_encoder.get_input_embeddings().table.weight,
        base.text_encoder.get_input_embeddings().weight,
    )
    learned = load_learned([tmp_path / "run" / "last"], base)
    assert learned.weights.keys() == changed and [x.token for x in learned.concepts] == [
        "<new1>",
        "<new2>",
    ]
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "last").iterdir())
    assert size < 6 * sum(value.numel() for value in learned.weights.values())

    pictures = contents(tmp_path / "regular")
    assert len(pictures) == 3
    capsys.readouterr()
    assert learn("custom-diffusion", tmp_path / "again", *flags) == 0
    assert "3 of 3 pictures are there already" in capsys.readouterr().out
    assert contents(tmp_path / "regular") == pictures


def test_other_settings_are_refused_before_anything_is_encoded(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else the cache would be the first to differ, and its advice to delete it would not help."""
    flags = ("--augmentation", "shrink", "--views", 2, "--num-class-images", 0)
    assert learn("custom-diffusion", tmp_path, *photos(world, "a"), *flags) == 0
    monkeypatch.setattr(train, "make_pool", lambda *_: pytest.fail("it encodes"))
    capsys.readouterr()
    assert learn("custom-diffusion", tmp_path, *photos(world, "a"), *flags, "--views", 3) == 2
    assert "is of a run with views = 2, not 3" in capsys.readouterr().err


def test_drawn_regularisation_pictures_are_scenes_without_mistakes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model generates nothing: the pool holds the drawn scenes, with their captions."""
    kept: list[RegularizationImages] = []
    make_pool = train.make_pool

    def kept_pool(*arguments: Any) -> Any:
        kept.extend(each for each in arguments if isinstance(each, RegularizationImages))
        return make_pool(*arguments)

    monkeypatch.setattr(train, "make_pool", kept_pool)
    monkeypatch.setattr(train, "regularization_images", None)
    flags = (*photos(world, "a", "b"), "--num-class-images", 3, "--class-images", "drawn")
    assert learn("custom-diffusion", tmp_path / "run", *flags) == 0
    scenes = drawn_examples(3, load_base(world / "base").side, 0)
    assert kept[0].prompts == scenes.captions
    assert torch.equal(torch.stack(kept[0].pictures), scenes.images)
    assert learn("custom-diffusion", tmp_path / "none", *flags, "--num-class-images", 0) == 0
    assert kept[1].pictures == []
    assert learn("custom-diffusion", tmp_path / "more", *flags, "--class-data-dir", tmp_path) == 2


def test_processes_wait_for_each_others_regularisation_pictures(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws its share and reads all: here the second process draws while the first one
    waits."""
    model, sampling = load_base(world / "base"), GenerationConfig(steps=1, chunk_size=2)
    arguments = (model, ["red circle", "lime star", "red circle"], tmp_path, sampling)

    def second_process() -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(distributed, "barrier", lambda: None)
        assert len(regularization_images(*arguments).pictures) == 3

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "barrier", second_process)
    assert len(regularization_images(*arguments).pictures) == 3 == len(contents(tmp_path))


def test_results_that_were_trained_apart_are_merged(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged matrices give the words of each concept its own keys and values (the constraint of
    the closed form)."""
    runs = []
    for name, token in (("a", "<new1>"), ("b", "<new2>")):
        runs.append(tmp_path / name / "last")
        flags = ("--tokens", token, "--num-class-images", 2, "--lr", 0.05)
        assert learn("custom-diffusion", tmp_path / name, *photos(world, name), *flags) == 0
    flags = (
        "--base",
        world / "base",
        "--output-dir",
        tmp_path / "merged",
        "--captions",
        20,
    )
    assert exit_code(merge.main, merge.Config, "--results", *runs, *flags) == 0
    base = load_base(world / "base")
    merged = load_learned([tmp_path / "merged"], base)
    assert [concept.token for concept in merged.concepts] == ["<new1>", "<new2>"]
    for run in runs:
        part = load_learned([run], base)
        features = merge.phrase_features(base, part, ["{} red"], templates.SHAPES)
        assert (
            len(features) == 3 * 2
        )  # the learned word and "red", in each of the small model's sentences
        for name, weight in part.weights.items():
            assert torch.allclose(features @ merged.weights[name].T, features @ weight.T, atol=2e-3)
    capsys.readouterr()
    assert "both hold matrices" in str(
        pytest.raises(train.InputError, load_learned, runs, base).value
    )
    about = json.loads((runs[1] / "config.json").read_text())
    shutil.copytree(runs[1], tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(about | {"base": "another"}))
    with pytest.raises(train.InputError, match="was trained on another base model"):
        load_learned([tmp_path / "foreign" / "model.safetensors"], base)  # the file alone
    foreign = ("--results", runs[0], tmp_path / "foreign", *flags)
    assert "foreign was trained on another base model" in refused(
        capsys, merge.main, merge.Config, *foreign
    )
    twice = ("--results", runs[0], runs[0], *flags)
    assert "<new1> occurs twice" in refused(capsys, merge.main, merge.Config, *twice)


def test_a_merge_finds_each_words_own_phrase() -> None:
    """The file of weights sorts the words, config.json has them in the order of training."""
    part = CustomDiffusionResult({}, [Concept(name, torch.ones(1, 4)) for name in ("<a>", "<z>")])
    entries = [{"token": "<z>", "phrase": "{} circle"}, {"token": "<a>", "phrase": "{} square"}]
    found = merge.phrases_of(part, {"concepts": entries}, Path("run"))
    assert found == ["{} square", "{} circle"]
    with pytest.raises(train.InputError, match="config.json names <z>, but the result holds <a>"):
        merge.phrases_of(part, {"concepts": entries[:1]}, Path("run"))


def test_words_of_another_base_model_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, words = tiny_base(), [Concept("<flora_pot>", torch.ones(1, 16))]
    for made_on, warned in (("another", True), (base_hash(base), False)):
        save_learned(tmp_path, CustomDiffusionResult({}, words), {"base": made_on})
        (found,) = load_learned([tmp_path], base).concepts
        assert found.token == "<flora_pot>"  # which holds the name of a LoRA's tensors
        assert ("another base model" in capsys.readouterr().err) == warned


# ----------------------------------------------------------------------------
# What a step reads.


def test_views_are_the_photo_and_its_mirror_image() -> None:
    photo = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    plain, mirrored = make_views(photo, 20, "flip", 9, torch.Generator())
    assert torch.allclose(plain.image, photo[:, :, 5:25] / 127.5 - 1.0, atol=1e-6)
    assert (
        torch.equal(mirrored.image, plain.image.flip(-1))
        and plain.mask.all()
        and plain.words == ("",)
    )
    (only,) = make_views(photo, 20, "none", 9, torch.Generator())
    assert torch.equal(only.image, plain.image)


def test_resized_views_say_how_near_they_are() -> None:
    """Smaller ones lie somewhere on nothing, where the loss does not count; all are of the photo's
    colour."""
    photo = torch.full((3, 50, 50), 200, dtype=torch.uint8)
    views = make_views(photo, 40, "resize", 60, torch.Generator().manual_seed(0))
    assert {view.words for view in views} == {
        ("",),
        ("far away ", "very small "),
        ("zoomed in ", "close up "),
    }
    for view in views:
        side = view.mask.sum().sqrt().item()
        assert side == pytest.approx(round(side)) and side >= 0.4 * 40 - 1
        inside = view.mask.bool()
        assert torch.allclose(view.image[:, inside], torch.tensor(200 / 127.5 - 1.0), atol=1e-5)
        assert not view.image[:, ~inside].any()
        assert (view.words == ("far away ", "very small ")) <= (side <= 0.6 * 40)
        assert (view.words == ("zoomed in ", "close up ")) <= (side == 40)
    weights = _latent_weights(torch.stack([view.mask for view in views]), 4).float()
    assert torch.allclose(weights.mean((1, 2, 3)), torch.ones(60), atol=1e-3)
    assert not _latent_weights(views[0].mask[None], 4)[0, 0][
        torch.nn.functional.avg_pool2d(views[0].mask[None], 4)[0] < 1
    ].any()


def test_cut_mix_views_hold_both_photos_whole_and_count_nothing_else() -> None:
    """Left and right stay where they are; above and below the edge goes on, outside the loss."""
    left = torch.full((3, 24, 36), 200, dtype=torch.uint8)
    right = torch.full((3, 24, 24), 40, dtype=torch.uint8)
    right[:, :, 12:] = 90  # so that it has a mirror image
    views = cut_mix_views(left, right, 32, 40, torch.Generator().manual_seed(0))
    tops = set()
    for view in views:
        assert torch.allclose(view.image[:, :, :16], torch.tensor(200 / 127.5 - 1.0), atol=1e-5)
        assert set(view.image[0, 0, 16:].mul(127.5).add(127.5).round().int().tolist()) >= {40, 90}
        assert (
            view.image[:, :1] == view.image
        ).all()  # these photos are the same from top to bottom
        for half in (view.mask[:, :16], view.mask[:, 16:]):
            rows = half.all(1)
            assert (
                torch.equal(rows, half.any(1))
                and rows.sum() == 16
                and rows.int().diff().abs().sum() <= 2
            )
        tops.add((int(view.mask[:, 0].argmax()), int(view.mask[:, 31].argmax())))
    assert len(tops) > 20 and len({view.image[0, 0, 17].item() > -0.5 for view in views}) == 2


def test_concepts_side_by_side_are_a_lesson_of_their_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair of things counts as one concept more, in both orders, with a prompt that names
    both; backgrounds are no things."""
    seen: dict[str, Any] = {}
    original = Pool.make

    def make(model: Any, encoded: Any, groups: Any, prompts: Any) -> Pool:
        seen.update(groups=groups, prompts=prompts, views=len(encoded.latents))
        return original(model, encoded, groups, prompts)

    monkeypatch.setattr(Pool, "make", make)
    drawn = ("--drawn", "wine", "mauve", "slate_triangle", "--cut-mix", 3, "--augmentation", "none")
    assert learn("textual-inversion", tmp_path / "run", *drawn) == 0
    groups = Counter(seen["groups"])
    assert groups == {0: 5, 1: 5, 2: 5, 3: 5 * 2 * 3} and seen["views"] == 45
    both = {
        prompts[0]
        for group, prompts in zip(seen["groups"], seen["prompts"], strict=True)
        if group == 3
    }
    assert both == {"<new1> circle next to <new3>", "<new3> next to <new1> circle"}
    named = {
        prompts[1]
        for group, prompts in zip(seen["groups"], seen["prompts"], strict=True)
        if group == 3
    }
    assert "<new3> next to <new1> circle with pink background" in named and len(named) == 10


def test_collages_and_the_losses_of_objects_end_to_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing, each pair, each thing beside a known shape and one and two known shapes are
    groups; half of the views with a thing are on the learned background, all others too."""
    seen: dict[str, Any] = {}
    original = train.training_views

    def record(*arguments: Any) -> list[TrainingView]:
        seen["views"] = original(*arguments)
        return seen["views"]

    monkeypatch.setattr(train, "training_views", record)
    flags = ("--base", world / "base", "--clip", world / "clip", "--drawn", "wine", "mauve", "ring")
    more = (
        "--drawn-photos",
        2,
        "--augmentation",
        "shrink",
        "--views",
        2,
        "--collage",
        4,
        "--known-shapes",
    )
    losses = ("--object-weight", 3, "--attention-weight", 0.5, "--num-class-images", 2)
    assert learn("custom-diffusion", tmp_path / "run", *flags, *more, *losses) == 0
    views = seen["views"]
    assert Counter(view.group for view in views) == dict.fromkeys(range(10), 4)
    assert {view.shown for view in views[:12]} == {(0,), (1,), (2,)}
    assert [view.shown for view in views[12:20]] == [(0,), (0, 1)] * 2 + [(2,), (2, 1)] * 2
    assert {view.shown for view in views[20:24]} <= {(0, 2), (2, 0), (0, 2, 1), (2, 0, 1)}
    assert [view.shown for view in views[24:32]] == [(0,), (0, 1)] * 2 + [(2,), (2, 1)] * 2
    assert {view.shown for view in views[32:]} == {(1,)}
    known = [(colour, kind) for colour in NAMES for kind in KINDS]
    for view, count in zip(views[24:], [1] * 12 + [2] * 4, strict=True):
        text = view.prompts[0].split(" with ")[0]
        named = [pair for pair in known if " ".join(pair) in text.split(" next to ")]
        assert len(named) == count and not {*named} & {*held_out_classes()}
    assert all(len(view.view.regions) == len(view.shown) for view in views)
    for view in views[12:]:
        assert ("<new2> background" in view.prompts[0]) == (1 in view.shown)
    colours = {prompt for view in views if view.shown == (2, 1) for prompt in view.prompts}
    assert {f"a {ring} with <new2> background" for ring in ("gold <new3>", "<new3>")} <= colours
    encoded = load_tensors(tmp_path / "run" / "latents.safetensors")[0]
    assert encoded["regions"].shape == (42, 3, 16, 16) and not encoded["regions"][40:].any()
    assert torch.allclose(encoded["weights"].float().mean((1, 2, 3)), torch.ones(42), atol=2e-3)


def test_objects_that_do_not_stand_out_are_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_views, "with_region", lambda photo, **_: torch.zeros(4, 8, 8))
    arguments = ("textual-inversion", "--run-dir", tmp_path / "run", *photos(world, "a"), *FEW)
    said = refused(capsys, train.main, train.Config, *arguments, "--object-weight", 2)
    assert "no object stands out from the background of photo 1 of <new1>" in said


def test_concepts_are_drawn_equally_often_and_every_other_row_is_regular() -> None:
    model = tiny_base()
    groups = [0] * 9 + [1] + [-1] * 4
    encoded = Encoded(torch.zeros(14, 4, 2, 2), torch.ones(14, 1, 2, 2), torch.zeros(14, 2, 2, 2))
    texts = [[f"a {colour} circle", f"{colour} circle"] for colour in ("red", "blue")]
    pool = Pool.make(model, encoded, groups, [texts[0]] * 9 + [texts[1]] + [["white star"]] * 4)
    assert len(pool.ids) == 5
    batch = pool.draw(400, torch.Generator().manual_seed(0))
    drawn = pool.group[batch["index"]]
    assert (drawn[1::2] == -1).all()
    counts = Counter(drawn[0::2].tolist())
    assert counts.keys() == {0, 1} and min(counts.values()) > 70
    expected = {
        0: model.tokenize(texts[0]),
        1: model.tokenize(texts[1]),
        -1: model.tokenize(["white star"]),
    }
    for group, ids in zip(drawn.tolist(), batch["ids"], strict=True):
        assert (expected[group] == ids).all(1).any()
    assert len(batch["ids"].unique(dim=0)) == 5
    assert torch.equal(pool.draw(400, torch.Generator().manual_seed(0))["ids"], batch["ids"])


def test_training_can_start_from_learned_words(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first round goes on to a new word, the second from it on; matrices are no words."""
    words, both = tmp_path / "words", tmp_path / "both"
    assert learn("textual-inversion", words, *photos(world, "a"), "--lr", 1.0) == 0
    assert learn("custom-diffusion", both, *photos(world, "a"), "--init-from", words / "last") == 0
    first, second = (
        load_learned([run / "last"], load_base(world / "base")).concepts[0] for run in (words, both)
    )
    word = load_base(world / "base")
    start = initial_vectors("red", 1, word.text_encoder, word.tokenizer)
    assert (
        (first.vectors - start).abs().max()
        > 0.2
        > 0.1
        > (first.vectors - second.vectors).abs().max()
        > 0.0
    )

    command = (
        "custom-diffusion",
        "--run-dir",
        tmp_path / "run",
        "--base",
        world / "base",
        "--device",
        "cpu",
        "--num-class-images",
        0,
    )
    for flags, said in (
        (
            ("--drawn", "wine", "--tokens", "<other>", "--init-from", words / "last"),
            "0 vectors for <other>, not 1",
        ),
        (
            ("--drawn", "wine", "--vectors", 2, "--init-from", words / "last"),
            "1 vectors for <new1>, not 2",
        ),
        (("--drawn", "wine", "--init-from", both / "last"), "holds matrices too"),
    ):
        assert said in refused(capsys, train.main, train.Config, *command, *flags)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--photos", "none", "--words", "red"), "the concept folder none holds no photo"),
        (("--photos", "none"), "must name equally many concepts, not 1, 0, 1 and 0"),
        (("--drawn", "blue"), "there is no drawn concept 'blue', only wine, mauve"),
        (
            ("--drawn", "wine", "--tokens", "<a>", "<b>"),
            "--drawn and --tokens must name equally many",
        ),
        (("--words", "red"), "need --photos"),
        (
            ("--tokens", "circle", "--drawn", "wine"),
            "'circle' is a word that the model already knows",
        ),
        (("--tokens", "new", "--drawn", "wine"), "'new' is a word that the model already knows"),
        (("--tokens", "newword", "--drawn", "wine"), "must have the form <name>"),
        (("--drawn", "wine", "--vectors", "0"), "--vectors must be between 1 and 75, not 0"),
        (
            ("--drawn", "wine", "--augmentation", "resize", "--views", "0"),
            "--views must be between 1 and 10000, not 0",
        ),
        (
            ("--drawn", "wine", "mauve", "--cut-mix", "2"),
            "--cut-mix needs two concepts that can stand beside each other",
        ),
        (("--drawn", "wine", "--cut-mix", "-1"), "--cut-mix must be at least 0, not -1"),
        (("--drawn", "mauve", "--collage", "2"), "--collage needs a concept that can stand beside"),
        (("--drawn", "wine", "--known-shapes"), "--known-shapes needs --collage, and the small"),
        (("--drawn", "mauve", "--object-weight", "3"), "--object-weight needs a concept that can"),
        (("--drawn", "ring", "--vectors", "75"), "tokens: give fewer --vectors or shorter words"),
        (("--drawn", "wine", "--start", ""), "the word '' to start from is empty"),
        (("--drawn", "wine", "--held-out", "a circle"), "must contain {} exactly once"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: Any,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = (
        "textual-inversion",
        "--run-dir",
        tmp_path / "run",
        "--base",
        world / "base",
        "--device",
        "cpu",
    )
    assert said in refused(capsys, train.main, train.Config, *command, *flags)
    assert not (tmp_path / "run").exists()


def test_a_style_has_no_object_to_attend_to(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*photos(world, "a"), "--styles", "<new1>", "--attention-weight", 0.1)
    assert learn("textual-inversion", tmp_path / "run", *flags) == 2
    assert "--attention-weight needs a concept that is not a style" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unreadable_photo_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    command = (
        "custom-diffusion",
        "--run-dir",
        tmp_path / "run",
        "--base",
        world / "base",
        "--device",
        "cpu",
    )
    flags = ("--photos", tmp_path / "photos", "--words", "red")
    assert "x.jpg is not a readable image" in refused(
        capsys, train.main, train.Config, *command, *flags
    )
    assert "--num-class-images must be at least 0" in refused(
        capsys, train.main, train.Config, *command, "--num-class-images", -1
    )
    assert not (tmp_path / "run").exists()
