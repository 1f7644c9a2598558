"""Stable Diffusion's and ControlNet's files: every form comes back bit for bit, and what differs is
refused by name."""

import functools
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from sd_tiny import (
    LIGHTNING,
    compvis_state,
    lightning_installed,
    published_form,
    random_networks,
    random_state,
    save_published,
    tiny_configs,
    to_compvis,
)
from tiny import Malice
from tiny_latent import text_condition
from torch import nn

from common.checkpoint import load_strict, save_tensors
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.latent import small as small_diffusion
from common.latent.load import kind_of
from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion import load as files
from common.latent.stable_diffusion import sd14
from common.latent.stable_diffusion.load import load_stable_diffusion
from common.latent.stable_diffusion.naming import (
    CONTROL,
    TEXT,
    UNET,
    VAE,
    linear_attention,
    text_encoder_names,
    unet_names,
    vae_names,
)
from common.latent.stable_diffusion.sd14 import SD14, empty_networks
from common.latent.text_encoder import clip_tokenizer
from p3_controlnet.formats import load_controlnet
from p3_controlnet.model import ControlNet

COUNTS = {"unet": 686, "vae": 248, "text_encoder": 196, "controlnet": 340}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once: it takes as long as all the rest of a tiny model."""
    for module in (files, sd14):
        monkeypatch.setattr(module, "clip_tokenizer", tokenizer)


@functools.cache
def tokenizer() -> Any:
    return clip_tokenizer()


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def networks(configs: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """U-Net, autoencoder, text encoder. Not to be changed."""
    return random_networks(configs)


@pytest.fixture(scope="session")
def sd_file(networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(tmp_path_factory.mktemp("sd") / "sd.ckpt", networks)


@pytest.fixture(scope="session")
def sd_folder(networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers and transformers write it. Copy it before changing it."""
    from diffusers import PNDMScheduler

    folder = tmp_path_factory.mktemp("sd_folder")
    for part, network in zip(("unet", "vae", "text_encoder"), networks, strict=True):
        network.save_pretrained(folder / part)
    tokenizer().save_pretrained(folder / "tokenizer")
    config = read_json(SD14 / "scheduler" / "scheduler_config.json")
    PNDMScheduler.from_config(config).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def control(networks: Any) -> ControlNet:
    control = ControlNet.from_unet(networks[0])
    load_strict(control, random_state(control, torch.Generator().manual_seed(5)), "random")
    return control.eval()


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert [
        key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])
    ] == []


def assert_equal_models(model: LatentDiffusion, networks: Any) -> None:
    for one, other in zip(
        (model.unet, model.autoencoder, model.text_encoder), networks, strict=True
    ):
        assert_equal_weights(one, other)


# ----------------------------------------------------------------------------
# Names.


@pytest.fixture(scope="session")
def full_size() -> dict[str, nn.Module]:
    """v1.4's networks, without memory."""
    unet, vae, text_encoder = empty_networks()
    with torch.device("meta"):
        control = ControlNet(unet.config)
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "controlnet": control}


NAMES = {
    "unet": unet_names,
    "vae": vae_names,
    "text_encoder": text_encoder_names,
    "controlnet": functools.partial(unet_names, prefix=CONTROL),
}


PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "controlnet": CONTROL}


@pytest.mark.parametrize("part", COUNTS)
def test_every_name_has_one_counterpart_and_comes_back(
    full_size: dict[str, nn.Module], part: str
) -> None:
    own = full_size[part].state_dict()
    names = NAMES[part](own)
    assert len(own) == COUNTS[part]
    assert names.keys() == own.keys()
    assert len(set(names.values())) == len(names)
    back = linear_attention(to_compvis(own, names))
    assert {key: back[names[key]].shape for key in own} == {
        key: value.shape for key, value in own.items()
    }


