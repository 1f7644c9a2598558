"""The U-Net of Problem 1, conditioned on timestep, digit and dataset.

Most of its computation happens at 14x14 and 7x7. At 28x28 it has few channels, which suffice for
edges and cost little.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import attend
from common.checkpoint import load_model, save_model
from common.config import Depth, Fraction, Index, Size, bounds
from common.data.digits import DATASETS, NUM_DIGITS, SIZE
from common.diffusion.process import Parameterization
from common.diffusion.schedule import SCHEDULES, ScheduleName
from common.embedding import SinusoidalEmbedding
from common.errors import InputError

KIND = "p1_diffusion.ContextUNet"
NULL_DIGIT = NUM_DIGITS
GROUP = 16  # channels per group of GroupNorm; layers with fewer channels have one group


@dataclasses.dataclass(frozen=True)
class ContextUNetConfig:
    """Hyperparameters of the network, and the meaning of its output."""

    datasets: Annotated[int, *bounds(at_least=1, at_most=len(DATASETS))] = 2
    """Number of datasets, the first ones of `common.data.digits.DATASETS`."""
    channels: tuple[Size, ...] = (32, 96, 192)
    """Channels at each resolution, finest first; each resolution halves height and width."""
    blocks: tuple[Depth, ...] = (1, 1, 1)
    """Residual blocks at each resolution of the encoder, and again of the decoder."""
    attention: tuple[Index, ...] = (2,)
    """Indices of the resolutions with self-attention; 0 is the finest."""
    heads: Depth = 6
    """Attention heads."""
    embedding: Size = 256
    """Width of the time and context embeddings."""
    class_maps: bool = True
    """Add a learned feature map for each (digit, dataset) at the coarsest resolution, which can
    encode where strokes lie."""
    dropout: Fraction = 0.0
    """Dropout probability inside the residual blocks."""
    augmentation: Index = 0
    """Length of the vector that describes a training image's augmentation; 0 is no such input."""
    parameterization: Parameterization = "v"
    """What the network predicts: eps, x0 or v."""
    schedule: ScheduleName = "cosine"
    """Noise schedule of the training."""
    ADDED: ClassVar = {"augmentation": 0, "datasets": 2}


