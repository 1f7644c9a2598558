"""Applies a network, ControlNet included, to overlapping patches of latents larger than its own."""

import dataclasses

import torch
from torch import Tensor

from common.diffusion.process import Network
from common.errors import InputError
from common.latent.model import LatentCondition


def patched(network: Network, size: int, stride: int, downscale: int) -> Network:
    """A network for latents [N, C, h, w] of any size, from one for latents of `size` x `size`.

    Patches of `size` x `size` latents start at every `stride` latents; the last ones end at the far
    sides. The hint is cut at the same places, with `downscale` pixels per latent. The output at a
    latent is the mean over the patches that cover it, weighted by `pyramid(size)`, which falls
    towards a patch's sides and so hides the seams. If one patch covers all latents, the network is
    called directly. Raises InputError if the stride is not between 1 and `size`, and when called
    with latents smaller than a patch.
    """
    if not 1 <= stride <= size:
        raise InputError(
            f"--patch-stride must be between 1 and {size} latents, the side of a patch, not"
            f" {stride}"
        )

    def apply(x_t: Tensor, t: Tensor, cond: LatentCondition) -> Tensor:
        height, width = x_t.shape[-2:]
        if min(height, width) < size:
            raise InputError(
                f"latents of {height}x{width} are smaller than one patch of {size}x{size}"
            )
        if (height, width) == (size, size):
            return network(x_t, t, cond)
        window = pyramid(size).to(x_t)
        total, weights = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
        for y in starts(height, size, stride):
            for x in starts(width, size, stride):
                here = (..., slice(y, y + size), slice(x, x + size))
                total[here] += window * network(x_t[here], t, _crop(cond, y, x, size, downscale))
                weights[here] += window
        return total / weights

    return apply


def starts(length: int, size: int, stride: int) -> list[int]:
    """Sorted start positions of patches along one side: every `stride`, and `length - size`."""
    return sorted({*range(0, length - size, stride), length - size})


def pyramid(size: int) -> Tensor:
    """Blending weights [size, size] in (0, 1], highest in the middle."""
    ramp = torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1)).float()
    return ramp[:, None] * ramp / ramp.max() ** 2


def _crop(cond: LatentCondition, y: int, x: int, size: int, downscale: int) -> LatentCondition:
    if cond.hint is None:
        return cond
    y, x, side = y * downscale, x * downscale, size * downscale
    return dataclasses.replace(cond, hint=cond.hint[..., y : y + side, x : x + side])
