"""Compute devices by name, and the rank of this process among several."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from common.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


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
        raise InputError(f"the environment variable {name} must be a whole number, not {text!r}")
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
    rank = this_process().local_rank
    return torch.device(kind, rank) if kind == "cuda" and rank is not None else torch.device(kind)


def has_room(device: torch.device, tensors: Iterable[Tensor]) -> bool:
    """Whether training data of this size may be kept on the device.

    On CUDA it may take at most a quarter of the free memory; elsewhere always True.
    """
    if device.type != "cuda":
        return True
    return sum(tensor.nbytes for tensor in tensors) <= torch.cuda.mem_get_info(device)[0] / 4


def make_accelerator(device: DeviceName, mixed_precision: str = "no") -> "Accelerator":
    """accelerate's interface to devices and processes; works without a launcher as well."""
    from accelerate import Accelerator

    kind = pick_device(device).type
    return Accelerator(cpu=kind == "cpu", mixed_precision=mixed_precision)
