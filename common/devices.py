"""Compute devices by name, and the rank of this process among several."""

import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from common.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {
    "fp32": torch.float32,
    "no": torch.float32,  # of --mixed-precision
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


LONGEST_WAIT = datetime.timedelta(hours=12)
"""How long processes wait for one another, for example while the main one validates."""


class Process(NamedTuple):
    """Which of the processes started by `torchrun` or `accelerate launch` this one is."""

    rank: int
    """Index of this process; 0 is the main process, the only one that prints and reports."""
    count: int
    """Number of processes; 1 without a launcher."""
    local_rank: int | None
    """Index of this process on its node, which selects its CUDA device; None without a launcher."""


def this_process() -> Process:
    """This process, from RANK, WORLD_SIZE and LOCAL_RANK; (0, 1, None) where they are not set.

    Raises InputError if they are no numbers or contradict each other.
    """
    rank, count, local_rank = (_whole(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None and (count or 1) > 1:
        raise InputError(
            f"WORLD_SIZE is {count}, but RANK is not set: start the processes with torchrun or"
            " accelerate launch, or unset WORLD_SIZE"
        )
    rank, count = rank or 0, 1 if count is None else count
    if rank >= count:
        raise InputError(f"RANK is {rank}, but must be below WORLD_SIZE, which is {count}")
    return Process(rank, count, local_rank)


def _whole(name: str) -> int | None:
    """The environment variable as a whole number; None if it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(
            f"the environment variable {name} must be a whole number of at most 9 digits, not"
            f" {text!r}"
        )
    return int(text)


def pick_device(name: DeviceName) -> torch.device:
    """The device of that name; "auto" is CUDA if present, else MPS, else the CPU.

    With several CUDA devices, a process of `torchrun` takes the one with its LOCAL_RANK. Raises
    InputError if the device is not present.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(kind for kind, there in present.items() if there) if name == "auto" else name
    if not present[kind]:
        raise InputError(f"--device {name} was given, but no {name.upper()} device is present")
    return torch.device(kind, _cuda_index()) if kind == "cuda" else torch.device(kind)


def _cuda_index() -> int | None:
    """The index of this process's CUDA device, its LOCAL_RANK; None without a launcher."""
    rank, count = this_process().local_rank, torch.cuda.device_count()
    if rank is not None and rank >= count:
        raise InputError(
            f"LOCAL_RANK is {rank}, but there are {count} CUDA devices: start at most as many"
            " processes on this node"
        )
    return rank


def usable_cores() -> int:
    """Number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that this process can still take, within the limit of its control group."""
    import psutil

    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(statistics.get("inactive_file", 0)))
    return available


def check_memory(params: Iterable[Tensor]) -> None:
    """Raises InputError if training these parameters needs more memory than there is.

    On a CPU that is the memory of the gradients, two moments and the moving average. On a GPU these
    are in its own memory, and as much of the host's holds the checkpoint while it is written.
    """
    needed = 4 * sum(4 * param.numel() for param in params)
    available = available_memory()
    if needed > available:
        raise InputError(
            f"training needs about {needed / 1e9:.1f} GB more memory, but {available / 1e9:.1f} GB"
            " are available"
        )


@functools.cache
def has_bf16_products(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 faster than those of float32.

    CPUs need AMX instructions for it; without them bfloat16 is about four times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def gpu_memory() -> float:
    """Memory of this process's CUDA device in GiB; 0 if there is none."""
    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(_cuda_index() or 0).total_memory / 2**30


@contextlib.contextmanager
def exact_kernels(wanted: bool = True) -> Iterator[None]:
    """Full float32 (no TF32) and deterministic kernels on CUDA inside the block.

    PyTorch computes convolutions in TF32 otherwise. Nothing changes if it is not `wanted`.
    """
    values = (
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
        (torch.backends.cudnn, "deterministic", True),
    )
    before = [getattr(module, name) for module, name, _ in values]
    for module, name, value in values if wanted else ():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(values, before, strict=True):
            setattr(module, name, value)


def make_accelerator(device: DeviceName, mixed_precision: str = "no") -> "Accelerator":
    """accelerate's interface to devices and processes; works without a launcher as well.

    Raises InputError if the device is not present, or for fp16 on a CPU.
    """
    from accelerate import (
        Accelerator,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
    )

    chosen = pick_device(device)
    if mixed_precision == "fp16" and chosen.type == "cpu":  # accelerate would leave it out silently
        raise InputError("--mixed-precision fp16 needs a GPU: on a CPU use bf16 or no")
    if mixed_precision == "bf16" and chosen.type == "cpu" and not has_bf16_products(chosen):
        _say_slow_bf16()
    handlers = [
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of them
    ]
    return Accelerator(
        cpu=chosen.type == "cpu", mixed_precision=mixed_precision, kwargs_handlers=handlers
    )


@functools.cache  # said once, though a trainer may ask for its accelerator twice
def _say_slow_bf16() -> None:
    if this_process().rank == 0:
        print(
            "warning: this CPU has no instructions for bfloat16, so --mixed-precision bf16 makes"
            " training slower: leave it out",
            file=sys.stderr,
        )
