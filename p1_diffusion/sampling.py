"""Sampling of digits: the settings, the list of images of an edition, and the sampling loop."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from common.config import Scale
from common.data.digits import DATASETS, SIZE
from common.devices import exact_kernels
from common.diffusion.guidance import guided
from common.diffusion.process import denoiser
from common.diffusion.samplers import Callback, sample
from common.diffusion.sampling import (
    ChunkSize,
    GuidedSamplerConfig,
    SpacingName,
    Timesteps,
    sample_in_chunks,
)
from common.diffusion.schedule import SPACINGS, make_schedule
from common.errors import InputError
from common.images import to_uint8
from common.seeds import StackedRandomGenerator, derive_seed
from p1_diffusion.model import NULL_DIGIT, ContextUNet

IMAGES_PER_CLASS = 50
ImageKey = tuple[str, int, int]  # (dataset, digit, number), numbers from 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig(GuidedSamplerConfig):
    """Sampling settings. An image depends on these and on its (dataset, digit, number) alone."""

    spacing: SpacingName = "karras"
    """Timesteps that the steps visit (common/diffusion/schedule.py)."""
    guidance_scale: Scale = 3.0
    """Scale s of classifier-free guidance, uncond + s (cond - uncond); 1 is no guidance. The
    homework's `--guide-w W` is also accepted and means s = W + 1. The defaults of scale and
    interval were chosen together, by measurement (results/p1_guidance.json)."""
    guidance_interval: Timesteps = (150, 700)
    """Lowest and highest timestep t with guidance; 0 999 is every timestep."""
    chunk_size: ChunkSize = 50
    """Images per network call. Runs on one device with one chunk size write identical files."""


def translate_guide_w(arguments: list[str]) -> list[str]:
    """Replaces the homework's flag `--guide-w W` by `--guidance-scale W+1`.

    The homework's formula (1 + w) cond - w uncond equals uncond + (w + 1) (cond - uncond). Raises
    InputError if W is not a number, or if `--guidance-scale` is given as well.
    """
    flags = [argument.split("=")[0].replace("_", "-") for argument in arguments]
    if "--guide-w" not in flags:
        return arguments
    if "--guidance-scale" in flags:
        raise InputError(
            "--guide-w and --guidance-scale set the same value (scale = w + 1): give only one"
        )
    at = flags.index("--guide-w")
    _, joined, value = arguments[at].partition("=")
    rest = arguments[at + 1 :]
    if not joined:
        value, rest = rest[0] if rest else "", rest[1:]
    try:
        scale = float(value) + 1.0
    except ValueError:
        raise InputError(f"--guide-w needs a number, not {value!r}") from None
    return [*arguments[:at], "--guidance-scale", repr(scale), *rest]


def class_keys(classes: Iterable[tuple[str, int]], count: int = IMAGES_PER_CLASS) -> list[ImageKey]:
    """Keys of the first `count` images of each (dataset, digit), in order."""
    return [
        (dataset, digit, number) for dataset, digit in classes for number in range(1, count + 1)
    ]


def file_name(key: ImageKey) -> str:
    """Path of an image relative to the output folder, for example mnistm/0_001.png."""
    dataset, digit, number = key
    return f"{dataset}/{digit}_{number:03d}.png"


@torch.no_grad()
def sample_digits(
    model: ContextUNet,
    keys: Sequence[ImageKey],
    config: SamplingConfig,
    *,
    share: tuple[int, int] = (0, 1),
    callback: Callback | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[ImageKey], Tensor]]:
    """Samples the images of `keys`; yields (keys, images) chunk by chunk.

    Images are uint8 [n, 3, 28, 28] on the CPU. `share` = (r, P) selects chunks r, r + P, r + 2P,
    ..., for process r of P. `callback` is passed to the sampler (common/diffusion/samplers.py) and
    sees whole chunks, padding included. Raises InputError if the model was not trained on a
    dataset, or if an image is not finite.
    """
    for dataset in sorted({dataset for dataset, _, _ in keys}):
        if DATASETS.index(dataset) >= model.config.datasets:
            raise InputError(
                f"this model was not trained on {dataset}, only on"
                f" {', '.join(DATASETS[: model.config.datasets])}"
            )
    device = next(model.parameters()).device
    schedule = make_schedule(model.config.schedule)
    timestep_pairs = SPACINGS[config.spacing](schedule, config.steps)

    def sample_chunk(chunk: list[ImageKey], callback: Callback) -> Tensor:
        context = torch.tensor(
            [[digit, DATASETS.index(dataset)] for dataset, digit, _ in chunk], device=device
        )
        null = torch.stack([torch.full_like(context[:, 0], NULL_DIGIT), context[:, 1]], dim=1)
        noise = image_noise(chunk, config.seed, device)
        predict = guided(
            model,
            context,
            null,
            config.guidance_scale,
            interval=config.guidance_interval,
            rescale=config.guidance_rescale,
        )
        denoise = denoiser(
            predict, schedule, model.config.parameterization, clip_x0=True, eps_of_clipped=True
        )
        with exact_kernels():
            return sample(
                config.sampler,
                denoise,
                schedule,
                noise(),
                timestep_pairs,
                eta=config.eta,
                noise=noise,
                callback=callback,
            )

    chunks = sample_in_chunks(
        keys,
        sample_chunk,
        config,
        name=file_name,
        share=share,
        callback=callback,
        show_progress=show_progress,
    )
    for chunk, images in chunks:
        yield chunk, to_uint8(images)


def image_noise(
    keys: Sequence[ImageKey], seed: int, device: torch.device | str
) -> Callable[[], Tensor]:
    """Returns a function that draws standard normal noise [N, 3, 28, 28], new at each call.

    The noise of an image depends on the seed, its own key and the number of the call alone.
    """
    seeds = [
        derive_seed(seed, DATASETS.index(dataset), digit, number) for dataset, digit, number in keys
    ]
    generators = StackedRandomGenerator(seeds, device)
    return lambda: generators.randn(3, SIZE, SIZE)
