"""CLIP loading: every form of weights, the activation, and the converter to transformers' names and
back."""

import contextlib
import hashlib
import http.client
import pickle
import time
import urllib.error
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from clip_tiny import TEXTS, TINY, tiny_clip, tiny_folder, transformers_model
from PIL import Image
from tiny import Malice
from torch import nn
from torch.nn import functional as F

from common.checkpoint import save_tensors
from common.clip import loading as clip_module
from common.clip import weights
from common.clip.fingerprint import check_activation, uses_quick_gelu
from common.clip.formats import from_transformers, to_transformers
from common.clip.loading import load_clip, load_judge, save_folder
from common.clip.model import Clip, encode_tokens
from common.clip.torchscript import load_torchscript
from common.clip.weights import find_weights, hub_files, network_reachable, preprocessing
from common.errors import InputError
from common.files import read_json, shown, write_json


@pytest.fixture(scope="module")
def folder(clip_world: Path) -> Path:
    """The model folder; do not change it."""
    return clip_world / "model"


# ----------------------------------------------------------------------------
# The shipped form.


def test_a_shipped_folder_loads_by_plain_open_clip(folder: Path, clip: Clip) -> None:
    plain = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    ids = tokenize(TEXTS)
    assert ids.shape == (3, 32)
    with torch.no_grad():
        assert torch.equal(plain.encode_text(ids), clip.network.encode_text(ids))
    assert clip.network.visual.preprocess_cfg == plain.visual.preprocess_cfg
    assert {p.name for p in folder.iterdir()} == {
        "open_clip_config.json",
        "model.safetensors",
        "fingerprint.json",
        "templates.txt",
    }


