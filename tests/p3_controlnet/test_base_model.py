"""The small latent-diffusion model: its folder, its normalised latents, and its two trainers."""

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import exit_code, refused, stop_after
from tiny_base import SMALL_AUTOENCODER, SMALL_UNET, UNET, tiny_base, tiny_control
from tiny_latent import seeded
from tiny_pairs import write_pairs
from torch import Tensor
from torch.nn import functional as F

from common.checkpoint import load_tensors, state_hash
from common.data.examples import DrawnCircles, drawn_examples
from common.data.shapes import KINDS, Scene, Shape
from common.diffusion.loss import min_snr_weight
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.images import to_model_range
from common.latent.load import holds_base, kind_of, load_base
from common.latent.model import LatentCondition, LatentDiffusion
from common.latent.small import (
    AutoencoderConfig,
    UNetConfig,
    build_autoencoder,
    build_unet,
    latent_statistics,
    load_model,
    load_network,
    psnr,
    save_model,
    save_network,
)
from common.latent.text_encoder import clip_tokenizer, load_text_encoder, load_text_tower
from common.seeds import StackedRandomGenerator
from p3_controlnet.base import train_autoencoder, train_text, train_unet
from p3_controlnet.formats import is_small, load_controlnet
from p3_controlnet.latent_cache import LatentCache
from p3_controlnet.loss import latent_loss

FEW = (
    "--pictures",
    12,
    "--batch-size",
    4,
    "--warmup",
    1,
    "--device",
    "cpu",
    "--log-every",
    1,
    "--checkpoint-every",
    2,
)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_base()


@pytest.fixture(scope="module")
def folder(model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as trained ones are stored. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, model, zero_terminal=True)
    return folder


