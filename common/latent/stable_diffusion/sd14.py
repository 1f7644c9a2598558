"""The configuration of Stable Diffusion v1.4 (`configs/sd14`, a diffusers folder without weights).

The weights do not show how many heads an attention has or which noise schedule the U-Net was
trained with: a folder that differs in these loads without error and generates noise. A folder's own
configuration is therefore compared with v1.4's first.
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
from common.versions import defaults_of, read_vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

SD14 = Path(__file__).resolve().parent / "configs" / "sd14"

# Keys that do not change what a network computes: the side of the training pictures, and keys that
# act only in training or in half precision.
_INERT = {"sample_size", "dropout", "force_upcast"}
# The noise that the U-Net was trained with. Keys about sampling (which sampler, which steps) are
# ignored.
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
    """The U-Net, the autoencoder and the text encoder, with weights on the meta device."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    # Without buffers: transformers' table of position indices is one, and no weight file holds it.
    with init_empty_weights(include_buffers=False):
        return (
            UNet2DConditionModel.from_config(read_json(configs / "unet" / CONFIG_FILE)),
            AutoencoderKL.from_config(read_json(configs / "vae" / CONFIG_FILE)),
            CLIPTextModel(
                CLIPTextConfig.from_dict(read_json(configs / "text_encoder" / CONFIG_FILE))
            ),
        )


def noise_schedule(configs: Path = SD14) -> NoiseSchedule:
    """The noise schedule that the U-Net was trained with."""
    config = read_json(configs / "scheduler" / SCHEDULER_FILE)
    return scaled_linear_schedule(
        config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    )


def check_table(alphas_cumprod: Tensor | None, configs: Path, source: Path) -> None:
    """Raises InputError if a CompVis file's own table of alphas_cumprod, [T], differs from v1.4's.

    None, a file without the table, passes.
    """
    if alphas_cumprod is None:
        return
    ours, theirs = noise_schedule(configs).alphas_cumprod, alphas_cumprod.double()
    # Near 1 bf16 resolves 4e-3 and fp16 5e-4; other schedules differ by about 0.1.
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.0, atol=4e-3):
        raise InputError(
            f"{source} was trained on another noise schedule than Stable Diffusion v1.4"
        )


def check_folder(folder: Path, configs: Path = SD14) -> None:
    """Raises InputError if a diffusers folder's configuration differs from the expected one.

    The message names the first difference.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    for part, network in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        check_config(
            folder / part / CONFIG_FILE,
            read_json(configs / part / CONFIG_FILE),
            defaults_of(network),
        )
    # Configurations of transformers and of schedulers have many keys that do not matter here, so
    # only some keys are compared.
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
    """The configuration at `path`, which must agree with `expected` in `keys` (None: in all keys).

    A missing key has the value in `defaults`. None, False and 0 count as equal. Raises InputError
    with `verdict` and the first key that differs.
    """
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
