"""The speed of zero-shot classification against the straightforward open_clip loop, in one run on
one set of pictures.

    python3 -m scripts.benchmark_clip --images hw2_data/clip_shapes_test/val
    python3 -m scripts.benchmark_clip --images DIR --model ViT-B-32 --random  (no weights needed)

Three ways to the same features: the loop of open_clip's README (read, preprocess, encode, one after
the other), this project's (read ahead in threads, cache empty), and this project's a second time
(cache full). Then, unless the weights are random, what a user waits for: `python -m
p3_clip.inference` as a process of its own, imports included, twice with one cache folder and
another template the second time. All files are read once before, so that none of it pays for a cold
disk.
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

PROGRAM = ("imports alone", "program, first run", "program, second run")
TEMPLATES = ("a photo of a {}", "a picture of a {}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Times zero-shot feature extraction against the straightforward open_clip loop."""

    images: Path
    """Folder of pictures."""
    clip: Annotated[ClipConfig, tyro.conf.arg(name="")] = ClipConfig()
    random: bool = False
    """Take random weights: the time is the same."""
    limit: int = 2500
    """Use the first pictures only."""
    batch_size: int = 64
    """Pictures in one network call."""
    workers: int = 2
    """Threads that read ahead."""
    repeats: int = 3
    """How often everything is timed; medians are reported."""
    result: Path | None = None
    """JSON file to write."""


def main(config: Config) -> None:
    """Times the three ways to the features and the program, prints and writes."""
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
    """Seconds of three ways to the features, which are checked to agree: the plain loop, and this
    project's twice."""
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
            raise SystemExit(f"{name} gives other features: they differ by up to {difference:.1e}")
    return [(name, took) for name, took, _ in found]


def time_program(config: Config, files: list[Path]) -> list[tuple[str, float]]:
    """Seconds of three processes: one that only imports open_clip, and two runs of
    p3_clip.inference, the second with the first's cache and another template. None for random
    weights, which the program does not take."""
    if config.random:
        return []
    with tempfile.TemporaryDirectory() as folder:
        images, labels = Path(folder) / "images", Path(folder) / "id2label.json"
        images.mkdir()
        for n, file in enumerate(files):  # any pictures will do: the classes cost nothing here
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
                    f"p3_clip.inference ended with {result.returncode}: {result.stderr[-500:]}"
                )
            return time.monotonic() - started

        runs = [[*map(str, command), "--template", template] for template in TEMPLATES]
        processes = ([sys.executable, "-c", "import open_clip"], *runs)
        return [(name, run(arguments)) for name, arguments in zip(PROGRAM, processes, strict=True)]


def random_clip(config: ClipConfig) -> Clip:
    """The model with random weights."""
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
    """Read, preprocess, encode, one batch after the other, as in open_clip's README."""
    features = []
    with torch.no_grad():
        for start in range(0, len(files), batch_size):
            images = [read_pixels(clip, file) for file in files[start : start + batch_size]]
            encoded = clip.network.encode_image(torch.stack(images).to(clip.device))
            features.append(F.normalize(encoded, dim=-1).cpu())
    return torch.cat(features)


def _timed(job: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.monotonic()
    result = job()
    return time.monotonic() - started, result


if __name__ == "__main__":
    cli.run(main, Config)
