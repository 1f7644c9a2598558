"""Samples the digits of Problem 1 into the grader's layout: OUT/{mnistm,svhn}/D_NNN.png, 28x28 RGB.

    # the edition 2025, 500 images
    python3 -m p1_diffusion.inference --output-dir OUT
    # the edition 2024, 1000 images
    python3 -m p1_diffusion.inference --output-dir OUT --edition 2024
    # two processes write the same files
    torchrun --nproc_per_node 2 -m p1_diffusion.inference --output-dir OUT

Each image depends on the sampling flags and on its dataset, digit and number alone.
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
    class_keys,
    file_name,
    sample_digits,
    translate_guide_w,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples the digits of Problem 1 into the grader's layout."""

    output_dir: Path
    """Output folder; gets the subfolders mnistm/ and svhn/."""
    edition: Edition = "2025"
    """Edition of the homework. 2025: 500 images, even digits in the style of MNIST-M and odd digits
    of SVHN. 2024: 1000 images, all digits in both styles."""
    classes: tuple[str, ...] = ()
    """Classes to sample, each as DATASET/DIGIT, for example svhn/7. If none is given, all classes
    of the edition."""
    checkpoint: Path = ROOT / "checkpoints" / "p1_digits"
    """Model folder."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig()
    translate_arguments = staticmethod(translate_guide_w)


def main(config: Config) -> None:
    """Writes the images of the chosen classes; each process samples its share of the chunks."""
    rank, processes, _ = this_process()
    device = pick_device(config.device)
    config.sampling.check()
    model = ContextUNet.load(config.checkpoint).to(device)
    everything = class_keys(pairing(config.edition))
    keys = class_keys(pick_classes(config.edition, config.classes))
    prepare_output(config.output_dir, {file_name(key) for key in everything})
    sampling = config.sampling.for_job(len(everything))
    for part, images in sample_digits(model, keys, sampling, share=(rank, processes)):
        for key, image in zip(part, images, strict=True):
            write_png(config.output_dir / file_name(key), image, staging=config.output_dir)
    if rank == 0:
        print(f"{len(keys)} images in {config.output_dir}")


def pick_classes(edition: Edition, names: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the (dataset, digit) pairs of the named classes; all of the edition if none is named.

    Raises InputError that lists the classes of the edition if a name is not among them.
    """
    known = {f"{dataset}/{digit}": (dataset, digit) for dataset, digit in pairing(edition)}
    for name in names:
        if name not in known:
            raise InputError(
                f"--classes: the edition {edition} has no class {name!r}; its classes are"
                f" {', '.join(known)}"
            )
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())


def prepare_output(folder: Path, wanted: set[str]) -> None:
    """Makes the output folders and deletes this program's images that are not in `wanted`.

    Such images come from a run of another edition. The grader reads the first character of each
    file name as the digit, so the folders must hold nothing else: raises InputError that names a
    file which this program did not write, before anything is deleted.
    """
    own = {file_name(key) for key in class_keys(pairing("2024"))}
    stale = []
    for dataset in DATASETS:
        for path in sorted(make_folder(folder / dataset).iterdir()):
            name = f"{dataset}/{path.name}"
            if name not in own or not path.is_file():
                raise InputError(
                    f"{path} was not written by this program, and the grader fails on it: move it"
                    " elsewhere first"
                )
            if name not in wanted:
                stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main, Config)