@pytest.mark.parametrize("part", ["unet", "vae", "controlnet"])
def test_names_are_those_of_diffusers_own_conversion(
    full_size: dict[str, nn.Module], part: str
) -> None:
    """Over the whole key list of v1.4: each weight is a number, and lands where diffusers puts
    it."""
    from diffusers.loaders import single_file_utils as theirs

    network = full_size[part]
    names = NAMES[part](network.state_dict())
    numbers = {key: torch.full((1, 1, 1, 1), float(i)) for i, key in enumerate(names)}
    numbered = {names[key]: value for key, value in numbers.items()}
    convert = {
        "unet": theirs.convert_ldm_unet_checkpoint,
        "vae": theirs.convert_ldm_vae_checkpoint,
        "controlnet": theirs.convert_controlnet_checkpoint,
    }[part]
    config = network.encoder_config if part == "controlnet" else network.config
    converted = convert(dict(numbered), dict(config))
    assert converted.keys() == names.keys()
    assert [key for key, value in converted.items() if value.item() != numbers[key].item()] == []


@pytest.mark.parametrize(
    ("part", "ours", "theirs"),
    [
        ("unet", "time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("unet", "down_blocks.0.resnets.0.norm1.weight", "input_blocks.1.0.in_layers.0.weight"),
        ("unet", "down_blocks.2.downsamplers.0.conv.weight", "input_blocks.9.0.op.weight"),
        (
            "unet",
            "down_blocks.3.resnets.1.time_emb_proj.bias",
            "input_blocks.11.0.emb_layers.1.bias",
        ),
        ("unet", "mid_block.resnets.1.conv2.weight", "middle_block.2.out_layers.3.weight"),
        ("unet", "up_blocks.0.upsamplers.0.conv.bias", "output_blocks.2.1.conv.bias"),
        ("unet", "up_blocks.2.upsamplers.0.conv.bias", "output_blocks.8.2.conv.bias"),
        (
            "unet",
            "up_blocks.3.resnets.2.conv_shortcut.weight",
            "output_blocks.11.0.skip_connection.weight",
        ),
        (
            "unet",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight",
        ),
        (
            "vae",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "encoder.down.1.block.0.nin_shortcut.bias",
        ),
        (
            "vae",
            "decoder.up_blocks.0.upsamplers.0.conv.weight",
            "decoder.up.3.upsample.conv.weight",
        ),
        (
            "vae",
            "decoder.mid_block.attentions.0.to_out.0.weight",
            "decoder.mid.attn_1.proj_out.weight",
        ),
        ("text_encoder", "final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("controlnet", "controlnet_cond_embedding.blocks.5.weight", "input_hint_block.12.weight"),
        ("controlnet", "controlnet_cond_embedding.conv_out.bias", "input_hint_block.14.bias"),
        ("controlnet", "controlnet_down_blocks.11.weight", "zero_convs.11.0.weight"),
        ("controlnet", "controlnet_mid_block.bias", "middle_block_out.0.bias"),
    ],
)
def test_known_names(full_size: dict[str, nn.Module], part: str, ours: str, theirs: str) -> None:
    """From the key list of the published files."""
    own = full_size[part].state_dict()
    key = ours if ours in own else f"text_model.{ours}"  # transformers 5.0 inside
    assert NAMES[part](own)[key] == PREFIXES[part] + theirs


def test_a_name_without_counterpart_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"add_embedding\.linear_1\.weight has no name in CompVis' format"
    ):
        unet_names(["add_embedding.linear_1.weight"])


# ----------------------------------------------------------------------------
# Stable Diffusion from one file.


def test_the_published_form_comes_back(sd_file: Path, networks: Any, configs: Path) -> None:
    assert kind_of(sd_file) == "sd_file"
    model = load_stable_diffusion(sd_file, configs=configs)
    assert_equal_models(model, networks)
    assert not any(param.requires_grad or param.is_meta for param in model.parameters())
    assert model.latent_std.item() == pytest.approx(1 / 0.18215)
    assert (model.schedule.num_timesteps, model.parameterization) == (1000, "eps")
    assert model.schedule.betas[0].item() == pytest.approx(0.00085)
    assert model.schedule.betas[-1].item() == pytest.approx(0.012)
    assert model.encode_text(["a circle", ""]).shape == (2, 77, 12)
    assert model.decode(model.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)


def test_safetensors_and_bare_pickles_come_back(
    tmp_path: Path, networks: Any, configs: Path
) -> None:
    state = compvis_state(*networks)
    save_tensors(tmp_path / "sd.safetensors", state)
    shutil.copy(
        tmp_path / "sd.safetensors", tmp_path / "sd.ckpt"
    )  # the content counts, not the name
    torch.save(state, tmp_path / "bare.ckpt")
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("sd.safetensors", "sd.ckpt", "bare.ckpt", "old.ckpt"):
        assert kind_of(tmp_path / name) == "sd_file"
        assert_equal_models(load_stable_diffusion(tmp_path / name, configs=configs), networks)


def test_half_precision_is_read_as_single_and_as_asked(
    tmp_path: Path, networks: Any, configs: Path
) -> None:
    """The networks' values are half precision numbers."""
    half = {key: value.half() for key, value in compvis_state(*networks).items()}
    save_tensors(tmp_path / "half.safetensors", half)
    assert_equal_models(
        load_stable_diffusion(tmp_path / "half.safetensors", configs=configs), networks
    )
    model = load_stable_diffusion(
        tmp_path / "half.safetensors", configs=configs, dtype=torch.bfloat16
    )
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_averaged_weights_win_where_both_are_there(
    tmp_path: Path, networks: Any, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = random_networks(configs, seed=1)[0]
    path = save_published(tmp_path / "ema.ckpt", networks, averaged)
    assert_equal_weights(load_stable_diffusion(path, configs=configs).unet, averaged)
    assert "holds two U-Nets: the averaged one" in capsys.readouterr().err
    assert_equal_weights(load_stable_diffusion(path, configs=configs, ema=True).unet, averaged)
    last = load_stable_diffusion(path, configs=configs, ema=False).unet
    assert_equal_weights(last, networks[0])
    save_tensors(tmp_path / "pruned.safetensors", compvis_state(*networks))
    with pytest.raises(InputError, match=r"\d+ missing \(model_ema\.diffusion_model"):
        load_stable_diffusion(tmp_path / "pruned.safetensors", configs=configs, ema=True)


def test_it_computes_what_diffusers_makes_of_the_file(
    networks: Any, configs: Path, sd_file: Path
) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    model = load_stable_diffusion(sd_file, configs=configs)
    state = compvis_state(*networks)
    unet = UNet2DConditionModel.from_single_file(
        dict(state), config=str(configs), subfolder="unet"
    ).eval()
    vae = AutoencoderKL.from_single_file(dict(state), config=str(configs), subfolder="vae").eval()
    assert_equal_weights(model.unet, unet)
    assert_equal_weights(model.autoencoder, vae)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 981])
    condition = text_condition(model, ["red circle", ""])
    with torch.no_grad():
        assert torch.equal(
            model.apply_model(x_t, t, condition), unet(x_t, t, condition.context).sample
        )
        assert torch.equal(model.decode(x_t), vae.decode(x_t * model.latent_std).sample)


