"""Samples the digits of Problem 1 into the grader's layout: OUT/{mnistm,svhn}/D_NNN.png, 28x28 RGB.

python3 -m p1_diffusion.inference --output-dir OUT                  (2025: 500 images)
python3 -m p1_diffusion.inference --output-dir OUT --edition 2024   (1000 images)
torchrun --nproc_per_node 2 -m p1_diffusion.inference --output-dir OUT    (the same files)
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from common import cli
from common.data.digits import DATASETS, SIZE, Edition, pairing
from common.devices import DeviceName, pick_device
from common.diffusion.guidance import guided
from common.diffusion.process import denoiser
from common.diffusion.samplers import Callback, SamplerName, sample
from common.diffusion.schedule import SPACINGS, make_schedule
from common.errors import InputError
from common.files import ROOT, make_folder
from common.images import to_uint8, write_png
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples the digits of Problem 1 into the grader's layout."""

    output_dir: Path
    """Folder for mnistm/ and svhn/."""
    edition: Edition = "2025"
    """2025: 500 images, even digits from MNIST-M and odd ones from SVHN; 2024: 1000 images, all digits from both."""
    classes: tuple[str, ...] = ()
    """Only these classes of the edition, each as DATASET/DIGIT, for example svhn/7; the default is all."""
    checkpoint: Path = ROOT / "checkpoints" / "p1_digits"
    """Model folder."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()


def main(config: Config) -> None:
    """Writes the images of the edition, each process its share of the chunks."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    check_sampling(config.sampling)
    model = ContextUNet.load(config.checkpoint).to(device)
    everything = edition_jobs(pairing(config.edition))
    jobs = edition_jobs(pick_classes(config.edition, config.classes))
    prepare_output(config.output_dir, {file_name(job) for job in everything})
    for part, images in sample_digits(model, jobs, config.sampling, share=(rank, processes)):
        for job, image in zip(part, images, strict=True):
            write_png(config.output_dir / file_name(job), image, staging=config.output_dir)
    if rank == 0:
        print(f"{len(jobs)} images in {config.output_dir}")


def edition_jobs(classes: Sequence[tuple[str, int]]) -> list[Job]:
    """Fifty images of each (dataset, digit)."""
    return [(dataset, digit, number) for dataset, digit in classes for number in range(1, IMAGES_PER_CLASS + 1)]


def pick_classes(edition: Edition, names: Sequence[str]) -> list[tuple[str, int]]:
    """The edition's classes of these names, all if none is given. Raises InputError that lists the known names."""
    known = {f"{dataset}/{digit}": (dataset, digit) for dataset, digit in pairing(edition)}
    for name in names:
        if name not in known:
            raise InputError(f"the edition {edition} has no class {name!r}; its classes are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def file_name(job: Job) -> str:
    """The grader's name of an image, relative to the output folder."""
    dataset, digit, number = job
    return f"{dataset}/{digit}_{number:03d}.png"


def prepare_output(folder: Path, wanted: set[str]) -> None:
    """Makes the folders and clears what another edition's run left there. Raises InputError that names a stranger's file.

    The grader reads the first character of every entry as a digit, so nothing else may lie there.
    """
    own = {file_name(job) for job in edition_jobs(pairing("2024"))}
    stale = []
    for dataset in DATASETS:
        for path in sorted(make_folder(folder / dataset).iterdir()):
            name = f"{dataset}/{path.name}"
            if name not in own or not path.is_file():
                raise InputError(
                    f"{path} was not written by this program and would break the grader: move it away first"
                )
            if name not in wanted:
                stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)


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


if __name__ == "__main__":
    cli.run(main, Config)
