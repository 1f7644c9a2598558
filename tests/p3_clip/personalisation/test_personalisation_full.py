"""Personalisation at the full size of Stable Diffusion v1.4, with random weights: `pytest -m full`.
Takes minutes and 12 GB of memory."""

import copy
import gc
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sd_tiny import random_networks
from tiny import exit_code
from tiny_latent import text_condition
from torch import Tensor

from common.checkpoint import load_tensors
from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion.sd14 import SD14, noise_schedule
from common.latent.text_encoder import clip_tokenizer
from p3_clip.personalisation import train
from p3_clip.personalisation.custom_diffusion import projections
from p3_clip.personalisation.model import load_learned, personalise

FLAGS = (
    *("--preset", "sd14", "--clip", "none", "--words", "dog", "--steps", 1, "--batch-size", 1),
    *("--views", 1, "--mixed-precision", "no", "--warmup", 0, "--lr", 0.01, "--device", "cpu"),
    *("--validate-every", 0, "--preview-every", 0),
)


class Base:
    """v1.4 of random weights, whose parts that personalisation changes can be put back."""

    def __init__(self) -> None:
        unet, vae, text_encoder = random_networks(SD14)
        unet.register_to_config(sample_size=32)  # pictures of 256
        self.model = LatentDiffusion(
            vae, text_encoder, clip_tokenizer(), unet, noise_schedule(), latent_std=5.49
        )
        self._text_encoder = copy.deepcopy(text_encoder)
        self._matrices = {key: x.detach().clone() for key, x in projections(unet).items()}

    def fresh(self) -> LatentDiffusion:
        """The model as it was at first."""
        self.model.text_encoder = copy.deepcopy(self._text_encoder)
        self.model.tokenizer = clip_tokenizer()
        self.model.requires_grad_(False)
        self.model.unet.load_state_dict(self._matrices, strict=False)
        return self.model


def step(model: LatentDiffusion) -> Tensor:
    """The U-Net's output for a prompt with the learned word."""
    x_t = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    condition = text_condition(model, ["a photo of a <new1> dog"])
    with torch.no_grad():
        return model.apply_model(x_t, torch.tensor([500]), condition)


@pytest.mark.full
def test_what_is_learned_works_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "0.png")
    gc.collect()
    base = Base()
    monkeypatch.setattr(train, "load_base", lambda path: base.fresh())
    monkeypatch.setattr(train, "base_hash", lambda model: "random")
    monkeypatch.setattr("p3_clip.personalisation.model.base_hash", lambda model: "random")
    monkeypatch.setattr("p3_clip.personalisation.base_kind.kind_of", lambda path: "sd_folder")
    before = step(base.fresh())
    for method, more in (
        ("textual-inversion", ()),
        ("custom-diffusion", ("--num-class-images", 0)),
    ):
        run = tmp_path / method
        flags = (method, "--run-dir", run, "--base", tmp_path, "--photos", tmp_path / "photos")
        assert exit_code(train.main, train.Config, *flags, *FLAGS, *more) == 0

        model = base.fresh()
        personalise(model, load_learned([run / "last"], model))
        ours = step(model)

        model = base.fresh()
        pipeline = StableDiffusionPipeline(
            vae=model.autoencoder,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        tensors = load_tensors(run / "last" / "model.safetensors")[0]
        words = {
            name.removeprefix("concept/"): vectors
            for name, vectors in tensors.items()
            if not name.startswith("unet/")
        }
        matrices = {
            name.removeprefix("unet/"): value
            for name, value in tensors.items()
            if name.startswith("unet/")
        }
        assert list(words) == ["<new1>"] and len(matrices) == 32 * (method == "custom-diffusion")
        pipeline.load_textual_inversion({"<new1>": words["<new1>"][0]})
        assert pipeline.unet.load_state_dict(matrices, strict=False).unexpected_keys == []
        model.text_encoder, model.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        theirs = step(model)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        assert (ours - before).abs().max() > 1e-3 * theirs.abs().max()  # the word has an effect
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with capsys.disabled():
            print(f"\n{method} at v1.4's size: peak memory {peak / 1e9:.1f} GB")
        assert peak < 14e9