def test_its_own_table_may_be_rounded(tmp_path: Path, networks: Any, configs: Path) -> None:
    table = sd14.noise_schedule(configs).alphas_cumprod
    for dtype in (torch.float16, torch.bfloat16):
        state = {**compvis_state(*networks), "alphas_cumprod": table.to(dtype)}
        save_tensors(tmp_path / "x.safetensors", state)
        load_stable_diffusion(tmp_path / "x.safetensors", configs=configs)


def test_another_noise_schedule_is_refused(tmp_path: Path, networks: Any, configs: Path) -> None:
    for table in (torch.linspace(0.999, 0.0, 1000), torch.ones(10)):
        save_tensors(
            tmp_path / "x.safetensors", {**compvis_state(*networks), "alphas_cumprod": table}
        )
        with pytest.raises(InputError, match="another noise schedule"):
            load_stable_diffusion(tmp_path / "x.safetensors", configs=configs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: s.pop("model.diffusion_model.out.2.bias"),
            r"1 missing \(model\.diffusion_model\.out\.2\.bias\)",
        ),
        (
            lambda s: s.update({"first_stage_model.encoder.extra": torch.ones(1)}),
            r"1 unexpected \(first_stage_model\.encoder\.extra\)",
        ),
        (
            lambda s: s.update(
                {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)}
            ),
            r"1 of another shape \(model\.diffusion_model\.input_blocks\.0\.0\.weight\)",
        ),
        (
            lambda s: [
                s.update({k.replace("transformer.text_model", "model"): s.pop(k)}) for k in list(s)
            ],
            r"is a file of Stable Diffusion 2, not of Stable Diffusion v1",
        ),
        (
            lambda s: s.update({"conditioner.x": torch.ones(1)}),
            r"not a Stable Diffusion v1 file: it holds conditioner\.x",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith(UNET)],
            r"it holds no model\.diffusion_model\.\*",
        ),
    ],
    ids=["missing", "unexpected", "inpainting", "v2", "foreign", "no U-Net"],
)
def test_wrong_keys_are_named_as_in_the_file(
    tmp_path: Path, networks: Any, configs: Path, change: Callable, reason: str
) -> None:
    state = compvis_state(*networks)
    change(state)
    save_tensors(tmp_path / "x.safetensors", state)
    with pytest.raises(InputError, match=reason) as caught:
        load_stable_diffusion(tmp_path / "x.safetensors", configs=configs)
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_a_truncated_file_is_refused(
    tmp_path: Path, sd_file: Path, networks: Any, configs: Path
) -> None:
    save_tensors(tmp_path / "whole.safetensors", compvis_state(*networks))
    for whole in (sd_file, tmp_path / "whole.safetensors"):
        for share in (0.0, 0.01, 0.6, 0.999):
            path = tmp_path / f"cut{whole.suffix}"
            path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
            for read in (lambda p: load_stable_diffusion(p, configs=configs), kind_of):
                with pytest.raises(InputError, match="cut"):
                    read(path)


