"""Memory: what is free, and errors that say that it does not suffice."""

from pathlib import Path

import torch

from common.errors import InputError


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory, of the CPU or of another device, is exhausted."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can be allocated on the device; None if the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAv"))
    except (OSError, StopIteration, ValueError):
        return None


def require_memory(size: int, what: str, device: torch.device | str = "cpu") -> None:
    """Raises InputError if `what` needs more bytes than are free on the device."""
    free = free_memory(device)
    if free is not None and size > free:
        raise InputError(
            f"{what} needs {size / 2**30:.1f} GiB of memory, but only {free / 2**30:.1f} GiB are"
            " free"
        )
