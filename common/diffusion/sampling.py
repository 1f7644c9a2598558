"""Sampling settings that all problems share, and the loop over chunks of images."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, Self, TypeVar

import torch
from torch import Tensor

from common.config import Probability, Scale, Seed, bounds, check_fields
from common.diffusion.samplers import SAMPLERS, Callback, SamplerName
from common.errors import InputError
from common.memory import out_of_memory
from common.progress import Progress
from common.seeds import padded_chunks

Item = TypeVar("Item")
SpacingName = Literal["leading", "trailing", "linspace", "homework", "karras"]
ChunkSize = Annotated[int, *bounds(at_least=1, at_most=4096)]
Timesteps = Annotated[tuple[int, int], *bounds(at_least=0, at_most=999)]
"""A lowest and a highest timestep t."""
PADDED = 64  # images; a chunk up to this size is filled even if there are fewer


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of the sampler; each problem extends the class with its own defaults."""

    sampler: SamplerName = "dpmpp_2m"
    """Sampling method."""
    steps: Annotated[int, *bounds(at_least=1, at_most=1000)] = 20
    """Sampling steps. Each is one network evaluation; Heun takes two."""
    spacing: SpacingName = "trailing"
    """Timesteps that the steps visit (common/diffusion/schedule.py)."""
    eta: Probability = 0.0
    """DDIM's eta in [0, 1], the scale of the noise added at each step: 0 is deterministic, 1 has
    DDPM's variance."""
    seed: Seed = 0
    """Seed of all random noise."""
    chunk_size: ChunkSize = 10
    """Images in one network call, at most 4096. Output files are byte-identical between runs of
    equal chunk size."""

    def for_job(self, images: int) -> Self:
        """These settings for a job of so many images, with no chunk far larger than the job.

        Chunks of up to PADDED images keep their size, so that the files of a few images are
        byte-identical to those of many.
        """
        return dataclasses.replace(self, chunk_size=min(self.chunk_size, max(images, PADDED)))

    def check(self, num_timesteps: int = 1000) -> None:
        """Raises InputError if a value is outside its range."""
        check_fields(self)
        if not 1 <= self.steps <= num_timesteps:
            raise InputError(f"--steps must be between 1 and {num_timesteps}, not {self.steps}")
        covered = num_timesteps // self.steps * self.steps
        if self.spacing in ("leading", "homework") and covered <= 0.8 * num_timesteps:
            raise InputError(
                f"--steps {self.steps} with --spacing {self.spacing} would start near t = {covered}"
                f" of {num_timesteps}, not at noise: choose a divisor of {num_timesteps}, or"
                " --spacing trailing"
            )
        if self.eta > 0.0 and not SAMPLERS[self.sampler].takes_eta:
            raise InputError(
                f"--eta applies to DDIM only: with --sampler {self.sampler} it must be 0"
            )


@dataclasses.dataclass(frozen=True)
class GuidedSamplerConfig(SamplerConfig):
    """`SamplerConfig` with classifier-free guidance (common/diffusion/guidance.py)."""

    guidance_scale: Scale | None = 1.0
    """Scale of classifier-free guidance, uncond + scale (cond - uncond); 1 is no guidance."""
    guidance_interval: Timesteps = (0, 999)
    """Lowest and highest timestep t at which guidance is applied."""
    guidance_rescale: Probability = 0.0
    """Fraction in [0, 1] by which the guided output's standard deviation is moved to the
    conditional output's; 0 is no change."""

    def check(self, num_timesteps: int = 1000) -> None:
        """Raises InputError if a value is outside its range."""
        super().check(num_timesteps)
        low, high = self.guidance_interval
        if low > high:
            raise InputError(
                "--guidance-interval must give the lowest t and then the highest, not"
                f" {low} and {high}"
            )


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
    """Yields (items, images float32 [n, ...] on the CPU) for each chunk; n <= `config.chunk_size`.

    - `sample_chunk(chunk, callback)` returns the images of a chunk, [N, ...], and passes `callback`
      to the sampler. Each chunk has exactly `config.chunk_size` items, the last one padded, so that
      results do not depend on how a job is split. If a chunk does not fit into the device's memory,
      the chunk size is halved, down to single images, and a message says so.
    - `name(item)` is the item's name in messages.
    - `share` = (r, P) selects every P-th chunk, starting at chunk r, for process r of P.
    - `callback` is the sampler's callback, called on whole chunks.

    Raises InputError if an image is not finite, or if a single image does not fit into the device's
    memory.
    """
    chunks = list(padded_chunks(items, config.chunk_size))[share[0] :: share[1]]
    hidden = not show_progress or share[0] > 0 or not chunks
    size = config.chunk_size  # a size that was halved stays halved for the chunks that follow
    done, count = 0, sum(real for _, real in chunks)
    with Progress(
        desc="sampling", unit="steps", total=len(chunks) * config.steps, disable=hidden
    ) as bar:
        bar.set_postfix_str(f"0 of {count} images")

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
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    size = _smaller(min(size, len(chunk) - len(images)))
            done += real
            bar.n = number * config.steps  # halves of a chunk repeat its steps
            bar.set_postfix_str(f"{done} of {count} images")
            _check_finite(images[:real], [name(item) for item in chunk[:real]])
            yield chunk[:real], torch.stack(images[:real])


def _check_finite(images: Sequence[Tensor], names: Sequence[str]) -> None:
    for image, name in zip(images, names, strict=True):
        if not bool(image.isfinite().all()):
            raise InputError(
                f"the image of {name} is not finite: check the weights, the guidance scale and the"
                " precision"
            )


def _smaller(size: int) -> int:
    if size == 1:
        instead = ", or --device cpu" if torch.cuda.is_available() else ""
        raise InputError(
            f"the device's memory does not hold one image: use a smaller model or size{instead}"
        )
    half = (size + 1) // 2
    Progress.write(f"{size} images at once do not fit into the device's memory: trying {half}")
    return half
