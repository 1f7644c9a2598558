"""Randomness: one generator for each image, so that an image depends on its own seed and on nothing beside it."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError

Item = TypeVar("Item")


def derive_seeds(*key: int, count: int) -> list[int]:
    """`count` independent 63-bit seeds from a key of integers; the first k do not depend on `count`.

    Raises InputError if an integer is outside 0..2^32 - 1.
    """
    if not all(0 <= word < 2**32 for word in key):
        raise InputError(f"a seed must lie between 0 and {2**32 - 1}, not {min(key) if min(key) < 0 else max(key)}")
    # numpy pads short keys with zeros: the length in front keeps (1,) and (1, 0) apart.
    state = np.random.SeedSequence([len(key), *key]).generate_state(count, np.uint64)
    return [int(word) >> 1 for word in state]


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a key of integers, for example (run seed, dataset, digit, number)."""
    return derive_seeds(*key, count=1)[0]


class ImageGenerators:
    """N generators, one for each image of a batch, drawn from on the CPU for every device.

    Image k's draws depend on `seeds[k]` and on the order of its own draws alone, bit for bit: not on the batch around it,
    the number of processes or the device. Methods return one row for each image, on `device`.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal float32 [N, *shape]."""
        return self._draw(lambda generator: torch.randn(shape, generator=generator))

    def rand(self) -> Tensor:
        """Uniform float32 [N] in [0, 1)."""
        return self._draw(lambda generator: torch.rand((), generator=generator))

    def randint(self, high: int) -> Tensor:
        """Uniform long [N] in [0, high)."""
        return self._draw(lambda generator: torch.randint(high, (), generator=generator))

    def _draw(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self.device)


def padded_chunks(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Cuts `items` into lists of exactly `size`, the last one padded by repeating its last item; yields (list, real count).

    Kernels choose their order of summation by batch shape, so equal shapes are what makes results equal bit for bit
    however a job is split.
    """
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        real = len(chunk)
        yield chunk + [chunk[-1]] * (size - real), real
