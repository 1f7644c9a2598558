"""Random seeds and generators.

In sampling each image has a generator of its own, so an image depends on its own seed only. In
training one generator draws for the whole batch, whose cost does not grow with the batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError

Item = TypeVar("Item")


def derive_seeds(*key: int, count: int) -> list[int]:
    """`count` independent 63-bit seeds from a key of integers.

    The first k seeds do not depend on `count`. Raises InputError if an integer is outside 0..2^32 -
    1.
    """
    if not all(0 <= word < 2**32 for word in key):
        raise InputError(
            f"a seed must lie between 0 and {2**32 - 1}, not"
            f" {min(key) if min(key) < 0 else max(key)}"
        )
    # numpy pads short keys with zeros; the length in front distinguishes (1,) from (1, 0).
    state = np.random.SeedSequence([len(key), *key]).generate_state(count, np.uint64)
    return [int(word) >> 1 for word in state]


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a key of integers, for example (run seed, dataset, digit, number)."""
    return derive_seeds(*key, count=1)[0]


# ----------------------------------------------------------------------------
# Random streams of a training run, each a function of the run's seed and the step.


def noise_seed(seed: int, step: int) -> int:
    """Seed of the loss's draws at a step: timesteps, noise, and which conditions are dropped."""
    return derive_seed(seed, step)


def batch_seed(seed: int, step: int) -> int:
    """Seed of the choice of a step's images, or of its drawn scenes."""
    return derive_seed(seed, step, 1)


def layers_seed(seed: int, step: int, process: int) -> int:
    """Seed of the draws of layers such as dropout at a step, different in each process."""
    return derive_seed(seed, step, 2, process)


def views_seed(seed: int) -> int:
    """Seed of the augmented views that personalisation makes once, before its first step.

    It equals `noise_seed` at step 3, so the two share a random stream. They draw different things,
    and a change would alter the views of runs that are to be resumed.
    """
    return derive_seed(seed, 3)


# ----------------------------------------------------------------------------
# Generators.


class Draws(Protocol):
    """Random numbers for a batch of N images, the source of a loss's draws.

    `StackedRandomGenerator` and the parts of `BatchDraws` implement it.
    """

    def randn(self, *shape: int) -> Tensor:
        """Standard normal float32 [N, *shape]."""

    def rand(self) -> Tensor:
        """Uniform float32 [N] in [0, 1)."""

    def randint(self, high: int) -> Tensor:
        """Uniform long [N] in [0, high)."""


class StackedRandomGenerator:
    """N random generators, one for each image of a batch; draws are made on the CPU.

    The draws of image k depend only on `seeds[k]` and on the order of its own draws, bit for bit:
    not on the other images, the number of processes or the device. Methods return one row for each
    image, on `device`.
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


class BatchDraws:
    """The random numbers of one optimiser step, drawn for its global batch by one generator.

    `part(slice)` gives the `Draws` of the images in that slice, on `device`. All parts must draw
    the same things in the same order, as micro-batches and processes that compute one loss do:
    together they then get the numbers that a single process would.
    """

    def __init__(self, seed: int, count: int, device: torch.device | str = "cpu") -> None:
        self.count, self.device = count, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drawn: list[Tensor] = []

    def part(self, images: slice) -> "Draws":
        """The draws of these images, beginning with the step's first draw."""
        return _Part(self, images)

    def draw(self, index: int, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        """The step's draw number `index`, for the global batch.

        It is made when a part first asks for it, and kept for the other parts.
        """
        if index == len(self._drawn):
            self._drawn.append(make(self._generator))
        return self._drawn[index]


class _Part:
    """`Draws` of a slice of the global batch."""

    def __init__(self, draws: BatchDraws, images: slice) -> None:
        self._draws, self._images, self._next = draws, images, 0

    def randn(self, *shape: int) -> Tensor:
        return self._draw(lambda options: torch.randn(self._draws.count, *shape, **options))

    def rand(self) -> Tensor:
        return self._draw(lambda options: torch.rand(self._draws.count, **options))

    def randint(self, high: int) -> Tensor:
        return self._draw(lambda options: torch.randint(high, (self._draws.count,), **options))

    def _draw(self, make: Callable[[dict], Tensor]) -> Tensor:
        drawn = self._draws.draw(
            self._next, lambda g: make({"generator": g, "device": self._draws.device})
        )
        self._next += 1
        return drawn[self._images]


def random_indices(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Long [count] uniform in [0, total), with replacement, on the generator's device."""
    return torch.randint(total, (count,), generator=generator, device=generator.device)


def padded_chunks(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Cuts `items` into lists of exactly `size`; yields (list, real count).

    The last list is padded by repeating its last item. Kernels choose their order of summation by
    the batch shape, so only equal shapes give bit-identical results however a job is split.
    """
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        real = len(chunk)
        yield chunk + [chunk[-1]] * (size - real), real
