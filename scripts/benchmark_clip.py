"""Times zero-shot classification against a plain open_clip loop on the same images.

    python3 -m scripts.benchmark_clip --images hw2_data/clip_shapes_test/val
    # random weights, so that no weight file is needed
    python3 -m scripts.benchmark_clip --images DIR --model ViT-B-32 --random

Three computations of the same image features are timed: the loop of open_clip's README (read,
preprocess and encode one batch after the other), this project's function with an empty feature
cache (images are read ahead in threads), and the same function with the filled cache.

Unless the weights are random, the program `python -m p3_clip.inference` is then timed as a process
of its own, imports included: two runs with one cache folder, the second with another template. All
files are read once before the timing, so that the disk cache is warm for all of them.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from common import cli
from common.clip.features import extract_features, read_pixels
from common.clip.loading import ClipConfig
from common.clip.model import Clip
from common.clip.weights import check_model_name
from common.devices import pick_device
from common.errors import InputError
from common.files import ROOT, write_json
from common.images import image_files

# Names of the timed processes, in the order of `time_program`.
PROGRAM = ("imports alone", "program, first run", "program, second run")
TEMPLATES = ("a photo of a {}", "a picture of a {}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Times zero-shot feature extraction against a plain open_clip loop."""

    images: Path
    """Folder of the images."""
    clip: Annotated[ClipConfig, tyro.conf.arg(name="")] = ClipConfig()
    random: bool = False
    """Use random weights, which take the same time; needs --model."""
    limit: int = 2500
    """Largest number of images, the first ones by name."""
    batch_size: int = 64
    """Images per network call."""
    workers: int = 2
    """Threads that read images ahead."""
    repeats: int = 3
    """Number of timings of each computation; the median is reported."""
    result: Path | None = None
    """JSON file to write; none is written if it is not given."""


def main(config: Config) -> None:
    """Times the feature computations and the program; prints and writes the median seconds."""
    if not config.images.is_dir():
        raise InputError(f"the image folder {config.images} does not exist")
    files = image_files(config.images)[: config.limit]
    if not files:
        raise InputError(f"{config.images} holds no image")
    clip = random_clip(config.clip) if config.random else config.clip.load()[0]
    for file in files:
        file.read_bytes()
    clip.encode_images(torch.zeros(1, 3, *clip.network.visual.image_size))  # warm up
    takes: dict[str, list[float]] = {}
    for _ in range(config.repeats):
        for name, took in [*time_features(config, clip, files), *time_program(config, files)]:
            takes.setdefault(name, []).append(took)
    seconds = {name: statistics.median(values) for name, values in takes.items()}
    for name, took in seconds.items():
        print(f"{name}: {took:.2f} s, median of {config.repeats}")
    if config.result:
        numbers = {
            "model": clip.name,
            "images": len(files),
            "batch_size": config.batch_size,
            "workers": config.workers,
            "device": str(clip.device),
            "threads": torch.get_num_threads(),
            "repeats": config.repeats,
        }
        write_json(config.result, {**numbers, "seconds": seconds})


def time_features(config: Config, clip: Clip, files: list[Path]) -> list[tuple[str, float]]:
    """Returns (name, seconds) of the plain loop and of this project's function, run twice.

    Exits with a message if the features differ by more than 1e-4.
    """
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> Tensor:
            return extract_features(
                clip,
                files,
                batch_size=config.batch_size,
                workers=config.workers,
                cache=Path(folder),
            )

        ways = {
            "open_clip loop": lambda: plain_loop(clip, files, config.batch_size),
            "this project, first run": ours,
            "this project, second run": ours,
        }
        found = [(name, *_timed(way)) for name, way in ways.items()]
    for name, _, features in found:
        if (difference := (features - found[0][2]).abs().max().item()) > 1e-4:
            raise SystemExit(
                f"the features of {name} and {found[0][0]} differ by up to {difference:.1e}, but"
                " 1e-4 is allowed"
            )
    return [(name, took) for name, took, _ in found]


def time_program(config: Config, files: list[Path]) -> list[tuple[str, float]]:
    """Returns (name, seconds) of three processes; empty with --random.

    The first process only imports open_clip. The other two run p3_clip.inference, the second with
    the first one's cache and another template. The program cannot use random weights.
    """
    if config.random:
        return []
    with tempfile.TemporaryDirectory() as folder:
        images, labels = Path(folder) / "images", Path(folder) / "id2label.json"
        images.mkdir()
        for n, file in enumerate(files):  # arbitrary labels: they do not affect the time
            (images / f"{n % 50}_{n}{file.suffix}").symlink_to(file.resolve())
        labels.write_text(json.dumps({str(c): f"class {c}" for c in range(50)}))
        command = [
            sys.executable,
            "-m",
            "p3_clip.inference",
            "--images",
            images,
            "--labels",
            labels,
        ]
        command += ["--output-dir", Path(folder) / "out", "--cache", Path(folder) / "cache"]
        command += [
            "--batch-size",
            config.batch_size,
            "--workers",
            config.workers,
            "--device",
            config.clip.device,
        ]
        for flag in ("model", "pretrained"):
            if value := getattr(config.clip, flag):
                command += [f"--{flag}", Path(value).resolve() if Path(value).exists() else value]

        def run(arguments: list[str]) -> float:
            started = time.monotonic()
            result = subprocess.run(
                arguments, cwd=ROOT, capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise InputError(
                    f"p3_clip.inference failed with exit code {result.returncode}:"
                    f" {result.stderr[-500:]}"
                )
            return time.monotonic() - started

        runs = [[*map(str, command), "--template", template] for template in TEMPLATES]
        processes = ([sys.executable, "-c", "import open_clip"], *runs)
        return [(name, run(arguments)) for name, arguments in zip(PROGRAM, processes, strict=True)]


def random_clip(config: ClipConfig) -> Clip:
    """The CLIP model `config.model` with random weights; raises InputError without --model."""
    import open_clip

    if config.model is None:
        raise InputError("--random needs --model")
    check_model_name(config.model)
    network, _, preprocess = open_clip.create_model_and_transforms(
        config.model, device=pick_device(config.device)
    )
    return Clip(
        network.eval(), open_clip.get_tokenizer(config.model), preprocess, config.model, "random"
    )


def plain_loop(clip: Clip, files: list[Path], batch_size: int) -> Tensor:
    """Unit features [N, D] on the CPU: reads, preprocesses and encodes batch by batch.

    This is the loop of open_clip's README.
    """
    features = []
    with torch.no_grad():
        for start in range(0, len(files), batch_size):
            images = [read_pixels(clip, file) for file in files[start : start + batch_size]]
            encoded = clip.network.encode_image(torch.stack(images).to(clip.device))
            features.append(F.normalize(encoded, dim=-1).cpu())
    return torch.cat(features)


def _timed(job: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Returns (seconds, result) of the function call."""
    started = time.monotonic()
    result = job()
    return time.monotonic() - started, result


if __name__ == "__main__":
    cli.run(main, Config)
