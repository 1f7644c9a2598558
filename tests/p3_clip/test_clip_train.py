"""The small CLIP's training and its test set: classes held out, batches without doubles, one form
on disk."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_tiny import TINY, tiny_clip
from PIL import Image
from test_clip_fill50k import fill50k
from tiny import contents, exit_code, refused
from torch.nn import functional as F

from common.checkpoint import load_tensors
from common.clip.loading import load_clip, save_folder
from common.colour import CSS_COLOURS, colour_difference
from common.data.shapes import Scene, draw_scene, held_out_classes, held_out_scene, render
from common.files import read_json
from common.images import resize
from p3_clip import train
from p3_clip.train import (
    Captioner,
    Config,
    RealPairs,
    contrastive_loss,
    read_model_cfg,
    shorten_vocabulary,
    vocabulary,
    whole_state,
)
from scripts import make_clip_testset as script

FLAGS = [
    *(
        "--steps",
        "4",
        "--batch-size",
        "8",
        "--device",
        "cpu",
        "--validate-every",
        "2",
        "--preview-every",
        "4",
    ),
    *("--checkpoint-every", "2", "--log-every", "1", "--warmup", "1"),
]


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(train, "WATCHED_PER_CLASS", 1)
    monkeypatch.setattr(train, "VALIDATION_BATCHES", 1)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path / "tiny.json"


def small_config(count: int, **more: Any) -> Config:
    config = Config(run_dir=Path("unused"), **more)
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, batch_size=count)
    )


# ----------------------------------------------------------------------------
# The held-out classes.


def test_held_out_classes_are_fifty_apart_and_not_circles() -> None:
    classes = held_out_classes()
    assert len(set(classes)) == 50
    assert Counter(kind for _, kind in classes) == {"square": 17, "triangle": 17, "star": 16}
    for kind in ("square", "triangle", "star"):
        rgb = np.array([CSS_COLOURS[colour] for colour, other in classes if other == kind])
        distance = colour_difference(
            rgb[:, None].repeat(len(rgb), 1), rgb[None].repeat(len(rgb), 0)
        )
        assert distance[~np.eye(len(rgb), dtype=bool)].min() >= 5.0
    assert classes == held_out_classes() != held_out_classes(seed=1)


def test_held_out_pictures_show_their_class() -> None:
    for index in (0, 20, 49):
        scene = held_out_scene(index, np.random.default_rng(index))
        assert [(shape.colour, shape.kind) for shape in scene.shapes] == [held_out_classes()[index]]
        colour = CSS_COLOURS[scene.shapes[0].colour]
        assert colour_difference(CSS_COLOURS[scene.background], colour) >= 10.0
        picture = render(scene, 64)
        assert (picture == torch.tensor(colour)[:, None, None]).all(0).sum() > 20


def test_the_first_shape_can_be_chosen() -> None:
    for seed in range(100):
        scene = draw_scene(np.random.default_rng(seed), count=1 + seed % 2, first=("red", "star"))
        assert (scene.shapes[0].colour, scene.shapes[0].kind) == ("red", "star") and len(
            scene.shapes
        ) == 1 + seed % 2
        colours = [scene.background, *(shape.colour for shape in scene.shapes)]
        assert len(set(colours)) == len(colours)


def test_batches_have_no_held_out_class_and_no_class_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = []

    def spy(scene: Scene, size: int) -> torch.Tensor:
        scenes.append(scene)
        return render(scene, size)

    monkeypatch.setattr(train, "render", spy)
    real = RealPairs(
        torch.zeros(20, 3, 32, 32, dtype=torch.uint8), [("red", "blue"), ("lime", "tan")] * 10
    )
    captions = Captioner(small_config(64), 32, real)
    for step in range(4):
        scenes.clear()
        images, texts = captions.batch(step)
        assert images.shape == (64, 3, 32, 32) and len(set(texts)) == 64
        classes = {(shape.colour, shape.kind) for scene in scenes for shape in scene.shapes}
        assert not classes & set(held_out_classes())
        firsts = [(scene.shapes[0].colour, scene.shapes[0].kind) for scene in scenes]
        assert len(set(firsts)) == len(firsts) == 62  # two circles come from the real pairs
        assert not {("red", "circle"), ("lime", "circle")} & set(firsts)
        # Pictures of one colour differ in the kind of the first shape alone.
        groups = {(s.shapes[0].colour, s.background, *s.shapes[1:]) for s in scenes}
        assert len(groups) == len({colour for colour, _ in firsts}) < 25
    again = captions.batch(3)
    assert torch.equal(again[0], images) and again[1] == texts
    assert captions.batch(4)[1] != texts


def test_small_pictures_are_made_as_inference_makes_them() -> None:
    picture = render(held_out_scene(3, np.random.default_rng(0)), 64)
    mine = resize(picture[None], 48)[0].permute(1, 2, 0).int()
    theirs = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
        (48, 48), Image.Resampling.BICUBIC
    )
    assert (mine - torch.from_numpy(np.array(theirs)).int()).abs().max() <= 1


# ----------------------------------------------------------------------------
# Loss and network.


def test_the_loss_is_that_of_open_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    assert torch.allclose(
        contrastive_loss(7.0 * images @ texts.T), open_clip.ClipLoss()(images, texts, 7.0)
    )


def test_only_the_rows_of_the_captions_are_trained_and_the_table_comes_back() -> None:
    network = tiny_clip()
    before = network.state_dict()
    table = before["token_embedding.weight"].clone()
    ids = open_clip.SimpleTokenizer(context_length=32)(vocabulary()).unique()
    shorten_vocabulary(network, ids)
    assert torch.equal(network.token_embedding(ids), table[ids])
    assert network.token_embedding.rows.shape[0] == len(ids) < 200
    with torch.no_grad():
        network.token_embedding.rows.add_(1.0)
        network.logit_scale.fill_(9.0)
    state = whole_state(network)
    assert state.keys() == before.keys()
    changed = (state["token_embedding.weight"] != table).any(1).nonzero().flatten()
    assert torch.equal(changed, ids)
    assert state["logit_scale"].exp().item() == pytest.approx(100.0)


def test_every_caption_is_in_the_vocabulary() -> None:
    tokenize = open_clip.SimpleTokenizer(context_length=32)
    ids = set(tokenize(vocabulary()).unique().tolist())
    captions = Captioner(small_config(256), 8, None)
    for step in range(3):
        found = tokenize(captions.batch(step)[1])
        assert set(found.unique().tolist()) <= ids
        assert int(found.argmax(1).max()) < 31  # nothing is cut off


def test_the_shipped_configuration() -> None:
    cfg = read_model_cfg(Config(run_dir=Path("unused")).model)
    network = open_clip.CLIP(**cfg)
    count = sum(param.numel() for param in network.parameters())
    block = (
        12 * 128**2 + 13 * 128
    )  # attention 4, MLP 8 matrices; their biases 9, two norms 4 vectors
    text = (49408 + 32) * 128 + 3 * block + 2 * 128 + 128 * 256
    image = 3 * 8 * 8 * 128 + (6 * 6 + 1) * 128 + 128 + 2 * 2 * 128 + 4 * block + 128 * 256
    assert count == text + image + 1
    assert 2 * count < 25e6  # bytes in float16
    assert cfg["text_cfg"]["width"] <= 160


# ----------------------------------------------------------------------------
# Runs.


def test_a_run_resumes_and_ships_a_folder_that_open_clip_loads(
    model_file: Path, tmp_path: Path
) -> None:
    real = fill50k(tmp_path / "fill50k", bare=False, count=2)
    arguments = ["--model", model_file, "--fill50k", real, *FLAGS]
    assert exit_code(train.main, Config, "--run-dir", tmp_path / "whole", *arguments) == 0
    folder = tmp_path / "whole" / "last"
    network = open_clip.create_model(f"local-dir:{folder}")
    assert {value.dtype for value in load_tensors(folder / "model.safetensors")[0].values()} == {
        torch.float16
    }
    assert (
        load_clip(str(folder), device="cpu")[0].network.visual.image_size
        == network.visual.image_size
        == (32, 32)
    )
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"validation_loss", "validation_matched", "validation_held_out"} <= lines[-1].keys()
    assert (tmp_path / "whole" / "samples" / "0000004.png").is_file()

    # Stopped at step 2 and run again, it ends with the same bytes.
    state = tmp_path / "halves"
    draw = Captioner.batch

    def stop_at_two(self: Captioner, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return draw(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Captioner, "batch", stop_at_two)
        assert exit_code(train.main, Config, "--run-dir", state, *arguments) == 130
    assert exit_code(train.main, Config, "--run-dir", state, *arguments) == 0
    assert contents(state / "last") == contents(folder)


def test_the_loss_falls(model_file: Path, tmp_path: Path) -> None:
    flags = [
        *FLAGS,
        "--steps",
        "40",
        "--batch-size",
        "16",
        "--lr",
        "0.003",
        "--checkpoint-every",
        "40",
    ]
    flags += ["--validate-every", "40", "--preview-every", "40"]
    assert (
        exit_code(train.main, Config, "--run-dir", tmp_path / "run", "--model", model_file, *flags)
        == 0
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--gradient-accumulation-steps", "2"], "needs its whole batch at once"),
        (["--batch-size", "600"], "--batch-size must be at most 506, the number of classes"),
        (["--model", "ViT-B32"], "open_clip knows no model 'ViT-B32'"),
        (
            ["--model", "resnet.json"],
            "--model must be a CLIP with a ViT and a causal text tower",
        ),
        (["--model", "torn.json"], "torn.json must hold embed_dim, vision_cfg and text_cfg"),
        (["--model", "nowhere.json"], "nowhere.json does not exist"),
        (["--model", "wide.json"], "must take square images, but its image_size is [32, 64]"),
        (["--fill50k", "nowhere"], "the pairs of fill50k are not there"),
        (
            ["--fill50k", "nowhere", "--real-fraction", "1"],
            "--real-fraction leaves no drawn image in a batch",
        ),
        (["--real-fraction", "1.5"], "--real-fraction must be between 0 and 1, not 1.5"),
        (["--pair-fraction", "-0.1"], "--pair-fraction must be between 0 and 1, not -0.1"),
        (["--init-from", "other"], "the weights in other do not fit the model: 2 missing"),
    ],
)
def test_what_training_refuses(
    flags: list[str],
    sentence: str,
    model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    resnet = TINY | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}}
    Path("resnet.json").write_text(json.dumps(resnet))
    Path("wide.json").write_text(
        json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": [32, 64]}})
    )
    if "--init-from" in flags:
        cfg = TINY | {"vision_cfg": TINY["vision_cfg"] | {"no_ln_pre": True}}
        save_folder(Path("other"), open_clip.CLIP(**json.loads(json.dumps(cfg))).state_dict(), cfg)
    Path("torn.json").write_text(json.dumps({"embed_dim": 8}))
    arguments = ["--run-dir", tmp_path / "run", "--model", model_file, *FLAGS, *flags]
    assert sentence in refused(capsys, train.main, Config, *arguments)


def test_several_processes_are_refused(
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    arguments = ["--run-dir", tmp_path / "run", "--model", model_file, *FLAGS]
    assert "train in one process" in refused(capsys, train.main, Config, *arguments)


# ----------------------------------------------------------------------------
# The test set.


def test_the_test_set_has_the_courses_layout_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        flags = ["--output-dir", tmp_path / name, "--count", "2", "--size", "32"]
        assert exit_code(script.main, script.Config, *flags) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    labels = read_json(tmp_path / "one" / "id2label.json")
    assert list(labels) == [str(i) for i in range(50)]
    assert [name.replace("_", " ") for name in labels.values()] == [
        " ".join(pair) for pair in held_out_classes()
    ]
    assert len(list((tmp_path / "one" / "val").iterdir())) == 100
    with Image.open(tmp_path / "one" / "val" / "49_001.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    assert "is already there" in refused(
        capsys, script.main, script.Config, "--output-dir", tmp_path / "one"
    )
    assert "--count must be between 1 and" in refused(
        capsys, script.main, script.Config, "--count", "0"
    )
