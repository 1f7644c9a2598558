"""What the tests of Problem 2 share: a small network, noises and photos."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from p2_ddim.model import FaceUNet, FaceUNetConfig

CONFIG = FaceUNetConfig(channels=(32, 64), blocks=1, attention=(1,), embedding=128)
SIDE = 16


def tiny_faces(config: FaceUNetConfig = CONFIG) -> FaceUNet:
    """A small network with fixed random weights, its last layer small, so that sampling does not
    amplify rounding."""
    generator = torch.Generator().manual_seed(0)
    network = FaceUNet(config)
    with torch.no_grad():
        for name, param in network.named_parameters():
            fan_in = param[0].numel() if param.dim() > 1 else 100
            scale = 0.02 if name.startswith("out.2") else 1.0
            param.copy_(torch.randn(param.shape, generator=generator) * scale / fan_in**0.5)
            if "norm" in name and name.endswith("weight") or name == "out.0.weight":
                param.add_(1.0)
    return network.eval()


def noise(seed: int, side: int = SIDE) -> Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))


def save_noises(folder: Path, count: int = 3, side: int = SIDE) -> Path:
    """00.pt, 01.pt, ... as the homework's, [1, 3, side, side]."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        torch.save(noise(i, side)[None], folder / f"{i:02d}.pt")
    return folder


def save_photos(root: Path, count: int = 40, side: int = SIDE) -> Path:
    """photos/NNNNN.jpg: smooth colours with a bright disc. Seven of the first forty names are held
    out."""
    (root / "photos").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for i in range(count):
        centre = torch.rand(2, generator=generator) * side
        colour = torch.rand(3, generator=generator) * 255
        disc = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < (side / 3) ** 2).float()[
            ..., None
        ]
        pixels = colour * disc + (255 - colour) * (1 - disc)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(
            root / "photos" / f"{i:05d}.jpg", quality=95
        )
    return root
