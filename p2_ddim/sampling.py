"""Sampling faces: the conventions of DDIM in circulation, noise files, and the images that come of
them."""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.checkpoint import load_pickle
from common.diffusion.process import Denoise, denoiser
from common.diffusion.samplers import Callback, SamplerName, sample
from common.diffusion.sampling import SamplerConfig, sample_in_chunks
from common.diffusion.schedule import SPACINGS, NoiseSchedule, TimestepPairs, linear_schedule
from common.errors import InputError
from common.seeds import StackedRandomGenerator, derive_seed
from p2_ddim.model import FaceNetwork

Precision = Literal["fp32", "fp16", "bf16"]
NamedNoise = tuple[str, Tensor]  # (name, noise [3, H, W])


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How faces are sampled; the defaults are the convention behind the homework's reference faces.
    An image depends on these, on its noise and, where fresh noise is drawn, on the seed and its own
    name."""

    sampler: SamplerName = "ddim"
    """The solver."""
    steps: int = 50
    """Steps of the solver: network evaluations, but for Heun, which takes two a step."""
    spacing: Literal["leading", "trailing", "linspace", "homework"] = "homework"
    """Which timesteps are visited; of 50 steps, homework visits t = 981, ..., 21, 1, leading 980,
    ..., 20, 0, trailing 999, ..., 39, 19."""
    chunk_size: int = 1
    """Images in one network call. Files agree to the byte at the same size."""
    clip_x0: bool = True
    """Clamp the predicted image to [-1, 1] at each step; eps is not recomputed."""
    last_abar: Literal["first", "one"] = "first"
    """Alpha-bar after the last step: the table's first entry (0.9999), or 1."""
    table_length: int = 1000
    """Betas in the table, from 0.0001 to 0.02."""
    table_offset: int = 0
    """The network at t goes with alphas_cumprod[t + offset]; -1 counts from a table that begins
    with an alpha-bar of 1."""
    precision: Precision = "fp32"
    """Autocast on CUDA; only fp32 is exact."""

    def check(self, num_timesteps: int | None = None) -> None:
        """Raises InputError on a number outside its range."""
        if self.table_length < 2:
            raise InputError(f"--table-length must be at least 2, not {self.table_length}")
        super().check(num_timesteps or self.table_length)
        t = [t for t, _ in plan(self)[1]]
        if min(t) < 0 or max(t) >= self.table_length or min(t) - self.table_offset < 0:
            raise InputError(
                f"--table-offset {self.table_offset} leads out of the table of {self.table_length}"
                " entries with these steps"
            )

    def check_device(self, device: torch.device) -> None:
        """Raises InputError if the device does not have the precision."""
        if self.precision != "fp32" and device.type != "cuda":
            raise InputError(
                f"--precision {self.precision} needs a CUDA device, not {device.type.upper()}"
            )


CONVENTIONS: dict[str, dict[str, Any]] = {
    "homework": {},
    "no clamp": {"clip_x0": False},
    "last alpha-bar 1": {"last_abar": "one"},
    "t = 0, 20, ..., 980": {"spacing": "leading", "last_abar": "one"},
    "table of 1001": {"table_length": 1001},
    "alpha-bar of t - 1": {"table_offset": -1},
    "trailing": {"spacing": "trailing", "last_abar": "one"},
    "linspace": {"spacing": "linspace", "last_abar": "one"},
}
"""How DDIM is written down in circulation: what differs from the defaults of `SamplingConfig`.
`p2_ddim.study.calibrate` tries them."""


