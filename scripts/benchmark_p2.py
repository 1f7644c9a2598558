"""Times a DDIM step of the homework's full-size face network against a naive step and diffusers.

    # takes some minutes on two CPU cores; needs about 5 GB
    python3 -m scripts.benchmark_p2
    python3 -m scripts.benchmark_p2 --device cuda

The networks have random weights and compute in float32 on one image. The three steps take turns,
and the shortest time of each is reported, since other programs can only add to it. The peak
throughput is that of the fastest single convolution of the network. No other program should run at
the same time.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import cli
from common.devices import DeviceName, pick_device
from common.diffusion.samplers import sample_ddim
from common.errors import InputError
from common.files import ROOT, write_json
from p2_ddim.model import FaceUNet, FaceUNetConfig, fold_upsampling
from p2_ddim.sampling import SamplingConfig, face_denoiser, plan

# The network's 3x3 convolutions with the most work: (input channels, output channels, image side
# over feature map side).
CONVOLUTIONS = ((128, 128, 1), (256, 128, 1), (256, 256, 2), (256, 256, 4), (512, 512, 8))
STEPS = 50  # DDIM steps for a face


@dataclasses.dataclass(frozen=True)
class Config:
    """Times one DDIM step of the full-size face network."""

    side: int = 256
    """Height and width of the image in pixels, a multiple of 32."""
    rounds: int = 5
    """Timed steps of each implementation, after one untimed step."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""
    result: Path | None = ROOT / "results" / "p2_speed.json"
    """JSON file to write."""


def main(config: Config) -> None:
    """Times the three implementations, prints and writes the table."""
    if config.side % 32 or config.side < 32 or config.rounds < 1:
        raise InputError("--side must be a multiple of 32 and --rounds at least 1")
    device = pick_device(config.device)
    x_t = torch.randn(
        1, 3, config.side, config.side, generator=torch.Generator().manual_seed(0)
    ).to(device)
    candidates = {
        "naive": naive_step(device),
        "this project": own_step(device),
        "diffusers": diffusers_step(device),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(config.rounds + 1):
        for name, step in candidates.items():
            seconds = timed(lambda step=step: step(x_t), device)
            if round_number > 0:
                times[name].append(seconds)
    flops = count_flops(config.side)
    peak = measure_peak(config.side, device)
    rows = []
    for name, values in times.items():
        seconds = min(values)
        rows.append(
            {
                "name": name,
                "seconds": seconds,
                "speed_over_naive": min(times["naive"]) / seconds,
                "fraction_of_peak": flops / seconds / peak,
                "minutes_for_ten_faces": 10 * STEPS * seconds / 60,
            }
        )
        print(
            f"{name:<13} {seconds:8.3f} s per step, {rows[-1]['speed_over_naive']:.2f} times the"
            f" naive speed, {rows[-1]['fraction_of_peak']:.0%} of the peak throughput, ten faces in"
            f" {rows[-1]['minutes_for_ten_faces']:.1f} minutes"
        )
    print(
        f"{flops / 1e9:.0f} GFLOP per step; the fastest convolution reaches {peak / 1e9:.0f}"
        " GFLOP/s"
    )
    if config.result:
        settings = {
            "command": "python3 -m scripts.benchmark_p2",
            "side": config.side,
            "rounds": config.rounds,
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        write_json(
            config.result,
            {**settings, "gflop": flops / 1e9, "peak_gflop_per_s": peak / 1e9, "rows": rows},
        )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the call, including the work that it queued on the device."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def full_size() -> FaceUNet:
    """The homework's network with random weights, in evaluation mode and without gradients."""
    torch.manual_seed(0)
    return FaceUNet(FaceUNetConfig()).eval().requires_grad_(False)


def naive_step(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a step of the unoptimised network, in the memory format NCHW.

    Gradients are enabled, although no parameter requires one, so that SiLU is not done in place.
    """
    network = full_size().to(device)

    def step(x_t: Tensor) -> Tensor:
        with torch.enable_grad():
            return ddim_step(network, x_t)

    return step


def own_step(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a step of the network as `load_network` prepares it.

    Its memory format is channels_last, up-samplings are folded, and SiLU is done in place.
    """
    network = fold_upsampling(full_size().to(memory_format=torch.channels_last)).to(device)
    return torch.inference_mode()(lambda x_t: ddim_step(network, x_t))


def ddim_step(network: FaceUNet, x_t: Tensor) -> Tensor:
    """The first step of the homework's DDIM from x_t [1, 3, S, S]."""
    sampling = SamplingConfig()
    schedule, timestep_pairs = plan(sampling)
    return sample_ddim(
        face_denoiser(network, schedule, sampling), schedule, x_t, timestep_pairs[:1]
    )


def diffusers_step(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a step of diffusers' UNet2DModel of the same size, with its DDIMScheduler."""
    from diffusers import DDIMScheduler, UNet2DModel

    config = FaceUNetConfig()
    levels = range(len(config.channels))
    torch.manual_seed(0)
    network = UNet2DModel(
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        down_block_types=[
            "AttnDownBlock2D" if i in config.attention else "DownBlock2D" for i in levels
        ],
        up_block_types=[
            "AttnUpBlock2D" if i in config.attention else "UpBlock2D" for i in reversed(levels)
        ],
        attention_head_dim=config.channels[-1],
        flip_sin_to_cos=False,
    )
    network.eval().requires_grad_(False).to(device)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    t = int(scheduler.timesteps[0])

    @torch.inference_mode()
    def step(x_t: Tensor) -> Tensor:
        return scheduler.step(network(x_t, t).sample, t, x_t).prev_sample

    return step


def count_flops(side: int) -> int:
    """FLOP of one evaluation of the unoptimised network; a multiply-add counts as 2."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = FaceUNet(FaceUNetConfig())
        network(torch.empty(1, 3, side, side), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


@torch.inference_mode()
def measure_peak(side: int, device: torch.device) -> float:
    """FLOP/s of the fastest of CONVOLUTIONS, in the faster memory format."""
    best = 0.0
    for channels_in, channels, divisor in CONVOLUTIONS:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            conv = nn.Conv2d(channels_in, channels, 3, padding=1).to(
                device, memory_format=memory_format
            )
            x = torch.randn(1, channels_in, side // divisor, side // divisor, device=device)
            x = x.contiguous(memory_format=memory_format)
            seconds = min(timed(lambda conv=conv, x=x: conv(x), device) for _ in range(5))
            best = max(best, 2 * 9 * channels_in * channels * (side // divisor) ** 2 / seconds)
    return best


if __name__ == "__main__":
    cli.run(main, Config)
