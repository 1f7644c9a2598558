"""Finds the DDIM convention that made given reference images, by the MSE of each convention.

    python3 -m p2_ddim.study.calibrate --noises hw2_data/face/noise \
        --references hw2_data/face/GT --checkpoint hw2_data/face/UNet.pt

The conventions are those of `p2_ddim.sampling.CONVENTIONS`; the smallest MSE is printed first.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from common import cli
from common.config import Count
from common.devices import DeviceName, pick_device
from common.errors import InputError
from common.files import write_json
from p2_ddim.evaluate import compare, read_images
from p2_ddim.model import FACES, load_network
from p2_ddim.sampling import (
    CONVENTIONS,
    SamplingConfig,
    check_side,
    minmax_to_uint8,
    read_noises,
    sample_faces,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares DDIM conventions on noises whose reference images are given."""

    noises: Path
    """Folder of the noise files NAME.pt."""
    references: Path
    """Folder of the reference images NAME.png."""
    checkpoint: Path = FACES
    """Network that made the references. The default is the shipped 64x64 face model."""
    count: Count = 1
    """Number of images to sample with each convention, the first ones by name."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""
    result: Path | None = None
    """JSON file to write; none is written if it is not given."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()


def main(config: Config) -> None:
    """Prints the MSE of each convention, smallest first, and writes the result."""
    device = pick_device(config.device)
    config.sampling.check_device(device)
    tried = {
        name: dataclasses.replace(config.sampling, **changes)
        for name, changes in CONVENTIONS.items()
    }
    for sampling in tried.values():
        sampling.check()
    references = read_images(config.references)
    named_noises = [
        named_noise for named_noise in read_noises(config.noises) if named_noise[0] in references
    ][: config.count]
    if not named_noises:
        raise InputError(
            f"no noise in {config.noises} has an image of its name in {config.references}"
        )
    network = load_network(config.checkpoint).to(device)
    check_side(network, named_noises[0][1], config.noises)
    wanted = {name: references[name] for name, _ in named_noises}
    rows = []
    for convention_name, sampling in tried.items():
        images = {}
        for part, x0 in sample_faces(network, named_noises, sampling, device):
            images |= {
                name: image for (name, _), image in zip(part, minmax_to_uint8(x0), strict=True)
            }
        result = compare(images, wanted)
        rows.append(
            {
                "convention": convention_name,
                "mse": result["mean_mse"],
                "max_difference": result["max_difference"],
            }
        )
    rows.sort(key=lambda row: row["mse"])
    for row in rows:
        print(
            f"{row['convention']:<22} MSE {row['mse']:9.4f}, largest difference"
            f" {row['max_difference']}"
        )
    if config.result:
        write_json(
            config.result, {"images": [name for name, _ in named_noises], "conventions": rows}
        )


if __name__ == "__main__":
    cli.run(main, Config)
