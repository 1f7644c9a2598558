"""Where to compute: device names and accelerate's view of the processes."""

from typing import TYPE_CHECKING, Literal

import torch

from common.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def pick_device(name: DeviceName) -> torch.device:
    """The device of that name; auto is CUDA, else MPS, else the CPU. Raises InputError if it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present[name]:
        raise InputError(f"--device {name} was asked for, but no {name.upper()} device is present")
    return torch.device(name)


def make_accelerator(device: DeviceName, mixed_precision: str = "no") -> "Accelerator":
    """accelerate's handle on devices and processes, started by `torchrun` or `accelerate launch` or alone."""
    from accelerate import Accelerator

    kind = pick_device(device).type
    return Accelerator(cpu=kind == "cpu", mixed_precision=mixed_precision)
