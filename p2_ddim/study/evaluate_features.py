"""Tests the face features (p2_ddim/study/features.py) on photos held out of their training.

    python3 -m p2_ddim.study.evaluate_features \
        --photos hw2_data/face [--result results/p2_features.json]

- Recognition rate: how often a photo's features match those of another random view of the same
  photo (cropped, mirrored, rotated and recoloured) best.
- Frechet distance between training photos and held-out photos, unchanged and after changes. The
  distance should grow with each change but mirroring.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import cli
from common.data.faces import load_faces
from common.files import shown, write_json
from common.images import resize
from common.metrics.frechet import feature_statistics, frechet_distance
from common.seeds import StackedRandomGenerator, derive_seeds
from p2_ddim.study.features import SHIPPED, FaceFeatures, recognised, view_cosines

RECOGNITION_IMAGES = 256  # held-out photos for the recognition rate
COLLAPSED = 8  # different photos in the simulated mode collapse


@dataclasses.dataclass(frozen=True)
class Config:
    """Tests the face features on held-out photos."""

    photos: Path
    """Folder with photos/, real faces."""
    features: Path = SHIPPED
    """Model folder of the feature network."""
    result: Path | None = None
    """JSON file to write; none is written if it is not given."""


def main(config: Config) -> None:
    """Prints the recognition rate and the Frechet distances, and writes the result."""
    network = FaceFeatures.load(config.features)
    train, held_out = (load_faces(config.photos, split).images for split in ("train", "held_out"))
    result = {
        "model": shown(config.features),
        "held_out": len(held_out),
        **judge(network, train, held_out),
    }
    print(f"{result['recognised']:.1%} of {result['among']} held-out photos are recognised")
    for row in result["rows"]:
        print(
            f"{row['photos']:<26} Frechet distance {row['frechet_distance']:8.4f},"
            f" {row['ratio']:6.2f} times that of the unchanged photos"
        )
    if config.result:
        write_json(config.result, result)


@torch.no_grad()
def judge(network: FaceFeatures, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Recognition rate and Frechet distances of held-out photos; photos are uint8 [N, 3, S, S].

    `recognised` is a fraction in [0, 1] of `among` photos. `rows` has an entry for each of
    `CHANGES`, the unchanged photos first; `ratio` is the distance over theirs.
    """
    some = held_out[:RECOGNITION_IMAGES]
    share = recognised(
        view_cosines(network, some, StackedRandomGenerator(derive_seeds(0, count=len(some))))
    )
    target = feature_statistics(network.describe(train))
    rows: list[dict[str, Any]] = []
    for name, change in CHANGES.items():
        distance = frechet_distance(feature_statistics(network.describe(change(held_out))), target)
        unchanged = rows[0]["frechet_distance"] if rows else distance
        rows.append({"photos": name, "frechet_distance": distance, "ratio": distance / unchanged})
    return {"recognised": share, "among": len(some), "rows": rows}


# ----------------------------------------------------------------------------
# Changes to photos, uint8 [N, 3, S, S].


def blurred(images: Tensor) -> Tensor:
    """Blurs the photos: averages 2x2 pixels, then enlarges bilinearly to the old size."""
    small = F.avg_pool2d(images.float(), 2)
    return resize(small, images.shape[-2:], "bilinear", antialias=False).round().to(torch.uint8)


def noisy(images: Tensor) -> Tensor:
    """Adds Gaussian noise with a standard deviation of 15 grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + 15.0 * noise).round().clamp(0, 255).to(torch.uint8)


def mixed(images: Tensor) -> Tensor:
    """Joins the left half of each face and the right half of the previous one."""
    half = images.shape[-1] // 2
    return torch.cat([images[..., :half], images.roll(1, 0)[..., half:]], dim=-1)


def collapsed(images: Tensor) -> Tensor:
    """Repeats the first COLLAPSED photos until there are as many as before (mode collapse)."""
    return images[torch.arange(len(images)) % COLLAPSED]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    "mirrored": lambda images: images.flip(-1),
    "blurred": blurred,
    "noisy": noisy,
    "halves of two faces": mixed,
    "upside down": lambda images: images.flip(-2),
    "eight of them, repeated": collapsed,
}


if __name__ == "__main__":
    cli.run(main, Config)
