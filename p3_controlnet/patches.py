"""Pictures larger than the model's own size: the network, ControlNet included, on overlapping
patches."""

import dataclasses

import torch
from torch import Tensor

from common.diffusion.process import Network
from common.errors import InputError
from common.latent.model import LatentCondition


def patched(network: Network, size: int, stride: int, downscale: int) -> Network:
    """A network for latents [N, C, h, w] of any size from one for `size` x `size`.

    The latents are cut into patches of `size` at every `stride` (the last ones flush with the far
    sides), and so is the hint, at the same places times `downscale` (pixels for each latent).
    Outputs are folded back, each weighted by a pyramid that falls towards its patch's sides, so
    that no seam shows. Where one patch covers everything the network is called as it is. Raises
    InputError if the latents are smaller than a patch or the stride leaves gaps.
    """
    if not 1 <= stride <= size:
        raise InputError(f"a stride of {stride} latents leaves gaps between patches of {size}")

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
    """Where patches begin along one side: at every stride, and flush with the end."""
    return sorted({*range(0, length - size, stride), length - size})


def pyramid(size: int) -> Tensor:
    """Blending weights [size, size], highest in the middle, positive everywhere."""
    ramp = torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1)).float()
    return ramp[:, None] * ramp / ramp.max() ** 2


def _crop(cond: LatentCondition, y: int, x: int, size: int, downscale: int) -> LatentCondition:
    if cond.hint is None:
        return cond
    y, x, side = y * downscale, x * downscale, size * downscale
    return dataclasses.replace(cond, hint=cond.hint[..., y : y + side, x : x + side])
