"""Face features, in which the Frechet distance between generated and real faces is measured.

The features of Inception, which FID uses, need a download. Here a small network is trained without
labels instead: it learns to match two random views of one photo among the views of other photos
(SimCLR, Chen et al. 2020, arXiv:2002.05709). Its features depend on eyes, mouths, hair and light,
but little on position and tint, since the views change these.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_config, load_weights, save_model
from common.files import ROOT, shown
from common.images import resize, to_model_range
from common.metrics.small_resnet import SmallResNet
from common.seeds import Draws

Features = Callable[[Tensor], Tensor]
"""Function from uint8 images [N, 3, H, W] to features [N, D]."""
SHIPPED = ROOT / "checkpoints" / "p2_features"
KIND = "p2_ddim.FaceFeatures"
CHANNELS = (48, 96, 160)  # at 16x16, 8x8 and 4x4
PROJECTION = 64  # dimensions of the projection that the contrastive loss compares


class FaceFeatures(SmallResNet):
    """Small ResNet for 64x64 faces, with the projection head of its training.

    Its blocks work at 16x16, 8x8 and 4x4; the features are 160 pooled activations.
    """

    def __init__(self) -> None:
        super().__init__(CHANNELS, patch=4)
        self.projection = nn.Sequential(
            nn.Linear(CHANNELS[-1], CHANNELS[-1]), nn.ReLU(), nn.Linear(CHANNELS[-1], PROJECTION)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Projected features, unit vectors [N, 64], of images [N, 3, 64, 64] in [-1, 1]."""
        return F.normalize(self.projection(self.features(images)), dim=1)

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Features [N, 160] of uint8 images [N, 3, H, W], which are first resized to 64x64."""
        parts = []
        for part in images.split(100):
            parts.append(self.features(resize(to_model_range(part), 64, "bilinear")))
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        """Writes the model folder."""
        save_model(folder, self, KIND, {})

    @classmethod
    def load(cls, folder: Path) -> "FaceFeatures":
        """Loads the network from its model folder, in evaluation mode."""
        load_config(folder, KIND)
        model = cls()
        load_weights(folder, model)
        return model.eval()


def random_views(images: Tensor, draws: Draws) -> Tensor:
    """A random view of each image [N, 3, H, W] in [-1, 1], for contrastive training.

    A view is cropped to 60 to 100 % of the sides, mirrored with probability 1/2, rotated by up to
    10 degrees, and changed in contrast, brightness and tint.
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.rand()

    scale, angle = uniform(0.6, 1.0), uniform(-math.pi / 18, math.pi / 18)
    mirror = torch.where(draws.rand() < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * scale * angle.cos(), -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = mirror * scale * angle.sin(), scale * angle.cos()
    theta[:, 0, 2], theta[:, 1, 2] = (
        (1.0 - scale) * uniform(-1.0, 1.0),
        (1.0 - scale) * uniform(-1.0, 1.0),
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    # Contrast, brightness and tint; one view in five becomes grey.
    gain = uniform(0.7, 1.3).view(n, 1, 1, 1) * (1.0 + 0.1 * draws.randn(3).view(n, 3, 1, 1))
    views = views * gain + uniform(-0.2, 0.2).view(n, 1, 1, 1)
    grey = (draws.rand() < 0.2).view(n, 1, 1, 1)
    return torch.where(grey, views.mean(1, keepdim=True).expand_as(views), views)


def view_cosines(model: FaceFeatures, images: Tensor, draws: Draws) -> Tensor:
    """Cosine similarities [N, N] between two random views of uint8 images [N, 3, H, W].

    Entry (i, j) compares the first view of image i and the second view of image j.
    """
    x = to_model_range(images)
    first, second = model(torch.cat([random_views(x, draws), random_views(x, draws)])).chunk(2)
    return first @ second.T


def recognised(cosines: Tensor) -> float:
    """Fraction of images whose first view is most similar to their own second view."""
    return (
        (cosines.argmax(1) == torch.arange(len(cosines), device=cosines.device))
        .float()
        .mean()
        .item()
    )


def colours(images: Tensor) -> Tensor:
    """Mean colours on an 8x8 grid, [N, 192] in [0, 1], of uint8 images [N, 3, H, W].

    These features need no network. They describe layout and light, but no detail.
    """
    return F.adaptive_avg_pool2d(images.float() / 255.0, 8).flatten(1)


def choose_features(folder: Path) -> tuple[Features, str]:
    """Returns the feature function and its description.

    It is that of the network in `folder`, or `colours` if the folder does not exist.
    """
    if not Path(folder).is_dir():
        return colours, "colours on an 8x8 grid"
    return FaceFeatures.load(folder).describe, f"the network in {shown(folder)}"