@pytest.fixture(autouse=True)
def small_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pictures to look at."""
    for name, value in {"VALIDATION_IMAGES": 6, "PREVIEW_IMAGES": 4}.items():
        monkeypatch.setattr(train_autoencoder, name, value)
    for name, value in {
        "VALIDATION_EXAMPLES": 6,
        "MEASURED_EXAMPLES": 8,
        "PREVIEW_COLUMNS": 1,
    }.items():
        monkeypatch.setattr(train_unet, name, value)
    monkeypatch.setattr(train_unet, "PREVIEW_PROMPTS", train_unet.PREVIEW_PROMPTS[:2])


# ----------------------------------------------------------------------------
# The folder.


def test_the_folder_gives_the_model_back(model: LatentDiffusion, folder: Path) -> None:
    """But for rounding to half precision."""
    again = load_model(folder)
    for ours, theirs in ((model.unet, again.unet), (model.autoencoder, again.autoencoder)):
        for (name, a), b in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            assert b.dtype == torch.float32 and torch.equal(a.half().float(), b), name
    assert torch.equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    assert float(again.schedule.alphas_cumprod[-1]) == 0.0 and again.parameterization == "v"
    assert (again.side, again.latent_side, again.downscale) == (64, 16, 4)
    assert torch.equal(again.latent_mean, model.latent_mean) and torch.equal(
        again.latent_std, model.latent_std
    )
    for prompts in (["red circle with blue background"], [""]):
        assert torch.allclose(again.encode_text(prompts), model.encode_text(prompts), atol=1e-2)
    assert not any(p.requires_grad for p in again.parameters())


def test_diffusers_and_transformers_read_its_parts(
    model: LatentDiffusion, folder: Path, offline: None
) -> None:
    from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    for kind, part, ours in (
        (UNet2DConditionModel, "unet", model.unet),
        (AutoencoderDC, "vae", model.autoencoder),
        (CLIPTextModel, "text_encoder", model.text_encoder),
    ):
        theirs = kind.from_pretrained(folder / part, torch_dtype=torch.float32).state_dict()
        assert theirs.keys() == ours.state_dict().keys()
        assert all(
            torch.equal(value, ours.state_dict()[name].half().float())
            for name, value in theirs.items()
        )
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.allclose(
        scheduler.alphas_cumprod.double(), model.schedule.alphas_cumprod, atol=1e-6
    )


def test_the_folder_is_told_from_stable_diffusions(
    model: LatentDiffusion, folder: Path, tmp_path: Path
) -> None:
    assert kind_of(folder) == "small" and load_base(folder).side == 64
    shutil.copytree(folder, tmp_path / "nameless")
    (tmp_path / "nameless" / "config.json").unlink()
    assert kind_of(tmp_path / "nameless") == "sd_folder"
    with pytest.raises(InputError, match="is not Stable Diffusion v1.4's"):
        load_base(tmp_path / "nameless")
    with pytest.raises(InputError, match="is no base model"):
        load_base(folder / "unet")
    with pytest.raises(InputError, match="does not exist"):
        load_base(tmp_path / "none")


def test_a_small_control_folder_fits_its_own_base_alone(
    model: LatentDiffusion, folder: Path, tmp_path: Path
) -> None:
    control = tiny_control(model)
    control.save(tmp_path)
    assert kind_of(tmp_path) == "controlnet" and is_small(tmp_path) and not holds_base(tmp_path)
    again = load_controlnet(tmp_path, load_base(folder).unet)
    assert again.hint_channels == (4, 8, 8) and state_hash(again) == state_hash(control)
    with pytest.raises(InputError, match="is a ControlNet without its base model"):
        load_base(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"block_out_channels": [320, 640, 1280, 1280]})
    assert not is_small(tmp_path)
    with pytest.raises(InputError, match="of another base model: block_out_channels"):
        load_controlnet(tmp_path, model.unet)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", {"latent_std": [1.0]}, "latent_std must be 4 numbers"),
        (
            "config.json",
            {"kind": "p1_diffusion.ContextUNet"},
            "holds a model of kind 'p1_diffusion.ContextUNet'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow"},
            "prediction_type must be one of epsilon, sample, v_prediction, not flow",
        ),
        (
            "unet/config.json",
            {"_class_name": "Other"},
            "holds a Other, but UNet2DConditionModel is expected",
        ),
        (
            "unet/config.json",
            {"block_out_channels": [16]},
            "does not describe a UNet2DConditionModel",
        ),
        ("vae/config.json", {"latent_channels": 8}, "the weights in .*vae.* do not fit the model"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    file: str, change: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "base")
    write_json(tmp_path / "base" / file, read_json(folder / file) | change)
    with pytest.raises(InputError, match=sentence):
        load_model(tmp_path / "base")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the checkpoint folder .*none does not exist"):
        load_model(tmp_path / "none")


# ----------------------------------------------------------------------------
# The autoencoder.


def test_latents_have_mean_0_and_variance_1_by_the_measured_statistics(
    model: LatentDiffusion,
) -> None:
    images = to_model_range(drawn_examples(10, 64, 0).images)
    statistics = latent_statistics(model.autoencoder, images)
    normal = LatentDiffusion(
        model.autoencoder,
        model.text_encoder,
        model.tokenizer,
        model.unet,
        model.schedule,
        **statistics,
    )
    latents = normal.encode(images)
    assert (
        latents.mean((0, 2, 3)).abs().max() < 1e-4
        and (latents.std((0, 2, 3)) - 1.0).abs().max() < 1e-4
    )
    with torch.no_grad():
        raw = model.autoencoder.encode(images).latent
        expected = model.autoencoder.decode(raw).sample
    assert (raw.std((0, 2, 3)) - 1.0).abs().min() > 0.05  # there was something to do
    assert torch.allclose(normal.decode(latents), expected, atol=1e-4)
    one = latent_statistics(model.autoencoder, images, channelwise=False)
    assert set(one["latent_mean"]) == {0.0} and one["latent_std"] == pytest.approx(
        [raw.std().item()] * raw.shape[1]
    )


def test_a_new_autoencoder_keeps_a_flat_colour_apart_from_the_rest_of_the_picture() -> None:
    """What a position becomes depends on its neighbourhood alone, not on statistics of the whole
    picture."""
    autoencoder = seeded(build_autoencoder, AutoencoderConfig())
    flat = torch.full((1, 3, 128, 128), 0.3)
    other = flat.clone()
    other[..., 96:] = -0.9
    with torch.no_grad():
        a, b = (autoencoder.decode(autoencoder.encode(x).latent).sample for x in (flat, other))
    assert torch.allclose(a[..., :8], b[..., :8], atol=1e-6) and not torch.allclose(
        a[..., 96:], b[..., 96:], atol=1e-2
    )


def test_psnr() -> None:
    images = torch.zeros(2, 3, 4, 4)
    assert psnr(images, images + 0.02) == pytest.approx(40.0, abs=1e-3)  # a hundredth of the range
    assert psnr(images, images) == pytest.approx(100.0)


def run_autoencoder(run: Path, *flags: Any) -> int:
    return exit_code(
        train_autoencoder.main,
        train_autoencoder.Config,
        "--run-dir",
        run,
        *FEW,
        *SMALL_AUTOENCODER,
        *flags,
    )


def test_the_autoencoder_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderDC

    run, whole = tmp_path / "run", tmp_path / "whole"
    assert run_autoencoder(whole, "--steps", 4) == 0
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["validation_psnr"] > 0.0
    assert lines[-1]["validation_loss"] == -lines[-1]["validation_psnr"]
    assert (whole / "samples" / "0000004.png").is_file()
    saved = load_network(whole / "last", AutoencoderDC)
    weights = load_tensors(whole / "last" / "diffusion_pytorch_model.safetensors")[0]
    assert {value.dtype for value in weights.values()} == {torch.float16}

    # Stopped after two of four steps, then gone on with: the same weights as without a stop.
    with monkeypatch.context() as patch:
        patch.setattr(train_autoencoder, "fit", stop_after(train_autoencoder.fit, 2))
        assert run_autoencoder(run, "--steps", 4) == 130
    assert load_tensors(run / "state.safetensors")[1]["step"] == 2
    assert run_autoencoder(run, "--steps", 4) == 0
    assert state_hash(load_network(run / "last", AutoencoderDC)) == state_hash(saved)


# ----------------------------------------------------------------------------
# The U-Net, and what it is trained on.


def run_unet(run: Path, autoencoder: Path, *flags: Any) -> int:
    text = autoencoder.parent / "text_encoder"
    arguments = (
        "--run-dir",
        run,
        "--text-encoder",
        text,
        "--autoencoder",
        autoencoder,
        *FEW,
        *SMALL_UNET,
    )
    return exit_code(train_unet.main, train_unet.Config, *arguments, *flags)


def test_the_unet_trains_resumes_and_is_saved_as_a_whole_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    write_pairs(tmp_path / "fill50k" / "training", 2)
    flags = ("--steps", 4, "--fill50k", tmp_path / "fill50k")
    assert run_unet(whole, folder / "vae", *flags) == 0
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and lines[-1]["validation_loss"] > 0.0
    assert (whole / "samples" / "0000004.png").is_file()
    header = read_json(whole / "latent_cache" / "header.json")
    assert header["arrays"]["latents"]["rows"] == 14 and "hints" not in header["arrays"]
    saved = load_base(whole / "last")
    assert saved.unet.config.block_out_channels == [16, 32] and saved.parameterization == "v"
    assert state_hash(saved.autoencoder) == state_hash(load_model(folder).autoencoder)

    with monkeypatch.context() as patch:
        patch.setattr(train_unet, "fit", stop_after(train_unet.fit, 2))
        assert run_unet(run, folder / "vae", *flags) == 130
    assert run_unet(run, folder / "vae", *flags) == 0
    assert state_hash(load_base(run / "last").unet) == state_hash(saved.unet)

    # Another run starts from these weights; other frozen parts are another run.
    assert (
        run_unet(
            tmp_path / "next", folder / "vae", "--steps", 1, "--init-from", whole / "last" / "unet"
        )
        == 0
    )
    save_network(tmp_path / "wide", build_unet(UNET, saved.autoencoder, 48))
    for unfit in (folder / "vae", tmp_path / "wide"):
        assert run_unet(tmp_path / "other", folder / "vae", "--init-from", unfit) == 2
    other = saved.autoencoder
    other.encoder.conv_out.bias.data += 1.0
    save_network(tmp_path / "vae", other)
    assert run_unet(run, tmp_path / "vae", *flags, "--text-encoder", folder / "text_encoder") == 2


def test_a_unet_for_other_latents_keeps_all_but_its_first_and_last_convolution(
    model: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_network(tmp_path, model.unet)

    def started(channels: int) -> dict[str, Tensor]:
        autoencoder = types.SimpleNamespace(config=types.SimpleNamespace(latent_channels=channels))
        new = build_unet(UNET, autoencoder, model.unet.config.cross_attention_dim)
        unet = train_unet.initialised_from(tmp_path, new)
        assert unet.config.in_channels == unet.config.out_channels == channels
        save_network(tmp_path / str(channels), unet)
        return load_network(tmp_path / str(channels), type(unet)).state_dict()

    before, count = model.unet.state_dict(), model.unet.config.in_channels
    same = started(count)
    assert all(torch.equal(same[name], value) for name, value in before.items())
    assert not capsys.readouterr().err
    other = started(count + 3)
    changed = {
        n for n in before if other[n].shape != before[n].shape or (other[n] != before[n]).any()
    }
    assert changed == {f"conv_{end}.{part}" for end in ("in", "out") for part in ("weight", "bias")}
    said = f"{len(before) - 4} of {len(before)} weights are taken from it, the others start anew"
    assert said in capsys.readouterr().err


def test_the_compiled_network_is_the_one_that_is_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compiled(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            calls.append(inputs)
            return network(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    for name, flags in (("plain", ()), ("compiled", ("--compile",))):
        assert run_unet(tmp_path / name, folder / "vae", "--steps", 2, *flags) == 0
    assert len(calls) == 2  # steps; neither the validation nor the preview
    first, second = (load_base(tmp_path / name / "last").unet for name in ("plain", "compiled"))
    assert state_hash(first) == state_hash(second)


def test_the_text_tower_is_tuned_resumes_and_is_saved_for_the_unet(
    clip_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (
        "--clip",
        clip_world / "model",
        "--captions",
        40,
        "--steps",
        30,
        "--batch-size",
        20,
        "--lr",
        0.02,
    )
    flags += ("--warmup", 5, "--checkpoint-every", 10, "--validate-every", 30, "--device", "cpu")

    def run(name: str) -> int:
        return exit_code(train_text.main, train_text.Config, "--run-dir", tmp_path / name, *flags)

    assert run("whole") == 0
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["validation_phrase_colour_error"] > 0.0
    tokenizer, tower = load_text_encoder(tmp_path / "whole" / "last")
    before = load_text_tower(clip_world / "model")[1]
    assert (
        state_hash(tower) != state_hash(before)
        and tower.config.num_hidden_layers == before.config.num_hidden_layers
    )
    with monkeypatch.context() as patch:
        patch.setattr(train_text, "fit", stop_after(train_text.fit, 10))
        assert run("run") == 130
    assert run("run") == 0
    assert state_hash(load_text_encoder(tmp_path / "run" / "last")[1]) == state_hash(tower)


def test_what_captions_say_at_which_positions() -> None:
    tokenizer = clip_tokenizer(32)
    star = Shape("star", "light slate gray", 0.3, 0.3, 0.2)
    circle = Shape("circle", "red", 0.7, 0.7, 0.2)
    twins = Scene("teal", (circle, circle))
    scenes = [Scene("blue", (star, circle)), Scene("teal", (circle,)), twins]
    captions = [scenes[0].caption, "a photo of a red circle", twins.counted]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    nouns = ["background", *KINDS, *(f"{kind}s" for kind in KINDS)]
    tokens = [noun[-1] for noun in tokenizer(nouns, add_special_tokens=False).input_ids]
    batch = {"ids": ids, **train_text.targets(ids, scenes, tokens)}
    words = [
        [word.removesuffix("</w>") for word in tokenizer.convert_ids_to_tokens(row)] for row in ids
    ]
    named = [
        {(word, region) for word, region in zip(*row, strict=True) if region >= 0}
        for row in zip(words, batch["phrase"].tolist(), strict=True)
    ]
    assert named[0] == {
        ("gray", 1),
        ("star", 1),
        ("red", 2),
        ("circle", 2),
        ("blue", 0),
        ("background", 0),
    }
    assert named[1] == {("red", 1), ("circle", 1)} and named[2] == {("red", 1), ("circles", 1)}
    assert [[train_text.WHAT[kind] for kind in row] for row in batch["kinds"]] == [
        ["background", "star", "circle", "nothing"],
        ["nothing", "circle", "nothing", "nothing"],
        ["nothing", "circle", "circle", "nothing"],
    ]
    assert torch.allclose(batch["colours"][0, 2], torch.tensor([1.0, -1.0, -1.0]))

    # A reader that says exactly this has no loss; one that is off everywhere has what it is off.
    colours = batch["colours"][:, None].repeat(1, 32, 1, 1)
    kinds = batch["kinds"][:, None].expand(-1, 32, -1)
    regions = batch["phrase"].clamp(min=0)
    own = colours.gather(2, regions[..., None, None].expand(-1, -1, 1, 3))[:, :, 0]
    logits = [
        100.0 * F.one_hot(values, count).float()
        for values, count in ((kinds, len(train_text.WHAT)), (regions, train_text.REGIONS))
    ]
    end = tokenizer.eos_token_id
    right = (colours, logits[0], own, logits[1])
    assert train_text.readout_loss(right, batch, end) < 1e-6
    assert max(train_text.colour_errors(right, batch, end)) < 1e-3
    off = (colours + 0.1, logits[0], own - 0.2, logits[1])
    assert abs(train_text.readout_loss(off, batch, end) - (0.01 + 0.04)) < 1e-5
    assert min(train_text.colour_errors(off, batch, end)) > 1.0


def test_trainings_that_make_no_sense(folder: Path, tmp_path: Path, capsys: Any) -> None:
    parts = (
        "--run-dir",
        tmp_path / "run",
        "--autoencoder",
        folder / "vae",
        "--text-encoder",
        folder / "text_encoder",
    )
    for flags, sentence in (
        (("--pictures", 0), "--pictures must be between 1 and 10000000, not 0"),
        (
            ("--parameterization", "eps"),
            "eps prediction needs --no-zero-terminal",
        ),
        (("--autoencoder", tmp_path), "config.json does not exist"),
        (
            ("--autoencoder", folder / "unet"),
            "holds a UNet2DConditionModel, but AutoencoderDC is expected",
        ),
        (("--text-encoder", tmp_path / "none"), "config.json does not exist"),
        (("--text-encoder", folder / "unet"), "does not describe a CLIPTextModel"),
    ):
        assert sentence in refused(
            capsys, train_unet.main, train_unet.Config, *parts, *SMALL_UNET, *flags
        )
        assert not (tmp_path / "run").exists()
    sentence = refused(
        capsys,
        train_autoencoder.main,
        train_autoencoder.Config,
        "--run-dir",
        tmp_path,
        "--pictures",
        0,
    )
    assert sentence == "--pictures must be between 1 and 10000000, not 0"
    for flags, sentence in (
        (("--captions", 0), "--captions must be between 1 and 10000000, not 0"),
        (("--clip", tmp_path / "none"), "the model folder"),
    ):
        words = ("--run-dir", tmp_path / "run", *flags)
        assert sentence in refused(capsys, train_text.main, train_text.Config, *words)
    assert not (tmp_path / "run").exists()


def test_the_default_model_is_small() -> None:
    """In half precision its two networks leave 14 MB of 40 to the text tower, which is the CLIP's,
    and 6 to a ControlNet."""
    with torch.device("meta"):
        autoencoder = build_autoencoder(AutoencoderConfig())
        unet = build_unet(UNetConfig(), autoencoder, 128)
    assert (
        2 * sum(p.numel() for network in (autoencoder, unet) for p in network.parameters()) < 20e6
    )


def test_the_shipped_model_and_its_control_network_have_40_megabytes() -> None:
    folders = (ROOT / "checkpoints" / name for name in ("ldm_shapes", "controlnet_circles"))
    files = [file for folder in folders for file in folder.rglob("*.safetensors")]
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 40e6


def test_the_loss_is_the_weighted_one_and_hides_captions_but_not_hints(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    """One loss for the base and for ControlNet."""
    cache = LatentCache.cached(tmp_path / "cache", model, DrawnCircles(1, 64, 0), {})
    batch, seen = cache.take(torch.tensor([0])), []

    def apply_model(x_t: torch.Tensor, t: torch.Tensor, cond: LatentCondition) -> torch.Tensor:
        seen.append((t, cond))
        return torch.zeros_like(x_t)

    spy = types.SimpleNamespace(
        apply_model=apply_model,
        schedule=model.schedule,
        parameterization="v",
        controlnet=types.SimpleNamespace(control_text="full"),
    )

    def loss(part: dict[str, torch.Tensor], cond_drop_prob: float, gamma: float | None) -> float:
        options = {"cond_drop_prob": cond_drop_prob, "min_snr_gamma": gamma, "snr_offset": 1.0}
        return latent_loss(spy, part, cache.null, StackedRandomGenerator([3]), **options).item()

    plain, weighted = loss(batch, 0.0, None), loss(batch, 1.0, 5.0)
    (t, kept), (_, hidden) = seen
    weight = min_snr_weight(model.schedule.snr(t), 5.0, "v", 1.0).item()
    assert weight < 1.0 and weighted == pytest.approx(plain * weight)
    assert torch.equal(kept.context, batch["context"].float())
    assert torch.equal(hidden.context, cache.null.float().expand_as(kept.context))
    for cond in (kept, hidden):
        assert torch.equal(cond.hint, batch["hint"].expand(-1, 3, -1, -1) / 255.0)
    loss({name: value for name, value in batch.items() if name != "hint"}, 0.0, None)
    assert seen[-1][1].hint is None
