"""CLIP features of picture files, with reading in threads and a cache keyed by file content."""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_tensors, save_tensors
from common.clip.model import Clip
from common.errors import InputError
from common.files import make_folder
from common.images import open_image, to_pil, viewed
from common.progress import Progress

AHEAD = 2  # batches that are read and preprocessed while one is computed
CHUNK = 16  # pictures per job of a thread


def extract_features(
    clip: Clip,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    workers: int = 2,
    cache: Path | None = None,
    show_progress: bool = True,
) -> Tensor:
    """Unit vectors float32 [N, D] of picture files.

    Equal files are computed once; with a `cache` folder, only in the first call. Threads read and
    preprocess the next batches while the network computes. Raises InputError that names an
    unreadable file.
    """
    with (
        _cancelling(ThreadPoolExecutor(workers)) as pool,
        Progress(
            desc="encoding", unit="images", total=len(files), disable=not show_progress
        ) as bar,
    ):
        keys = [key for job in _submit(pool, _content_key, files) for key in job.result()]
        store = cache / f"{clip.identity}.safetensors" if cache else None
        known = _read_store(store, clip) if store else {}
        todo = list(
            {key: file for key, file in zip(keys, files, strict=True) if key not in known}.items()
        )
        bar.update(len(files) - len(todo))
        before = len(known)
        try:
            for part, pixels in _batches(clip, todo, batch_size, pool):
                for (key, _), feature in zip(part, clip.encode_images(pixels), strict=True):
                    known[key] = feature
                bar.update(len(part))
        finally:  # an unreadable picture or Ctrl-C keeps what was computed
            if store and len(known) > before:
                # If the cache cannot be written, the features are still returned.
                with contextlib.suppress(OSError, InputError):
                    make_folder(store.parent)
                    save_tensors(
                        store,
                        {"features": torch.stack(list(known.values()))},
                        {"keys": list(known)},
                    )
    return torch.stack([known[key] for key in keys])


@contextlib.contextmanager
def _cancelling(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """The pool, whose waiting jobs are dropped if the block fails, as by Ctrl-C."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _content_key(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _read_store(path: Path, clip: Clip) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    try:
        tensors, metadata = load_tensors(path)
        features = tensors["features"]
        unit = torch.ones(len(features))
        if features.shape[1:] != clip.encode_texts([""]).shape[1:] or not torch.allclose(
            features.norm(dim=1), unit, atol=1e-3
        ):
            return {}
        return dict(zip(metadata["keys"], features, strict=True))
    except (InputError, KeyError, TypeError, ValueError, RuntimeError, IndexError):
        return {}  # a damaged cache counts as empty


def _batches(
    clip: Clip, items: Sequence[tuple[str, Path]], size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[tuple[str, Path]], Tensor]]:
    """Yields (items, preprocessed pictures [n, 3, S, S]).

    While one batch is in use, up to AHEAD more are read and preprocessed.
    """
    waiting: deque[tuple[Sequence[tuple[str, Path]], list[Future[list[Tensor]]]]] = deque()
    starts = deque(range(0, len(items), size))
    while starts or waiting:
        while starts and len(waiting) <= AHEAD:
            start = starts.popleft()
            part = items[start : start + size]
            waiting.append((part, _submit(pool, lambda item: read_pixels(clip, item[1]), part)))
        part, jobs = waiting.popleft()
        yield part, torch.stack([pixels for job in jobs for pixels in job.result()])


def _submit(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Sequence[Any]
) -> list[Future[list[Any]]]:
    """Submits the items to the pool in chunks of CHUNK; returns one future per chunk.

    A job per picture would cost more than it gains for small pictures.
    """
    chunks = (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
    return [pool.submit(lambda chunk: [work(item) for item in chunk], chunk) for chunk in chunks]


def read_pixels(clip: Clip, file: Path) -> Tensor:
    """One preprocessed picture, float32 [3, S, S]. Raises InputError if it cannot be read."""
    with open_image(file) as image:
        return clip.preprocess(viewed(image))


@torch.no_grad()
def encode_pictures(clip: Clip, pictures: Sequence[Tensor], batch_size: int = 64) -> Tensor:
    """Unit vectors float32 [N, D] of pictures in memory, uint8 [3, H, W] of any sizes."""
    parts = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    return torch.cat(
        [
            clip.encode_images(torch.stack([clip.preprocess(to_pil(one)) for one in part]))
            for part in parts
        ]
    )
