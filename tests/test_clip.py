"""CLIP loading: every form of weights, the activation, and the converter to transformers' names and back."""

import time
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from clip_tiny import TEXTS, TINY, tiny_clip, tiny_folder
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import clip as clip_module
from common.checkpoint import save_tensors
from common.clip import Clip, encode_tokens, load_clip
from common.clip.fingerprint import check_activation, uses_quick_gelu
from common.clip.formats import from_transformers, to_transformers, transformers_model
from common.clip.weights import find_weights
from common.errors import InputError
from common.files import shown


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


def test_weights_of_another_model_or_activation_are_caught_by_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    for name in ("open_clip_config.json", "fingerprint.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = tiny_folder(tmp_path / "other", seed=1)
    (tmp_path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="do not give the text embedding stored in fingerprint.json"):
        load_clip(str(tmp_path), device="cpu")


# ----------------------------------------------------------------------------
# Text.


def test_short_texts_give_the_numbers_of_the_whole_context(clip: Clip) -> None:
    ids = clip.tokenize([*TEXTS, ""])
    with torch.no_grad():
        assert torch.allclose(encode_tokens(clip.network, ids), clip.network.encode_text(ids), atol=1e-6)


# ----------------------------------------------------------------------------
# Weights in every form.


@pytest.fixture
def small_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of open_clip's list that means the tiny network."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-test", TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-test-quickgelu", TINY | {"quick_gelu": True})
    return "ViT-tiny-test"


@pytest.mark.parametrize("form", ["pt", "module", "bin", "safetensors", "torchscript", "transformers", "folder"])
def test_every_form_of_weights_loads_without_network(form: str, small_name: str, tmp_path: Path, offline: None) -> None:
    network = tiny_clip(3)
    state = network.state_dict()
    path = tmp_path / f"weights.{form if form in ('bin', 'safetensors') else 'pt'}"
    if form in ("pt", "bin"):
        torch.save({"state_dict": state}, path)
    elif form == "module":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    elif form == "safetensors":
        save_tensors(path, state)
    elif form == "torchscript":
        _torchscript(state, path)
    else:
        path = tmp_path / "transformers"
        transformers_model(network).save_pretrained(path)
    name, pretrained = (str(path), None) if form == "folder" else (small_name, str(path))
    clip, note = load_clip(name, pretrained, "cpu")
    ids = clip.tokenize(TEXTS)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(clip.network.encode_text(ids), network.encode_text(ids), atol=1e-6)
        assert torch.allclose(clip.network.encode_image(pixels), network.encode_image(pixels), atol=1e-6)
    assert str(path) in note


def _torchscript(state: dict[str, torch.Tensor], path: Path) -> None:
    """An archive like OpenAI's: the weights and three sizes."""

    class Holder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for name, value in {**state, "input_resolution": torch.tensor(32), "vocab_size": torch.tensor(49408)}.items():
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
    with pytest.raises(InputError, match=r"1 missing \(visual.proj\); 1 unexpected \(visual.extra\)"):
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
    with pytest.raises(InputError, match="need QuickGELU: use --model ViT-X-quickgelu" if quick else "need GELU"):
        check_activation(Clip(wrong, clip.tokenize, clip.preprocess, clip.name, clip.pretrained), fingerprints)
    assert uses_quick_gelu(wrong) != quick  # as it was
    check_activation(_with_fingerprint(_loud(tiny_clip(5)))[0], fingerprints)  # unknown weights pass


def test_the_openai_tag_always_means_quick_gelu(
    small_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "w.safetensors", tiny_clip().state_dict())
    monkeypatch.setattr(clip_module, "find_weights", lambda name, tag: tmp_path / "w.safetensors")
    assert uses_quick_gelu(load_clip(small_name, "openai", "cpu")[0].network)
    assert not uses_quick_gelu(load_clip(small_name, str(tmp_path / "w.safetensors"), "cpu")[0].network)


# ----------------------------------------------------------------------------
# Names, caches and the network.


def test_unknown_names_suggest_and_tags_are_listed(offline: None) -> None:
    with pytest.raises(InputError, match="knows no model 'ViT-B32'; did you mean .*ViT-B-32"):
        find_weights("ViT-B32", "openai")
    with pytest.raises(InputError, match="neither a file nor a set of weights of ViT-B-32, which has: openai"):
        find_weights("ViT-B-32", "laion9b")
    with pytest.raises(InputError, match="model folder checkpoints/none does not exist"):
        load_clip("checkpoints/none", device="cpu")


def test_no_weights_and_no_network_says_so_at_once(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"not in the local cache \(.*\) and could not be fetched \(no network\)"):
        load_clip("ViT-B-32", "openai", "cpu")
    monkeypatch.setattr(clip_module, "SHIPPED", Path("nowhere/clip_shapes"))
    with pytest.raises(InputError, match="nowhere/clip_shapes/model.safetensors is missing"):
        load_clip(device="cpu")
    assert time.monotonic() - started < 15


def test_without_openai_the_default_is_the_shipped_model_and_says_so(
    offline: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_module, "SHIPPED", folder)
    clip, note = load_clip(device="cpu")
    assert clip.folder == folder
    assert note.startswith("ViT-B-32-quickgelu with OpenAI's weights is not to be had here, so this is the small model")


def test_paths_below_the_checkout_are_shown_relative_to_it() -> None:
    assert shown(clip_module.SHIPPED) == "checkpoints/clip_shapes"
    assert shown(Path("/elsewhere/clip")) == "/elsewhere/clip"


def test_the_cache_comes_before_the_network(offline: None, tmp_path: Path) -> None:
    file = tmp_path / ".cache" / "clip" / "ViT-B-32.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_weights("ViT-B-32-quickgelu", "openai") == file


# ----------------------------------------------------------------------------
# open_clip and transformers.


def test_the_converter_goes_both_ways() -> None:
    state = tiny_clip(2).state_dict()
    back = from_transformers(to_transformers(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(InputError, match="visual.layer1.0.conv1.weight has no counterpart"):
        to_transformers({"visual.layer1.0.conv1.weight": torch.zeros(1)})


def test_vit_b32_agrees_with_transformers() -> None:
    """The same random ViT-B/32, QuickGELU included, through both libraries on the same pixels and ids."""
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
    """Measured apart: open_clip resizes with Pillow, transformers may with torch; both bicubic and antialiased."""
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
