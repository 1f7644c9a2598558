"""Augmentation that the network is told of, so that samples look like the data (EDM,
arXiv:2206.00364, Appendix F.2)."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from common.seeds import Draws

ORDERS = torch.tensor(
    list(itertools.permutations(range(3)))
)  # of the colour channels; the first is the images' own
LARGEST_SHIFT, LARGEST_SCALE = (
    3.0 / 14.0,
    0.15,
)  # three of 28 pixels; along each axis, as a logarithm
AUGMENTATION = len(ORDERS) - 1 + 1 + 4  # order, negative, shift and scale along x and y


def augment(images: Tensor, probability: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [-1, 1] and what was done to each, [N, AUGMENTATION], all zeros where
    nothing was.

    With the given probability each, an image gets its colour channels in another order, becomes
    negative, and is shifted and stretched. None of these changes what a digit is.
    """
    n = len(images)
    order = torch.where(draws.rand() < probability, 1 + draws.randint(len(ORDERS) - 1), 0)
    negative = (draws.rand() < probability).float()
    moved = (draws.rand() < probability).float()[:, None]
    shift = moved * LARGEST_SHIFT * torch.stack([2.0 * draws.rand() - 1.0 for _ in range(2)], 1)
    scale = moved * LARGEST_SCALE * torch.stack([2.0 * draws.rand() - 1.0 for _ in range(2)], 1)

    channels = ORDERS.to(images.device)[order][:, :, None, None].expand_as(images)
    images = images.gather(1, channels) * (1.0 - 2.0 * negative).view(n, 1, 1, 1)
    theta = torch.cat([torch.diag_embed(scale.exp()), shift[:, :, None]], dim=2)  # [N, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = torch.where(moved.view(n, 1, 1, 1) > 0.0, warped, images)
    told = [
        F.one_hot(order, len(ORDERS))[:, 1:].float(),
        negative[:, None],
        shift / LARGEST_SHIFT,
        scale / LARGEST_SCALE,
    ]
    return images, torch.cat(told, dim=1)