class ContextUNet(nn.Module):
    """Predicts eps, x0 or v (see `parameterization`), conditioned on digit and dataset.

    The digit NULL_DIGIT is the null condition of classifier-free guidance. The dataset is never
    dropped, so guidance strengthens the digit and not the style of the dataset.
    """

    def __init__(self, config: ContextUNetConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        first, width = config.channels[0], config.embedding
        self.time = nn.Sequential(
            SinusoidalEmbedding(2 * first),
            nn.Linear(2 * first, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )
        self.digit = nn.Embedding(NUM_DIGITS + 1, width)
        self.dataset = nn.Embedding(config.datasets, width)
        self.augmentation = (
            nn.Linear(config.augmentation, width, bias=False) if config.augmentation else None
        )

        self.class_embedding = None
        if config.class_maps:
            self.map_shape = (config.channels[-1], *[SIZE // 2 ** (len(config.channels) - 1)] * 2)
            self.class_embedding = nn.Embedding(
                (NUM_DIGITS + 1) * config.datasets, math.prod(self.map_shape)
            )
            nn.init.normal_(self.class_embedding.weight, std=0.02)

        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.downsample, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(config.channels):
            attends = level in config.attention
            for side, channels_in in ((self.down, channels), (self.up, 2 * channels)):
                side.append(
                    nn.ModuleList(
                        Block(channels_in, channels, config, attends)
                        for _ in range(config.blocks[level])
                    )
                )
            if level + 1 < len(config.channels):
                coarser = config.channels[level + 1]
                self.downsample.append(nn.Conv2d(channels, coarser, 2, stride=2))
                self.upsample.append(nn.ConvTranspose2d(coarser, channels, 2, stride=2))
        self.norm_out = group_norm(first)
        self.conv_out = nn.Conv2d(first, 3, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, x_t: Tensor, t: Tensor, context: Tensor, augmentation: Tensor | None = None
    ) -> Tensor:
        """The prediction [N, 3, 28, 28] for x_t [N, 3, 28, 28], t long [N] and context long [N, 2].

        `context` is (digit, dataset). `augmentation` [N, A] describes how training images were
        augmented (p1_diffusion/augment.py); None, as in sampling, means that they were not.
        """
        emb = self.time(t) + self.digit(context[:, 0]) + self.dataset(context[:, 1])
        if augmentation is None and self.augmentation is not None and self.training:
            # Several processes expect a gradient of every parameter.
            augmentation = x_t.new_zeros(len(x_t), self.config.augmentation)
        if augmentation is not None:
            emb = emb + self.augmentation(augmentation)
        emb = F.silu(emb)  # [N, E]
        h = self.conv_in(x_t)  # [N, C, 28, 28]
        skips = []
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.downsample[level - 1](h)  # [N, C', H / 2, W / 2]
            if self.class_embedding is not None and level + 1 == len(self.down):
                maps = self.class_embedding(context[:, 0] * self.config.datasets + context[:, 1])
                h = h + maps.unflatten(1, self.map_shape)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if level > 0:
                h = self.upsample[level - 1](h)
        return self.conv_out(F.silu(self.norm_out(h)))  # [N, 3, 28, 28]

    def save(self, folder: Path) -> None:
        """Writes the model folder, with parameters in float16."""
        save_model(folder, self, KIND, dataclasses.asdict(self.config), torch.float16)

    @classmethod
    def load(cls, folder: Path) -> "ContextUNet":
        """Loads the network from its model folder, in evaluation mode.

        Raises InputError if the folder does not hold such a network.
        """
        return load_model(folder, KIND, cls, ContextUNetConfig)


def _check(config: ContextUNetConfig) -> None:
    """Raises InputError if no network can be built with this configuration."""
    channels, coarsest = config.channels, len(config.channels) - 1
    if config.datasets < 1:
        raise InputError(f"a network needs at least 1 dataset, not {config.datasets}")
    if (
        config.heads < 1
        or not channels
        or min(channels) < 1
        or len(config.blocks) != len(channels)
        or min(config.blocks) < 1
    ):
        raise InputError(
            f"a network needs at least 1 head, and channels and blocks for each resolution, not"
            f" {config.heads} heads, channels {channels} and blocks {config.blocks}"
        )
    if any(count % min(GROUP, count) or count % 2 for count in channels) or SIZE % 2**coarsest:
        raise InputError(
            f"channels must be multiples of {GROUP} (or even and below {GROUP}), for at most 3"
            f" resolutions, not {channels}"
        )
    if any(
        not 0 <= level <= coarsest or channels[level] % config.heads for level in config.attention
    ):
        raise InputError(
            f"attention at the resolutions {config.attention} with {config.heads} heads does not"
            f" fit the channels {channels}"
        )
    if config.schedule not in SCHEDULES:
        raise InputError(
            f"the schedule must be one of {', '.join(SCHEDULES)}, not {config.schedule!r}"
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with GROUP channels per group."""
    return nn.GroupNorm(max(channels // GROUP, 1), channels)


class Block(nn.Module):
    """A residual block, followed by self-attention if `attends`."""

    def __init__(
        self, channels_in: int, channels: int, config: ContextUNetConfig, attends: bool
    ) -> None:
        super().__init__()
        self.residual = ResBlock(channels_in, channels, config.embedding, config.dropout)
        self.attention = Attention(channels, config.heads) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features [N, channels, H, W] of x [N, channels_in, H, W] and the embedding [N, E]."""
        h = self.residual(x, emb)
        return h if self.attention is None else self.attention(h)


class ResBlock(nn.Module):
    """Residual block: twice (GroupNorm, SiLU, 3x3 convolution), conditioned by AdaGN.

    The embedding scales and shifts the channels after the second GroupNorm (Dhariwal and Nichol
    2021, arXiv:2105.05233).
    """

    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        )
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features [N, channels, H, W] of x [N, channels_in, H, W] and the embedding [N, E]."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1.0 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over the pixels of x [N, C, H, W]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the attention's output, [N, C, H, W]."""
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = (
            self.qkv(tokens).unflatten(-1, (3, self.heads, c // self.heads)).permute(2, 0, 3, 1, 4)
        )  # [N, heads, HW, C/heads]
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # [N, HW, C]
        return x + self.out(mixed).transpose(1, 2).view(n, c, height, width)
