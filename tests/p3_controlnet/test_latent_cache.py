"""The latent cache: what it holds, how it goes on after any end, and what it refuses."""

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import contents
from tiny_base import tiny_base
from tiny_pairs import write_pairs

from common.array_files import ArrayWriter
from common.data.examples import DrawnCircles, DrawnScenes, Example, ExampleDataset, RealPairs
from common.errors import InputError, Terminated
from common.files import read_json, write_json
from common.images import to_model_range
from common.latent.model import LatentDiffusion
from common.seeds import batch_seed, random_indices
from p3_controlnet import latent_cache
from p3_controlnet.latent_cache import CachedBatches, LatentCache, pack_hint, unpack_hint

SIZE = 16
FROZEN = {"base": "tiny"}


class Squares(ExampleDataset):
    """Pictures of one brightness with hints of noise, black and white but for number 3; `before`
    is called before each is made."""

    def __init__(self, count: int, before: Callable[[int], Any] = lambda index: None) -> None:
        self.size, self._before = SIZE, before
        self.captions = [f"square {k % 5}" for k in range(count)]

    def __getitem__(self, index: int) -> Example:
        self._before(index)
        noise = torch.randint(2, (1, SIZE, SIZE), generator=torch.Generator().manual_seed(index))
        hint = (noise * (250 if index == 3 else 255)).to(torch.uint8)
        return Example(torch.full((3, SIZE, SIZE), index, dtype=torch.uint8), hint)

    def identity(self) -> Iterator[str]:
        yield from self.captions


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_base()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 2 pictures, and a commit after each."""
    monkeypatch.setattr(latent_cache, "PIXELS", 2 * SIZE**2)
    monkeypatch.setattr(latent_cache, "SECONDS_BETWEEN_COMMITS", 0.0)


def make(folder: Path, model: LatentDiffusion, data: ExampleDataset) -> LatentCache:
    return LatentCache.cached(folder, model, data, FROZEN)


def rows(folder: Path) -> int:
    """Number of encoded pictures in the folder's header."""
    header = read_json(folder / "header.json") if (folder / "header.json").is_file() else {}
    return header.get("arrays", {}).get("latents", {"rows": 0})["rows"]


# ----------------------------------------------------------------------------
# What it holds.


def test_it_holds_what_the_frozen_networks_say(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "PIXELS", 64 * 64**2)
    data = DrawnCircles(3, 64, 0) + DrawnCircles(3, 64, 0)
    cache = make(tmp_path, model, data)
    assert len(cache) == 6 and cache.contexts.shape == (4, 32, 16)  # equal captions are read once
    batch = cache.take(torch.tensor([4, 0]))
    examples = [data[4], data[0]]
    assert torch.equal(batch["hint"], torch.stack([example.hint for example in examples]))
    latents = model.encode(to_model_range(torch.stack([data[k].image for k in range(6)]))).half()
    assert torch.equal(batch["latent"], latents[[4, 0]]) and batch["index"].tolist() == [4, 0]
    contexts = model.encode_text(sorted(set(data.captions))).half()
    numbers = [sorted(set(data.captions)).index(data.captions[k]) for k in (4, 0)]
    assert torch.equal(batch["context"], contexts[numbers])
    assert torch.equal(cache.null, model.encode_text([""])[0].half())


def test_pictures_without_hints(model: LatentDiffusion, tmp_path: Path) -> None:
    batch = make(tmp_path, model, DrawnScenes(2, 64, 0)).take(torch.tensor([0]))
    assert batch.keys() == {"index", "latent", "context"}


