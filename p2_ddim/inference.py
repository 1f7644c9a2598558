"""Samples faces from given noises by DDIM (Problem 2): OUT/NAME.png for each NOISE_DIR/NAME.pt.

    # the homework's network; reproduces its reference images
    python3 -m p2_ddim.inference --noises NOISE_DIR --output-dir OUT --checkpoint UNet.pt
    # the shipped face model
    python3 -m p2_ddim.inference --noises NOISE_DIR --output-dir OUT
    # two processes write the same files
    torchrun --nproc_per_node 2 -m p2_ddim.inference --noises NOISE_DIR --output-dir OUT

The defaults are the DDIM convention of the homework's reference faces; the flags of
`SamplingConfig` change it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from common import cli
from common.devices import DeviceName, pick_device, this_process
from common.files import check_targets, make_folder
from common.images import NOTE, check_replaceable, to_uint8, write_png
from p2_ddim.model import FACES, FACES_SIDE, load_network
from p2_ddim.sampling import SamplingConfig, check_side, minmax_to_uint8, read_noises, sample_faces


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples a face from each noise file."""

    noises: Path
    """Folder of the noise files NAME.pt, each a float tensor [1, 3, H, W] or [3, H, W]."""
    output_dir: Path
    """Output folder of NAME.png."""
    checkpoint: Path = FACES
    """Network: the homework's UNet.pt, a model folder of this project, or a folder of a diffusers
    UNet2DModel. The default is the shipped 64x64 face model."""
    stretch: bool = True
    """Map the smallest and largest value of each image to 0 and 255, as the homework does.
    Otherwise values are clamped to [-1, 1], which is mapped to 0..255."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()


def main(config: Config) -> None:
    """Writes an image for each noise; each process samples its share of the chunks."""
    rank, processes, _ = this_process()
    device = pick_device(config.device)
    config.sampling.check()
    config.sampling.check_device(device)
    named_noises = read_noises(config.noises)
    network = load_network(config.checkpoint).to(device)
    check_side(network, named_noises[0][1], config.noises)
    side = named_noises[0][1].shape[-1]
    if config.checkpoint == FACES and side != FACES_SIDE and rank == 0:
        print(
            f"warning: the noises are {side}x{side}, but the shipped network was trained on faces"
            f" of {FACES_SIDE}x{FACES_SIDE}; UNet.pt of the homework draws 256x256",
            file=sys.stderr,
        )
    make_folder(config.output_dir)
    targets = [config.output_dir / f"{name}.png" for name, _ in named_noises]
    check_targets(list(map(str, targets)))
    for target in targets:
        check_replaceable(target)
    sampling = config.sampling.for_job(len(named_noises))
    for part, x0 in sample_faces(network, named_noises, sampling, device, share=(rank, processes)):
        images = minmax_to_uint8(x0) if config.stretch else to_uint8(x0)
        for (name, _), image in zip(part, images, strict=True):
            write_png(config.output_dir / f"{name}.png", image, note=(NOTE, "p2_ddim.inference"))
    if rank == 0:
        print(f"{len(named_noises)} images in {config.output_dir}")


if __name__ == "__main__":
    cli.run(main, Config)
