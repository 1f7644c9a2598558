"""Zero-shot classification end to end on a tiny CLIP, and what the program refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import pytest
import torch
from clip_tiny import CLASSES, TINY, tiny_clip
from PIL import Image
from tiny import exit_code, refused
from torch.nn import functional as F

from common.checkpoint import load_tensors, save_tensors
from common.clip.features import extract_features
from common.clip.model import Clip
from common.errors import InputError
from p3_clip import inference
from p3_clip.inference import Run, accuracy, predictions
from p3_clip.model import DATA, check_template, class_names, read_templates, zero_shot_classifier


@pytest.fixture
def arguments(clip_world: Path, tmp_path: Path) -> list[Any]:
    return [
        *(
            "--images",
            clip_world / "val",
            "--labels",
            clip_world / "id2label.json",
            "--model",
            clip_world / "model",
        ),
        *("--output_dir", tmp_path / "out", "--cache", tmp_path / "cache", "--device", "cpu"),
    ]


# ----------------------------------------------------------------------------
# A run.


def test_a_run_writes_the_results(
    arguments: list[Any], clip_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(inference.main, inference.Config, *arguments) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"The model in {clip_world / 'model'}.\n")
    assert "3 of 3 class names changed" in output.out
    assert "encoding: 12 of 12 images" in output.err
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["metrics"].keys() == {"acc1", "acc5", "mean_per_class_recall"}
    assert result["metrics"]["acc5"] == 1.0  # of three classes
    assert {
        "dataset",
        "model",
        "pretrained",
        "task",
        "language",
        "template_hash",
        "ensemble",
    } <= result.keys()
    assert (result["images"], result["classes"], result["names_changed"]) == (12, 3, 3)
    assert result["templates"] == ["a photo of a {}"]
    assert len(result["ensemble"]["templates"]) == 5  # those of the model folder
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(table) == 12 and table["single_correct"].mean() == pytest.approx(
        result["metrics"]["acc1"]
    )
    assert set(table["truth"]) == {"red square", "lime star", "blue triangle"}
    run = Run.load(tmp_path / "out")
    assert run.files[0] == "0_0.png" and run.cosines["single"].shape == (12, 3)
    assert torch.allclose(run.probabilities("ensemble").sum(1), torch.ones(12))


def test_predictions_follow_the_class_list(
    arguments: list[Any], clip_world: Path, tmp_path: Path
) -> None:
    """With the labels in another order, every picture gets the same class."""
    assert exit_code(inference.main, inference.Config, *arguments) == 0
    before = pd.read_csv(tmp_path / "out" / "predictions.csv")
    (tmp_path / "turned.json").write_text(json.dumps(dict(reversed(CLASSES.items()))))
    assert (
        exit_code(
            inference.main, inference.Config, *arguments, "--labels", tmp_path / "turned.json"
        )
        == 0
    )
    after = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert after["single_prediction"].tolist() == before["single_prediction"].tolist()


def test_features_are_computed_once_for_a_content(
    clip: Clip, clip_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((clip_world / "val").iterdir())
    seen: list[int] = []
    encode = Clip.encode_images

    def counting(self: Clip, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Clip, "encode_images", counting)
    first = extract_features(clip, files, batch_size=5, cache=tmp_path, show_progress=False)
    assert seen == [5, 5, 2]
    shutil.copy(files[0], tmp_path / "other_name.png")
    again = extract_features(
        clip, [*files, tmp_path / "other_name.png"], cache=tmp_path, show_progress=False
    )
    assert seen == [5, 5, 2] and torch.equal(again[:-1], first) and torch.equal(again[-1], first[0])
    plain = torch.stack([clip.preprocess(Image.open(file)) for file in files])
    assert torch.allclose(first, encode(clip, plain), atol=1e-6)
    store = next(tmp_path.glob("*.safetensors"))
    whole, (features, keys) = store.read_bytes(), load_tensors(store)
    for damage in (
        lambda: store.write_bytes(whole[:-9]),
        lambda: save_tensors(store, {"features": features["features"][:, :-1]}, keys),
        lambda: save_tensors(store, {"features": features["features"] * 2}, keys),
        lambda: save_tensors(store, {"features": features["features"][0, 0]}, keys),
    ):
        damage()  # a damaged store is made anew
        again = extract_features(clip, files, cache=tmp_path, show_progress=False)
        assert torch.allclose(again, first, atol=1e-6)
    assert sum(seen) == 5 * 12


def test_features_belong_to_weights_activation_and_preprocessing(clip: Clip) -> None:
    def identity(network: open_clip.CLIP, preprocess: Any = clip.preprocess) -> str:
        return Clip(network, clip.tokenize, preprocess, "name", "weights").identity

    def prepared(mean: float) -> Any:
        return open_clip.image_transform(32, is_train=False, mean=(mean,) * 3, std=(0.5,) * 3)

    first = identity(tiny_clip())
    assert first == identity(tiny_clip())
    others = [
        identity(tiny_clip(1)),
        identity(tiny_clip(quick_gelu=True)),
        identity(tiny_clip(), prepared(0.4)),
    ]
    assert len({first, *others}) == 4
    assert " at 0x" not in repr(
        clip.preprocess
    )  # an address would make every process's identity another one


def test_the_first_line_says_that_the_small_model_steps_in(
    arguments: list[Any],
    clip_world: Path,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("common.clip.loading.SHIPPED", clip_world / "model")
    at = arguments.index("--model")
    assert exit_code(inference.main, inference.Config, *arguments[:at], *arguments[at + 2 :]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        "ViT-B-32-quickgelu with OpenAI's weights is not available, so this is the small model"
    )


def test_an_unreadable_picture_keeps_what_was_computed(
    clip: Clip, clip_world: Path, tmp_path: Path
) -> None:
    files = sorted((clip_world / "val").iterdir())
    (tmp_path / "broken.png").write_text("hello")
    with pytest.raises(InputError, match="broken.png is not a readable image"):
        extract_features(
            clip,
            [*files, tmp_path / "broken.png"],
            batch_size=5,
            cache=tmp_path,
            show_progress=False,
        )
    store = next(tmp_path.glob("*.safetensors"))
    assert len(load_tensors(store)[0]["features"]) == 10  # two whole batches


def test_a_long_template_is_no_path(
    arguments: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is warned of, since the text encoder sees its beginning alone."""
    template = "a photo of a {}" + ", very large" * 400
    assert exit_code(inference.main, inference.Config, *arguments, "--template", template) == 0
    said = capsys.readouterr().err
    assert "prompts have more tokens than the text encoder takes and are cut, such as" in said
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["template"]
        == template
    )


