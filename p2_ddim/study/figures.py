"""Makes the figures of Problem 2's report: the eta grid, the interpolations and a grid of faces.

    python3 -m p2_ddim.study.figures --noises NOISE_DIR \
        --output-dir results/figures/p2 [--checkpoint UNet.pt] [--images OUT]

- `eta.png`: rows are eta 0, 0.25, 0.5, 0.75 and 1; columns are the first four noises. The row of
  eta 0 shows the images that hw2_2.sh writes.
- `slerp.png`, `lerp.png`: interpolation from the first noise to the second, alpha = 0.0, 0.1, ...,
  1.0.
- `faces.png`: the first 32 images of OUT, by name; made only with --images.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from common import cli
from common.devices import DeviceName, pick_device
from common.diffusion.interpolation import lerp, slerp
from common.errors import InputError
from common.files import make_folder
from common.grid import labelled_grid
from common.images import write_png
from p2_ddim.evaluate import read_images
from p2_ddim.model import FACES, FaceNetwork, load_network
from p2_ddim.sampling import (
    NamedNoise,
    SamplingConfig,
    check_side,
    minmax_to_uint8,
    read_noises,
    sample_faces,
)

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLUMNS = 4
FACES_SHOWN, FACES_IN_A_ROW = 32, 8
ALPHAS = tuple(i / 10 for i in range(11))
PATHS = {"slerp": slerp, "lerp": lerp}


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the eta grid, the interpolations and a grid of faces."""

    noises: Path
    """Folder of the noise files NAME.pt; the first four by name are used."""
    output_dir: Path
    """Output folder of the figures."""
    checkpoint: Path = FACES
    """Network: the homework's UNet.pt, a model folder of this project, or a folder of a diffusers
    UNet2DModel. The default is the shipped 64x64 face model."""
    images: Path | None = None
    """Folder of the faces for faces.png, which is not made if none is given."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()


def main(config: Config) -> None:
    """Writes the figures."""
    device = pick_device(config.device)
    config.sampling.check()
    config.sampling.check_device(device)
    named_noises = read_noises(config.noises)
    if len(named_noises) < 2:
        raise InputError(f"{config.noises} holds one noise, but the interpolations need two")
    figures = {"faces": face_grid(config.images)} if config.images else {}
    network = load_network(config.checkpoint).to(device)
    check_side(network, named_noises[0][1], config.noises)
    folder = make_folder(config.output_dir)
    figures["eta"] = eta_grid(network, named_noises[:COLUMNS], config.sampling, device)
    for name in PATHS:
        figures[name] = strip(
            network, named_noises[0], named_noises[1], name, config.sampling, device
        )
    for name, figure in figures.items():
        write_png(folder / f"{name}.png", figure)
        print(folder / f"{name}.png")


def eta_grid(
    network: FaceNetwork,
    named_noises: list[NamedNoise],
    sampling: SamplingConfig,
    device: torch.device,
) -> Tensor:
    """Grid with a row for each eta and a column for each noise.

    Within a column the fresh noise of the sampler is the same up to its scale.
    """
    settings = [dataclasses.replace(sampling, eta=eta) for eta in ETAS]
    for each in settings:
        each.check()
    rows = [faces(network, named_noises, each, device) for each in settings]
    labels = [f"eta {eta:g}" for eta in ETAS]
    names = [name for name, _ in named_noises]
    return labelled_grid(
        torch.cat(rows),
        len(named_noises),
        row_labels=labels,
        column_labels=names,
        scale=_scale(rows[0]),
    )


def strip(
    network: FaceNetwork,
    start: NamedNoise,
    end: NamedNoise,
    path: str,
    sampling: SamplingConfig,
    device: torch.device,
) -> Tensor:
    """Row of the images along the interpolation `path` between two noises, labelled by alpha."""
    named_noises = [
        (f"alpha {alpha:.1f}", PATHS[path](start[1], end[1], alpha)) for alpha in ALPHAS
    ]
    images = faces(network, named_noises, sampling, device)
    title = f"{path} from {start[0]} to {end[0]}"
    labels = [f"{alpha:.1f}" for alpha in ALPHAS]
    return labelled_grid(
        images, len(named_noises), column_labels=labels, title=title, scale=_scale(images)
    )


def face_grid(folder: Path) -> Tensor:
    """Grid of the first images of a folder, by name; raises InputError if their sizes differ."""
    chosen = sorted(read_images(folder).items())[:FACES_SHOWN]
    images = [image for _, image in chosen]
    if len({image.shape for image in images}) > 1:
        raise InputError(f"the images in {folder} are not of one size")
    return labelled_grid(
        torch.stack(images), min(FACES_IN_A_ROW, len(images)), scale=_scale(images[0])
    )


def faces(
    network: FaceNetwork,
    named_noises: list[NamedNoise],
    sampling: SamplingConfig,
    device: torch.device,
) -> Tensor:
    """Samples an image from each noise, min-max normalised like hw2_2.sh's: uint8 [N, 3, H, W]."""
    return minmax_to_uint8(
        torch.cat([x0 for _, x0 in sample_faces(network, named_noises, sampling, device)])
    )


def _scale(images: Tensor) -> int:
    """Magnification of the images in a figure: 2 below 128 pixels, else 1."""
    return 2 if images.shape[-1] < 128 else 1


if __name__ == "__main__":
    cli.run(main, Config)
