"""Sampling of faces: the conventions of DDIM, the noise files, and the sampling loop."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from common.checkpoint import all_finite, load_pickle, load_tensors
from common.config import bounds, check_fields
from common.devices import DTYPES, Precision, exact_kernels
from common.diffusion.process import Denoise, denoiser
from common.diffusion.samplers import Callback, SamplerName, sample
from common.diffusion.sampling import ChunkSize, SamplerConfig, sample_in_chunks
from common.diffusion.schedule import SPACINGS, NoiseSchedule, TimestepPairs, linear_schedule
from common.errors import InputError
from common.images import is_hidden, name_text, warn_left_out
from common.seeds import StackedRandomGenerator, derive_seed
from common.weights import is_safetensors
from p2_ddim.model import FaceNetwork

NamedNoise = tuple[str, Tensor]  # (name, noise [3, H, W])
LARGEST_NOISE = 1e4  # of a number in a noise file; networks overflow with far larger ones


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """Sampling settings; the defaults are the convention of the homework's reference faces.

    An image depends on these settings and on its noise; with eta > 0 or a stochastic sampler also
    on the seed and its own name.
    """

    sampler: SamplerName = "ddim"
    """Sampler (solver of the reverse process)."""
    steps: Annotated[int, *bounds(at_least=1, at_most=10**6)] = 50
    """Number of sampling steps, at most the table's length. A step is one network evaluation; with
    heun it is two, or one if it ends at an alpha-bar of 1."""
    spacing: Literal["leading", "trailing", "linspace", "homework"] = "homework"
    """Choice of the timesteps. With 50 steps: homework 981, ..., 21, 1; leading 980, ..., 20, 0;
    trailing 999, ..., 39, 19; linspace 50 rounded values from 999 to 0."""
    chunk_size: ChunkSize = 1
    """Images per network call. Runs on one device with one chunk size write identical files."""
    clip_x0: bool = True
    """Clamp the predicted x0 to [-1, 1] at each step; eps is not recomputed from it."""
    last_abar: Literal["first", "one"] = "first"
    """Alpha-bar after the last step: first is alphas_cumprod[0] (0.9999), one is 1."""
    table_length: Annotated[int, *bounds(at_least=2, at_most=10**6)] = 1000
    """Number of betas in the noise schedule, linear from 0.0001 to 0.02."""
    table_offset: int = 0
    """Offset k of the noise schedule: the network receives t where the sampler uses
    alphas_cumprod[t + k]. -1 is for code whose table begins with an extra alpha-bar of 1."""
    precision: Precision = "fp32"
    """Floating-point format of the network. fp16 and bf16 use autocast and need CUDA; only fp32 is
    exact."""

    def check(self, num_timesteps: int | None = None) -> None:
        """Raises InputError if a setting is out of range."""
        check_fields(self)
        super().check(num_timesteps or self.table_length)
        t = [t for t, _ in plan(self)[1]]
        if min(t) < 0 or max(t) >= self.table_length or min(t) - self.table_offset < 0:
            raise InputError(
                f"--table-offset {self.table_offset} leads out of the table of {self.table_length}"
                f" entries with --steps {self.steps} and --spacing {self.spacing}"
            )

    def check_device(self, device: torch.device) -> None:
        """Raises InputError if the precision is not available on the device."""
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
"""Conventions of published DDIM code, as differences from the defaults of `SamplingConfig`.
`p2_ddim.study.calibrate` compares them."""


def read_noises(folder: Path) -> list[NamedNoise]:
    """Reads the `.pt` files of a folder: (name, noise float32 [3, H, W]), sorted by name.

    Other files are counted in a warning on stderr.

    Raises InputError that names the folder or file if it is missing, empty or unreadable, or if a
    noise is not finite or differs in shape from the first one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"the noise folder {folder} does not exist")
    files = [path for path in sorted(folder.iterdir()) if not is_hidden(path)]
    noises = [path for path in files if path.suffix.lower() in (".pt", ".pth")]
    warn_left_out(folder, [path for path in files if path not in noises], "noises (.pt)")
    for path in noises:
        name_text(path)
    named_noises = [(path.stem, read_noise(path)) for path in noises]
    if not named_noises:
        below = next(folder.glob("*/*.pt"), None)
        hint = f"; {below.parent} holds some" if below else ""
        raise InputError(f"{folder} holds no noise file: NAME.pt is expected{hint}")
    names = [name for name, _ in named_noises]
    for name, noise in named_noises:
        if names.count(name) > 1:
            raise InputError(f"{folder} holds two noises of the name {name}")
        if noise.shape != named_noises[0][1].shape:
            raise InputError(
                f"{folder / name}.pt is {_size(noise)}, but {named_noises[0][0]}.pt is"
                f" {_size(named_noises[0][1])}: all noises must have one size"
            )
    return named_noises


