"""The CPU's memory: where it does not suffice, and how the C library keeps what is freed."""

import ctypes
import sys

import torch

from common.devices import available_memory
from common.errors import InputError


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory, of the CPU or of another device, is exhausted."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def require_memory(size: int, what: str) -> None:
    """Raises InputError if `what`, of `size` bytes, is more than the CPU's memory can take."""
    if size > (available := available_memory()):
        raise InputError(
            f"{what} needs {size / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are"
            " available"
        )


# ----------------------------------------------------------------------------
# Settings of glibc's allocator (mallopt(3)); other C libraries have none of them.

M_TRIM_THRESHOLD = -1  # bytes that may stay free at the end of the heap
M_MMAP_THRESHOLD = -3  # bytes from which on a block is mapped by itself, and unmapped when freed
M_ARENA_MAX = -8  # number of heaps


def keep_freed_memory() -> None:
    """Lets this process keep freed blocks of up to 256 MiB instead of returning them to the system.

    A training step on a CPU allocates the same large tensors each time, and the system would clear
    every page of them anew.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**28)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_heaps() -> None:
    """Lets all threads that start from now on share two heaps.

    By default each thread has one of its own, and what is freed there serves no other thread: the
    memory of a server with many short threads grows.
    """
    _mallopt(M_ARENA_MAX, 2)


def _mallopt(parameter: int, value: int) -> None:
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(parameter, value)
