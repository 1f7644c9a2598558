"""Fine detail of images: how much neighbouring pixels differ."""

from torch import Tensor


def mean_difference(images: Tensor) -> float:
    """Mean absolute difference of horizontally and vertically neighbouring values of uint8 [N, C, H, W], in grey levels."""
    x = images.float()
    return sum(x.diff(dim=dim).abs().mean().item() for dim in (-1, -2)) / 2.0


def rms_difference(images: Tensor) -> float:
    """Root mean square difference of neighbouring values within an image, mean over images uint8 [N, C, H, W], in grey levels."""
    x = images.float()
    return sum(x.diff(dim=dim).square().flatten(1).mean(1).sqrt().mean().item() for dim in (-1, -2)) / 2.0
