"""Sampling digits: how, and the images of a list of keys, which depend on nothing else."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.data.digits import DATASETS, SIZE
from common.diffusion.guidance import guided
from common.diffusion.process import denoiser
from common.diffusion.samplers import Callback, sample
from common.diffusion.sampling import GuidedSamplerConfig, sample_in_chunks
from common.diffusion.schedule import SPACINGS, make_schedule
from common.errors import InputError
from common.images import to_uint8
from common.seeds import StackedRandomGenerator, derive_seed
from p1_diffusion.model import NULL_DIGIT, ContextUNet

IMAGES_PER_CLASS = 50
ImageKey = tuple[str, int, int]  # (dataset, digit, number)


@dataclasses.dataclass(frozen=True)
class SamplingConfig(GuidedSamplerConfig):
    """How digits are sampled. An image depends on these, and on its own dataset, digit and
    number."""

    guidance_scale: float = 7.5
    """Classifier-free guidance, uncond + scale (cond - uncond); 1 is none. The homework's
    `--guide-w W` is understood as W + 1. The default and the interval were chosen together, by
    measurement (results/p1_guidance.json)."""
    guidance_interval: tuple[int, int] = (150, 700)
    """Lowest and highest t at which guidance acts; 0 999 is always."""
    chunk_size: int = 50
    """Images in one network call. Files agree to the byte at the same size."""


def translate_guide_w(arguments: list[str]) -> list[str]:
    """Command-line arguments with the homework's `--guide-w W` as `--guidance-scale W+1`: guide_w
    counts from the conditional prediction, (1 + w) cond - w uncond.

    Raises InputError if W is not a number, or if another `--guidance-scale` is given as well.
    """
    flags = [argument.split("=")[0].replace("_", "-") for argument in arguments]
    if "--guide-w" not in flags:
        return arguments
    if "--guidance-scale" in flags:
        raise InputError(
            "--guide-w and --guidance-scale are the same guidance, scale = w + 1: give one of them"
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


def edition_keys(classes: Sequence[tuple[str, int]]) -> list[ImageKey]:
    """Fifty images of each (dataset, digit)."""
    return [
        (dataset, digit, number)
        for dataset, digit in classes
        for number in range(1, IMAGES_PER_CLASS + 1)
    ]


def file_name(key: ImageKey) -> str:
    """The grader's name of an image, relative to the output folder."""
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
    """Yields (keys, images uint8 [n, 3, 28, 28] on the CPU) chunk by chunk.

    `share` = (r, P) takes every P-th chunk, from the r-th on. `callback` is the samplers', on whole
    chunks, padding included. Raises InputError on a dataset that the model does not know, and if an
    image is not finite.
    """
    for dataset in sorted({dataset for dataset, _, _ in keys}):
        if DATASETS.index(dataset) >= model.config.datasets:
            raise InputError(
                f"this model was not trained on {dataset}: it knows"
                f" {', '.join(DATASETS[: model.config.datasets])}"
            )
    device = next(model.parameters()).device
    schedule = make_schedule(model.config.schedule)
    timestep_pairs = SPACINGS[config.spacing](schedule.num_timesteps, config.steps)

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
    """Fresh noise [N, 3, 28, 28] at each call; each image's depends on the seed and its own key
    alone."""
    seeds = [
        derive_seed(seed, DATASETS.index(dataset), digit, number) for dataset, digit, number in keys
    ]
    generators = StackedRandomGenerator(seeds, device)
    return lambda: generators.randn(3, SIZE, SIZE)
