"""Generates the images of an input.json: 25 for each prompt of each concept, 512x512 RGB.

    python3 -m p3_clip.personalisation.inference --prompts input.json --output-dir OUT \
        --checkpoint checkpoints/ldm_shapes
    torchrun --nproc_per_node 2 -m p3_clip.personalisation.inference ...    (the same files)

The images are OUT/KEY/INDEX/sourceKEY_promptINDEX_N.png. The checkpoint is a Stable Diffusion v1.4
file or folder, or the folder of the small model. Each token_name of the input must be a placeholder
in the folders or files that --concepts names. Finished images of the same settings are kept, so an
interrupted run continues where it stopped.
"""

import dataclasses
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from common import cli
from common.config import Pictures, Side
from common.devices import DTYPES, DeviceName, Precision, exact_kernels, pick_device, this_process
from common.errors import InputError
from common.files import ROOT
from common.images import image_files
from common.latent.generate import GenerationConfig, Request
from common.latent.load import kind_of, load_base
from common.latent.save_pictures import Picture, draw_missing
from common.seeds import derive_seed
from p3_clip.personalisation.base_kind import SMALL, STABLE_DIFFUSION, BaseKind
from p3_clip.personalisation.concepts import Concept, expand, unused
from p3_clip.personalisation.model import load_learned, personalise
from p3_clip.personalisation.task import Task, read_tasks

SHIPPED_BASE = ROOT / "checkpoints" / "ldm_shapes"
SHIPPED_CONCEPTS = ROOT / "checkpoints" / "concepts_shapes"
SD_CONCEPTS = ROOT / "checkpoints" / "concepts_sd14"
SIZE, COUNT = 512, 25  # side in pixels, images per prompt; what the grader expects
MOST_PICTURES = 100_000  # of one run: months of Stable Diffusion on a GPU


