"""Latent cache: latents, hints and text features, computed once before a training.

The trainings of the U-Net and of ControlNet read the cache instead of images and captions. This is
possible because the autoencoder and the text encoder are frozen. The cache is a folder of mapped
files (`common.array_files`), whatever its size: worker processes decode the pictures for the
encoding pass, and a training step reads the rows of its own batch, which the kernel was asked for
`STEPS_AHEAD` steps before. Workers for the training itself would only copy rows between processes
and hold copies of the networks' memory.
"""

import contextlib
import dataclasses
import errno
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.array_files import ArrayWriter, is_complete, map_arrays, read_ahead
from common.data.examples import ExampleDataset
from common.devices import this_process, usable_cores
from common.errors import InputError, raises_terminated
from common.images import to_model_range
from common.latent.model import LatentDiffusion
from common.progress import Progress
from common.seeds import batch_seed, random_indices
from common.training import Batch

CAPTIONS = 64  # encoded at a time
PIXELS = 512**2  # encoded at a time: 16 pictures of 128x128, or one of 512x512
WORKERS = 2  # two decode 200 pairs of 512x512 in a second
BATCHES_AHEAD = 4  # decoded ahead by each worker
SECONDS_BETWEEN_COMMITS = 2.0  # while encoding: a kill loses as much
STEPS_AHEAD = 8  # training steps whose rows are read ahead
SAMPLED_HINTS = 8  # control images from which the disk need of all is estimated


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Latents, text features and hints of N examples; equal captions are stored once."""

    latents: np.memmap
    """float16 [N, C, h, w]: means of the autoencoder's posterior, normalised."""
    contexts: np.memmap
    """float16 [1 + K, L, D]: text features of the empty prompt and of the K distinct captions."""
    captions: np.memmap
    """int64 [N]: index into `contexts` for each example."""
    size: int
    """Side of the pictures in pixels."""
    hints: np.memmap | None = None
    """uint8, flat: control images one after another. One of pure black and white has a bit a pixel,
    any other 8 bits a pixel and channel. None if the examples have none."""
    hint_ends: np.memmap | None = None
    """int64 [N]: where each control image ends in `hints`."""

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def null(self) -> Tensor:
        """Text features of the empty prompt, float16 [L, D]."""
        return torch.from_numpy(np.array(self.contexts[0]))

    def take(self, index: Tensor) -> Batch:
        """The batch of the examples at `index`, long [B].

        Its keys are "index", "latent" [B, C, h, w], "context" [B, L, D] and, if the examples have
        control images, "hint" uint8 [B, 1, H, W], or [B, 3, H, W] if one has colours.
        """
        return {"index": index} | {name: read(index) for name, read in self._readers().items()}

    def take_late(self, index: Tensor, coming: Sequence[Tensor] = ()) -> Batch:
        """`take`, where slices of the values are read when they are asked for.

        The same slices of the batches `coming` are read ahead.
        """
        later = {
            name: _LateRows(read, index, self._read_ahead if name == "latent" else None, coming)
            for name, read in self._readers().items()
        }
        return {"index": index, **later}

    def _readers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        readers = {"latent": self._latents, "context": self._contexts}
        return readers if self.hints is None else readers | {"hint": self._hints}

    def _latents(self, index: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.latents)[index.numpy()])

    def _contexts(self, index: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.contexts)[self.captions[index.numpy()]])

    def _hints(self, index: Tensor) -> Tensor:
        hints = [
            unpack_hint(np.array(self.hints[slice(*self._hint_range(k))]), self.size)
            for k in index.tolist()
        ]
        channels = max(len(hint) for hint in hints)
        return torch.stack([hint.expand(channels, -1, -1) for hint in hints])

    def _hint_range(self, k: int) -> tuple[int, int]:
        return int(self.hint_ends[k - 1]) if k else 0, int(self.hint_ends[k])

    def _read_ahead(self, index: Tensor) -> None:
        for k in index.tolist():
            read_ahead(self.latents, k, k + 1)
            read_ahead(self.contexts, int(self.captions[k]), int(self.captions[k]) + 1)
            if self.hints is not None:
                read_ahead(self.hints, *self._hint_range(k))

    @classmethod
    def cached(
        cls,
        folder: Path,
        model: LatentDiffusion,
        data: ExampleDataset,
        made_from: Mapping[str, Any],
    ) -> "LatentCache":
        """The cache in `folder`, which the main process makes, or completes, if it is not there.

        `made_from` describes the frozen networks. Ctrl-C and SIGTERM end the encoding at once; what
        is encoded is kept. Raises InputError if the folder was made from something else, if the
        disk is too small, if a pair cannot be read (the message names it), and if a worker dies.
        """
        made_from = {**made_from, "size": data.size, "examples": len(data), "data": data.hash()}
        while not is_complete(folder, made_from):
            if this_process().rank == 0:
                encode(model, data, folder, made_from)
            else:
                # Not a barrier: those end after ten minutes.
                time.sleep(0.2)
        arrays = map_arrays(folder, made_from)
        _check_stamps(folder, data, arrays.pop("stamps"))
        return cls(size=data.size, **arrays)


