"""Judges the judge: what the features that faces are compared in (p2_ddim/study/features.py) see of
photos held out of their training.

    python3 -m p2_ddim.study.evaluate_features \
        --photos hw2_data/face [--result results/p2_features.json]

- The part of the photos that are recognised by their features when they are cropped, turned and
  recoloured.
- The Frechet distance to the training photos of held-out photos as they are, and after changes that
  it should see, or should not.
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

RECOGNITION_IMAGES = 256
COLLAPSED = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Judges the features that faces are compared in."""

    photos: Path
    """Folder with photos/, real faces."""
    features: Path = SHIPPED
    """Folder of the network."""
    result: Path | None = None
    """JSON file to write."""


def main(config: Config) -> None:
    """Prints and writes the table."""
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
            f" {row['ratio']:6.2f} times unchanged"
        )
    if config.result:
        write_json(config.result, result)


@torch.no_grad()
def judge(network: FaceFeatures, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """`recognised` of `among` photos, and a row for each of `CHANGES`, the first unchanged; photos
    are uint8 [N, 3, S, S]."""
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
    """Halved in size and enlarged again."""
    small = F.avg_pool2d(images.float(), 2)
    return resize(small, images.shape[-2:], "bilinear", antialias=False).round().to(torch.uint8)


def noisy(images: Tensor) -> Tensor:
    """With noise of 15 grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + 15.0 * noise).round().clamp(0, 255).to(torch.uint8)


def mixed(images: Tensor) -> Tensor:
    """The left half of one face beside the right half of another."""
    half = images.shape[-1] // 2
    return torch.cat([images[..., :half], images.roll(1, 0)[..., half:]], dim=-1)


def collapsed(images: Tensor) -> Tensor:
    """Eight photos again and again, as many as there were."""
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
