"""Fine detail of images: differences of neighbouring pixels and power at spatial frequencies."""

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B (ITU-R BT.601)


def mean_difference(images: Tensor) -> float:
    """Mean absolute difference of horizontally and vertically neighbouring values, in grey levels.

    `images` is uint8 [N, C, H, W].
    """
    x = images.float()
    return sum(x.diff(dim=dim).abs().mean().item() for dim in (-1, -2)) / 2.0


def rms_difference(images: Tensor) -> float:
    """Root mean square difference of neighbouring values in an image, averaged over the images.

    `images` is uint8 [N, C, H, W]; the result is in grey levels.
    """
    x = images.float()
    return (
        sum(x.diff(dim=dim).square().flatten(1).mean(1).sqrt().mean().item() for dim in (-1, -2))
        / 2.0
    )


def luminance_power(images: Tensor, k: int) -> float:
    """Power of the luminance at spatial frequency k: the mean over the DFTs of rows and columns.

    `images` is uint8 [N, 3, H, W]. Grain shows as too much power at k = H / 4 and H / 2; a network
    that works on patches of p pixels leaves excess power at multiples of H / p.
    """
    # [N, H, W]
    luma = (images.float() * torch.tensor(LUMA, device=images.device).view(3, 1, 1)).sum(1)
    return (
        sum(
            torch.fft.rfft(luma, dim=dim).select(dim, k).abs().square().mean().item()
            for dim in (-1, -2)
        )
        / 2.0
    )
