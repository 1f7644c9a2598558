"""Memory that does not suffice: said before it is taken, where its size is known, or after."""

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