def test_black_and_white_hints_are_bits_and_grey_ones_keep_theirs(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    data = Squares(6)
    cache = make(tmp_path, model, data)
    assert cache.hints.nbytes == 5 * SIZE**2 // 8 + SIZE**2
    hints = cache.take(torch.arange(6))["hint"]
    assert torch.equal(hints, torch.stack([data[k].hint for k in range(6)]))
    colours = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    for hint in (colours, colours[:1], data[0].hint, torch.zeros(1, SIZE, SIZE).byte()):
        assert torch.equal(unpack_hint(pack_hint(hint), SIZE), hint)


def test_it_is_made_once(model: LatentDiffusion, tmp_path: Path) -> None:
    make(tmp_path, model, Squares(5))

    def refuse(index: int) -> None:
        raise AssertionError("a picture was read again")

    assert len(make(tmp_path, model, Squares(5, refuse))) == 5


def test_slices_of_a_late_batch_are_those_of_the_whole_and_alone_are_read(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, seen = make(tmp_path, model, Squares(6)), []
    get_batch = CachedBatches(cache, 4, seed=7)
    index = random_indices(6, 4, torch.Generator().manual_seed(batch_seed(7, 2)))
    later = random_indices(6, 4, torch.Generator().manual_seed(batch_seed(7, 3)))
    whole = cache.take(index)
    monkeypatch.setattr(LatentCache, "_read_ahead", lambda self, rows: seen.append(rows.tolist()))
    monkeypatch.setattr(latent_cache, "STEPS_AHEAD", 1)
    part, batch = slice(1, 3), get_batch(2, torch.Generator())
    assert batch.keys() == whole.keys() == {"index", "latent", "context", "hint"}
    assert all(torch.equal(batch[name][part], whole[name][part]) for name in whole)
    assert seen == [later[part].tolist()]


# ----------------------------------------------------------------------------
# Ends of all kinds.


def test_a_pair_that_cannot_be_read_is_named_and_what_is_encoded_is_kept(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "PIXELS", 64**2)
    monkeypatch.setattr(latent_cache, "SAMPLED_HINTS", 1)
    write_pairs(tmp_path / "training", 5)
    bad = tmp_path / "training" / "target" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"prompt\.json, line 4: .*target/3\.png is not a readab"):
        make(tmp_path / "cache", model, RealPairs(tmp_path, 64))
    assert rows(tmp_path / "cache") == 3
    bad.write_bytes(good)
    cache = make(tmp_path / "cache", model, RealPairs(tmp_path, 64))
    again = make(tmp_path / "again", model, RealPairs(tmp_path, 64))
    assert len(cache) == 5 and contents(tmp_path / "cache") == contents(tmp_path / "again")
    assert len(again) == 5

    # A picture that has changed since it was encoded is other data.
    bad.write_bytes(good + b"more")
    with pytest.raises(InputError, match=r"other data: the pictures of .*line 4 have changed"):
        make(tmp_path / "cache", model, RealPairs(tmp_path, 64))


def test_a_worker_that_dies(model: LatentDiffusion, tmp_path: Path) -> None:
    main = os.getpid()

    def die(index: int) -> None:
        if index == 5 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(InputError, match="a process that reads pictures has died.* is kept"):
        make(tmp_path / "cache", model, Squares(8, die))
    done = rows(tmp_path / "cache")
    assert done in (0, 2, 4)
    make(tmp_path / "cache", model, Squares(8))
    make(tmp_path / "again", model, Squares(8))
    assert contents(tmp_path / "cache") == contents(tmp_path / "again")


def test_a_disk_that_is_too_small_or_full(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4000))
        with pytest.raises(InputError, match=r"needs 0\.0 MB of disk .* and 0\.0 MB are free"):
            make(tmp_path / "cache", model, Squares(8))
    append, calls = ArrayWriter.append, []

    def full(self: ArrayWriter, **arrays: np.ndarray) -> None:
        calls.append(arrays)
        if len(calls) == 5:
            append(self, **{"latents": arrays["latents"]})  # as if in the middle of a batch
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "append", full)
        with pytest.raises(InputError, match="is full, and 0.0 MB are still needed: what is enc"):
            make(tmp_path / "cache", model, Squares(8))
    make(tmp_path / "cache", model, Squares(8))
    make(tmp_path / "again", model, Squares(8))
    assert len(contents(tmp_path / "cache")) == 7


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_it_goes_on_where_a_signal_ended_it(
    number: int,
    status: int,
    model: LatentDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real process with workers; each picture takes a while, so that it would need minutes."""
    monkeypatch.setattr(latent_cache, "SAMPLED_HINTS", 1)
    process = os.fork()
    if not process:
        torch.set_num_threads(1)  # OpenMP's other threads are not copied
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: SIM115
            try:
                make(tmp_path / "cache", model, Squares(40, lambda index: time.sleep(0.3 * index)))
            except Terminated:
                os._exit(143)
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
    deadline = time.monotonic() + 60.0
    while rows(tmp_path / "cache") < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process, number)
    while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < deadline + 60.0:
        time.sleep(0.05)
    assert ended[0] == process and os.waitstatus_to_exitcode(ended[1]) == status
    done, read = rows(tmp_path / "cache"), []
    assert 4 <= done < 40

    monkeypatch.setattr(latent_cache, "WORKERS", 0)  # pictures are decoded here, where it is seen
    cache = make(tmp_path / "cache", model, Squares(40, read.append))
    assert read == [0, *range(done, 40)]  # the first for the disk's estimate
    make(tmp_path / "again", model, Squares(40))
    assert len(cache) == 40 and contents(tmp_path / "cache") == contents(tmp_path / "again")


# ----------------------------------------------------------------------------
# Caches of something else.


def test_a_cache_of_something_else_is_refused(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, model, Squares(4))
    other = Squares(4)
    other.captions = ["other"] * 4
    for data, frozen, key in (
        (Squares(4), {"base": "other"}, "base"),
        (Squares(5), FROZEN, "examples"),
        (other, FROZEN, "data"),
        (DrawnCircles(4, 64, 0), FROZEN, "size"),
    ):
        with pytest.raises(InputError, match=f"by another model \\(its {key} is .* delete it"):
            LatentCache.cached(tmp_path, model, data, frozen)


def test_a_damaged_cache_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    cache = make(tmp_path, model, Squares(6))
    path, header = tmp_path / "latents.bin", read_json(tmp_path / "header.json")
    del cache
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="latents.bin is damaged: delete the folder"):
        make(tmp_path, model, Squares(6))
    # Of a half cache, the bytes are checked too.
    path.write_bytes(b"\1" + data[1:])
    write_json(tmp_path / "header.json", header | {"complete": False})
    with pytest.raises(InputError, match="latents.bin is damaged: delete the folder"):
        make(tmp_path, model, Squares(6))
    (tmp_path / "header.json").write_text("[]")
    with pytest.raises(InputError, match="is not the header of a cache"):
        make(tmp_path, model, Squares(6))
