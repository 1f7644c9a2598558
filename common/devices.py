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
Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {
    "fp32": torch.float32,
    "no": torch.float32,  # of --mixed-precision
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class Process(NamedTuple):
    """Which of the processes started by `torchrun` or `accelerate launch` this one is."""

    rank: int
    """Index of this process; 0 is the main process, the only one that prints and reports."""
    count: int
    """Number of processes; 1 without a launcher."""
    local_rank: int | None
    """Index of this process on its node, which selects its CUDA device; None without a launcher."""


def this_process() -> Process:
    """This process, from RANK, WORLD_SIZE and LOCAL_RANK; (0, 1, None) where they are not set."""
    local_rank = os.environ.get("LOCAL_RANK")
    return Process(
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        int(local_rank) if local_rank else None,
    )


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


def gpu_memory() -> float:
    """Memory of this process's CUDA device in GiB; 0 if there is none."""
    if not torch.cuda.is_available():
        return 0.0
    device = this_process().local_rank or 0
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def make_accelerator(device: DeviceName, mixed_precision: str = "no") -> "Accelerator":
    """accelerate's interface to devices and processes; works without a launcher as well."""
    from accelerate import Accelerator

    kind = pick_device(device).type
    return Accelerator(cpu=kind == "cpu", mixed_precision=mixed_precision)
