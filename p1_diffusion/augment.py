"""Non-leaky data augmentation (EDM, arXiv:2206.00364, Appendix F.2).

In training, a vector that describes each image's augmentation is an input of the network. Sampling
gives the network no such vector, so samples look like the data without augmentation.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from common.seeds import Draws

# Permutations of the colour channels, [6, 3]; the first is the identity.
ORDERS = torch.tensor(list(itertools.permutations(range(3))))
LARGEST_SHIFT = 3.0 / 14.0  # 3 of 28 pixels: `affine_grid` measures the image from -1 to 1
LARGEST_SCALE = 0.15  # largest |log(scale)| along each axis
# Length of the vector: one-hot permutation (without the identity), negation, shift and scale in x
# and y.
AUGMENTATION = len(ORDERS) - 1 + 1 + 4


def augment(images: Tensor, probability: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Augments images at random; returns them and the vectors that describe each augmentation.

    `images` are float32 [N, 3, H, W] in [-1, 1]. The vectors are [N, AUGMENTATION]; an unchanged
    image has the zero vector. Three augmentations are applied independently, each with the given
    probability: a permutation of the colour channels, a negation (x to -x), and a shift with a
    scaling along each axis. None of them changes which digit is shown.
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
    with torch.autocast(images.device.type, enabled=False):  # bf16 would move pixels
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = torch.where(moved.view(n, 1, 1, 1) > 0.0, warped, images)
    vectors = [
        F.one_hot(order, len(ORDERS))[:, 1:].float(),
        negative[:, None],
        shift / LARGEST_SHIFT,
        scale / LARGEST_SCALE,
    ]
    return images, torch.cat(vectors, dim=1)