def test_no_class_of_a_file_ever_runs(tmp_path: Path, configs: Path) -> None:
    """Those of Lightning are replaced by one that does nothing."""
    trace = tmp_path / "it_ran"
    torch.save({**published_form({}), "callbacks": Malice(trace)}, tmp_path / "evil.ckpt")
    with lightning_installed("Other"):
        torch.save(
            {"state_dict": {}, "callbacks": {sys.modules[LIGHTNING].Other: 1}},
            tmp_path / "other.ckpt",
        )
    for read in (lambda p: load_stable_diffusion(p, configs=configs), kind_of):
        with pytest.raises(InputError, match=r"evil\.ckpt was refused"):
            read(tmp_path / "evil.ckpt")
    assert not trace.exists()
    assert kind_of(tmp_path / "other.ckpt") == "unknown"  # it holds no weights


# ----------------------------------------------------------------------------
# Stable Diffusion from a folder.


def test_a_folder_comes_back(sd_folder: Path, networks: Any, configs: Path) -> None:
    assert kind_of(sd_folder) == "sd_folder"
    assert_equal_models(load_stable_diffusion(sd_folder, configs=configs), networks)
    with pytest.raises(InputError, match="no averaged U-Net"):
        load_stable_diffusion(sd_folder, configs=configs, ema=True)


