"""From prompts to pictures with a latent-diffusion model, with or without control images."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common.diffusion.process import Network, denoiser
from common.diffusion.samplers import SamplerName, sample
from common.diffusion.schedule import SPACINGS
from common.errors import InputError
from common.images import to_hint
from common.latent.control import control_interval, guess_mode_scales
from common.latent.model import LatentCondition, LatentDiffusion
from common.seeds import ImageGenerators, derive_seed, padded_chunks


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to generate. A picture depends on these, on its prompt and control image, and on its own seed."""

    sampler: SamplerName = "dpmpp_2m"
    """The solver."""
    steps: int = 20
    """Steps of the solver (network evaluations, but for Heun, which takes two a step)."""
    spacing: Literal["leading", "trailing", "linspace", "homework"] = "trailing"
    """Where the steps lie."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none, the default what suits the model: 7.5 for Stable Diffusion, 3 for the small one."""
    guidance_interval: tuple[int, int] = (0, 999)
    """Lowest and highest t at which guidance acts."""
    guidance_rescale: float = 0.0
    """How far to pull the guided prediction's spread back to the conditional one's, in [0, 1]."""
    eta: float = 0.0
    """DDIM's fresh noise, in [0, 1]."""
    control_scales: tuple[float, ...] = (1.0,)
    """Strength of the control: one number for all residuals, or one for each (Stable Diffusion has 13)."""
    control_start: float = 0.0
    """Fraction of the trajectory at which control sets in."""
    control_end: float = 1.0
    """Fraction of the trajectory at which control ends."""
    guess_mode: bool = False
    """Control on the conditional half alone, weaker towards the outer layers (the authors' guess mode)."""
    seed: int = 0
    """Seed of all pictures."""
    chunk_size: int = 10
    """Pictures in one network call; files agree to the byte at the same size."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to generate."""

    prompt: str
    seed: int
    """Of its noise (`common.seeds.derive_seed`)."""
    hint: Tensor | None = None
    """Control image, uint8 [3, H, W]; all requests of a call have one, or none has."""


def check_generation(config: GenerationConfig) -> None:
    """Raises InputError on numbers that make no sense."""
    derive_seed(config.seed)
    if not 1 <= config.steps <= 1000:
        raise InputError(f"--steps must be between 1 and 1000, not {config.steps}")
    if config.chunk_size < 1:
        raise InputError(f"--chunk-size must be at least 1, not {config.chunk_size}")
    if config.guidance_scale is not None and not math.isfinite(config.guidance_scale):
        raise InputError(f"--guidance-scale must be finite, not {config.guidance_scale}")
    if not config.control_scales or not all(math.isfinite(scale) for scale in config.control_scales):
        raise InputError(f"--control-scales must be finite numbers, not {config.control_scales}")
    for name in ("eta", "guidance_rescale"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise InputError(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(config, name)}")
    low, high = config.guidance_interval
    if low > high:
        raise InputError(f"--guidance-interval must be the lowest t and then the highest, not {low} and {high}")
    if not 0.0 <= config.control_start <= config.control_end <= 1.0:
        raise InputError(
            "--control-start and --control-end must be fractions 0 <= start <= end <= 1, "
            f"not {config.control_start} and {config.control_end}"
        )


def settled(config: GenerationConfig, model: LatentDiffusion) -> GenerationConfig:
    """The same with the guidance scale that it comes to on this model."""
    scale = model.usual_guidance if config.guidance_scale is None else config.guidance_scale
    return dataclasses.replace(config, guidance_scale=scale)


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    requests: Sequence[Request],
    config: GenerationConfig,
    latent_side: int | None = None,
    *,
    network: Network | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices of requests, pictures float32 [n, 3, H, W] in about [-1, 1], on the CPU) chunk by chunk.

    `latent_side` is that of the pictures' latents (default: the model's own), `network` takes the place of `model.apply_model`.
    Where a chunk does not fit into the device's memory, halves of it are tried, down to single pictures, and that is said.
    Raises InputError if not even one fits.
    """
    size = config.chunk_size  # what fits is found out once
    chunks = list(padded_chunks(range(len(requests)), size))
    for chunk, real in tqdm(chunks, unit="chunk", disable=not show_progress, dynamic_ncols=True):
        pictures: list[Tensor] = []
        while len(pictures) < real:
            part = [requests[i] for i in chunk[len(pictures) : len(pictures) + size]]
            try:
                pictures += _generate_chunk(model, part, config, latent_side or model.latent_side, network).cpu()
            except torch.OutOfMemoryError:
                size = _smaller(len(part))
        yield chunk[:real], torch.stack(pictures[:real])


def _smaller(size: int) -> int:
    if size == 1:
        raise InputError("the device's memory does not hold one picture: use a smaller model or size, or --device cpu")
    half = (size + 1) // 2
    tqdm.write(f"{size} pictures at once do not fit into the device's memory: trying {half}")
    return half


def residual_scales(config: GenerationConfig, count: int) -> tuple[float, ...]:
    """The factor of each of `count` control residuals. Raises InputError if `config` has neither one nor `count` of them."""
    given = config.control_scales
    if len(given) not in (1, count):
        raise InputError(f"--control-scales needs 1 number, or {count} for this model's residuals, not {len(given)}")
    scales = given if len(given) == count else given * count
    if not config.guess_mode:
        return scales
    return tuple(a * b for a, b in zip(scales, guess_mode_scales(count), strict=True))


def _generate_chunk(
    model: LatentDiffusion, requests: list[Request], config: GenerationConfig, latent_side: int, network: Network | None
) -> Tensor:
    device = model.unet.device
    condition, null = _conditions(model, requests, config, device)
    pairs = SPACINGS[config.spacing](model.schedule.num_timesteps, config.steps)
    predict = model.predictor(
        condition,
        null,
        settled(config, model).guidance_scale,
        control=control_interval(pairs, config.control_start, config.control_end),
        interval=config.guidance_interval,
        rescale=config.guidance_rescale,
        network=network,
    )
    denoise = denoiser(predict, model.schedule, model.parameterization, clip_x0=False)
    generators = ImageGenerators([request.seed for request in requests], device)

    def noise() -> Tensor:
        return generators.randn(model.unet.config.in_channels, latent_side, latent_side)

    x0 = sample(config.sampler, denoise, model.schedule, noise(), pairs, eta=config.eta, noise=noise)
    return model.decode(x0)


def _conditions(
    model: LatentDiffusion, requests: list[Request], config: GenerationConfig, device: torch.device
) -> tuple[LatentCondition, LatentCondition]:
    """The condition of these requests, and the empty prompt's, which has the same control unless in guess mode."""
    context = model.encode_text([request.prompt for request in requests])
    null = model.encode_text([""]).expand_as(context)
    if requests[0].hint is None:
        return LatentCondition(context), LatentCondition(null)
    hint = to_hint(torch.stack([request.hint for request in requests]).to(device))
    scales = residual_scales(config, model.controlnet.num_residuals)
    controlled = LatentCondition(context, hint, scales)
    return controlled, LatentCondition(null) if config.guess_mode else LatentCondition(null, hint, scales)
