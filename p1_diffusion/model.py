"""The U-Net of Problem 1, conditioned on time, digit and dataset.

Designed for quality per FLOP on 28x28 images: a pixel-unshuffle takes the place of the first down-sampling and of the slow
convolutions at full resolution, so that all work happens at 14x14 and 7x7.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_model, save_model
from common.data.digits import DATASETS, NUM_DIGITS
from common.diffusion import Parameterization
from common.embedding import SinusoidalEmbedding
from common.errors import InputError
from common.schedule import SCHEDULES, ScheduleName

KIND = "p1_diffusion.ContextUNet"
NULL_DIGIT = NUM_DIGITS
GROUPS = 16  # of the normalisation


@dataclasses.dataclass(frozen=True)
class ContextUNetConfig:
    """What builds the network, and how to read its output."""

    channels: tuple[int, int] = (80, 160)
    """Channels at 14x14 and at 7x7."""
    blocks: int = 1
    """Residual blocks at each resolution on the way down, and again on the way up."""
    heads: int = 4
    """Attention heads at 7x7."""
    embedding: int = 256
    """Width of the time and context embeddings."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    parameterization: Parameterization = "v"
    """What the network's output means."""
    schedule: ScheduleName = "cosine"
    """The noise schedule that the network is trained on."""


class ContextUNet(nn.Module):
    """Predicts from x_t [N, 3, 28, 28], t long [N] and context long [N, 2] = (digit, dataset) an output like x_t.

    The digit NULL_DIGIT stands for dropped context. The dataset is never dropped: guidance then pulls towards the digit
    and leaves the dataset's look alone.
    """

    def __init__(self, config: ContextUNetConfig) -> None:
        super().__init__()
        self.config = config
        high, low = config.channels
        if high % GROUPS or low % GROUPS or low % config.heads or config.schedule not in SCHEDULES:
            raise InputError(
                f"a network with channels {high} and {low}, {config.heads} heads and the schedule {config.schedule!r} cannot "
                f"be built: channels must be multiples of {GROUPS}, the second one of the heads too"
            )
        width = config.embedding
        self.time = nn.Sequential(SinusoidalEmbedding(high), nn.Linear(high, width), nn.SiLU(), nn.Linear(width, width))
        self.digit = nn.Embedding(NUM_DIGITS + 1, width)
        self.dataset = nn.Embedding(len(DATASETS), width)

        self.conv_in = nn.Conv2d(12, high, 3, padding=1)
        self.down_high = nn.ModuleList(ResBlock(high, high, width, config.dropout) for _ in range(config.blocks))
        self.downsample = nn.Conv2d(high, low, 3, stride=2, padding=1)
        self.down_low = nn.ModuleList(ResBlock(low, low, width, config.dropout) for _ in range(config.blocks))
        self.attention = Attention(low, config.heads)
        self.up_low = nn.ModuleList(ResBlock(2 * low, low, width, config.dropout) for _ in range(config.blocks))
        self.upsample = nn.ConvTranspose2d(low, high, 2, stride=2)
        self.up_high = nn.ModuleList(ResBlock(2 * high, high, width, config.dropout) for _ in range(config.blocks))
        self.norm_out = nn.GroupNorm(GROUPS, high)
        self.conv_out = nn.Conv2d(high, 12, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = F.silu(self.time(t) + self.digit(context[:, 0]) + self.dataset(context[:, 1]))  # [N, E]
        h = self.conv_in(F.pixel_unshuffle(x_t, 2))  # [N, C, 14, 14], the first down
        skips = []
        for block in self.down_high:
            h = block(h, emb)
            skips.append(h)
        h = self.downsample(h)  # [N, C', 7, 7], the second down
        for block in self.down_low:
            h = block(h, emb)
            skips.append(h)
        h = self.attention(h)
        for block in self.up_low:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        h = self.upsample(h)  # [N, C, 14, 14], the first up
        for block in self.up_high:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)  # [N, 3, 28, 28], the second up

    def save(self, folder: Path) -> None:
        """Writes the model folder."""
        save_model(folder, self, KIND, dataclasses.asdict(self.config))

    @classmethod
    def load(cls, folder: Path) -> "ContextUNet":
        """Rebuilds the network from its folder, in evaluation mode. Raises InputError if the folder does not hold one."""
        return load_model(folder, KIND, cls, ContextUNetConfig)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; between them the embedding [N, E] scales and shifts each channel (AdaGN, arXiv:2105.05233)."""

    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1.0 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over the pixels of x [N, C, H, W]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = (
            self.qkv(tokens).unflatten(-1, (3, self.heads, c // self.heads)).permute(2, 0, 3, 1, 4)
        )  # [N, heads, HW, C/heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, HW, C]
        return x + self.out(mixed).transpose(1, 2).view(n, c, height, width)
