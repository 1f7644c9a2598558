"""Where to compute: device names, and which of several processes this one is."""

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
    """Which of the processes that `torchrun` or `accelerate launch` started this one is."""

    rank: int
    """0 for the main process, which alone prints and reports."""
    count: int
    """How many there are; 1 without a launcher."""
    local_rank: int | None
    """Its number on this machine, by which it takes a CUDA device; None without a launcher."""


def this_process() -> Process:
    """This process, from RANK, WORLD_SIZE and LOCAL_RANK; 0 of 1 where they are not set."""
    local_rank = os.environ.get("LOCAL_RANK")
    return Process(
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        int(local_rank) if local_rank else None,
    )


def pick_device(name: DeviceName) -> torch.device:
    """The device of that name; auto is CUDA, else MPS, else the CPU. Raises InputError if it is not
    there.

    Of several CUDA devices a process of `torchrun` takes its own, LOCAL_RANK.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(kind for kind, there in present.items() if there) if name == "auto" else name
    if not present[kind]:
        raise InputError(f"--device {name} was asked for, but no {name.upper()} device is present")
    rank = this_process().local_rank
    return torch.device(kind, rank) if kind == "cuda" and rank is not None else torch.device(kind)


def has_room(device: torch.device, tensors: Iterable[Tensor]) -> bool:
    """Whether training data of this size may stay on the device: it takes at most a quarter of what
    is free there."""
    if device.type != "cuda":
        return True
    return sum(tensor.nbytes for tensor in tensors) <= torch.cuda.mem_get_info(device)[0] / 4


def make_accelerator(device: DeviceName, mixed_precision: str = "no") -> "Accelerator":
    """accelerate's handle on devices and processes, started by `torchrun` or `accelerate launch` or
    alone."""
    from accelerate import Accelerator

    kind = pick_device(device).type
    return Accelerator(cpu=kind == "cpu", mixed_precision=mixed_precision)
