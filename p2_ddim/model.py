"""The U-Net of Problem 2, of the homework's size (114 million parameters) or smaller.

The default configuration has exactly the keys and shapes of the homework's `UNet.pt`.
`load_network` also reads this project's model folders and a diffusers `UNet2DModel`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import attend
from common.checkpoint import build_network, load_model, load_strict, save_model
from common.config import Depth, Fraction, Index, Size, bounds, read_entries
from common.diffusion.process import Parameterization
from common.embedding import SinusoidalEmbedding
from common.errors import InputError
from common.files import ROOT, read_json, shown
from common.latent.network_config import NETWORK
from common.weights import (
    followed,
    has_old_attention,
    old_attention_names,
    read_weights,
    weights_file,
)

FACES_SIDE = 64  # of the faces that the shipped network draws
FACES = ROOT / "checkpoints" / "p2_faces"
"""Model folder of the face model that this project trained, for 64x64 images."""
KIND = "p2_ddim.FaceUNet"
GROUPS = 32  # groups of GroupNorm


class FaceNetwork(Protocol):
    """Interface of the networks that can be sampled: (x_t [N, 3, H, W], t long [N]) -> prediction.

    The prediction has the shape of x_t.
    """

    parameterization: Parameterization  # what the prediction is: eps, x0 or v
    side_multiple: int  # H and W must be multiples of it

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class FaceUNetConfig:
    """Hyperparameters of the network, and the meaning of its output.

    The defaults are those of the homework's `UNet.pt`.
    """

    channels: tuple[Size, ...] = (128, 128, 256, 256, 512, 512)
    """Channels at each resolution, finest first; each resolution halves height and width."""
    blocks: Depth = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more at each."""
    attention: tuple[Index, ...] = (4,)
    """Indices of the resolutions with self-attention; 0 is the finest. The bottleneck always has
    it."""
    heads: Depth = 1
    """Attention heads."""
    embedding: Size = 512
    """Width of the time embedding."""
    dropout: Fraction = 0.0
    """Dropout probability inside the residual blocks."""
    patch: Annotated[int, *bounds(at_least=1, at_most=64)] = 1
    """Patch side p in pixels: a pixel-unshuffle by p before the first layer and a pixel-shuffle by
    p at the end; 1 is none."""
    refine: Index = 0
    """Channels of a final residual block at full resolution, which removes the grain that patches
    cause; 0 is no such block."""
    parameterization: Parameterization = "eps"
    """What the network predicts: eps, x0 or v."""
    ADDED: ClassVar = {"refine": 0}


