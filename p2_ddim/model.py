"""The U-Net of Problem 2: the homework's 114M-parameter face network and smaller ones, from one
class.

The default configuration has exactly the keys and shapes of the homework's `UNet.pt`.
`load_network` also reads this project's model folders and a diffusers `UNet2DModel`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import attend
from common.checkpoint import load_model, load_pickle, load_strict, load_tensors, save_model
from common.diffusion.process import Parameterization
from common.embedding import SinusoidalEmbedding
from common.errors import InputError
from common.files import ROOT, read_json, shown

FACES = ROOT / "checkpoints" / "p2_faces"
"""The face model that this project trained, 64x64."""
KIND = "p2_ddim.FaceUNet"
GROUPS = 32


class FaceNetwork(Protocol):
    """What sampling needs of a network: (x_t [N, 3, H, W], t long [N]) -> an output like x_t."""

    parameterization: Parameterization
    side_multiple: int

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class FaceUNetConfig:
    """What builds the network, and how to read its output. The defaults are the homework's
    `UNet.pt`."""

    channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    """Channels at each resolution, from the finest; every next one is half as wide and high."""
    blocks: int = 2
    """Residual blocks at each resolution on the way down; on the way up there is one more."""
    attention: tuple[int, ...] = (4,)
    """Resolutions whose blocks attend, 0 being the finest; the middle always does."""
    heads: int = 1
    """Attention heads."""
    embedding: int = 512
    """Width of the time embedding."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    patch: int = 1
    """Side of the pixel squares that are folded into channels at the entrance and unfolded at the
    exit; 1 is none."""
    refine: int = 0
    """Channels of a last residual block at full resolution, which takes away the grain that patches
    leave; 0 is none."""
    parameterization: Parameterization = "eps"
    """What the network's output means."""


class FaceUNet(nn.Module):
    """Predicts from x_t [N, 3, H, W] and t long [N] an output like x_t; sides are multiples of
    `side_multiple`.

    `down1, down2, ...` run on the way down and each leaves a skip; `up1, up2, ...` take the skips
    in reverse, but for the up-samplings. The names are those of the keys in `UNet.pt`.
    """

    def __init__(self, config: FaceUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.parameterization = config.parameterization
        self.side_multiple = config.patch * 2 ** (len(config.channels) - 1)
        first, last = config.channels[0], config.channels[-1]
        width = config.embedding
        self.time = nn.Sequential(
            SinusoidalEmbedding(first), nn.Linear(first, width), nn.SiLU(), nn.Linear(width, width)
        )

        # Down: an entrance convolution, then the blocks of each resolution with a stride-2
        # convolution in between.
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

        # Up: one block for each skip, with nearest-neighbour up-sampling and a convolution between
        # resolutions.
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

        # Out: to pixels at once, or to features of each pixel, beside those of the noisy image, and
        # from these to pixels.
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
        """Writes the model folder, its parameters in `dtype`."""
        save_model(folder, self, KIND, dataclasses.asdict(self.config), dtype)

    @classmethod
    def load(cls, folder: Path) -> "FaceUNet":
        """Rebuilds the network from its folder, in evaluation mode. Raises InputError if the folder
        does not hold one."""
        return load_model(folder, KIND, cls, FaceUNetConfig)

    def _name(self, prefix: str, parts: list[nn.Module]) -> list[str]:
        names = [f"{prefix}{i}" for i in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)
        return names


def run_part(part: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    """Blocks take the embedding [N, E], convolutions do not."""
    return part(h, emb) if isinstance(part, Block) else part(h)


class Block(nn.Module):
    """A residual block, followed by attention where the network attends."""

    def __init__(
        self, channels_in: int, channels: int, config: FaceUNetConfig, *, attends: bool
    ) -> None:
        super().__init__()
        self.resblocks = ResBlock(channels_in, channels, config.embedding, config.dropout)
        self.attention = Attention(channels, config.heads) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.resblocks(x, emb)
        return h if self.attention is None else self.attention(h)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the projected SiLU of the time embedding [N, E] is added in
    between.

    `emb` arrives with the SiLU applied, which is the same for every block; the keys keep its place
    (`time.1`).
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
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return h + self.skip(x)


class Attention(nn.Module):
    """Residual self-attention over the pixels of x [N, C, H, W], with weights softmax(q k / sqrt(C
    / heads))."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [N, HW, 3C]
        q, k, v = qkv.unflatten(-1, (3, self.heads, c // self.heads)).permute(
            2, 0, 3, 1, 4
        )  # [N, heads, HW, C / heads]
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # [N, HW, C]
        return x + self.out(mixed.transpose(1, 2).unflatten(2, (height, width)))


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs: in place when no gradient is asked for."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


# ----------------------------------------------------------------------------
# Reading networks.


def load_network(path: Path) -> FaceNetwork:
    """The network at `path`, in evaluation mode on the CPU, whatever form it has:

    the homework's `UNet.pt` (a plain state dict, or the same as .safetensors), a model folder of
    this project, or a folder of a diffusers `UNet2DModel`, alone or inside a pipeline. Raises
    InputError if it is none of these or does not fit.
    """
    path = Path(path)
    if path == FACES and not path.exists():
        raise InputError(
            f"{shown(path)} is missing; it is part of the repository: restore it with git, or give"
            " a checkpoint, such as the homework's UNet.pt"
        )
    if not path.is_dir():
        state = load_tensors(path)[0] if path.suffix == ".safetensors" else load_pickle(path)
        return from_state_dict(state, path)
    if (path / "model_index.json").is_file():
        path = path / "unet"
    config = read_json(path / "config.json")
    if isinstance(config, dict) and config.get("_class_name") == "UNet2DModel":
        return DiffusersUNet(path)
    return fold_upsampling(FaceUNet.load(path))


def from_state_dict(state: object, source: Path) -> FaceUNet:
    """The homework's network with the weights of its state dict. Raises InputError that names keys
    and shapes that do not fit."""
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise InputError(f"{source} holds no state dict: a dict from names to tensors is expected")
    model = FaceUNet(FaceUNetConfig())
    load_strict(model, state, source)
    return fold_upsampling(model.eval().to(memory_format=torch.channels_last))


def fold_upsampling(network: FaceUNet) -> FaceUNet:
    """Replaces each up-sampling and its 3x3 convolution by one transposed 4x4 convolution of stride
    2: the same map to within rounding, for 4 products in place of 9. For inference: the keys of
    these layers change.

    Of the three taps of the convolution, two fall on the same repeated pixel: an even output sees
    w0 on the pixel before and w1 + w2 on its own, an odd one w0 + w1 on its own and w2 on the next.
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
    """A diffusers `UNet2DModel` that predicts eps, such as google/ddpm-celebahq-256, as a network
    of this program."""

    parameterization: Parameterization = "eps"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel  # needed here only
        except ImportError:
            raise InputError(
                f"{folder} holds a diffusers model, which needs the package diffusers"
            ) from None
        try:
            self.unet, found = UNet2DModel.from_pretrained(
                folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} is not a complete diffusers model ({error})") from None
        strange = found["missing_keys"] + found["unexpected_keys"] + found["mismatched_keys"]
        if strange:
            raise InputError(
                f"the weights in {folder} do not fit its config.json: {len(strange)} keys, such as"
                f" {strange[0]}"
            )
        self.side_multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.eval().to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t).sample