def test_the_form_of_the_first_folders_comes_back(
    tmp_path: Path, sd_folder: Path, networks: Any, configs: Path
) -> None:
    """Pickles, half precision, transformers 4's names, the autoencoder's old names, and
    configurations that leave out defaults."""
    folder = tmp_path / "old"
    shutil.copytree(
        sd_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.json")
    )
    unet, vae, text = (network.state_dict() for network in networks)
    torch.save(unet, folder / "unet" / "diffusion_pytorch_model.bin")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    pattern = re.compile("|".join(map(re.escape, old)))
    vae = {
        pattern.sub(lambda found: old[found[0]], key): value.half() for key, value in vae.items()
    }
    assert sum(".query." in key for key in vae) == 4
    save_tensors(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", vae)
    text = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(text, folder / "text_encoder" / "pytorch_model.bin")
    write_json(folder / "tokenizer" / "vocab.json", tokenizer().get_vocab())
    for part in ("unet", "vae", "text_encoder"):
        shutil.copy(configs / part / "config.json", folder / part / "config.json")
    assert_equal_models(load_stable_diffusion(folder, configs=configs), networks)


def test_flat_names_of_transformers_5_come_back(
    tmp_path: Path, sd_folder: Path, networks: Any, configs: Path
) -> None:
    shutil.copytree(sd_folder, tmp_path / "new")
    flat = {
        key.removeprefix("text_model."): value for key, value in networks[2].state_dict().items()
    }
    save_tensors(tmp_path / "new" / "text_encoder" / "model.safetensors", flat)
    assert_equal_models(load_stable_diffusion(tmp_path / "new", configs=configs), networks)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"attention_head_dim": 4}),  # heads: no weight shows it
        ("unet", {"num_attention_heads": 8}),
        ("unet", {"flip_sin_to_cos": False}),
        ("unet", {"an_option_of_later_versions": 3}),
        ("unet", {"block_out_channels": [8, 16, 24, 32]}),
        ("vae", {"scaling_factor": 0.13025}),
        ("vae", {"shift_factor": 0.1}),
        ("text_encoder", {"num_attention_heads": 3}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("scheduler", {"prediction_type": "v_prediction"}),
        ("scheduler", {"beta_end": 0.02}),
        ("scheduler", {"beta_schedule": "linear"}),
        ("scheduler", {"rescale_betas_zero_snr": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_another_configuration_is_refused(
    tmp_path: Path, sd_folder: Path, configs: Path, part: str, change: dict[str, Any]
) -> None:
    shutil.copytree(sd_folder, tmp_path / "sd")
    path = (
        tmp_path / "sd" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    )
    write_json(path, {**read_json(path), **change})
    ((key, value),) = change.items()
    with pytest.raises(InputError) as caught:
        load_stable_diffusion(tmp_path / "sd", configs=configs)
    assert str(caught.value).startswith(
        f"{path} is not Stable Diffusion v1.4's: {key} is {value!r}, but "
    )


def test_a_folder_is_v14_at_full_size_only(sd_folder: Path) -> None:
    with pytest.raises(InputError, match=r"attention_head_dim is 2, but 8 is expected"):
        load_stable_diffusion(sd_folder)


def test_harmless_differences_are_none(
    tmp_path: Path, sd_folder: Path, networks: Any, configs: Path
) -> None:
    shutil.copytree(sd_folder, tmp_path / "sd")
    for part, change in {
        "unet": {
            "sample_size": 96,
            "upcast_attention": None,
            "new": None,
            "_diffusers_version": "0.2.2",
        },
        "text_encoder": {"torch_dtype": "float16", "eos_token_id": 2},
    }.items():
        path = tmp_path / "sd" / part / "config.json"
        write_json(path, {**read_json(path), **change})
    assert_equal_models(load_stable_diffusion(tmp_path / "sd", configs=configs), networks)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "unet" / "config.json").unlink(), r"unet/config\.json does not exist"),
        (lambda f: (f / "unet" / "config.json").write_text("[]"), "is not a configuration"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: shutil.rmtree(f / "scheduler"), r"scheduler_config\.json does not exist"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer holds no tokenizer"),
        (
            lambda f: write_json(f / "tokenizer" / "vocab.json", {"a": 0}),
            "vocabulary in .* is not Stable Diffusion v1.4's",
        ),
        (
            lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            "vae holds no weights",
        ),
        (
            lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"\x10" + bytes(40)),
            "not a complete safetensors file",
        ),
        (
            lambda f: save_tensors(
                f / "unet" / "diffusion_pytorch_model.safetensors",
                {"conv_in.weight": torch.ones(1)},
            ),
            r"\d+ missing .* 1 of another shape \(conv_in\.weight\)",
        ),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, sd_folder: Path, configs: Path, damage: Callable, reason: str
) -> None:
    shutil.copytree(sd_folder, tmp_path / "sd")
    damage(tmp_path / "sd")
    with pytest.raises(InputError, match=reason):
        load_stable_diffusion(tmp_path / "sd", configs=configs)


# ----------------------------------------------------------------------------
# ControlNet.