@dataclasses.dataclass(frozen=True)
class Config:
    """Generates the images of an input.json."""

    prompts: Path
    """The input.json: for each concept, its token_name and prompts."""
    output_dir: Path
    """Folder for the images."""
    checkpoint: Path = SHIPPED_BASE
    """Stable Diffusion v1.4 file or folder, or the folder of the small model."""
    concepts: tuple[str, ...] = ()
    """Folders or files of learned concepts; FILE=<word> calls the only word of a file <word>.
    Default: the shipped ones."""
    count: Pictures = COUNT
    """Images per prompt."""
    size: Side = SIZE
    """Width and height of the written images, in pixels."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""
    precision: Precision = "fp32"
    """Floating-point format of U-Net and text encoder; the autoencoder decodes in float32 always,
    because its activations can exceed what fp16 holds. Default fp32: pictures then agree on all
    devices, and the small model gains nothing from less. For Stable Diffusion on a GPU fp16 (or
    bf16, which cannot overflow and is coarser) takes half the memory and about half the time."""
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = GenerationConfig(steps=25)


def main(config: Config) -> None:
    """Generates and writes the images; each process generates a share of them."""
    tasks = read_tasks(config.prompts, to_grade=False)
    kind = checked_kind(config.checkpoint)
    config.generation.check()
    device = pick_device(config.device)
    paths = find_concepts(config, tasks, kind)
    model = load_base(config.checkpoint)
    learned = load_learned(paths, model)
    pictures = plan(config, tasks, learned.concepts)
    personalise(model, learned)
    model.cast(DTYPES[config.precision])
    for token in unused([prompt for task in tasks for prompt in task.prompts], learned.concepts):
        print(f"warning: the concept {token} is loaded, but no prompt holds it", file=sys.stderr)
    check_output(config.output_dir, pictures)
    model = model.to(device).eval()
    with exact_kernels(config.precision == "fp32"):
        draw_missing(model, pictures, config.generation, config.size, staging=config.output_dir)
    if this_process().rank == 0:
        print(f"{len(pictures)} pictures in {config.output_dir}")


def checked_kind(checkpoint: Path) -> BaseKind:
    """Returns the kind of the base model.

    Raises InputError if it is missing, or neither Stable Diffusion nor a small model.
    """
    if checkpoint.resolve() == SHIPPED_BASE and not checkpoint.is_dir():
        raise InputError(
            f"checkpoints/{SHIPPED_BASE.name} is missing; it is part of the repository: restore it"
            " with git"
        )
    kind = kind_of(checkpoint)
    if kind not in ("small", "sd_file", "sd_folder"):
        raise InputError(
            f"{checkpoint} is neither Stable Diffusion v1.4 nor a model folder of this project"
        )
    return SMALL if kind == "small" else STABLE_DIFFUSION


def find_concepts(config: Config, tasks: Sequence[Task], kind: BaseKind) -> Sequence[Path | str]:
    """Returns the folders or files of learned concepts: --concepts, or the shipped ones.

    Raises InputError if there are none; for Stable Diffusion it gives the command that trains them.
    """
    if config.concepts:
        return config.concepts
    shipped = SHIPPED_CONCEPTS if kind is SMALL else SD_CONCEPTS
    if shipped.is_dir():
        return [shipped]
    if kind is SMALL:
        raise InputError(
            f"checkpoints/{shipped.name} is missing; it is part of the repository: restore it with"
            " git, or name your own with --concepts"
        )
    raise InputError(
        "no learned concepts are shipped for Stable Diffusion: train them with"
        f" `{training_command(config, tasks)}` and name the result with --concepts"
        " runs/textual_inversion/best"
    )


def training_command(config: Config, tasks: Sequence[Task]) -> str:
    """Returns the command that trains the concepts of the input by textual inversion.

    The photos of a concept are expected in the folder of its key, beside the input. A concept that
    some prompt asks for with "in the style of" is passed to --styles.
    """
    folder = config.prompts.parent
    photos = [str(folder / task.key) for task in tasks]
    words = [
        "--words",
        *(task.source for task in tasks),
        "--tokens",
        *(task.token for task in tasks),
    ]
    styles = [
        task.token
        for task in tasks
        if any(f"in the style of {task.token}" in prompt for prompt in task.prompts)
    ]
    if styles:
        words += ["--styles", *styles]
    command = [
        "bash",
        "scripts/train_textual_inversion.sh",
        "--preset",
        "sd14",
        "--base",
        str(config.checkpoint),
        "--photos",
        *photos,
    ]
    return shlex.join([*command, *words])


def plan(config: Config, tasks: Sequence[Task], concepts: Sequence[Concept]) -> list[Picture]:
    """Returns all images to generate, with their paths, prompts and seeds.

    Raises InputError if a prompt contains a placeholder that is not loaded, or if there are more
    than `MOST_PICTURES`.
    """
    prompts = sum(len(task.prompts) for task in tasks)
    if config.count * prompts > MOST_PICTURES:
        raise InputError(
            f"--count {config.count} for the {prompts} prompts of {config.prompts} is more than"
            f" {MOST_PICTURES} pictures: make it smaller"
        )
    pictures = []
    for task in tasks:
        for index, prompt in enumerate(task.prompts):
            words = expand(prompt, concepts)
            for number in range(config.count):
                path = picture_path(task.key, index, number)
                request = Request(words, picture_seed(path, config.generation.seed))
                pictures.append(Picture(config.output_dir / path, request))
    return pictures


def picture_path(key: str, prompt: int, number: int) -> Path:
    """Path of a picture below the output folder, from the concept's key and the prompt's index."""
    return Path(key) / str(prompt) / f"source{key}_prompt{prompt}_{number}.png"


def picture_seed(path: Path, seed: int) -> int:
    """The seed of a picture's noise, from its `picture_path` and the run's seed."""
    return derive_seed(seed, zlib.crc32(path.as_posix().encode()))


def check_output(folder: Path, pictures: Sequence[Picture]) -> None:
    """Raises InputError if an output folder holds another run's image, which would be graded."""
    ours = {picture.path for picture in pictures}
    for path in sorted({path.parent for path in ours}):
        if strange := [file for file in image_files(path) if file not in ours]:
            raise InputError(
                f"{strange[0]} is not a picture of this run, but would be graded as one: remove it,"
                f" or choose another folder than {folder}"
            )


if __name__ == "__main__":
    cli.run(main, Config)