class _LateRows:
    """A tensor [B, ...] of which only slices are read."""

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        index: Tensor,
        ahead: Callable[[Tensor], None] | None,
        coming: Sequence[Tensor],
    ) -> None:
        self._read, self._index, self._ahead, self._coming = read, index, ahead, coming

    def __getitem__(self, part: slice) -> Tensor:
        if self._ahead:
            for index in self._coming:
                self._ahead(index[part])
        return self._read(self._index[part])


class CachedBatches:
    """`get_batch` for `common.training.fit`: examples drawn with replacement.

    The choice is a function of (seed, step) alone, the same on every device. A process reads only
    its own slices.
    """

    def __init__(self, cache: LatentCache, batch_size: int, seed: int) -> None:
        self._cache, self._batch_size, self._seed = cache, batch_size, seed
        self._read_until = -1

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of a step; the generator, which may be on another device, is not used."""
        until = step + STEPS_AHEAD
        coming = range(max(self._read_until, step) + 1, until + 1)
        self._read_until = until
        return self._cache.take_late(self._index(step), [self._index(later) for later in coming])

    def _index(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch_seed(self._seed, step))
        return random_indices(len(self._cache), self._batch_size, generator)


# ----------------------------------------------------------------------------
# Control images as bytes.


def pack_hint(hint: Tensor) -> np.ndarray:
    """A hint uint8 [C, S, S] as bytes: a bit a pixel if it is only black and white, else as it is.

    One of colours is never black and white here, as it has three different channels.
    """
    pixels = hint.numpy()
    if len(pixels) == 1 and ((pixels == 0) | (pixels == 255)).all():
        return np.packbits(pixels.reshape(-1) > 0)
    return pixels.reshape(-1)


def unpack_hint(data: np.ndarray, size: int) -> Tensor:
    """The inverse of `pack_hint`: uint8 [1 or 3, S, S]."""
    if data.size * 8 == size**2:
        data = np.unpackbits(data) * 255
    return torch.from_numpy(data.reshape(-1, size, size))


# ----------------------------------------------------------------------------
# The encoding pass.


def encode(
    model: LatentDiffusion, data: ExampleDataset, folder: Path, made_from: Mapping[str, Any]
) -> None:
    """Encodes examples into the folder of a cache; goes on where an earlier call was ended.

    The pictures' sides must be multiples of the model's downscaling factor.
    """
    texts = sorted(set(data.captions))
    with ArrayWriter(folder, made_from) as writer:
        if writer.rows("stamps"):
            _check_stamps(folder, data, writer.read("stamps"))
        needed = _bytes_needed(model, data, len(texts))
        _check_disk(folder, needed, writer.size(), len(data))
        try:
            with raises_terminated():
                _encode_texts(model, texts, data.captions, writer)
                _encode_images(model, data, writer)
            writer.commit(complete=True)
        except BaseException as error:
            with contextlib.suppress(OSError):
                writer.commit()
            kept = "what is encoded is kept, and the same command goes on"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                left = _shown_bytes(max(needed - writer.size(), 0))
                raise InputError(
                    f"the disk of {folder} is full, and {left} are still needed: {kept}"
                ) from None
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                raise InputError(
                    f"a process that reads pictures has died, perhaps for want of memory: {kept}"
                ) from None
            raise


def _check_stamps(folder: Path, data: ExampleDataset, stamps: np.ndarray) -> None:
    """Raises InputError if a file has another size than when it was encoded."""
    for k, stamp in enumerate(stamps.tolist()):
        if data.stamp(k) != stamp:
            raise InputError(
                f"{folder} was made from other data: the pictures of {data.where(k)} have changed"
                " since; choose another run folder, or delete it"
            )


def _bytes_needed(model: LatentDiffusion, data: ExampleDataset, texts: int) -> int:
    """Size of the whole cache; that of control images is estimated from a few."""
    places = np.linspace(0, len(data) - 1, min(SAMPLED_HINTS, len(data))).astype(int)
    hints = [data[int(k)].hint for k in places]
    hint = np.mean([0 if hint is None else len(pack_hint(hint)) for hint in hints])
    latent = 2 * model.unet.config.in_channels * (data.size // model.downscale) ** 2
    context = 2 * model.tokenizer.model_max_length * model.text_encoder.config.hidden_size
    return round(len(data) * (latent + hint + 24) + (1 + texts) * context)


def _check_disk(folder: Path, needed: int, there: int, count: int) -> None:
    """Says how much disk the cache needs; raises InputError if it is not free."""
    free = shutil.disk_usage(folder).free
    sentence = (
        f"the latent cache of {count} examples needs {_shown_bytes(needed)} of disk in {folder}"
        f" ({_shown_bytes(there)} are there), and {_shown_bytes(free)} are free"
    )
    if needed - there > free:
        raise InputError(sentence)
    Progress.write(sentence)


def _shown_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _encode_texts(
    model: LatentDiffusion, texts: Sequence[str], captions: Sequence[str], writer: ArrayWriter
) -> None:
    if not writer.rows("captions"):
        number = {text: 1 + k for k, text in enumerate(texts)}
        context = model.encode_text([""]).half().cpu().numpy()
        index = np.array([number[caption] for caption in captions])
        writer.append(captions=index, contexts=context)
    done = writer.rows("contexts") - 1
    with _Progress(len(texts), done, "encoding captions", "captions", writer) as progress:
        for start in range(done, len(texts), CAPTIONS):
            contexts = model.encode_text(texts[start : start + CAPTIONS])
            writer.append(contexts=contexts.half().cpu().numpy())
            progress(len(contexts))


def _encode_images(model: LatentDiffusion, data: ExampleDataset, writer: ArrayWriter) -> None:
    done = writer.rows("latents")
    # Batches begin at multiples of their size, also after an interruption: results of one batch
    # shape are equal to the bit.
    starts = range(done, len(data), max(PIXELS // data.size**2, 1))
    hint_end = writer.rows("hints")
    with (
        _Progress(len(data), done, "encoding images", "images", writer) as progress,
        contextlib.closing(_decoded(data, starts, model)) as batches,
    ):
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            images, hints, lengths, stamps = batch
            latents = model.encode(to_model_range(images).to(model.unet.device))
            rows = {"latents": latents.half().cpu().numpy(), "stamps": stamps.numpy()}
            if lengths is not None:
                ends = hint_end + lengths.cumsum(0).numpy()
                rows, hint_end = rows | {"hints": hints.numpy(), "hint_ends": ends}, int(ends[-1])
            writer.append(**rows)
            progress(len(images))


class _Progress:
    """A progress bar over what is encoded, with a commit of the writer every few seconds."""

    def __init__(self, total: int, done: int, what: str, unit: str, writer: ArrayWriter) -> None:
        self._bar = Progress(desc=what, unit=unit, total=total, initial=done)
        self._writer, self._committed = writer, time.monotonic()

    def __enter__(self) -> Callable[[int], None]:
        return self._add

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _add(self, count: int) -> None:
        self._bar.update(count)
        if time.monotonic() - self._committed >= SECONDS_BETWEEN_COMMITS:
            self._writer.commit()
            self._committed = time.monotonic()


Decoded = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


class _Batches(Dataset[Decoded | InputError]):
    """Images uint8 [n, 3, S, S], packed hints [bytes], their lengths [n], and stamps [n].

    An InputError is an item, since a worker's exception would arrive as a traceback's text.
    """

    def __init__(self, data: ExampleDataset, starts: range) -> None:
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, k: int) -> Decoded | InputError:
        start = self._starts[k]
        indices = range(start, min(start + self._starts.step, len(self._data)))
        try:
            examples = [self._data[i] for i in indices]
        except InputError as error:
            return error
        images = torch.stack([example.image for example in examples])
        stamps = torch.tensor([self._data.stamp(i) for i in indices])
        if examples[0].hint is None:
            return images, None, None, stamps
        hints = [pack_hint(example.hint) for example in examples]
        lengths = torch.tensor([len(hint) for hint in hints])
        return images, torch.from_numpy(np.concatenate(hints)), lengths, stamps


def _decoded(
    data: ExampleDataset, starts: range, model: LatentDiffusion
) -> Iterator[Decoded | InputError]:
    """The batches in their order, decoded by worker processes; one alone is decoded here."""
    batches = _Batches(data, starts)
    workers = min(WORKERS, usable_cores(), len(batches) - 1)
    options: dict[str, Any] = {}
    if workers > 0:
        options = {"num_workers": workers, "prefetch_factor": BATCHES_AHEAD}
        if sys.platform == "linux":
            options |= {"multiprocessing_context": "fork", "worker_init_fn": _Bare(model)}
    yield from DataLoader(
        batches, batch_size=None, collate_fn=_unchanged, generator=torch.Generator(), **options
    )


@dataclasses.dataclass(frozen=True)
class _Bare:
    """Makes a forked worker let go of the networks' memory, and leave Ctrl-C to the main process.

    A worker would keep the old pages of what the main process changes later.
    """

    model: LatentDiffusion

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.model.unet.device.type == "cpu":
            self.model.to("meta")


def _unchanged(batch: Any) -> Any:
    return batch
