"""Sampling digits: how, and the images of a list of jobs, which depend on nothing else."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common.data.digits import DATASETS, SIZE
from common.diffusion.guidance import guided
from common.diffusion.process import denoiser
from common.diffusion.samplers import Callback, SamplerName, sample
from common.diffusion.schedule import SPACINGS, make_schedule
from common.errors import InputError
from common.images import to_uint8
from common.seeds import ImageGenerators, derive_seed, padded_chunks
from p1_diffusion.model import NULL_DIGIT, ContextUNet

IMAGES_PER_CLASS = 50
Job = tuple[str, int, int]  # (dataset, digit, number)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. An image depends on these, on the seed, and on its own dataset, digit and number."""

    sampler: SamplerName = "dpmpp_2m"
    """The solver."""
    steps: int = 20
    """Steps of the solver (network evaluations, but for Heun, which takes two a step)."""
    spacing: Literal["leading", "trailing", "linspace", "homework"] = "trailing"
    """Where the steps lie."""
    guide_w: float | None = None
    """Guidance counted from the conditional prediction, (1 + w) cond - w uncond; 0 is none. Default 6.5, chosen by measurement
    together with the interval in which it acts."""
    guidance_scale: float | None = None
    """The same guidance as a scale, w + 1; 1 is none."""
    guidance_interval: tuple[int, int] = (150, 700)
    """Lowest and highest t at which guidance acts; 0 999 is always."""
    guidance_rescale: float = 0.0
    """How far to pull the guided prediction's spread back to the conditional one's, in [0, 1]."""
    eta: float = 0.0
    """DDIM's fresh noise, in [0, 1]."""
    seed: int = 0
    """Seed of all images."""
    chunk_size: int = 50
    """Images in one network call; files agree to the byte at the same size."""

    def scale(self) -> float:
        """The guidance scale. Raises InputError if the two flags disagree or a number makes no sense."""
        both = self.guide_w is not None and self.guidance_scale is not None
        if both and not math.isclose(self.guide_w + 1.0, self.guidance_scale, abs_tol=1e-9):
            raise InputError("--guide-w and --guidance-scale disagree: the scale is w + 1; give one of them")
        scale = (
            self.guidance_scale
            if self.guidance_scale is not None
            else 1.0 + (DEFAULT_GUIDE_W if self.guide_w is None else self.guide_w)
        )
        if not math.isfinite(scale):
            raise InputError(f"the guidance must be a finite number, not {scale}")
        return scale


DEFAULT_GUIDE_W = 6.5


def edition_jobs(classes: Sequence[tuple[str, int]]) -> list[Job]:
    """Fifty images of each (dataset, digit)."""
    return [(dataset, digit, number) for dataset, digit in classes for number in range(1, IMAGES_PER_CLASS + 1)]


def file_name(job: Job) -> str:
    """The grader's name of an image, relative to the output folder."""
    dataset, digit, number = job
    return f"{dataset}/{digit}_{number:03d}.png"


def check_sampling(config: SamplingConfig) -> None:
    """Raises InputError on numbers that make no sense."""
    config.scale()
    derive_seed(config.seed)
    if not 1 <= config.steps <= 1000:
        raise InputError(f"--steps must be between 1 and 1000, not {config.steps}")
    if config.chunk_size < 1:
        raise InputError(f"--chunk-size must be at least 1, not {config.chunk_size}")
    for name in ("eta", "guidance_rescale"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise InputError(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(config, name)}")


@torch.no_grad()
def sample_digits(
    model: ContextUNet,
    jobs: Sequence[Job],
    config: SamplingConfig,
    *,
    share: tuple[int, int] = (0, 1),
    callback: Callback | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[Job], Tensor]]:
    """Yields (jobs, uint8 images [n, 3, 28, 28]) chunk by chunk, on the model's device.

    `share` = (r, P) takes every P-th chunk, from the r-th on. `callback` is the samplers', on whole chunks, padding included.
    """
    device = next(model.parameters()).device
    schedule = make_schedule(model.config.schedule)
    pairs = SPACINGS[config.spacing](schedule.num_timesteps, config.steps)
    chunks = list(padded_chunks(jobs, config.chunk_size))[share[0] :: share[1]]
    for chunk, real in tqdm(chunks, unit="chunk", disable=not show_progress or share[0] > 0, dynamic_ncols=True):
        context = torch.tensor([[digit, DATASETS.index(dataset)] for dataset, digit, _ in chunk], device=device)
        null = torch.stack([torch.full_like(context[:, 0], NULL_DIGIT), context[:, 1]], dim=1)
        noise = image_noise(chunk, config.seed, device)
        predict = guided(
            model, context, null, config.scale(), interval=config.guidance_interval, rescale=config.guidance_rescale
        )
        denoise = denoiser(predict, schedule, model.config.parameterization, clip_x0=True, eps_of_clipped=True)
        x0 = sample(config.sampler, denoise, schedule, noise(), pairs, eta=config.eta, noise=noise, callback=callback)
        yield chunk[:real], to_uint8(x0[:real].cpu())


def image_noise(jobs: Sequence[Job], seed: int, device: torch.device | str) -> Callable[[], Tensor]:
    """Fresh noise [N, 3, 28, 28] at each call; each image's depends on the seed and its own job alone."""
    seeds = [derive_seed(seed, DATASETS.index(dataset), digit, number) for dataset, digit, number in jobs]
    generators = ImageGenerators(seeds, device)
    return lambda: generators.randn(3, SIZE, SIZE)
