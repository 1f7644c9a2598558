"""What Stable Diffusion v1.4 is, beyond its weights: the configurations in `configs/sd14`, in the
layout of a diffusers folder.

How many heads an attention has, or which noise the U-Net was trained on, shows in no weight: a
folder that differs there loads well and makes noise. So a folder's own configuration is compared
with v1.4's before anything is computed.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.diffusion.schedule import NoiseSchedule, scaled_linear_schedule
from common.errors import InputError
from common.files import read_json
from common.latent.stable_diffusion.naming import CONFIG_FILE, SCHEDULER_FILE
from common.latent.text_encoder import clip_tokenizer
from common.library_versions import defaults_of, read_vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

SD14 = Path(__file__).resolve().parent / "configs" / "sd14"

# The side of training pictures, and what acts in training or in half precision alone: no network
# computes anything else by them.
_INERT = {"sample_size", "dropout", "force_upcast"}
# What noise the U-Net was trained on. How a folder would sample (which sampler, which steps) is not
# of interest.
_NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
_NOISE_DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def empty_networks(
    configs: Path = SD14,
) -> tuple["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"]:
    """The U-Net, the autoencoder and the text encoder of the configurations, with weights on the
    meta device."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights(
        include_buffers=False
    ):  # transformers' table of positions is no weight: no file brings it
        return (
            UNet2DConditionModel.from_config(read_json(configs / "unet" / CONFIG_FILE)),
            AutoencoderKL.from_config(read_json(configs / "vae" / CONFIG_FILE)),
            CLIPTextModel(
                CLIPTextConfig.from_dict(read_json(configs / "text_encoder" / CONFIG_FILE))
            ),
        )


def noise_schedule(configs: Path = SD14) -> NoiseSchedule:
    """The schedule that the U-Net was trained on."""
    config = read_json(configs / "scheduler" / SCHEDULER_FILE)
    return scaled_linear_schedule(
        config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    )


def check_table(alphas_cumprod: Tensor | None, configs: Path, source: Path) -> None:
    """Raises InputError if the table of the noise schedule that a CompVis file may carry, [T], is
    another."""
    if alphas_cumprod is None:
        return
    ours, theirs = noise_schedule(configs).alphas_cumprod, alphas_cumprod.double()
    # Half precision resolves 5e-4 near 1; other schedules differ by 0.1.
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.0, atol=1e-3):
        raise InputError(
            f"{source} was trained on another noise schedule than Stable Diffusion v1.4"
        )


def check_folder(folder: Path, configs: Path = SD14) -> None:
    """Raises InputError that names the first difference between a diffusers folder's configuration
    and the expected one."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    for part, network in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        check_config(
            folder / part / CONFIG_FILE,
            read_json(configs / part / CONFIG_FILE),
            defaults_of(network),
        )
    # Configurations of transformers and of schedulers are full of what concerns other uses.
    text = read_json(configs / "text_encoder" / CONFIG_FILE)
    check_config(
        folder / "text_encoder" / CONFIG_FILE,
        text,
        defaults_of(CLIPTextConfig),
        set(text) - {"architectures"},
    )
    noise = read_json(configs / "scheduler" / SCHEDULER_FILE)
    check_config(
        folder / "scheduler" / SCHEDULER_FILE, noise, _NOISE_DEFAULTS, {*_NOISE, *_NOISE_DEFAULTS}
    )
    _check_vocabulary(folder / "tokenizer")


def check_config(
    path: Path,
    expected: Mapping[str, Any],
    defaults: Mapping[str, Any],
    keys: Iterable[str] | None = None,
    verdict: str = "not Stable Diffusion v1.4's",
) -> dict[str, Any]:
    """The configuration at `path`, which must agree with `expected` in `keys` (None: in all); None,
    False and 0 are one value."""
    given = read_json(path)
    if not isinstance(given, dict):
        raise InputError(f"{path} is not a configuration")
    for key in sorted(keys or {*given, *expected, *defaults} - _INERT):
        found, wanted = (_plain(config.get(key, defaults.get(key))) for config in (given, expected))
        if not key.startswith("_") and found != wanted and (found or wanted):
            raise InputError(f"{path} is {verdict}: {key} is {found!r}, but {wanted!r} is expected")
    return given


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_vocabulary(folder: Path) -> None:
    if read_vocabulary(folder) != clip_tokenizer().get_vocab():
        raise InputError(f"the vocabulary in {folder} is not Stable Diffusion v1.4's")
