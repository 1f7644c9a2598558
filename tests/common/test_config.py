"""Configurations that lie: each is refused with the file and the key, before memory is taken."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from tiny import tiny_network

from common.clip.loading import load_folder
from common.config import Probability, bounds, check_fields, check_value, from_json
from common.errors import InputError
from common.files import ROOT
from common.latent import small
from common.latent.text_encoder import load_text_encoder
from p1_diffusion.model import ContextUNet
from p2_ddim.model import FaceUNet, FaceUNetConfig
from p3_controlnet.model import ControlNet

CHECKPOINTS = ROOT / "checkpoints"
BASE = CHECKPOINTS / "ldm_shapes"


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Probability = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    sizes: tuple[Annotated[int, *bounds(at_least=1)], ...] = (1,)
    pair: tuple[int, int] = (0, 1)
    limit: Annotated[float | None, *bounds(above=0, below=2)] = None
    on: bool = False
    inner: Inner = Inner()


GOOD = {"name": "x", "kind": "b", "sizes": [3, 4], "pair": [5, 6], "limit": 1, "on": True}


def test_json_becomes_the_dataclass() -> None:
    values = GOOD | {"inner": Inner()}
    assert from_json(Outer, values, Path("f")) == Outer("x", "b", (3, 4), (5, 6), 1, True)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("name", 5, "name must be text, not 5"),
        ("kind", "c", "kind must be one of a, b, not c"),
        ("sizes", 5, "sizes must be a list, not 5"),
        ("sizes", [0], r"sizes must be a list of which each value is at least 1, not \[0\]"),
        (
            "sizes",
            [1.5],
            r"sizes must be a list of which each value is a whole number, not \[1.5\]",
        ),
        ("sizes", [True], "sizes must be"),
        ("pair", [1], r"pair must be a list of 2, not \[1\]"),
        ("limit", 0, "limit must be above 0 and below 2, not 0"),
        ("limit", math.nan, "limit must be a finite number, not nan"),
        pytest.param("limit", 10**400, "limit must be a finite number, not 1000", id="400"),
        pytest.param("limit", 10**5000, "limit must be .* not such a long number", id="5000"),
        ("on", 1, "on must be true or false, not 1"),
        ("more", 1, "more is unknown"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^f: {sentence}") as error:
        from_json(Outer, GOOD | {"inner": Inner(), key: value}, Path("f"))
    assert len(str(error.value)) < 200


def test_a_missing_value_and_no_object_are_named() -> None:
    with pytest.raises(InputError, match="^f: name is missing"):
        from_json(Outer, {"inner": Inner(), **{k: v for k, v in GOOD.items() if k != "name"}}, "f")
    with pytest.raises(InputError, match=r"^f must hold a JSON object, not \[\]"):
        from_json(Outer, [], Path("f"))


def test_fields_are_named_as_flags() -> None:
    with pytest.raises(InputError, match="--inner.rate must be between 0 and 1, not 2"):
        check_fields(Outer("x", inner=Inner(2)))
    with pytest.raises(InputError, match="--limit must be above 0 and below 2, not -1"):
        check_fields(Outer("x", limit=-1))


def test_every_annotation_in_use_is_understood() -> None:
    assert [check_value(5, hint, "x") for hint in (int, float, int | None, Any, object)] == [
        None
    ] * 5


# ----------------------------------------------------------------------------
# The configuration files of all models.


def edited(source: Path, file: str, change: dict[str, Any], folder: Path) -> Path:
    """`folder` as `source`, with changed entries in one JSON file; None deletes, ... empties."""
    for path in (path for path in source.rglob("*") if path.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path, target)
    values = json.loads((source / file).read_text())
    for key, value in change.items():
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner[name]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    tiny_network().save(folder)
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    FaceUNet(FaceUNetConfig(channels=(32, 64), blocks=1, attention=(1,), embedding=32)).save(folder)
    return folder


def unet(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    small.load_network(folder, UNet2DConditionModel)


def autoencoder(folder: Path) -> None:
    from diffusers import AutoencoderDC

    small.load_network(folder, AutoencoderDC)


def clip(folder: Path) -> None:
    load_folder(folder, torch.device("cpu"))


HUGE, NAN = 10**9, math.nan
DIGITS = [
    ("parameterization", "bogus"),
    ("schedule", "bogus"),
    ("channels", []),
    ("channels", [0, 32]),
    ("channels", "16 32"),
    ("channels", [16, HUGE]),
    ("channels", [65536, 65536]),
    ("blocks", [HUGE, 1]),
    ("blocks", [1.5, 1]),
    ("attention", [-1]),
    ("heads", 0),
    ("heads", 3),
    ("embedding", -1),
    ("embedding", "32"),
    ("dropout", NAN),
    ("dropout", 1),
    ("datasets", 3),
    ("class_maps", "yes"),
    ("channels", None),
    ("parameterization", None),
]
FACES = [
    ("parameterization", "bogus"),
    ("channels", [33, 64]),
    ("channels", [32, HUGE]),
    ("attention", [2]),
    ("heads", 0),
    ("heads", 5),
    ("patch", 0),
    ("patch", HUGE),
    ("refine", 50),
    ("dropout", -1),
    ("blocks", None),
]
UNET = [
    ("sample_size", 0),
    ("sample_size", "16"),
    ("in_channels", -4),
    ("block_out_channels", [64, 128, 0]),
    ("block_out_channels", [64, 128, 60000]),
    ("layers_per_block", HUGE),
    ("norm_num_groups", 0),
    ("norm_num_groups", 7),
    ("norm_eps", NAN),
    ("norm_eps", 0),
    ("attention_head_dim", 0),
    ("cross_attention_dim", HUGE),
    ("cross_attention_dim", "128"),
    ("dropout", 2),
    ("act_fn", 5),
    ("act_fn", "bogus"),
    ("down_block_types", "CrossAttnDownBlock2D"),
    ("down_block_types", ["Bogus"] * 3),
    ("flip_sin_to_cos", "no"),
    ("quantization_config", {"a": 1}),
]
AUTOENCODER = [
    ("latent_channels", 0),
    ("latent_channels", HUGE),
    ("encoder_block_out_channels", [64, 64, 60000]),
    ("encoder_layers_per_block", [0, HUGE, 1]),
    ("decoder_layers_per_block", [0, -1, 1]),
    ("attention_head_dim", 0),
    ("upsample_block_type", "bogus"),
]
TEXT = [
    ("vocab_size", 0),
    ("vocab_size", HUGE),
    ("hidden_size", "128"),
    ("hidden_size", 60000),
    ("num_hidden_layers", HUGE),
    ("num_attention_heads", 0),
    ("num_attention_heads", 5),
    ("max_position_embeddings", -1),
    ("layer_norm_eps", NAN),
    ("hidden_act", "bogus"),
    ("attention_dropout", 7),
    ("eos_token_id", -5),
    ("pad_token_id", HUGE),
    ("bos_token_id", "0"),
    ("initializer_range", NAN),
    ("quantization_config", {"a": 1}),
]
CONTROL = [
    ("conditioning_embedding_out_channels", [8, 0, 32]),
    ("conditioning_embedding_out_channels", 8),
    ("conditioning_embedding_out_channels", [8, 60000, 60000]),
    ("layers_per_block", 0),
    ("block_out_channels", "64"),
    ("cross_attention_dim", NAN),
    ("norm_eps", -1),
]
MODEL = [
    ("latent_std", [0.0, 1.0, 1.0, 1.0]),
    ("latent_std", [NAN, 1.0, 1.0, 1.0]),
    ("latent_std", [1.0]),
    ("latent_std", None),
    ("latent_mean", ["0", 0.0, 0.0, 0.0]),
    ("latent_mean", 0.0),
]
SCHEDULER = [
    ("beta_end", 0.5),
    ("beta_start", 0),
    ("num_train_timesteps", 5),
    ("prediction_type", "bogus"),
    ("rescale_betas_zero_snr", 1.5),
    ("beta_schedule", "linear"),
    ("beta_end", None),
    ("_class_name", 5),
    ("timestep_spacing", "bogus"),
    ("clip_sample", 0),
]
CLIP = [
    ("model_cfg.embed_dim", 0),
    ("model_cfg.vision_cfg.image_size", 0),
    ("model_cfg.vision_cfg.patch_size", 0),
    ("model_cfg.vision_cfg.layers", HUGE),
    ("model_cfg.vision_cfg.width", -1),
    ("model_cfg.vision_cfg", 5),
    ("model_cfg.text_cfg.heads", 0),
    ("model_cfg.text_cfg.context_length", "32"),
    ("model_cfg.text_cfg.vocab_size", HUGE),
    ("preprocess_cfg.std", [0.5, 0.5, 0.0]),
    ("preprocess_cfg.mean", [NAN, 0.5, 0.5]),
    ("preprocess_cfg.mean", 0.5),
]
FILES: dict[str, tuple[Path | str, str, Callable[[Path], Any], list[tuple[str, Any]]]] = {
    "digits": ("digits", "config.json", ContextUNet.load, DIGITS),
    "faces": ("faces", "config.json", FaceUNet.load, FACES),
    "unet": (BASE / "unet", "config.json", unet, UNET),
    "vae": (BASE / "vae", "config.json", autoencoder, AUTOENCODER),
    "text": (BASE / "text_encoder", "config.json", load_text_encoder, TEXT),
    "control": (CHECKPOINTS / "controlnet_circles", "config.json", ControlNet.load, CONTROL),
    "model": (BASE, "config.json", small.load_model, MODEL),
    "scheduler": (BASE, "scheduler/scheduler_config.json", small.load_model, SCHEDULER),
    "clip": (CHECKPOINTS / "clip_shapes", "open_clip_config.json", clip, CLIP),
}


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [(kind, *case) for kind, (*_, cases) in FILES.items() for case in cases],
)
def test_a_configuration_that_lies_is_refused_with_its_file(
    kind: str, key: str, value: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, file, load, _ = FILES[kind]
    source = source if isinstance(source, Path) else request.getfixturevalue(source)
    folder = edited(source, file, {key: value}, tmp_path / "model")
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(folder / file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("sample_size", 17), ("in_channels", 5), ("cross_attention_dim", 64)]
)
def test_a_unet_that_does_not_fit_its_neighbours_is_refused(
    key: str, value: int, tmp_path: Path
) -> None:
    folder = edited(BASE, "unet/config.json", {key: value}, tmp_path / "model")
    with pytest.raises(InputError):
        small.load_model(folder)
