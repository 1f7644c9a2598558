"""Stable Diffusion v1.4 at its full size, with random weights: `pytest -m full`. Takes minutes, 14
GB of memory and 2.2 GB of disk."""

import gc
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from sd_tiny import compvis_state, lightning_installed, published_form, random_networks
from tiny_latent import text_condition

from common.latent.load import kind_of
from common.latent.stable_diffusion.load import load_stable_diffusion
from common.latent.stable_diffusion.sd14 import SD14

TOKENS = [49406, 736, 7117, 593, 2866, 5994]  # start of text and five words


def seal_the_network(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        patch.setattr(socket, name, refuse)


@pytest.mark.full
def test_v14_loads_offline_and_computes_a_step_as_diffusers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the U-Net, text and decoder of the file sd-v1-4.ckpt in half precision, against
    diffusers' own reading of it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    path = tmp_path / "sd-v1-4.ckpt"
    try:
        networks = random_networks(SD14, dtype=torch.float16)
        state = compvis_state(*networks)
        assert len(state) == 686 + 248 + 196
        text = networks[2].float()(torch.tensor([TOKENS])).last_hidden_state
        del networks
        with lightning_installed():
            torch.save(published_form(state), path)

        seal_the_network(monkeypatch)
        assert kind_of(path) == "sd_file"
        model = load_stable_diffusion(path)
    finally:
        path.unlink(missing_ok=True)  # pytest would keep it for three runs
    gc.collect()

    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(1, 4, 32, 32, generator=generator), torch.tensor([981])
    condition = text_condition(model, ["pale golden rod circle with old lace background"])
    assert condition.context.shape == (1, 77, 768)
    with torch.no_grad():
        assert torch.equal(model.text_encoder(torch.tensor([TOKENS])).last_hidden_state, text)
        ours, image = model.apply_model(x_t, t, condition), model.decode(x_t[..., :16, :16])

        unet = UNet2DConditionModel.from_single_file(
            state, config=str(SD14), subfolder="unet", torch_dtype=torch.float32
        )
        theirs = unet.eval()(x_t, t, condition.context).sample
        del unet
        vae = AutoencoderKL.from_single_file(
            dict(state), config=str(SD14), subfolder="vae", torch_dtype=torch.float32
        )
        decoded = vae.eval().decode(x_t[..., :16, :16] * model.latent_std).sample
    assert ours.std() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5
    assert (image - decoded).abs().max() <= 1e-4 * decoded.abs().max()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 14e6  # kilobytes
