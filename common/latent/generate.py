"""Generating pictures from prompts with a latent-diffusion model and optional control images."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.config import Scale
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
    """Sampling settings; a picture depends on these, its prompt and its seed."""

    guidance_scale: Scale | None = None
    """Scale of classifier-free guidance, uncond + scale (cond - uncond); 1 is no guidance. By
    default the base model's own: 7.5 for Stable Diffusion; 1 for the small model, 2 with a
    ControlNet."""
    pag_scale: Scale | None = None
    """Scale of perturbed-attention guidance (arXiv:2403.17377), which adds
    scale (cond - perturbed), where "perturbed" is the conditional prediction with the identity as
    self-attention map: clearer shapes for one more evaluation of the network a step; 0 is none. By
    default the base model's own: 0 for Stable Diffusion; 3 for the small model, 0 with a
    ControlNet, whose control image gives the shapes."""


@dataclasses.dataclass(frozen=True)
class ControlledGenerationConfig(ControlConfig, GenerationConfig):
    """`GenerationConfig` with a ControlNet; a picture also depends on its control image."""

    def check(self, num_timesteps: int = 1000) -> None:
        """Raises InputError if a value is outside its range."""
        super().check(num_timesteps)
        self.check_control()


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """The prompt, seed and control image of one picture to generate."""

    prompt: str
    seed: int | Callable[[], int]
    """Seed of the picture's noise (`common.seeds.derive_seed`), or a function that derives it."""
    hint: Tensor | Callable[[], Tensor] | None = None
    """Control image, uint8 [3, H, W], or a function that reads it, which is called when the
    picture's turn comes; in one call either all requests have one or none has."""

    def derive_seed(self) -> int:
        """The seed of the picture's noise."""
        return self.seed() if callable(self.seed) else self.seed

    def read_hint(self) -> Tensor | None:
        """The control image, uint8 [3, H, W], or None."""
        return self.hint() if callable(self.hint) else self.hint


def with_default_guidance(config: GenerationConfig, model: LatentDiffusion) -> GenerationConfig:
    """`config` with the model's default scales of guidance filled in where none are given."""
    controlled = isinstance(config, ControlConfig)
    usual = model.default_controlled_guidance if controlled else model.default_guidance
    return dataclasses.replace(
        config,
        guidance_scale=usual.scale if config.guidance_scale is None else config.guidance_scale,
        pag_scale=usual.pag_scale if config.pag_scale is None else config.pag_scale,
    )


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    requests: Sequence[Request],
    config: GenerationConfig,
    latent_side: int | None = None,
    *,
    network: Network | None = None,
    callback: Callback | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices of requests, pictures float32 [n, 3, H, W] on the CPU) for each chunk.

    Pictures are about in [-1, 1], not clamped. `latent_side` is the side of the latents (default:
    the model's own). `network` replaces `model.apply_model`. `callback` is passed to the sampler
    (common/diffusion/samplers.py) and sees latents. Raises InputError if a picture is not finite,
    or if a single one does not fit into the device's memory.
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
        callback=callback,
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
    if condition.hint is not None and network is None:  # another network may see parts of the hint
        features = model.encode_hint(condition.hint)
        condition, null = (
            dataclasses.replace(each, hint_features=features) if each.hint is not None else each
            for each in (condition, null)
        )
    timestep_pairs = SPACINGS[config.spacing](model.schedule, config.steps)
    config = with_default_guidance(config, model)
    predict = model.predictor(
        condition,
        null,
        config.guidance_scale,
        pag_scale=config.pag_scale,
        control=control_interval(timestep_pairs, control.control_start, control.control_end),
        interval=config.guidance_interval,
        rescale=config.guidance_rescale,
        network=network,
    )
    denoise = denoiser(predict, model.schedule, model.parameterization, clip_x0=False)
    generators = StackedRandomGenerator([request.derive_seed() for request in requests], device)

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
    """The conditions of these requests and of the empty prompt, with the same control image.

    In guess mode the empty prompt has no control. A ControlNet that reads no text gets the empty
    prompt in both.
    """
    context = model.encode_text([request.prompt for request in requests])
    null = model.encode_text([""]).expand_as(context)
    if requests[0].hint is None:
        return LatentCondition(context), LatentCondition(null)
    hint = to_hint(torch.stack([request.read_hint() for request in requests]).to(device))
    scales = residual_scales(control, model.controlnet.num_residuals)
    text = control.control_text or model.controlnet.control_text
    read = null if text == "empty" else None
    controlled = LatentCondition(context, hint, scales, read)
    if control.guess_mode:
        return controlled, LatentCondition(null)
    return controlled, dataclasses.replace(controlled, context=null)
