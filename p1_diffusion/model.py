"""The U-Net of Problem 1, conditioned on time, digit and dataset.

Designed for quality per FLOP on 28x28 images: most work happens at 14x14 and 7x7, and a narrow path
at 28x28 draws the edges.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import attend
from common.checkpoint import load_config, load_model, save_model
from common.data.digits import NUM_DIGITS, SIZE
from common.diffusion.process import Parameterization
from common.diffusion.schedule import SCHEDULES, ScheduleName
from common.embedding import SinusoidalEmbedding
from common.errors import InputError

KIND = "p1_diffusion.ContextUNet"
NULL_DIGIT = NUM_DIGITS
GROUP = 16  # channels that are normalised together, where there are as many


@dataclasses.dataclass(frozen=True)
class ContextUNetConfig:
    """What builds the network, and how to read its output."""

    datasets: int = 2
    """How many datasets it knows: the first ones of `common.data.digits.DATASETS`."""
    channels: tuple[int, ...] = (32, 96, 192)
    """Channels at each resolution, from the finest; every next one is half as wide and high."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks at each resolution on the way down, and again on the way up."""
    attention: tuple[int, ...] = (2,)
    """Resolutions whose blocks attend, 0 being the finest."""
    heads: int = 6
    """Attention heads."""
    embedding: int = 256
    """Width of the time and context embeddings."""
    class_maps: bool = True
    """Whether each class also has a learned map of features at the coarsest resolution: a first
    idea of where strokes lie."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    augmentation: int = 0
    """Length of the vectors that tell the network how a training image was augmented; 0 if none
    is."""
    parameterization: Parameterization = "v"
    """What the network's output means."""
    schedule: ScheduleName = "cosine"
    """The noise schedule that the network is trained on."""


class ContextUNet(nn.Module):
    """Predicts from x_t [N, 3, 28, 28], t long [N] and context long [N, 2] = (digit, dataset) an
    output like x_t.

    The digit NULL_DIGIT stands for dropped context. The dataset is never dropped: guidance then
    pulls towards the digit and leaves the dataset's look alone. In training `augmentation` [N, A]
    may tell what was done to an image; without it, as in sampling, images are as in the data (the
    non-leaky augmentation of EDM, arXiv:2206.00364, Appendix F.2).
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
        emb = self.time(t) + self.digit(context[:, 0]) + self.dataset(context[:, 1])
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
        """Writes the model folder, its parameters as float16."""
        save_model(folder, self, KIND, dataclasses.asdict(self.config), torch.float16)

    @classmethod
    def load(cls, folder: Path) -> "ContextUNet":
        """Rebuilds the network from its folder, in evaluation mode; also one of the first edition,
        which has the same calls.

        Raises InputError if the folder does not hold one.
        """
        if isinstance(load_config(folder, KIND).get("blocks"), int):
            from p1_diffusion.first_edition import (
                FirstEditionUNet,
            )  # it is made of this file's blocks

            return FirstEditionUNet.load(folder)
        return load_model(folder, KIND, cls, ContextUNetConfig)


def _check(config: ContextUNetConfig) -> None:
    """Raises InputError if no network can be built from it."""
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
            f"a network needs blocks for each resolution, not channels {channels} and blocks"
            f" {config.blocks}"
        )
    if any(count % min(GROUP, count) or count % 2 for count in channels) or SIZE % 2**coarsest:
        raise InputError(
            f"channels must be multiples of {GROUP} (or even and below it) for at most 3"
            f" resolutions, not {channels}"
        )
    if any(
        not 0 <= level <= coarsest or channels[level] % config.heads for level in config.attention
    ):
        raise InputError(
            f"attention at {config.attention} with {config.heads} heads does not fit the channels"
            f" {channels}"
        )
    if config.schedule not in SCHEDULES:
        raise InputError(f"the schedule {config.schedule!r} is none of {', '.join(SCHEDULES)}")


def group_norm(channels: int, groups: int | None = None) -> nn.GroupNorm:
    """Normalises GROUP channels at a time, or as many as make the given number of groups."""
    return nn.GroupNorm(groups or max(channels // GROUP, 1), channels)


class Block(nn.Module):
    """A residual block, followed by attention where the network attends."""

    def __init__(
        self, channels_in: int, channels: int, config: ContextUNetConfig, attends: bool
    ) -> None:
        super().__init__()
        self.residual = ResBlock(channels_in, channels, config.embedding, config.dropout)
        self.attention = Attention(channels, config.heads) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.residual(x, emb)
        return h if self.attention is None else self.attention(h)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; between them the embedding [N, E] scales and shifts each
    channel (AdaGN, arXiv:2105.05233)."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        embedding: int,
        dropout: float,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = group_norm(channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        )
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1.0 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over the pixels of x [N, C, H, W]."""

    def __init__(self, channels: int, heads: int, groups: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, groups)
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
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # [N, HW, C]
        return x + self.out(mixed).transpose(1, 2).view(n, c, height, width)
