"""The U-Net of this project's first edition, which works at 14x14 and 7x7 only.

It is kept so that its checkpoints load; `checkpoints/p1_digits` is one of them.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_model, save_model
from common.config import Depth, Fraction, Size
from common.data.digits import NUM_DIGITS
from common.diffusion.process import Parameterization
from common.diffusion.schedule import ScheduleName
from common.embedding import SinusoidalEmbedding
from p1_diffusion.model import KIND, Attention, ResBlock

GROUPS = 16


@dataclasses.dataclass(frozen=True)
class FirstEditionConfig:
    """Hyperparameters of the network, and the meaning of its output."""

    channels: tuple[Size, Size] = (80, 160)
    """Channels at 14x14 and at 7x7."""
    blocks: Depth = 1
    """Residual blocks at each resolution of the encoder, and again of the decoder."""
    heads: Depth = 4
    """Attention heads at 7x7."""
    embedding: Size = 256
    """Width of the time and context embeddings."""
    dropout: Fraction = 0.0
    """Dropout probability inside the residual blocks."""
    parameterization: Parameterization = "v"
    """What the network predicts: eps, x0 or v."""
    schedule: ScheduleName = "cosine"
    """Noise schedule of the training."""
    augmentation: Literal[0] = 0
    """Length of the augmentation vector; always 0, since this network takes none."""
    datasets: Literal[2] = 2
    """Number of datasets; always 2, MNIST-M and SVHN."""
    ADDED: ClassVar = {"augmentation": 0, "datasets": 2}


class FirstEditionUNet(nn.Module):
    """Like `ContextUNet`, but a pixel-unshuffle by 2 replaces the first down-sampling."""

    def __init__(self, config: FirstEditionConfig) -> None:
        super().__init__()
        self.config = config
        high, low = config.channels
        width = config.embedding

        def blocks(channels_in: int, channels: int) -> nn.ModuleList:
            parts = (
                ResBlock(channels_in, channels, width, config.dropout, GROUPS)
                for _ in range(config.blocks)
            )
            return nn.ModuleList(parts)

        self.time = nn.Sequential(
            SinusoidalEmbedding(high), nn.Linear(high, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.digit = nn.Embedding(NUM_DIGITS + 1, width)
        self.dataset = nn.Embedding(config.datasets, width)
        self.conv_in = nn.Conv2d(12, high, 3, padding=1)
        self.down_high, self.down_low = blocks(high, high), blocks(low, low)
        self.downsample = nn.Conv2d(high, low, 3, stride=2, padding=1)
        self.attention = Attention(low, config.heads, GROUPS)
        self.up_low, self.up_high = blocks(2 * low, low), blocks(2 * high, high)
        self.upsample = nn.ConvTranspose2d(low, high, 2, stride=2)
        self.norm_out = nn.GroupNorm(GROUPS, high)
        self.conv_out = nn.Conv2d(high, 12, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, augmentation: None = None) -> Tensor:
        """The prediction [N, 3, 28, 28]; arguments as for `ContextUNet.forward`."""
        emb = self.time(t) + self.digit(context[:, 0]) + self.dataset(context[:, 1])
        emb = F.silu(emb)  # [N, E]
        h = self.conv_in(F.pixel_unshuffle(x_t, 2))  # [N, C, 14, 14]
        skips = []
        for block in self.down_high:
            h = block(h, emb)
            skips.append(h)
        h = self.downsample(h)  # [N, C', 7, 7]
        for block in self.down_low:
            h = block(h, emb)
            skips.append(h)
        h = self.attention(h)
        for block in self.up_low:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        h = self.upsample(h)
        for block in self.up_high:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)  # [N, 3, 28, 28]

    def save(self, folder: Path) -> None:
        """Writes the model folder, with parameters in float16."""
        config = dataclasses.asdict(self.config)
        del config["augmentation"], config["datasets"]
        save_model(folder, self, KIND, config, torch.float16)

    @classmethod
    def load(cls, folder: Path) -> "FirstEditionUNet":
        """Loads the network from its model folder, in evaluation mode.

        Raises InputError if the folder does not hold one.
        """
        return load_model(folder, KIND, cls, FirstEditionConfig)
