"""How to sample: the settings that all problems share, and the loop over chunks of images."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from common.diffusion.samplers import SAMPLERS, Callback, SamplerName
from common.errors import InputError
from common.seeds import derive_seed, padded_chunks

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to solve the reverse process. Each problem extends it with defaults of its own."""

    sampler: SamplerName = "dpmpp_2m"
    """The solver."""
    steps: int = 20
    """Steps of the solver: network evaluations, but for Heun, which takes two a step."""
    spacing: Literal["leading", "trailing", "linspace", "homework"] = "trailing"
    """Which timesteps the steps visit (common/diffusion/schedule.py)."""
    eta: float = 0.0
    """Strength of DDIM's fresh noise, in [0, 1]."""
    seed: int = 0
    """Seed of all noise that is drawn."""
    chunk_size: int = 10
    """Images in one network call. Files agree to the byte at the same size."""

    def check(self, num_timesteps: int = 1000) -> None:
        """Raises InputError on a number outside its range."""
        derive_seed(self.seed)
        if not 1 <= self.steps <= num_timesteps:
            raise InputError(f"--steps must be between 1 and {num_timesteps}, not {self.steps}")
        if self.chunk_size < 1:
            raise InputError(f"--chunk-size must be at least 1, not {self.chunk_size}")
        if not 0.0 <= self.eta <= 1.0:
            raise InputError(f"--eta must lie in [0, 1], not {self.eta}")
        if self.eta > 0.0 and not SAMPLERS[self.sampler].takes_eta:
            raise InputError(f"--eta is DDIM's: with --sampler {self.sampler} it must be 0")


@dataclasses.dataclass(frozen=True)
class GuidedSamplerConfig(SamplerConfig):
    """The same with classifier-free guidance (common/diffusion/guidance.py)."""

    guidance_scale: float | None = 1.0
    """Classifier-free guidance, uncond + scale (cond - uncond); 1 is none."""
    guidance_interval: tuple[int, int] = (0, 999)
    """Lowest and highest t at which guidance acts."""
    guidance_rescale: float = 0.0
    """How far to pull the guided output's standard deviation back to the conditional one's, in [0,
    1]."""

    def check(self, num_timesteps: int = 1000) -> None:
        """Raises InputError on a number outside its range."""
        super().check(num_timesteps)
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise InputError(f"--guidance-scale must be finite, not {self.guidance_scale}")
        low, high = self.guidance_interval
        if low > high:
            raise InputError(
                f"--guidance-interval must be the lowest t and then the highest, not {low} and"
                f" {high}"
            )
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise InputError(f"--guidance-rescale must lie in [0, 1], not {self.guidance_rescale}")


def sample_in_chunks(
    items: Sequence[Item],
    sample_chunk: Callable[[list[Item], Callback], Tensor],
    config: SamplerConfig,
    *,
    name: Callable[[Item], str] = str,
    share: tuple[int, int] = (0, 1),
    callback: Callback | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[Item], Tensor]]:
    """Yields (items, images float32 [n, ...] on the CPU) chunk by chunk, n at most
    `config.chunk_size`.

    - `sample_chunk(chunk, callback)` gives the images of a chunk, [N, ...], and hands `callback` to
      the sampler. Chunks have exactly `config.chunk_size` items, the last one padded, so that
      results do not depend on how a job is split. Where the device's memory does not hold a chunk,
      halves of it are tried, down to single images, and that is said.
    - `share` = (r, P) takes every P-th chunk, from the r-th on. `callback` is the samplers', on
      whole chunks.
    - `name(item)` is for messages.

    Raises InputError if an image is not finite, or if the device's memory does not hold a single
    one.
    """
    chunks = list(padded_chunks(items, config.chunk_size))[share[0] :: share[1]]
    hidden = not show_progress or share[0] > 0
    size = config.chunk_size  # what fits is found out once
    done, count = 0, sum(real for _, real in chunks)
    with tqdm(
        total=len(chunks) * config.steps, unit="step", disable=hidden, dynamic_ncols=True
    ) as bar:

        def step(i: int, t: int, x_t: Tensor, x0: Tensor) -> None:
            bar.update()
            if callback:
                callback(i, t, x_t, x0)

        for number, (chunk, real) in enumerate(chunks, 1):
            images: list[Tensor] = []
            while len(images) < real:
                try:
                    images += (
                        sample_chunk(chunk[len(images) : len(images) + size], step).float().cpu()
                    )
                except torch.OutOfMemoryError:
                    size = _smaller(min(size, len(chunk) - len(images)))
            done += real
            bar.n = number * config.steps  # halves of a chunk repeat its steps
            bar.set_postfix_str(f"{done}/{count} images")
            _check_finite(images[:real], [name(item) for item in chunk[:real]])
            yield chunk[:real], torch.stack(images[:real])


def _check_finite(images: Sequence[Tensor], names: Sequence[str]) -> None:
    for image, name in zip(images, names, strict=True):
        if not bool(image.isfinite().all()):
            raise InputError(
                f"the image of {name} is not finite: the weights, the guidance or the precision do"
                " not fit"
            )


def _smaller(size: int) -> int:
    if size == 1:
        raise InputError(
            "the device's memory does not hold one image: use a smaller model or size, or"
            " --device cpu"
        )
    half = (size + 1) // 2
    tqdm.write(f"{size} images at once do not fit into the device's memory: trying {half}")
    return half