def bare(state: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(CONTROL): value for key, value in state.items()}


FORMS: dict[str, Callable[[dict, dict], dict]] = {
    "cldm": lambda ours, theirs: {"state_dict": {**theirs, UNET + "x": torch.ones(1)}},
    "control part": lambda ours, theirs: theirs,
    "control part, diffusers": lambda ours, theirs: {CONTROL + k: v for k, v in ours.items()},
    "state_dict": lambda ours, theirs: {"state_dict": theirs, "epoch": 3},
    "controlnet_state_dict": lambda ours, theirs: {
        "controlnet_state_dict": ours,
        "step": 100,
        "lr": 1e-5,
    },
    "controlnet_state_dict, CompVis": lambda ours, theirs: {"controlnet_state_dict": bare(theirs)},
    "control_model": lambda ours, theirs: {"control_model": bare(theirs)},
    "control_model, diffusers": lambda ours, theirs: {"control_model": ours},
    "bare CompVis": lambda ours, theirs: bare(theirs),
    "bare diffusers": lambda ours, theirs: ours,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_form_of_controlnet_comes_back(
    tmp_path: Path, networks: Any, control: ControlNet, form: str, suffix: str
) -> None:
    ours = control.state_dict()
    content = FORMS[form](ours, to_compvis(ours, unet_names(ours, CONTROL)))
    path = tmp_path / f"control{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    else:
        save_tensors(path, next((v for v in content.values() if isinstance(v, dict)), content))
    assert kind_of(path) == "controlnet"
    loaded = load_controlnet(path, networks[0])
    assert_equal_weights(loaded, control)
    assert not loaded.training and all(param.requires_grad for param in loaded.parameters())


def test_a_whole_cldm_file_is_a_base_as_well(
    tmp_path: Path, networks: Any, control: ControlNet, configs: Path
) -> None:
    ours = control.state_dict()
    whole = {**compvis_state(*networks), **to_compvis(ours, unet_names(ours, CONTROL))}
    save_tensors(tmp_path / "whole.safetensors", whole)
    assert kind_of(tmp_path / "whole.safetensors") == "controlnet"
    model = load_stable_diffusion(tmp_path / "whole.safetensors", configs=configs)
    assert_equal_models(model, networks)
    assert_equal_weights(load_controlnet(tmp_path / "whole.safetensors", model.unet), control)


def test_a_controlnet_folder_goes_to_diffusers_and_back(
    tmp_path: Path, networks: Any, control: ControlNet
) -> None:
    from diffusers import ControlNetModel

    control.save(tmp_path / "ours")
    assert kind_of(tmp_path / "ours") == "controlnet"
    assert_equal_weights(load_controlnet(tmp_path / "ours", networks[0]), control)
    theirs = ControlNetModel.from_pretrained(tmp_path / "ours").eval()
    assert_equal_weights(theirs, control)
    theirs.save_pretrained(tmp_path / "theirs")
    assert kind_of(tmp_path / "theirs") == "controlnet"
    assert_equal_weights(load_controlnet(tmp_path / "theirs", networks[0]), control)
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(control.state_dict(), tmp_path / "theirs" / "diffusion_pytorch_model.bin")
    assert_equal_weights(load_controlnet(tmp_path / "theirs", networks[0]), control)
    assert {
        p.dtype
        for p in load_controlnet(tmp_path / "theirs", networks[0], dtype=torch.half).parameters()
    } == {torch.half}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"attention_head_dim": 4},
            r"of another base model: attention_head_dim is 4, but 2 is expected",
        ),
        (
            {"cross_attention_dim": 768},
            r"of another base model: cross_attention_dim is 768, but 12 is expected",
        ),
        ({"controlnet_conditioning_channel_order": "bgr"}, "controlnet_conditioning_channel_order"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_controlnet_of_another_base_is_refused(
    tmp_path: Path, networks: Any, control: ControlNet, change: dict[str, Any], reason: str
) -> None:
    control.save(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps({**read_json(path), **change}))
    with pytest.raises(InputError, match=reason) as caught:
        load_controlnet(tmp_path / "c", networks[0])
    assert str(tmp_path / "c") in str(caught.value)


def test_wrong_controlnet_files_are_refused(
    tmp_path: Path, networks: Any, control: ControlNet, sd_file: Path
) -> None:
    ours = control.state_dict()
    theirs = to_compvis(ours, unet_names(ours, CONTROL))
    del theirs["control_model.zero_convs.3.0.bias"]
    save_tensors(tmp_path / "a.safetensors", theirs)
    with pytest.raises(
        InputError,
        match=r"a\.safetensors do not fit .* 1 missing \(control_model\.zero_convs\.3\.0\.bias\)",
    ):
        load_controlnet(tmp_path / "a.safetensors", networks[0])
    with pytest.raises(InputError, match=r"holds no ControlNet: neither control_model\."):
        load_controlnet(sd_file, networks[0])
    torch.save({"control_model": {"a": "text"}}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="does not hold a dict of named weights"):
        load_controlnet(tmp_path / "b.pth", networks[0])
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        load_controlnet(tmp_path / "none.pth", networks[0])


def test_a_difference_controlnet_is_added_to_its_base(
    tmp_path: Path, networks: Any, control: ControlNet
) -> None:
    """The form of the web UI's extension: a tensor named "difference" marks the file."""
    base, ours = networks[0].state_dict(), control.state_dict()
    change = {key: value - base[key] if key in base else value for key, value in ours.items()}
    file = bare(to_compvis(change, unet_names(change, CONTROL)))
    save_tensors(tmp_path / "diff.safetensors", {**file, "difference": torch.ones(1)})
    loaded = load_controlnet(tmp_path / "diff.safetensors", networks[0])
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, ours[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_controlnet", "a ControlLoRA"),
        ("body.0.block1.weight", "a T2I-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("lllite_unet_input_blocks_4_1.depth1.0.weight", "a ControlNet-LLLite"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("add_embedding.linear_1.weight", "Stable Diffusion XL"),
        ("controlnet_x_embedder.weight", "Stable Diffusion 3 or Flux"),
        ("down_blocks.0.motion_modules.0.proj_in.weight", "a SparseCtrl"),
    ],
)
def test_other_forms_are_refused_by_their_names(
    tmp_path: Path, networks: Any, control: ControlNet, name: str, kind: str
) -> None:
    save_tensors(tmp_path / "x.safetensors", {**control.state_dict(), name: torch.ones(1)})
    with pytest.raises(InputError, match=rf"x\.safetensors is .*{kind}"):
        load_controlnet(tmp_path / "x.safetensors", networks[0])


def test_a_controlnet_of_stable_diffusion_2_is_refused_by_its_name(
    tmp_path: Path, networks: Any, control: ControlNet
) -> None:
    state = {
        key: torch.ones(len(value), 1024) if key.endswith("attn2.to_k.weight") else value
        for key, value in control.state_dict().items()
    }
    save_tensors(tmp_path / "x.safetensors", state)
    with pytest.raises(InputError, match="a ControlNet for Stable Diffusion 2: its text features"):
        load_controlnet(tmp_path / "x.safetensors", networks[0])


def test_parts_that_no_network_needs_are_left_out_and_said(
    tmp_path: Path, networks: Any, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = (
        "embedding_manager.string_to_param_dict.*",
        "first_stage_model.loss.perceptual_loss.lin0.model.1.weight",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.logit_scale",
    )
    state = compvis_state(*networks) | {name: torch.ones(1) for name in extra}
    save_tensors(tmp_path / "extra.safetensors", state)
    assert_equal_models(
        load_stable_diffusion(tmp_path / "extra.safetensors", configs=configs), networks
    )
    assert "4 weights in" in capsys.readouterr().err


def test_shards_wrappers_and_the_hubs_cache_are_understood(
    tmp_path: Path, sd_folder: Path, networks: Any, configs: Path
) -> None:
    """A cache's root is followed to the snapshot of refs/main, and shards by their index."""
    root = tmp_path / "models--X--Y"
    shutil.copytree(sd_folder, root / "snapshots" / "abc")
    (root / "snapshots" / "old").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    unet = root / "snapshots" / "abc" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    state = networks[0].state_dict()
    names = sorted(state)
    first, second = (f"a-0000{k}-of-00002.safetensors" for k in (1, 2))
    shards = {first: names[::2], second: names[1::2]}
    for file, own in shards.items():
        save_tensors(unet / file, {f"module.{name}": state[name] for name in own})
    write_json(
        unet / "diffusion_pytorch_model.safetensors.index.json",
        {"weight_map": {f"module.{name}": file for file, own in shards.items() for name in own}},
    )
    assert kind_of(root) == "sd_folder"
    assert_equal_models(load_stable_diffusion(root, configs=configs), networks)
    (unet / second).unlink()
    with pytest.raises(InputError, match=f"{second}, which .* names, does not exist"):
        load_stable_diffusion(root, configs=configs)
    (root / "refs" / "main").unlink()
    with pytest.raises(InputError, match="with 2 snapshots"):
        kind_of(root)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.full((8,), float("nan")), "is not finite"),
        (torch.ones(8, dtype=torch.int8), "1 of another kind of number"),
        (torch.ones(8, dtype=torch.bool), "1 of another kind of number"),
        (torch.ones(8, dtype=torch.complex64), "1 of another kind of number"),
        (torch.ones(1), "1 of another shape"),
    ],
)
def test_weights_that_would_draw_nonsense_are_refused(
    tmp_path: Path, networks: Any, configs: Path, value: torch.Tensor, reason: str
) -> None:
    for name in (
        "model.diffusion_model.input_blocks.0.0.bias",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        state = compvis_state(*networks)
        bad = value if len(value) == 1 else value[:1].expand_as(state[name])
        save_tensors(tmp_path / "x.safetensors", state | {name: bad})
        with pytest.raises(InputError, match=reason):
            load_stable_diffusion(tmp_path / "x.safetensors", configs=configs)


# ----------------------------------------------------------------------------
# What is it?


def test_other_things_are_unknown(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    torch.save([1, 2], tmp_path / "b.pt")
    torch.save({1: 2}, tmp_path / "c.pt")
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "list" / "config.json", [])
    for name in ("a.safetensors", "b.pt", "c.pt", "empty", "list"):
        assert kind_of(tmp_path / name) == "unknown"
    assert kind_of(ROOT / "checkpoints" / "p1_digits") == "unknown"
    assert kind_of(ROOT / "checkpoints" / "p1_digits" / "model.safetensors") == "unknown"
    write_json(tmp_path / "small" / "config.json", {"kind": small_diffusion.KIND})
    assert kind_of(tmp_path / "small") == "small"
    (tmp_path / "text.ckpt").write_text("hello, this is no weight file")
    for name in ("text.ckpt", "nothing"):
        with pytest.raises(InputError, match=name):
            kind_of(tmp_path / name)


def test_the_kind_is_found_without_reading_the_values(
    sd_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 4 GB is only looked at: its tensors stay mapped."""
    loaded = []
    original = torch.load

    def spy(*args: Any, **options: Any) -> Any:
        loaded.append(options["mmap"])
        return original(*args, **options)

    monkeypatch.setattr(torch, "load", spy)
    assert kind_of(sd_file) == "sd_file"
    assert set(loaded) == {True}


# ----------------------------------------------------------------------------
# Versions.


def test_the_floor_of_transformers_is_stated_and_kept() -> None:
    """5.0 still has transformers 4's names inside CLIPTextModel and later ones have not; both load
    here. 4 is not supported."""
    stated = re.search(
        r"^transformers>=(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    floor = tuple(map(int, stated.groups()))
    assert floor == (5, 0)
    assert tuple(map(int, version("transformers").split(".")[:2])) >= floor


def test_the_bundled_configurations_are_v14s() -> None:
    """What shared/CONTRACT.md of the task lists, and the parameter counts that the paper and the
    model card give."""
    unet, vae, text_encoder = empty_networks()
    assert unet.config.attention_head_dim == 8
    assert [sum(p.numel() for p in n.parameters()) for n in (unet, vae, text_encoder)] == [
        859520964,
        83653863,
        123060480,
    ]