def read_noises(folder: Path) -> list[NamedNoise]:
    """The (name, noise float32 [3, H, W]) of every `.pt` file in the folder, in the order of names,
    all of one shape.

    Raises InputError that names the folder or file that is missing, empty, unreadable, of a wrong
    shape or not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"the noise folder {folder} does not exist")
    named_noises = [(path.stem, read_noise(path)) for path in sorted(folder.glob("*.pt"))]
    if not named_noises:
        raise InputError(f"{folder} holds no noise file: NAME.pt is expected")
    for name, noise in named_noises:
        if noise.shape != named_noises[0][1].shape:
            raise InputError(
                f"{folder / name}.pt is {_size(noise)}, but {named_noises[0][0]}.pt is"
                f" {_size(named_noises[0][1])}: one size is expected"
            )
    return named_noises


def read_noise(path: Path) -> Tensor:
    """One noise, float32 [3, H, W] on the CPU, whatever device it was saved on. Raises InputError
    if the file holds none."""
    noise = load_pickle(path)
    if not isinstance(noise, Tensor):
        raise InputError(f"{path} holds no tensor")
    shape = list(noise.shape)
    if len(shape) == 4 and shape[0] == 1:
        noise = noise[0]
    if noise.dim() != 3 or noise.shape[0] != 3 or not noise.is_floating_point():
        raise InputError(
            f"{path} holds a tensor {shape} of {noise.dtype}, but floats [1, 3, H, W] or [3, H, W]"
            " are expected"
        )
    if not bool(noise.isfinite().all()):
        raise InputError(f"{path} holds numbers that are not finite")
    return noise.float()


def check_side(network: FaceNetwork, noise: Tensor, source: Path) -> None:
    """Raises InputError if the network cannot work on images of the noise's size."""
    height, width = noise.shape[-2:]
    multiple = network.side_multiple
    if height % multiple or width % multiple or not height or not width:
        raise InputError(
            f"the noises in {source} are {_size(noise)}, but this network needs sides that are"
            f" multiples of {multiple}"
        )


def minmax_to_uint8(x0: Tensor) -> Tensor:
    """Images [N, 3, H, W] to uint8, each stretched from its own smallest and largest value to 0 and
    255.

    This is what `torchvision.utils.save_image(image, normalize=True)` writes.
    """
    low, high = x0.amin((1, 2, 3), keepdim=True), x0.amax((1, 2, 3), keepdim=True)
    return ((x0 - low) / (high - low).clamp(min=1e-5) * 255.0 + 0.5).to(torch.uint8)


def _size(noise: Tensor) -> str:
    return "x".join(str(side) for side in noise.shape)


def plan(config: SamplingConfig) -> tuple[NoiseSchedule, TimestepPairs]:
    """The schedule and the pairs (t, t_prev) of indices into it. The network is fed t -
    `table_offset`."""
    schedule, offset = linear_schedule(config.table_length), config.table_offset
    timestep_pairs = SPACINGS[config.spacing](config.table_length, config.steps)
    timestep_pairs[-1] = (timestep_pairs[-1][0], 0 if config.last_abar == "first" else -1)
    return schedule, [(t + offset, max(t_prev + offset, -1)) for t, t_prev in timestep_pairs]


def face_denoiser(network: FaceNetwork, schedule: NoiseSchedule, config: SamplingConfig) -> Denoise:
    """The network as the samplers want it, under the convention's offset and clamp."""

    def predict(x_t: Tensor, t: int) -> Tensor:
        timesteps = torch.full((len(x_t),), t - config.table_offset, device=x_t.device)
        return network(x_t, timesteps).to(x_t.dtype)

    return denoiser(predict, schedule, network.parameterization, clip_x0=config.clip_x0)


@torch.inference_mode()
def sample_faces(
    network: FaceNetwork,
    named_noises: Sequence[NamedNoise],
    config: SamplingConfig,
    device: torch.device | str = "cpu",
    *,
    share: tuple[int, int] = (0, 1),
    callback: Callback | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[list[NamedNoise], Tensor]]:
    """Yields (named_noises, clean images float32 [n, 3, H, W] on the CPU) chunk by chunk.

    `share` = (r, P) takes every P-th chunk, from the r-th on. `callback` is the samplers', on whole
    chunks, padding included. Raises InputError if an image is not finite.
    """
    _use_exact_kernels()
    device = torch.device(device)
    schedule, timestep_pairs = plan(config)
    denoise = face_denoiser(network, schedule, config)

    def sample_chunk(chunk: list[NamedNoise], callback: Callback) -> Tensor:
        x_T = torch.stack([noise for _, noise in chunk]).to(device)
        generators = StackedRandomGenerator(
            [derive_seed(config.seed, zlib.crc32(name.encode())) for name, _ in chunk], device
        )

        def noise() -> Tensor:
            return generators.randn(*x_T.shape[1:])

        with _autocast(device, config.precision):
            return sample(
                config.sampler,
                denoise,
                schedule,
                x_T,
                timestep_pairs,
                eta=config.eta,
                noise=noise,
                callback=callback,
            )

    yield from sample_in_chunks(
        named_noises,
        sample_chunk,
        config,
        name=lambda pair: pair[0],
        share=share,
        callback=callback,
        show_progress=show_progress,
    )


def _autocast(device: torch.device, precision: Precision) -> torch.autocast | nullcontext:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


def _use_exact_kernels() -> None:
    """On CUDA: convolutions and products in full float32 (no TF32), the same kernels at each
    run."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
