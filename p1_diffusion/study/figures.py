"""Makes the figures of Problem 1's report from a folder that `p1_diffusion.inference` wrote.

    python3 -m p1_diffusion.study.figures --images OUT --output-dir results/figures/p1

- `grid_mixed.png`, `reverse_2025.png`, from a folder of either edition: even digits of MNIST-M and
  odd ones of SVHN, and the reverse process of the first MNIST-M 0 and the first SVHN 1.
- `grid_mnistm.png`, `grid_svhn.png`, `reverse_2024.png`, from a folder of the edition 2024 only:
  all digits of each dataset, and the reverse process of the first 0 of each.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from common import cli
from common.data.digits import DATASETS, NUM_DIGITS, pairing
from common.errors import InputError
from common.files import ROOT, make_folder
from common.grid import labelled_grid
from common.images import read_rgb, to_uint8, write_png
from p1_diffusion.model import ContextUNet
from p1_diffusion.sampling import (
    ImageKey,
    SamplingConfig,
    class_keys,
    file_name,
    sample_digits,
    translate_guide_w,
)

COLUMNS = 10
REVERSE_IMAGES = 6


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the grids of digits and the figures of the reverse process."""

    images: Path
    """Folder of the sampled digits, with mnistm/ and svhn/, written with the same sampling flags as
    are given here."""
    output_dir: Path
    """Output folder of the figures."""
    checkpoint: Path = ROOT / "checkpoints" / "p1_digits"
    """Model folder; its network samples the reverse process."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()
    translate_arguments = staticmethod(translate_guide_w)


def main(config: Config) -> None:
    """Writes the figures that the folder has images for."""
    config.sampling.check()
    model = ContextUNet.load(config.checkpoint)
    folder = make_folder(config.output_dir)
    rows = {dataset: [(dataset, digit) for digit in range(NUM_DIGITS)] for dataset in DATASETS}
    rows["mixed"] = sorted(pairing("2025"), key=lambda pair: pair[1])
    made = []
    for name, classes in rows.items():
        if all((config.images / file_name((*pair, COLUMNS))).is_file() for pair in classes):
            made.append(folder / f"grid_{name}.png")
            write_png(made[-1], grid(config.images, classes))
    if not made:
        raise InputError(
            f"{config.images} holds no complete set of digits: write one with"
            " p1_diffusion.inference first"
        )
    full = (config.images / file_name(("svhn", 0, 1))).is_file()
    editions = {"2025": [("mnistm", 0, 1), ("svhn", 1, 1)]} | (
        {"2024": [("mnistm", 0, 1), ("svhn", 0, 1)]} if full else {}
    )
    for edition, keys in editions.items():
        made.append(folder / f"reverse_{edition}.png")
        write_png(made[-1], reverse_process(model, keys, config.sampling))
    print("\n".join(str(path) for path in made))


def grid(folder: Path, classes: list[tuple[str, int]]) -> Tensor:
    """Grid with a row for each (dataset, digit), labelled by digit, of its first ten images."""
    images = [read_rgb(folder / file_name(key)) for key in class_keys(classes, COLUMNS)]
    labels = [str(digit) for _, digit in classes]
    return labelled_grid(torch.stack(images), COLUMNS, row_labels=labels, scale=2)


def reverse_process(model: ContextUNet, keys: list[ImageKey], sampling: SamplingConfig) -> Tensor:
    """Grid with a row for each key: x_t at the steps nearest to five equally spaced t, then x_0.

    The first column is pure noise; columns are labelled by t.
    """
    states: list[tuple[int, Tensor]] = []
    (_, final), *_ = sample_digits(
        model,
        keys,
        sampling,
        callback=lambda i, t, x_t, x0: states.append((t, x_t[: len(keys)].cpu())),
        show_progress=False,
    )
    wanted = torch.linspace(states[0][0], 0, REVERSE_IMAGES)[:-1].tolist()
    chosen = [min(states, key=lambda state: abs(state[0] - t)) for t in wanted]
    frames = [*(to_uint8(x_t) for _, x_t in chosen), final]
    labels = [*(f"t = {t}" for t, _ in chosen), "image"]
    rows = [f"{dataset} {digit}" for dataset, digit, _ in keys]
    images = torch.stack([frame[row] for row in range(len(keys)) for frame in frames])
    return labelled_grid(images, REVERSE_IMAGES, row_labels=rows, column_labels=labels, scale=3)


if __name__ == "__main__":
    cli.run(main, Config)