def test_an_output_folder_that_cannot_be_is_refused_before_loading(
    arguments: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").write_text("")
    monkeypatch.setattr("common.clip.loading.ClipConfig.load", None)
    assert "out is a regular file" in refused(capsys, inference.main, inference.Config, *arguments)


def test_accuracies() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    result = accuracy(scores, torch.tensor([0, 0, 0, 2]))
    assert result == pytest.approx(
        {"acc1": 0.75, "acc5": 1.0, "mean_per_class_recall": (2 / 3 + 1) / 2}
    )
    table = predictions(
        Run(
            list("abcd"),
            torch.tensor([0, 0, 0, 2]),
            list("012"),
            list("xyz"),
            1.0,
            {"single": scores},
        )
    )
    assert table["single_rank_of_truth"].tolist() == [1, 1, 3, 1]
    assert table["single_runner_up"].tolist() == ["y"] * 4


def test_the_classifier_is_normalise_mean_normalise_and_follows_the_class_list(clip: Clip) -> None:
    names, templates = ["red square", "lime star", "tan circle"], ["a {}", "a photo of {}"]
    matrix = zero_shot_classifier(clip, names, templates)
    assert matrix.shape == (TINY["embed_dim"], 3)
    vectors = [clip.encode_texts([t.replace("{}", "lime star")])[0] for t in templates]
    assert torch.allclose(matrix[:, 1], F.normalize(sum(vectors), dim=0), atol=1e-6)
    order = [2, 0, 1]
    assert torch.allclose(
        zero_shot_classifier(clip, [names[i] for i in order], templates),
        matrix[:, order],
        atol=1e-6,
    )
    reference = open_clip.build_zero_shot_classifier(clip.network, clip.tokenize, names, templates)
    assert torch.allclose(matrix, reference, atol=1e-6)


def test_names_and_templates() -> None:
    classes = {"0": "pine_tree", "1": "mouse", "2": "bus"}
    assert class_names(classes, {}) == (["pine tree", "mouse", "bus"], 1)
    cranes = {"134": "crane", "517": "crane"}
    assert class_names(cranes, {"517": "construction crane"})[0] == ["crane", "construction crane"]
    assert class_names(classes, {"1": "mouse animal", "pine tree": "a pine"}) == (
        ["a pine", "mouse animal", "bus"],
        2,
    )
    assert check_template("A photo of {object}.", "") == "A photo of {}."
    assert len(read_templates(DATA / "templates" / "openai_7.txt")) == 7
    assert len(read_templates(DATA / "templates" / "openai_80.txt")) == 80
    for overrides, sentence in (
        ({"lorry": "x"}, "'lorry', which is neither an id nor a name"),
        ({"bus": "mouse"}, "two classes the same name, 'mouse'"),
        (["bus"], "must be a JSON object"),
    ):
        with pytest.raises(InputError, match=sentence):
            class_names(classes, overrides)


# ----------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, no output.


def _stray(root: Path) -> None:
    shutil.copy(root / "val" / "0_0.png", root / "val" / "bicycle.png")


def _no_id(root: Path) -> None:
    shutil.copy(root / "val" / "0_0.png", root / "val" / "7_0.png")


def _unreadable(root: Path) -> None:
    (root / "val" / "1_0.png").write_bytes((root / "val" / "1_0.png").read_bytes()[:60])


def _no_image(root: Path) -> None:
    (root / "val" / "2_9.png").write_text("hello")


def _empty(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()


def _gone(root: Path) -> None:
    shutil.rmtree(root / "val")


def _double(root: Path) -> None:
    (root / "id2label.json").write_text(json.dumps({**CLASSES, "3": "red square"}))


def _list(root: Path) -> None:
    (root / "id2label.json").write_text(json.dumps(["bicycle"]))


def _torn(root: Path) -> None:
    (root / "id2label.json").write_text('{"0": ')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_stray, "val/bicycle.png: the name must be {class_id}_{image_id}.png"),
        (_no_id, "val/7_0.png: the class id '7' is not in the labels"),
        (_unreadable, "val/1_0.png is not a readable image"),
        (_no_image, "val/2_9.png is not a readable image (not an image)"),
        (_empty, "val holds no image"),
        (_gone, "does not exist"),
        (_double, "the classes 0 and 3 have the same name, 'red square'"),
        (_list, "must map class ids to names"),
        (_torn, "id2label.json, line 1 is not valid JSON"),
    ],
)
def test_bad_data(
    damage: Callable[[Path], None],
    sentence: str,
    clip_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(clip_world, tmp_path / "world")
    damage(tmp_path / "world")
    root = tmp_path / "world"
    arguments = [
        "--images",
        root / "val",
        "--labels",
        root / "id2label.json",
        "--model",
        root / "model",
    ]
    more = ["--output-dir", tmp_path / "out", "--cache", tmp_path / "cache", "--device", "cpu"]
    assert sentence in refused(capsys, inference.main, inference.Config, *arguments, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--template", ""], "--template is empty"),
        (["--template", "a photo"], "must contain {} exactly once"),
        (["--ensemble", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--names", "nowhere.json"], "nowhere.json does not exist"),
        (["--batch-size", "0"], "--batch-size must be between 1 and 4096, not 0"),
        (["--workers", "0"], "--workers must be between 1 and 256, not 0"),
        (["--model", "ViT-B32"], "open_clip knows no model 'ViT-B32'; did you mean"),
        (["--pretrained", "openai"], "leave out --pretrained"),
    ],
)
def test_bad_flags(
    flags: list[str],
    sentence: str,
    arguments: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sentence in refused(capsys, inference.main, inference.Config, *arguments, *flags)
    assert not (tmp_path / "out").exists()


def test_an_empty_line_of_a_template_file_is_named(
    arguments: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "templates.txt").write_text("# note\na {}\n\n")
    sentence = refused(
        capsys,
        inference.main,
        inference.Config,
        *arguments,
        "--ensemble",
        tmp_path / "templates.txt",
    )
    assert "templates.txt, line 3 is empty" in sentence


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("open_clip_config.json", "{}", "has no model_cfg"),
        (
            "open_clip_config.json",
            '{"model_cfg": {"embed_dim": 4}}',
            "does not describe a model of open_clip",
        ),
        (
            "open_clip_config.json",
            None,
            "holds neither open_clip_config.json nor transformers' config.json",
        ),
        ("model.safetensors", "abc", "is a text file that begins with 'abc'"),
        ("model.safetensors", None, "holds no weights"),
        ("fingerprint.json", "{}", "is not a fingerprint"),
    ],
)
def test_a_damaged_model_folder(
    file: str,
    content: str | None,
    sentence: str,
    clip_world: Path,
    arguments: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(clip_world / "model", folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    assert sentence in refused(
        capsys, inference.main, inference.Config, *arguments, "--model", folder
    )
