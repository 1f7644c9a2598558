"""Fine detail of images: how much neighbouring pixels differ, and at which spatial frequencies."""

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # of R, G, B (ITU-R BT.601)


def mean_difference(images: Tensor) -> float:
    """Mean absolute difference of horizontally and vertically neighbouring values of uint8 [N, C,
    H, W], in grey levels."""
    x = images.float()
    return sum(x.diff(dim=dim).abs().mean().item() for dim in (-1, -2)) / 2.0


def rms_difference(images: Tensor) -> float:
    """Root mean square difference of neighbouring values within an image, mean over images uint8
    [N, C, H, W], in grey levels."""
    x = images.float()
    return (
        sum(x.diff(dim=dim).square().flatten(1).mean(1).sqrt().mean().item() for dim in (-1, -2))
        / 2.0
    )


def luminance_power(images: Tensor, k: int) -> float:
    """Power of the luminance of uint8 [N, 3, H, W] at frequency k, mean of the DFTs along all rows
    and all columns.

    Grain shows as too much power at k = H / 4 and H / 2; a network that works on patches of p
    pixels leaves it at multiples of H / p.
    """
    luma = (images.float() * torch.tensor(LUMA, device=images.device).view(3, 1, 1)).sum(
        1
    )  # [N, H, W]
    return (
        sum(
            torch.fft.rfft(luma, dim=dim).select(dim, k).abs().square().mean().item()
            for dim in (-1, -2)
        )
        / 2.0
    )
