"""From prompts to pictures with a latent-diffusion model, with or without control images."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.diffusion.process import Network, denoiser
from common.diffusion.samplers import Callback, sample
from common.diffusion.sampling import GuidedSamplerConfig, sample_in_chunks
from common.diffusion.schedule import SPACINGS
from common.images import to_hint
from common.latent.control import ControlConfig, control_interval, residual_scales
from common.latent.model import LatentCondition, LatentDiffusion
from common.seeds import StackedRandomGenerator


@dataclasses.dataclass(frozen=True)
class GenerationConfig(GuidedSamplerConfig):
    """How to generate. A picture depends on these, on its prompt and on its own seed."""

    guidance_scale: float | None = None
    """Classifier-free guidance, uncond + scale (cond - uncond); 1 is none. By default the base
    model's own `default_guidance_scale`: 7.5 for Stable Diffusion, 2 for the small model."""


@dataclasses.dataclass(frozen=True)
class ControlledGenerationConfig(ControlConfig, GenerationConfig):
    """The same with a ControlNet, where a picture also depends on its control image."""

    def check(self, num_timesteps: int = 1000) -> None:
        """Raises InputError on a number outside its range."""
        super().check(num_timesteps)
        self.check_control()


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to generate."""

    prompt: str
    seed: int
    """Of its noise (`common.seeds.derive_seed`)."""
    hint: Tensor | None = None
    """Control image, uint8 [3, H, W]; all requests of a call have one, or none has."""


def with_default_guidance(config: GenerationConfig, model: LatentDiffusion) -> GenerationConfig:
    """`config` with the model's default guidance scale filled in where none is given."""
    scale = model.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
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
    """Yields (indices of requests, pictures float32 [n, 3, H, W] in about [-1, 1], on the CPU)
    chunk by chunk.

    `latent_side` is that of the pictures' latents (default: the model's own), `network` takes the
    place of `model.apply_model`. Raises InputError if a picture is not finite, or if the device's
    memory does not hold one.
    """
    side = latent_side or model.latent_side

    def sample_chunk(indices: list[int], callback: Callback) -> Tensor:
        return _generate_chunk(
            model, [requests[i] for i in indices], config, side, network, callback
        )

    yield from sample_in_chunks(
        range(len(requests)),
        sample_chunk,
        config,
        name=lambda i: repr(requests[i].prompt),
        show_progress=show_progress,
    )


def _generate_chunk(
    model: LatentDiffusion,
    requests: list[Request],
    config: GenerationConfig,
    latent_side: int,
    network: Network | None,
    callback: Callback,
) -> Tensor:
    device = model.unet.device
    control = config if isinstance(config, ControlConfig) else ControlConfig()
    condition, null = _conditions(model, requests, control, device)
    timestep_pairs = SPACINGS[config.spacing](model.schedule.num_timesteps, config.steps)
    predict = model.predictor(
        condition,
        null,
        with_default_guidance(config, model).guidance_scale,
        control=control_interval(timestep_pairs, control.control_start, control.control_end),
        interval=config.guidance_interval,
        rescale=config.guidance_rescale,
        network=network,
    )
    denoise = denoiser(predict, model.schedule, model.parameterization, clip_x0=False)
    generators = StackedRandomGenerator([request.seed for request in requests], device)

    def noise() -> Tensor:
        return generators.randn(model.unet.config.in_channels, latent_side, latent_side)

    x0 = sample(
        config.sampler,
        denoise,
        model.schedule,
        noise(),
        timestep_pairs,
        eta=config.eta,
        noise=noise,
        callback=callback,
    )
    return model.decode(x0)


def _conditions(
    model: LatentDiffusion, requests: list[Request], control: ControlConfig, device: torch.device
) -> tuple[LatentCondition, LatentCondition]:
    """The condition of these requests, and the empty prompt's, which has the same control unless in
    guess mode."""
    context = model.encode_text([request.prompt for request in requests])
    null = model.encode_text([""]).expand_as(context)
    if requests[0].hint is None:
        return LatentCondition(context), LatentCondition(null)
    hint = to_hint(torch.stack([request.hint for request in requests]).to(device))
    scales = residual_scales(control, model.controlnet.num_residuals)
    controlled = LatentCondition(context, hint, scales)
    return controlled, LatentCondition(null) if control.guess_mode else LatentCondition(
        null, hint, scales
    )
