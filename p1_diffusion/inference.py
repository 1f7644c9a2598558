"""Samples the digits of Problem 1 into the grader's layout: OUT/{mnistm,svhn}/D_NNN.png, 28x28 RGB.

python3 -m p1_diffusion.inference --output-dir OUT                  (2025: 500 images)
python3 -m p1_diffusion.inference --output-dir OUT --edition 2024   (1000 images)
torchrun --nproc_per_node 2 -m p1_diffusion.inference --output-dir OUT    (the same files)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from common import cli
from common.data.digits import DATASETS, Edition, pairing
from common.devices import DeviceName, pick_device, this_process
from common.errors import InputError
from common.files import ROOT, make_folder
from common.images import write_png
from p1_diffusion.model import ContextUNet
from p1_diffusion.sampling import (
    SamplingConfig,
    edition_keys,
    file_name,
    sample_digits,
    translate_guide_w,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples the digits of Problem 1 into the grader's layout."""

    output_dir: Path
    """Folder for mnistm/ and svhn/."""
    edition: Edition = "2025"
    """2025: 500 images, even digits from MNIST-M and odd ones from SVHN; 2024: 1000 images, all
    digits from both."""
    classes: tuple[str, ...] = ()
    """Only these classes of the edition, each as DATASET/DIGIT, for example svhn/7; the default is
    all."""
    checkpoint: Path = ROOT / "checkpoints" / "p1_digits"
    """Model folder."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()
    translate_arguments = staticmethod(translate_guide_w)


def main(config: Config) -> None:
    """Writes the images of the edition, each process its share of the chunks."""
    rank, processes, _ = this_process()
    device = pick_device(config.device)
    config.sampling.check()
    model = ContextUNet.load(config.checkpoint).to(device)
    everything = edition_keys(pairing(config.edition))
    keys = edition_keys(pick_classes(config.edition, config.classes))
    prepare_output(config.output_dir, {file_name(key) for key in everything})
    for part, images in sample_digits(model, keys, config.sampling, share=(rank, processes)):
        for key, image in zip(part, images, strict=True):
            write_png(config.output_dir / file_name(key), image, staging=config.output_dir)
    if rank == 0:
        print(f"{len(keys)} images in {config.output_dir}")


def pick_classes(edition: Edition, names: Sequence[str]) -> list[tuple[str, int]]:
    """The edition's classes of these names, all if none is given. Raises InputError that lists the
    known names."""
    known = {f"{dataset}/{digit}": (dataset, digit) for dataset, digit in pairing(edition)}
    for name in names:
        if name not in known:
            raise InputError(
                f"the edition {edition} has no class {name!r}; its classes are {', '.join(known)}"
            )
    return [known[name] for name in names] or list(known.values())


def prepare_output(folder: Path, wanted: set[str]) -> None:
    """Makes the folders and clears what another edition's run left there. Raises InputError that
    names a stranger's file.

    The grader reads the first character of every entry as a digit, so nothing else may lie there.
    """
    own = {file_name(key) for key in edition_keys(pairing("2024"))}
    stale = []
    for dataset in DATASETS:
        for path in sorted(make_folder(folder / dataset).iterdir()):
            name = f"{dataset}/{path.name}"
            if name not in own or not path.is_file():
                raise InputError(
                    f"{path} was not written by this program and would break the grader: move it"
                    " away first"
                )
            if name not in wanted:
                stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main, Config)
