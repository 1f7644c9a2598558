"""Randomness. In sampling each image has a generator of its own, so that it depends on its own seed
and on nothing beside it; in training one generator draws for the whole batch, which costs nothing
however large the batch is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError

Item = TypeVar("Item")


def derive_seeds(*key: int, count: int) -> list[int]:
    """`count` independent 63-bit seeds from a key of integers; the first k do not depend on
    `count`.

    Raises InputError if an integer is outside 0..2^32 - 1.
    """
    if not all(0 <= word < 2**32 for word in key):
        raise InputError(
            f"a seed must lie between 0 and {2**32 - 1}, not"
            f" {min(key) if min(key) < 0 else max(key)}"
        )
    # numpy pads short keys with zeros: the length in front keeps (1,) and (1, 0) apart.
    state = np.random.SeedSequence([len(key), *key]).generate_state(count, np.uint64)
    return [int(word) >> 1 for word in state]


def derive_seed(*key: int) -> int:
    """One 63-bit seed from a key of integers, for example (run seed, dataset, digit, number)."""
    return derive_seeds(*key, count=1)[0]


# ----------------------------------------------------------------------------
# The random streams of a training, each a function of the run's seed and the step.


def noise_seed(seed: int, step: int) -> int:
    """Seed of what the loss draws at a step: timesteps, noise, and which conditions are dropped."""
    return derive_seed(seed, step)


def batch_seed(seed: int, step: int) -> int:
    """Seed of which images, or which drawn scenes, make up a step's batch."""
    return derive_seed(seed, step, 1)


def layers_seed(seed: int, step: int, process: int) -> int:
    """Seed of what layers such as dropout draw at a step, by themselves in each process."""
    return derive_seed(seed, step, 2, process)


def views_seed(seed: int) -> int:
    """Seed of the augmented views that personalisation makes once, before its first step.

    It is the number that `noise_seed` gives at step 3, so the two share their bits; they draw
    different things, and runs that are under way keep their views.
    """
    return derive_seed(seed, 3)


# ----------------------------------------------------------------------------
# Generators.


class Draws(Protocol):
    """Random numbers for a batch of N images: what a loss draws from. `StackedRandomGenerator` and
    `BatchDraws` are such."""

    def randn(self, *shape: int) -> Tensor:
        """Standard normal float32 [N, *shape]."""

    def rand(self) -> Tensor:
        """Uniform float32 [N] in [0, 1)."""

    def randint(self, high: int) -> Tensor:
        """Uniform long [N] in [0, high)."""


class StackedRandomGenerator:
    """N generators, one for each image of a batch, drawn from on the CPU for every device.

    Image k's draws depend on `seeds[k]` and on the order of its own draws alone, bit for bit: not
    on the batch around it, the number of processes or the device. Methods return one row for each
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
    """The random numbers of one optimiser step, drawn for its global batch at once, on `device`, by
    one generator.

    `part(slice)` gives the `Draws` of the images in that slice. Each part must draw the same things
    in the same order, as micro-batches and processes do that run one loss: they then get what a
    single process would.
    """

    def __init__(self, seed: int, count: int, device: torch.device | str = "cpu") -> None:
        self.count, self.device = count, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drawn: list[Tensor] = []

    def part(self, images: slice) -> "Draws":
        """The draws of these images, from the step's first draw on."""
        return _Part(self, images)

    def draw(self, index: int, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        """The step's draw of that index, for the global batch; made when a part first asks for
        it."""
        if index == len(self._drawn):
            self._drawn.append(make(self._generator))
        return self._drawn[index]


class _Part:
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
    """Cuts `items` into lists of exactly `size`, the last one padded by repeating its last item;
    yields (list, real count).

    Kernels choose their order of summation by batch shape, so equal shapes are what makes results
    equal bit for bit however a job is split.
    """
    for start in range(0, len(items), size):
        chunk = list(items[start : start + size])
        real = len(chunk)
        yield chunk + [chunk[-1]] * (size - real), real
