"""A small ResNet; its pooled activations are the features of the project's own metrics."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.images import to_model_range


class SmallResNet(nn.Module):
    """A ResNet with two residual blocks at each of three resolutions.

    `channels` are those of the three resolutions, which are 1/patch, 1/(2 patch) and 1/(4 patch) of
    the images' side.
    """

    def __init__(self, channels: tuple[int, int, int], patch: int) -> None:
        super().__init__()
        high, middle, low = channels
        self.stem = nn.Conv2d(3, high, 2 * patch, stride=patch, padding=patch // 2)
        self.blocks = nn.Sequential(
            ResidualBlock(high, high),
            ResidualBlock(high, high),
            ResidualBlock(high, middle, stride=2),
            ResidualBlock(middle, middle),
            ResidualBlock(middle, low, stride=2),
            ResidualBlock(low, low),
            nn.BatchNorm2d(low),
            nn.ReLU(),
        )

    def features(self, images: Tensor) -> Tensor:
        """Pooled activations after the last block, [N, channels[-1]].

        `images` is [N, 3, H, W] in [-1, 1].
        """
        return self.blocks(self.stem(images)).mean((2, 3))

    @torch.no_grad()
    def recalibrate(self, images: Tensor) -> None:
        """Recomputes the running statistics of batch normalisation from `images`.

        `images` is uint8 [N, 3, H, W]. The statistics are then a function of the current weights,
        averaged weights included, and a checkpoint need not store them.
        """
        was_training = self.training
        self.train()
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
        device = next(self.parameters()).device
        for part in images.split(200):
            self.features(to_model_range(part).to(device))
        self.train(was_training)


class ResidualBlock(nn.Module):
    """A pre-activation residual block (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or channels != channels_in
        self.skip = (
            nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, channels_in, H, W] to [N, channels, H / stride, W / stride]."""
        h = F.relu(self.norm1(x))
        return self.skip(x) + self.conv2(F.relu(self.norm2(self.conv1(h))))
