"""Writes noise files for Problem 2 in the homework's format: OUT/NN.pt, float32 [1, 3, SIDE, SIDE].

    # ten noises of 64x64 for the shipped model
    python3 -m scripts.make_noise --output-dir hw2_data/face/noise
    # ten noises of 256x256 for the homework's UNet.pt
    python3 -m scripts.make_noise --output-dir hw2_data/face/noise256 --side 256

The values are standard normal. Noise NN depends on the seed, the side and NN alone.
"""

import dataclasses
import io
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.config import Pictures, Seed, Side
from common.errors import InputError
from common.files import atomic_write, make_folder
from p2_ddim.sampling import numbered_noise, read_noise


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes standard normal noise files in the homework's format."""

    output_dir: Path
    """Output folder of NN.pt."""
    count: Pictures = 10
    """Number of files, named 00.pt to (COUNT - 1).pt."""
    side: Side = 64
    """Height and width of the noises in pixels."""
    seed: Seed = 0
    """Seed of all noises."""


def main(config: Config) -> None:
    """Writes the noise files. Raises InputError if one of another content is there already."""
    folder = make_folder(config.output_dir)

    def noise(number: int) -> Tensor:
        return numbered_noise(number, config.side, config.seed)

    files = {number: folder / f"{number:02d}.pt" for number in range(config.count)}
    for number, path in files.items():
        if path.exists() and not torch.equal(read_noise(path), noise(number)):
            raise InputError(
                f"{path} is there already with another noise and is not changed: remove it first,"
                " or give another --output-dir"
            )
    for number, path in files.items():
        buffer = io.BytesIO()
        torch.save(noise(number)[None], buffer)
        atomic_write(path, buffer.getvalue())
    print(f"{config.count} noises in {folder}")


if __name__ == "__main__":
    cli.run(main, Config)