def test_weights_of_another_model_or_activation_are_caught_by_the_fingerprint(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("open_clip_config.json", "fingerprint.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = tiny_folder(tmp_path / "other", seed=1)
    (tmp_path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(
        InputError, match="do not give the text embedding stored in fingerprint.json"
    ):
        load_clip(str(tmp_path), device="cpu")


# ----------------------------------------------------------------------------
# Text.


def test_short_texts_give_the_numbers_of_the_whole_context(clip: Clip) -> None:
    ids = clip.tokenize([*TEXTS, ""])
    with torch.no_grad():
        assert torch.allclose(
            encode_tokens(clip.network, ids), clip.network.encode_text(ids), atol=1e-6
        )


def test_texts_longer_than_the_context_are_named(clip: Clip) -> None:
    room = clip.network.context_length - 2  # the ends of a text take a place each
    fits, cut = "red " * room, "red " * (room + 1)
    assert torch.equal(clip.tokenize([fits]), clip.tokenize([cut]))
    assert clip.cut_texts([fits, cut, "red"]) == [cut]
    assert clip.cut_texts(["red", "blue"]) == []


# ----------------------------------------------------------------------------
# Weights in every form.


@pytest.fixture
def small_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of open_clip's list that means the tiny network."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-test", TINY)
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "ViT-tiny-test-quickgelu", TINY | {"quick_gelu": True}
    )
    return "ViT-tiny-test"


@pytest.mark.parametrize(
    "form",
    ["pt", "module", "epoch", "bin", "safetensors", "torchscript", "transformers", "folder"],
)
def test_every_form_of_weights_loads_without_network(
    form: str, small_name: str, tmp_path: Path, offline: None
) -> None:
    network = tiny_clip(3)
    state = network.state_dict()
    path = tmp_path / f"weights.{form if form in ('bin', 'safetensors') else 'pt'}"
    if form in ("pt", "bin"):
        torch.save({"state_dict": state}, path)
    elif form == "module":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    elif form == "epoch":  # as open_clip's training leaves it, compiled
        wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
        optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
        torch.save({"epoch": 5, "state_dict": wrapped, "optimizer": optimizer}, path)
    elif form == "safetensors":
        save_tensors(path, state)
    elif form == "torchscript":
        _torchscript(state, path)
    else:
        path = tmp_path / "transformers"
        transformers_model(network).save_pretrained(path)
    name, pretrained = (str(path), None) if form == "folder" else (small_name, str(path))
    if form == "torchscript":  # as in OpenAI's archives
        name, network = f"{name}-quickgelu", tiny_clip(3, quick_gelu=True)
    clip, note = load_clip(name, pretrained, "cpu")
    assumed = {"transformers": "OpenAI's preprocessing", "folder": None, "torchscript": None}
    if what := assumed.get(form, "GELU and OpenAI's preprocessing"):
        assert f", assumed to need {what} (the file does not say)." in note
    else:
        assert "assumed" not in note
    ids = clip.tokenize(TEXTS)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(clip.network.encode_text(ids), network.encode_text(ids), atol=1e-6)
        assert torch.allclose(
            clip.network.encode_image(pixels), network.encode_image(pixels), atol=1e-6
        )
    assert str(path) in note


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive like OpenAI's; do not change it."""
    path = tmp_path_factory.mktemp("archive") / "weights.pt"
    _torchscript(tiny_clip(3).state_dict(), path)
    return path


def test_of_an_archive_only_the_tensors_are_read(archive: Path, tmp_path: Path) -> None:
    found = load_torchscript(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(archive).state_dict()
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )

    class Odd(nn.Module):
        """A dtype, shared and strided values, a list, and no parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turned", torch.arange(6.0).half().view(2, 3).T)
            self.register_buffer("tied", self.turned[1:])
            self.sizes = [1, 2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Odd()), str(tmp_path / "odd.pt"))
    odd = load_torchscript(tmp_path / "odd.pt")
    assert odd.keys() == {"turned", "tied"}
    assert odd["turned"].tolist() == [[0, 3], [1, 4], [2, 5]] and odd["tied"].tolist() == [
        [1, 4],
        [2, 5],
    ]


@pytest.mark.parametrize("damage", ["cut", "code", "empty"])
def test_a_damaged_or_malicious_archive_is_refused(
    damage: str, archive: Path, small_name: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                content = {
                    "cut": content[:100],
                    "code": pickle.dumps(Malice(tmp_path / "trace")),
                    "empty": b"",
                }[damage]
            new.writestr(name, content)
    with pytest.raises(InputError, match="is not a readable TorchScript archive"):
        load_clip(small_name, str(path), "cpu")
    assert not (tmp_path / "trace").exists()


def _torchscript(state: dict[str, torch.Tensor], path: Path) -> None:
    """An archive like OpenAI's: the weights and three sizes."""

    class Holder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for name, value in {
        **state,
        "input_resolution": torch.tensor(32),
        "vocab_size": torch.tensor(49408),
    }.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Holder())
            module = module._modules[parent]
        module.register_buffer(leaf, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but OpenAI's archives stay
        torch.jit.save(torch.jit.script(root), str(path))


def test_weights_that_do_not_fit_name_the_keys(small_name: str, tmp_path: Path) -> None:
    state = tiny_clip().state_dict()
    state["visual.extra"] = state.pop("visual.proj")
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        InputError, match=r"1 missing \(visual.proj\); 1 unexpected \(visual.extra\)"
    ):
        load_clip(small_name, str(tmp_path / "weights.pt"), "cpu")


# ----------------------------------------------------------------------------
# The activation.


def _with_fingerprint(network: open_clip.CLIP) -> tuple[Clip, list[dict]]:
    tokenize = open_clip.SimpleTokenizer(context_length=32)
    clip = Clip(network, tokenize, lambda image: image, "ViT-X", "weights.pt")
    values = clip.encode_texts(["hello world"])[0]
    known = {
        "weights": "a test's weights",
        "quick_gelu": uses_quick_gelu(network),
        "width": len(values),
        "text": "hello world",
        "first_values": values[:5].tolist(),
        "tolerance": 1e-3,
    }
    return clip, [known]


def _loud(network: open_clip.CLIP) -> open_clip.CLIP:
    """With weights large enough for the activation to matter, as in a trained network."""
    with torch.no_grad():
        for block in network.transformer.resblocks:
            block.mlp.c_fc.weight.mul_(8.0)
            block.mlp.c_proj.weight.mul_(8.0)
    return network


@pytest.mark.parametrize("quick", [True, False])
def test_the_wrong_activation_is_caught_by_one_text_embedding(quick: bool) -> None:
    right = _loud(tiny_clip(quick_gelu=quick))
    clip, fingerprints = _with_fingerprint(right)
    check_activation(clip, fingerprints)
    wrong = tiny_clip(quick_gelu=not quick)
    wrong.load_state_dict(right.state_dict())
    with pytest.raises(
        InputError, match="need QuickGELU: use --model ViT-X-quickgelu" if quick else "need GELU"
    ):
        check_activation(
            Clip(wrong, clip.tokenize, clip.preprocess, clip.name, clip.pretrained), fingerprints
        )
    assert uses_quick_gelu(wrong) != quick  # as it was
    check_activation(
        _with_fingerprint(_loud(tiny_clip(5)))[0], fingerprints
    )  # unknown weights pass


def test_openais_archives_need_quick_gelu_whatever_their_size(
    archive: Path, small_name: str
) -> None:
    with pytest.raises(
        InputError,
        match="weights of OpenAI's, which need QuickGELU: use --model ViT-tiny-test-quickgelu",
    ):
        load_clip(small_name, str(archive), "cpu")


def test_a_transformers_folder_says_which_activation_it_needs(
    small_name: str, tmp_path: Path
) -> None:
    for quick in (False, True):
        folder = tmp_path / str(quick)
        transformers_model(tiny_clip(3, quick_gelu=quick)).save_pretrained(folder)
        assert uses_quick_gelu(load_clip(str(folder), device="cpu")[0].network) == quick
    load_clip(small_name, str(tmp_path / "False"), "cpu")
    with pytest.raises(InputError, match="need QuickGELU: use --model ViT-tiny-test-quickgelu"):
        load_clip(small_name, str(tmp_path / "True"), "cpu")
    with pytest.raises(InputError, match="need GELU: use --model ViT-tiny-test$"):
        load_clip(f"{small_name}-quickgelu", str(tmp_path / "False"), "cpu")
    with pytest.raises(InputError, match="need QuickGELU: use --model ViT-tiny-test-quickgelu"):
        load_clip(small_name, str(tmp_path / "True" / "model.safetensors"), "cpu")


def test_the_configuration_says_how_images_are_normalised(small_name: str, tmp_path: Path) -> None:
    """In transformers' older file, in the one of its version 5, and in open_clip's; beside a file
    of weights as in a folder."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, content in (
        ("preprocessor_config.json", half),
        ("processor_config.json", {"image_processor": half}),
    ):
        transformers_model(tiny_clip(3)).save_pretrained(tmp_path / name)
        write_json(tmp_path / name / name, content)
        given = (tmp_path / name, tmp_path / name / "model.safetensors")
        for path in given:
            clip, note = load_clip(small_name, str(path), "cpu")
            assert clip.network.visual.preprocess_cfg["mean"] == (0.5,) * 3
            assert "assumed" not in note
    config = {"model_cfg": {**TINY, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.5] * 3}}
    write_json(tmp_path / "open_clip_config.json", config)
    save_tensors(tmp_path / "model.safetensors", tiny_clip(3).state_dict())
    with pytest.raises(InputError, match="need QuickGELU"):
        load_clip(small_name, str(tmp_path / "model.safetensors"), "cpu")
    clip, _ = load_clip(f"{small_name}-quickgelu", str(tmp_path / "model.safetensors"), "cpu")
    assert clip.network.visual.preprocess_cfg["mean"] == (0.5,) * 3


def test_a_transformers_folder_of_another_tokenizer_or_activation_is_refused(
    tmp_path: Path,
) -> None:
    transformers_model(tiny_clip(3)).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    for key, value, sentence in (
        ("vocab_size", 1000, "has 49408 tokens, but this model has 1000"),
        ("hidden_act", "relu", "not relu and gelu"),
    ):
        write_json(
            tmp_path / "config.json", config | {"text_config": config["text_config"] | {key: value}}
        )
        with pytest.raises(InputError, match=sentence):
            load_clip(str(tmp_path), device="cpu")


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_a_folder_without_a_fingerprint_is_checked_for_known_weights(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = _loud(tiny_clip(quick_gelu=True))
    known = _with_fingerprint(network)[1]
    wrong = tiny_clip()
    wrong.load_state_dict(network.state_dict())
    if form == "open_clip":
        save_folder(tmp_path, wrong.state_dict(), TINY)
        (tmp_path / "fingerprint.json").unlink()
    else:
        transformers_model(wrong).save_pretrained(tmp_path)
    load_clip(str(tmp_path), device="cpu")
    monkeypatch.setattr(check_activation, "__defaults__", (known,))
    with pytest.raises(InputError, match="holds a test's weights, which need QuickGELU"):
        load_clip(str(tmp_path), device="cpu")


def test_a_text_tower_apart_with_a_biased_projection_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of SigLIP: no text_projection of the network's own, and scalars beside the
    weights."""
    cfg = TINY | {
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {**TINY["text_cfg"], "proj_bias": True},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-biased", cfg)
    network = open_clip.create_model("ViT-tiny-biased", load_weights=False)
    save_tensors(tmp_path / "w.safetensors", network.state_dict())
    clip, _ = load_clip("ViT-tiny-biased", str(tmp_path / "w.safetensors"), "cpu")
    assert type(clip.network) is open_clip.CustomTextCLIP


def test_the_openai_tag_always_means_quick_gelu(
    small_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "w.safetensors", tiny_clip().state_dict())
    monkeypatch.setattr(clip_module, "find_weights", lambda name, tag: tmp_path / "w.safetensors")
    assert uses_quick_gelu(load_clip(small_name, "openai", "cpu")[0].network)
    assert not uses_quick_gelu(
        load_clip(small_name, str(tmp_path / "w.safetensors"), "cpu")[0].network
    )


# ----------------------------------------------------------------------------
# Names, caches and the network.


def test_unknown_names_suggest_and_tags_are_listed(offline: None) -> None:
    with pytest.raises(InputError, match="knows no model 'ViT-B32'; did you mean .*ViT-B-32"):
        find_weights("ViT-B32", "openai")
    with pytest.raises(
        InputError, match="neither a file nor a set of weights of ViT-B-32, which has: openai"
    ):
        find_weights("ViT-B-32", "laion9b")
    with pytest.raises(InputError, match="model folder checkpoints/none does not exist"):
        load_clip("checkpoints/none", device="cpu")
    with pytest.raises(InputError, match="name of the model ViT-B/32 is ViT-B-32$"):
        load_clip("ViT-B/32", device="cpu")
    with pytest.raises(InputError, match="named by itself: --model runs/last"):
        load_clip("local-dir:runs/last", device="cpu")


def test_no_weights_and_no_network_says_so_at_once(
    offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    with pytest.raises(
        InputError,
        match=r"\(~/.cache/clip/ViT-B-32.pt or .*\) and could not be downloaded \(no network\)",
    ):
        load_clip("ViT-B-32", "openai", "cpu")
    monkeypatch.setattr(clip_module, "SHIPPED", Path("nowhere/clip_shapes"))
    with pytest.raises(InputError, match="nowhere/clip_shapes/model.safetensors is missing"):
        load_clip(device="cpu")
    assert time.monotonic() - started < 15


def test_the_shipped_model_is_never_a_judge_unless_named(
    monkeypatch: pytest.MonkeyPatch, offline: None, folder: Path
) -> None:
    monkeypatch.setattr(clip_module, "SHIPPED", folder)
    judge, why = load_judge(device="cpu")
    assert judge is None and "no network" in why
    assert load_judge("none") == load_judge(pretrained="none") == (None, "left out as asked for")
    judge, what = load_judge(str(folder), device="cpu")
    assert judge is not None and str(folder) in what
    with pytest.raises(InputError, match="does not exist"):
        load_judge("nowhere/clip", device="cpu")
    with pytest.raises(InputError, match="nowhere.pt"):
        load_judge(pretrained="nowhere.pt", device="cpu")


def test_without_openai_the_default_is_the_shipped_model_and_says_so(
    offline: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_module, "SHIPPED", folder)
    clip, note = load_clip(device="cpu")
    assert clip.folder == folder
    assert note.startswith(
        "ViT-B-32-quickgelu with OpenAI's weights is not available, so this is the small model"
    )
    assert "(no network)" in note and "--pretrained FILE" in note and "\n" not in note


def test_paths_below_the_checkout_are_shown_relative_to_it() -> None:
    assert shown(clip_module.SHIPPED) == "checkpoints/clip_shapes"
    assert shown(Path("/elsewhere/clip")) == "/elsewhere/clip"


@pytest.fixture
def cached(offline: None, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny network in the place of OpenAI's ViT-B/32, as its download lies in the cache."""
    name, content = "ViT-B-32-quickgelu", archive.read_bytes()
    file = tmp_path / ".cache" / "clip" / "ViT-B-32.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    url = f"https://openaipublic.azureedge.net/clip/models/{hashlib.sha256(content).hexdigest()}/ViT-B-32.pt"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY | {"quick_gelu": True})
    monkeypatch.setattr(weights, "tag_entry", lambda *_: {"url": url, "quick_gelu": True})
    return file


def test_the_cache_comes_before_the_network_and_before_the_small_model(cached: Path) -> None:
    assert find_weights("ViT-B-32-quickgelu", "openai") == cached
    clip, note = load_clip(device="cpu")
    assert (clip.name, clip.pretrained, clip.folder) == ("ViT-B-32-quickgelu", "openai", None)
    assert note == "ViT-B-32-quickgelu with OpenAI's weights."


def test_half_a_download_is_not_taken_for_the_weights(cached: Path) -> None:
    cached.write_bytes(cached.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"ViT-B-32.pt is incomplete or damaged .* delete it"):
        find_weights("ViT-B-32-quickgelu", "openai")


@pytest.mark.parametrize(
    ("answer", "usable"),
    [
        (None, True),
        (urllib.error.HTTPError("", 404, "", None, None), True),
        (urllib.error.HTTPError("", 407, "", None, None), False),
        (urllib.error.HTTPError("", 503, "", None, None), False),
        (http.client.BadStatusLine("?"), False),
        (OSError("no route"), False),
    ],
)
def test_a_proxy_in_between_is_no_network(
    answer: Exception | None, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def urlopen(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        if answer:
            raise answer
        return contextlib.nullcontext()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert network_reachable() == usable


def test_a_tokenizer_on_the_hub_is_looked_for_in_the_cache_and_then_named(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    started = time.monotonic()
    with pytest.raises(
        InputError,
        match="ViT-B-16-SigLIP needs tokenizer_config.json of the repository timm/ViT-B-16-SigLIP",
    ):
        load_clip("ViT-B-16-SigLIP", str(tmp_path / "w.pt"), "cpu")
    with (
        pytest.raises(InputError, match="of the repository roberta-base on the Hugging Face hub"),
        hub_files("roberta-ViT-B-32"),
    ):
        pass
    assert time.monotonic() - started < 15
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repository, file: f"{repository}/{file}"
    )
    with hub_files("ViT-B-16-SigLIP"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="hf download org/repo --local-dir FOLDER"):
        load_clip("hf-hub:org/repo", device="cpu")


def test_a_local_file_gets_the_preprocessing_that_all_tags_of_its_model_agree_on() -> None:
    half = (0.5, 0.5, 0.5)
    found, agreed = preprocessing("ViT-B-16-SigLIP", None)
    assert agreed and (found["mean"], found["std"], found["resize_mode"]) == (half, half, "squash")
    assert preprocessing("ViT-L-14", None) == ({}, False)
    assert preprocessing("ViT-L-14", "laion2b_s32b_b82k")[0]["mean"] == half
    assert preprocessing("ViT-B-32", None)[0]["mean"] == open_clip.OPENAI_DATASET_MEAN


# ----------------------------------------------------------------------------
# open_clip and transformers.


def test_the_converter_goes_both_ways() -> None:
    state = tiny_clip(2).state_dict()
    back = from_transformers(to_transformers(state))
    assert back.keys() == state.keys() and all(
        torch.equal(back[name], state[name]) for name in state
    )
    with pytest.raises(InputError, match="visual.layer1.0.conv1.weight has no counterpart"):
        to_transformers({"visual.layer1.0.conv1.weight": torch.zeros(1)})


def test_vit_b32_agrees_with_transformers() -> None:
    """The same random ViT-B/32, QuickGELU included, through both libraries on the same pixels and
    ids."""
    torch.manual_seed(0)
    network = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False).eval()
    other = transformers_model(network)
    pixels = torch.randn(1, 3, 224, 224)
    ids = open_clip.get_tokenizer("ViT-B-32-quickgelu")(TEXTS)
    with torch.no_grad():
        result = other(input_ids=ids, pixel_values=pixels)
        for mine, theirs in (
            (network.encode_image(pixels), result.image_embeds),
            (network.encode_text(ids), result.text_embeds),
        ):
            cosine = F.cosine_similarity(mine, theirs)
            assert cosine.min() >= 0.9999, cosine
    back = from_transformers(other.state_dict())
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())


def test_preprocessing_differs_little_from_transformers() -> None:
    """Measured apart: open_clip resizes with Pillow, transformers may with torch; both bicubic and
    antialiased."""
    from transformers import CLIPImageProcessor

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 12, generator=generator)
    pixels = F.interpolate(coarse, (300, 360), mode="bicubic").clamp(0, 1)[0]
    image = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
    mine = open_clip.image_transform(
        224, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )(image)
    theirs = CLIPImageProcessor()(image, return_tensors="pt").pixel_values[0]
    # One grey level is 1 / 255 / 0.26 = 0.015 after normalisation.
    assert (mine - theirs).abs().mean() < 0.015 and (mine - theirs).abs().max() < 0.1