class FaceUNet(nn.Module):
    """Predicts eps, x0 or v (see `parameterization`) for images whose sides fit `side_multiple`.

    The layers `down1, down2, ...` of the encoder each store their output for a skip connection; the
    blocks among the decoder's layers `up1, up2, ...` concatenate these in reverse order. The names
    are those of the keys in the homework's `UNet.pt`.
    """

    def __init__(self, config: FaceUNetConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.parameterization = config.parameterization
        self.side_multiple = config.patch * 2 ** (len(config.channels) - 1)
        first, last = config.channels[0], config.channels[-1]
        width = config.embedding
        self.time = nn.Sequential(
            SinusoidalEmbedding(first), nn.Linear(first, width), nn.SiLU(), nn.Linear(width, width)
        )

        # Encoder: an input convolution, then the blocks of each resolution, with a convolution of
        # stride 2 between resolutions.
        down: list[nn.Module] = [nn.Conv2d(3 * config.patch**2, first, 3, padding=1)]
        skips = [first]
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks):
                down.append(Block(skips[-1], channels, config, attends=level in config.attention))
                skips.append(channels)
            if level < len(config.channels) - 1:
                down.append(nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                skips.append(channels)
        self._down = self._name("down", down)
        self.mid1 = Block(last, last, config, attends=True)
        self.mid2 = Block(last, last, config, attends=False)

        # Decoder: one block for each skip connection, with nearest-neighbour up-sampling and a
        # convolution between resolutions.
        up: list[nn.Module] = []
        before = last
        for level, channels in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                up.append(
                    Block(before + skips.pop(), channels, config, attends=level in config.attention)
                )
                before = channels
            if level > 0:
                up.append(
                    nn.Sequential(
                        nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1)
                    )
                )
        self._up = self._name("up", up)

        # Output: one convolution to the patches' pixels. With `refine`: features of each pixel are
        # added to features of the noisy image, and a residual block and a convolution follow.
        fine, groups = config.refine, max(config.refine // 16, 1)
        self.unfold = (
            nn.Sequential(
                nn.GroupNorm(GROUPS, first), nn.SiLU(), nn.Conv2d(first, fine * config.patch**2, 1)
            )
            if fine
            else None
        )
        self.fine = nn.Conv2d(3, fine, 3, padding=1) if fine else None
        self.refine = ResBlock(fine, fine, width, config.dropout, groups) if fine else None
        last_norm = nn.GroupNorm(groups, fine) if fine else nn.GroupNorm(GROUPS, first)
        last_conv = (
            nn.Conv2d(fine, 3, 3, padding=1)
            if fine
            else nn.Conv2d(first, 3 * config.patch**2, 3, padding=1)
        )
        self.out = nn.Sequential(last_norm, nn.SiLU(), last_conv)
        nn.init.zeros_(last_conv.weight)
        nn.init.zeros_(last_conv.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction [N, 3, H, W] for x_t [N, 3, H, W] and t long [N]."""
        emb = F.silu(self.time(t))  # [N, E]
        h = F.pixel_unshuffle(x_t, self.config.patch)  # [N, 3 p^2, H / p, W / p]
        skips = []
        for name in self._down:
            h = run_part(getattr(self, name), h, emb)
            skips.append(h)
        h = self.mid2(self.mid1(h, emb), emb)
        for name in self._up:
            part = getattr(self, name)
            if isinstance(part, Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = run_part(part, h, emb)
        if not self.config.refine:
            return F.pixel_shuffle(self.out(h), self.config.patch)  # [N, 3, H, W]
        h = F.pixel_shuffle(self.unfold(h), self.config.patch) + self.fine(x_t)  # [N, C, H, W]
        return self.out(self.refine(h, emb))  # [N, 3, H, W]

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the model folder, with parameters in `dtype`."""
        save_model(folder, self, KIND, dataclasses.asdict(self.config), dtype)

    @classmethod
    def load(cls, folder: Path) -> "FaceUNet":
        """Loads the network from its model folder, in evaluation mode.

        Raises InputError if the folder does not hold one.
        """
        return load_model(folder, KIND, cls, FaceUNetConfig)

    def _name(self, prefix: str, parts: list[nn.Module]) -> list[str]:
        """Registers the modules as PREFIX1, PREFIX2, ... and returns these names."""
        names = [f"{prefix}{i}" for i in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)
        return names


def _check(config: FaceUNetConfig) -> None:
    """Raises InputError if no network can be built with this configuration."""
    channels, refine = config.channels, config.refine
    if not 1 <= len(channels) <= 10 or any(count % GROUPS for count in channels):
        raise InputError(
            f"channels must be multiples of {GROUPS} for 1 to 10 resolutions, not {channels}"
        )
    if any(level >= len(channels) for level in config.attention):
        raise InputError(f"attention {config.attention} names a resolution that {channels} lacks")
    attending = [channels[-1], *(channels[level] for level in config.attention)]
    if any(count % config.heads for count in attending):
        raise InputError(f"{config.heads} heads do not divide the channels {attending}")
    if refine % max(refine // 16, 1):
        raise InputError(f"refine must be a multiple of its groups, {refine // 16}, not {refine}")


def run_part(part: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    """Applies a layer to h [N, C, H, W]; a `Block` also takes the embedding [N, E]."""
    return part(h, emb) if isinstance(part, Block) else part(h)


class Block(nn.Module):
    """A residual block, followed by self-attention if `attends`."""

    def __init__(
        self, channels_in: int, channels: int, config: FaceUNetConfig, *, attends: bool
    ) -> None:
        super().__init__()
        self.resblocks = ResBlock(channels_in, channels, config.embedding, config.dropout)
        self.attention = Attention(channels, config.heads) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features [N, channels, H, W] of x [N, channels_in, H, W] and the embedding [N, E]."""
        h = self.resblocks(x, emb)
        return h if self.attention is None else self.attention(h)


class ResBlock(nn.Module):
    """Residual block: twice (GroupNorm, SiLU, 3x3 convolution).

    A linear projection of the time embedding is added after the first convolution. Its SiLU is
    applied once in `FaceUNet.forward`, since all blocks share it. The identity in `time` stands in
    its place, so that the keys of the linear layer remain `time.1`, as in `UNet.pt`.
    """

    def __init__(
        self, channels_in: int, channels: int, embedding: int, dropout: float, groups: int = GROUPS
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Sequential(nn.Identity(), nn.Linear(embedding, channels))
        self.norm2 = nn.GroupNorm(groups, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        )
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features [N, channels, H, W] of x [N, channels_in, H, W] and the embedding [N, E]."""
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return h + self.skip(x)


class Attention(nn.Module):
    """Residual self-attention over the pixels of x [N, C, H, W].

    The weights are softmax(q k^T / sqrt(C / heads)).
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the attention's output, [N, C, H, W]."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [N, HW, 3C]
        # [N, heads, HW, C / heads] each
        q, k, v = qkv.unflatten(-1, (3, self.heads, c // self.heads)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # [N, HW, C]
        return x + self.out(mixed.transpose(1, 2).unflatten(2, (height, width)))


def silu(x: Tensor) -> Tensor:
    """SiLU, in place if gradients are disabled: x must not be used afterwards."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


# ----------------------------------------------------------------------------
# Loading networks.


def load_network(path: Path) -> FaceNetwork:
    """Loads the network at `path`, in evaluation mode on the CPU.

    `path` is the homework's `UNet.pt` (a state dict, also accepted as .safetensors), a model folder
    of this project, or the folder of a diffusers `UNet2DModel` or of a pipeline that contains one.
    Raises InputError if it is none of these, or if its weights do not fit.
    """
    path = followed(path)
    if path == FACES and not path.exists():
        raise InputError(
            f"{shown(path)} is missing; it is part of the repository: restore it with git, or give"
            " another --checkpoint, such as the homework's UNet.pt"
        )
    if not path.is_dir():
        return from_state_dict(read_weights(path), path)
    if (path / "model_index.json").is_file():
        path = path / "unet"
    config = read_json(path / "config.json")
    if isinstance(config, dict) and config.get("_class_name") == "UNet2DModel":
        return DiffusersUNet(path)
    return fold_upsampling(FaceUNet.load(path))


def from_state_dict(state: Mapping[str, Tensor], source: Path) -> FaceUNet:
    """Builds the homework's network, in evaluation mode, with the weights of a state dict.

    Raises InputError that names keys and shapes that do not fit.
    """
    model = FaceUNet(FaceUNetConfig())
    load_strict(model, state, source)
    return fold_upsampling(model.eval().to(memory_format=torch.channels_last))


def fold_upsampling(network: FaceUNet) -> FaceUNet:
    """Merges each up-sampling and its 3x3 convolution into a 4x4 transposed convolution, stride 2.

    The result is the same to within rounding, with 4 multiplications instead of 9 for each output
    value and input channel. The network is changed in place and is for inference only, since the
    keys of these layers change.

    In one dimension, nearest-neighbour up-sampling repeats each pixel, so two of the three taps
    (w0, w1, w2) fall on the same pixel i. Output 2 i is w0 x[i - 1] + (w1 + w2) x[i], and output
    2 i + 1 is (w0 + w1) x[i] + w2 x[i + 1].
    """
    taps = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for name, part in list(network.named_children()):
        if isinstance(part, nn.Sequential) and isinstance(part[0], nn.Upsample):
            conv = part[1]
            folded = nn.utils.skip_init(
                nn.ConvTranspose2d, conv.in_channels, conv.out_channels, 4, stride=2, padding=1
            )
            with torch.no_grad():
                folded.weight.copy_(torch.einsum("oikl,mk,nl->iomn", conv.weight, taps, taps))
                folded.bias.copy_(conv.bias)
            setattr(network, name, folded.to(memory_format=torch.channels_last))
    return network


class DiffusersUNet(nn.Module):
    """A diffusers `UNet2DModel` that predicts eps, with the interface of `FaceNetwork`.

    An example is google/ddpm-celebahq-256. Raises InputError if the package diffusers is missing,
    or if the folder is incomplete.
    """

    parameterization: Parameterization = "eps"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel  # optional: needed for this class only
        except ImportError:
            raise InputError(
                f"{folder} holds a diffusers model, which needs the package diffusers: install it"
                " with python3 -m pip install diffusers"
            ) from None
        path, weights = folder / "config.json", weights_file(folder)
        config = read_entries(path, NETWORK)
        self.unet = build_network(
            lambda: UNet2DModel.from_config(dict(config)), path, "a UNet2DModel", weights
        )
        state = read_weights(weights)
        names = old_attention_names(self.unet.state_dict()) if has_old_attention(state) else None
        load_strict(self.unet, state, weights, names)
        self.side_multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.eval().to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The predicted eps [N, 3, H, W] for x_t [N, 3, H, W] and t long [N]."""
        return self.unet(x_t, t).sample