def read_noise(path: Path) -> Tensor:
    """Reads one noise, float32 [3, H, W] on the CPU, whatever device it was saved from.

    Raises InputError if the file does not hold one finite float tensor [1, 3, H, W] or [3, H, W].
    """
    noise = load_tensors(path)[0] if is_safetensors(path) else load_pickle(path)
    if isinstance(noise, Mapping) and len(noise) > 1:
        raise InputError(f"{path} holds {len(noise)} entries, such as weights, not one noise")
    if isinstance(noise, Mapping | list | tuple) and len(noise) == 1:
        noise = next(iter(noise.values() if isinstance(noise, Mapping) else noise))
    if not isinstance(noise, Tensor):
        raise InputError(
            f"{path} holds no tensor: save a noise with torch.save, and one of numpy after"
            " torch.from_numpy"
        )
    shape = list(noise.shape)
    if len(shape) == 4 and shape[0] == 1:
        noise = noise[0]
    if noise.dim() != 3 or noise.shape[0] != 3 or not noise.is_floating_point():
        raise InputError(
            f"{path} holds a tensor {shape} of {noise.dtype}, but floats [1, 3, H, W] or [3, H, W]"
            " are expected"
        )
    if noise.layout != torch.strided:
        raise InputError(f"{path} holds a sparse tensor: save noise.to_dense()")
    noise = noise.float()
    if not all_finite(noise):
        raise InputError(f"{path} holds numbers that are not finite")
    if noise.numel() and (largest := noise.abs().amax().item()) > LARGEST_NOISE:
        raise InputError(
            f"{path} holds {largest:.3g}, but noises are standard normal, of at most about 6"
        )
    return noise


def numbered_noise(number: int, side: int, seed: int = 0) -> Tensor:
    """Standard normal noise, float32 [3, side, side], which depends on the three numbers alone.

    `scripts.make_noise` writes it as NN.pt. Raises InputError if a number is negative.
    """
    return StackedRandomGenerator([derive_seed(seed, number)]).randn(3, side, side)[0]


def check_side(network: FaceNetwork, noise: Tensor, source: Path) -> None:
    """Raises InputError if the noise's sides do not fit the network; the message names `source`."""
    height, width = noise.shape[-2:]
    multiple = network.side_multiple
    if height % multiple or width % multiple or not height or not width:
        raise InputError(
            f"the noises in {source} are {_size(noise)}, but this network needs sides that are"
            f" multiples of {multiple}"
        )


def minmax_to_uint8(x0: Tensor) -> Tensor:
    """Converts float images [N, 3, H, W] to uint8 by min-max normalisation of each image.

    An image's smallest and largest value become 0 and 255, as
    `torchvision.utils.save_image(image, normalize=True)` writes them.
    """
    low, high = x0.amin((1, 2, 3), keepdim=True), x0.amax((1, 2, 3), keepdim=True)
    return ((x0 - low) / (high - low).clamp(min=1e-5) * 255.0 + 0.5).to(torch.uint8)


def _size(noise: Tensor) -> str:
    return "x".join(str(side) for side in noise.shape)


def plan(config: SamplingConfig) -> tuple[NoiseSchedule, TimestepPairs]:
    """Returns the noise schedule and the pairs (t, t_prev) of indices into it.

    The network receives t - `table_offset`; a t_prev of -1 stands for an alpha-bar of 1.
    """
    schedule, offset = linear_schedule(config.table_length), config.table_offset
    timestep_pairs = SPACINGS[config.spacing](schedule, config.steps)
    timestep_pairs[-1] = (timestep_pairs[-1][0], 0 if config.last_abar == "first" else -1)
    return schedule, [(t + offset, max(t_prev + offset, -1)) for t, t_prev in timestep_pairs]


def face_denoiser(network: FaceNetwork, schedule: NoiseSchedule, config: SamplingConfig) -> Denoise:
    """Wraps the network as a denoiser for the samplers, with the config's offset and clamping."""

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
    """Samples an image from each noise; yields (named_noises, images) chunk by chunk.

    Images are float32 [n, 3, H, W] on the CPU, about in [-1, 1]. `share` = (r, P) selects chunks r,
    r + P, r + 2P, ..., for process r of P. `callback` is passed to the sampler
    (common/diffusion/samplers.py) and sees whole chunks, padding included. Raises InputError if an
    image is not finite.
    """
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

        with exact_kernels(), _autocast(device, config.precision):
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
    """Context manager for the network calls; it does nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
