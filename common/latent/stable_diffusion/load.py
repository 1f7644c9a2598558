"""Loading Stable Diffusion v1.4 from local files in the published formats.

    model = load_stable_diffusion("sd-v1-4.ckpt")  # or a .safetensors, or a diffusers folder

A single file holds weights only and gets v1.4's configuration; a folder has its own, which must
equal v1.4's (`sd14.py`). `naming.py` has CompVis' names of the weights, `weights.py` reads the
files.
"""

import functools
import re
from pathlib import Path

import torch

from common.errors import InputError
from common.latent.model import LatentDiffusion
from common.latent.stable_diffusion.naming import (
    CONTROL,
    EMA,
    TEXT,
    UNET,
    VAE,
    State,
    ema_names,
    text_encoder_names,
    unet_names,
    vae_names,
)
from common.latent.stable_diffusion.sd14 import (
    SD14,
    check_folder,
    check_table,
    empty_networks,
    noise_schedule,
)
from common.latent.stable_diffusion.weights import Part, fill, own_names
from common.latent.text_encoder import clip_tokenizer
from common.progress import Progress
from common.versions import (
    text_prefix,
    without_positions,
)
from common.weights import (
    followed,
    has_old_attention,
    old_attention_names,
    read_folder,
    read_weights,
    say,
)

UNNEEDED = re.compile(
    r"embedding_manager\.|safety_checker\.|loss\.|first_stage_model\.(loss|model_ema)\.|denoiser\."
    r"|cond_stage_model\.(transformer\.)?(logit_scale|text_projection|visual_projection"
    r"|vision_model)\b"
)
"""Weights in Stable Diffusion v1 files that no network needs to generate pictures: those of the
trainings of the U-Net and the autoencoder, and of the rest of the text encoder's CLIP."""
OTHERS = (
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    ("model.diffusion_model.double_blocks.", "Flux"),
)
"""Beginnings of names in the files of other models."""


def load_stable_diffusion(
    path: Path, *, ema: bool | None = None, dtype: torch.dtype = torch.float32, configs: Path = SD14
) -> LatentDiffusion:
    """Stable Diffusion v1.4 from a CompVis file or a diffusers folder, on the CPU as `dtype`.

    v1.1 to v1.5 have the same networks and load as well. `ema` says whether to take the averaged
    U-Net that some files hold besides the last one; by default it is taken where there is one.
    `path` may also be a repository's folder in the hub's cache. `configs` is the folder with the
    expected configuration; only tests use another than v1.4's.

    Raises InputError if a file is missing, truncated or would run code, if the weights do not fit
    (the message names them as the file does), if the file has another noise schedule, or if a
    folder's configuration differs.
    """
    path = followed(path)
    if path.is_dir() and ema:
        raise InputError(
            f"{path} is a folder, which holds no averaged U-Net: only CompVis files do"
        )
    parts = _parts_of_folder(path, configs) if path.is_dir() else _parts_of_file(path, configs, ema)
    unet, vae, text_encoder = networks = empty_networks(configs)
    pairs = list(zip(networks, parts, strict=True))
    for network, part in Progress(pairs, desc=f"loading {path.name}", unit="networks"):
        fill(network, part, dtype)
    std = 1.0 / vae.config.scaling_factor
    return LatentDiffusion(
        vae, text_encoder, clip_tokenizer(), unet, noise_schedule(configs), latent_std=std
    )


def _parts_of_file(path: Path, configs: Path, ema: bool | None) -> tuple[Part, Part, Part]:
    state = read_weights(path)
    for prefix, name in OTHERS:
        if any(key.startswith(prefix) for key in state):
            raise InputError(f"{path} is a file of {name}, not of Stable Diffusion v1")
    if unneeded := [key for key in state if UNNEEDED.match(key)]:
        say(
            f"{len(unneeded)} weights in {path} are left out, which no network needs to generate"
            f" pictures, such as {unneeded[0]}"
        )
        state = {key: value for key, value in state.items() if not UNNEEDED.match(key)}
    by_prefix = {
        prefix: {k: v for k, v in state.items() if k.startswith(prefix)}
        for prefix in (UNET, VAE, TEXT, EMA)
    }
    # Names without a full stop are tables of the noise schedule; a whole cldm file holds a
    # ControlNet as well.
    strange = [key for key in state if "." in key and not key.startswith((*by_prefix, CONTROL))]
    if strange or not by_prefix[UNET]:
        found = ", ".join(strange[:3]) if strange else f"no {UNET}*"
        raise InputError(f"{path} is not a Stable Diffusion v1 file: it holds {found}")
    check_table(state.get("alphas_cumprod"), configs, path)
    unet = Part(by_prefix[UNET], path, unet_names)
    counters = {f"{EMA}decay", f"{EMA}num_updates"}
    averaged = {k: v for k, v in by_prefix[EMA].items() if k not in counters}
    if ema is None and averaged:
        say(f"{path} holds two U-Nets: the averaged one ({EMA}*) is used")
    if ema or (ema is None and averaged):
        unet = Part(averaged, path, ema_names)
    return unet, Part(by_prefix[VAE], path, vae_names), _text_part(by_prefix[TEXT], path, TEXT)


def _parts_of_folder(folder: Path, configs: Path) -> tuple[Part, Part, Part]:
    check_folder(folder, configs)
    vae, file = read_folder(folder / "vae")
    return (
        Part(*read_folder(folder / "unet"), own_names),
        Part(vae, file, old_attention_names if has_old_attention(vae) else own_names),
        _text_part(*read_folder(folder / "text_encoder"), ""),
    )


def _text_part(state: State, source: Path, prefix: str) -> Part:
    """The text encoder's weights; `prefix` precedes transformers' own names in the file."""
    prefix += text_prefix(state, before=prefix)
    return Part(
        without_positions(state), source, functools.partial(text_encoder_names, prefix=prefix)
    )
