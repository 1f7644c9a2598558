"""Measures the data of a ControlNet training at Stable Diffusion's size: memory, disk and waiting.

    # 50,000 pairs of 512x512: about 10 minutes on two CPU cores, and 6 GB of disk
    python3 -m scripts.benchmark_streaming --fill50k hw2_data/fill50k

Pairs are made by hard links of the given ones, with captions of many colours. The networks are
stand-ins of no size and no cost whose results have v1.4's shapes, so that only the data is
measured: the encoding pass with its worker processes, then training steps that sleep instead of
computing, on a cache that the operating system was asked to drop from memory.
"""

import dataclasses
import itertools
import json
import os
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.colour import NAMES
from common.data.examples import RealPairs
from common.data.fill50k import Pair, load_fill50k
from common.files import ROOT, write_json
from p3_controlnet.latent_cache import CachedBatches, LatentCache

SECONDS_BETWEEN_SAMPLES = 0.2  # of the memory


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures memory, disk and waiting of a ControlNet training's data at v1.4's size."""

    fill50k: Path
    """Folder of fill50k, whose training pairs are linked."""
    pairs: int = 50_000
    """Pairs of the set that is made."""
    size: int = 512
    """Side of the training pictures."""
    steps: int = 100
    """Training steps."""
    batch_size: int = 4
    """Pairs in a step."""
    seconds: float = 0.5
    """Time that a step sleeps, as long as one of v1.4 takes on a GPU."""
    folder: Path | None = None
    """Where the pairs and the cache are made, on the disk of the pairs; removed at the end.
    Default: beside the pairs."""
    result: Path | None = ROOT / "results" / "streaming.json"
    """JSON file to write."""


class StandIn(nn.Module):
    """Looks to the cache like Stable Diffusion v1.4; computes next to nothing."""

    downscale = 8

    def __init__(self) -> None:
        super().__init__()
        self.unet = types.SimpleNamespace(
            config=types.SimpleNamespace(in_channels=4), device=torch.device("cpu")
        )
        self.tokenizer = types.SimpleNamespace(model_max_length=77)
        self.text_encoder = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=768))

    def encode(self, images: Tensor) -> Tensor:
        """Averages of 8x8 pixels, [N, 4, h, w], for images [N, 3, H, W]."""
        small = F.avg_pool2d(images, self.downscale)
        return torch.cat([small, small[:, :1]], 1)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[N, 77, 768], the same for all prompts."""
        return torch.full((len(prompts), 77, 768), 0.5)


class MemoryWatch:
    """Inside the block, the most anonymous memory of this process and its children, in bytes.

    Pages that a forked worker shares with this process count once: `Pss_Anon` of
    /proc/PID/smaps_rollup. `largest` is the most that one process has by `RssAnon` of
    /proc/PID/status, shared pages included.
    """

    def __enter__(self) -> "MemoryWatch":
        self.total = self.largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            processes = [os.getpid(), *(x.pid for x in psutil.Process().children(recursive=True))]
            shares = [kilobytes(pid, "smaps_rollup", "Pss_Anon") for pid in processes]
            whole = [kilobytes(pid, "status", "RssAnon") for pid in processes]
            self.total = max(self.total, 1024 * sum(shares))
            self.largest = max(self.largest, 1024 * max(whole))
            if self._stop.wait(SECONDS_BETWEEN_SAMPLES):
                break


def kilobytes(pid: int, file: str, name: str) -> int:
    """An entry of a file in /proc/PID; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def main(config: Config) -> None:
    """Makes the pairs, encodes them, takes the steps, and writes the measurements."""
    real = load_fill50k(config.fill50k)
    with tempfile.TemporaryDirectory(dir=config.folder or config.fill50k) as name:
        folder = Path(name)
        link_pairs(real, folder / "fill50k" / "training", config.pairs)
        at_first = 1024 * kilobytes(os.getpid(), "status", "RssAnon")
        started = time.monotonic()
        with MemoryWatch() as memory:
            data = RealPairs(folder / "fill50k", config.size)
            cache = LatentCache.cached(folder / "cache", StandIn(), data, {})
            encoding = time.monotonic() - started
            files = [path for path in (folder / "cache").iterdir() if path.suffix == ".bin"]
            for path in files:
                drop_from_memory(path)
            waited = wait_for_batches(config, cache)
        measured = {
            "pairs": config.pairs,
            "size": config.size,
            "distinct_captions": len(cache.contexts) - 1,
            "hint_bytes": len(cache.hints) / len(cache),
            "disk_gb": sum(path.stat().st_size for path in files) / 1e9,
            "pairs_per_second": config.pairs / encoding,
            "anonymous_gb": memory.total / 1e9,
            "anonymous_largest_gb": memory.largest / 1e9,
            "anonymous_at_first_gb": at_first / 1e9,
            "peak_rss_gb": 1024 * kilobytes(os.getpid(), "status", "VmHWM") / 1e9,
            "step_seconds": config.seconds,
            "batch_size": config.batch_size,
            "steps": config.steps,
            "waiting_fraction": waited / (waited + config.steps * config.seconds),
        }
        del cache
    print(json.dumps(measured, indent=2))
    if config.result:
        flags = f"--pairs {config.pairs} --size {config.size} --steps {config.steps}"
        command = f"python3 -m scripts.benchmark_streaming --fill50k hw2_data/fill50k {flags}"
        write_json(config.result, {"command": command, **measured})


def link_pairs(real: Sequence[Pair], folder: Path, count: int) -> None:
    """Makes `count` pairs of hard links of the real ones, and prompt.json, in `folder`."""
    colours = list(itertools.product(NAMES, NAMES))
    lines = []
    for kind in ("source", "target"):
        (folder / kind).mkdir(parents=True)
    for k in range(count):
        pair = real[k % len(real)]
        os.link(pair.source, folder / "source" / f"{k}.png")
        os.link(pair.target, folder / "target" / f"{k}.png")
        circle, background = colours[k % len(colours)]
        prompt = f"{circle} circle with {background} background"
        lines.append(json.dumps({"source": f"{k}.png", "target": f"{k}.png", "prompt": prompt}))
    (folder / "prompt.json").write_text("\n".join(lines) + "\n")


def drop_from_memory(path: Path) -> None:
    """Asks the operating system to forget a file's pages, so that they are read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait_for_batches(config: Config, cache: LatentCache) -> float:
    """Seconds that steps wait for their batch, in all."""
    batches, waited = CachedBatches(cache, config.batch_size, seed=0), 0.0
    for step in range(config.steps):
        before = time.perf_counter()
        batch = batches(step, torch.Generator())
        for value in batch.values():
            value[slice(config.batch_size)]
        waited += time.perf_counter() - before
        time.sleep(config.seconds)
    return waited


if __name__ == "__main__":
    cli.run(main, Config)
