"""Metrics of generated faces: Frechet distance and detail, and the nearest photo to find copies."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.data.faces import Faces
from common.errors import InputError
from common.metrics.detail import luminance_power, rms_difference
from common.metrics.frechet import feature_statistics, frechet_distance
from p2_ddim.study.features import Features

REAL_DRAWS = 5  # random sets of held-out photos whose Frechet distances are averaged


def stack_like(images: Mapping[str, Tensor], photos: Faces) -> Tensor:
    """Stacks the images to uint8 [N, 3, S, S]; raises InputError if a size is not the photos'."""
    for name, image in images.items():
        if image.shape != photos.images.shape[1:]:
            raise InputError(
                f"the image {name} is {tuple(image.shape)}, the photos are"
                f" {tuple(photos.images.shape[1:])}: one size is expected"
            )
    return torch.stack(list(images.values()))


def quality(images: Tensor, train: Faces, held_out: Faces, features: Features) -> dict[str, float]:
    """Metrics that compare uint8 images [N, 3, S, S] and photos.

    - `frechet_distance`: of `count` images to the training photos. `frechet_distance_real` is that
      of `count` held-out photos, averaged over REAL_DRAWS random sets; `frechet_ratio` is their
      quotient.
    - `detail`, `detail_real`: root mean square difference of neighbouring pixels, in grey levels,
      of the images and of all photos.
    - `luminance_power_K_ratio`: power of the luminance at the spatial frequencies K = S/4 and S/2,
      images over photos. Grain raises it above 1.
    """
    count = min(len(images), len(held_out))
    if count < 2:
        raise InputError(
            f"a Frechet distance needs at least two images and two held-out photos, not"
            f" {len(images)} and {len(held_out)}"
        )
    target = feature_statistics(features(train.images))
    pool = features(held_out.images)
    real = []
    for draw in range(REAL_DRAWS):
        chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(draw))[:count]
        real.append(frechet_distance(feature_statistics(pool[chosen]), target))
    distance = frechet_distance(feature_statistics(features(images[:count])), target)
    real_distance = sum(real) / len(real)
    photos, side = torch.cat([train.images, held_out.images]), images.shape[-1]
    powers = {
        k: luminance_power(images, k) / luminance_power(photos, k) for k in (side // 4, side // 2)
    }
    return {
        "count": count,
        "frechet_distance": distance,
        "frechet_distance_real": real_distance,
        "frechet_ratio": distance / real_distance,
        "detail": rms_difference(images),
        "detail_real": rms_difference(photos),
        **{f"luminance_power_{k}_ratio": ratio for k, ratio in powers.items()},
    }


def nearest_photo(images: Tensor, train: Faces, held_out: Faces) -> dict[str, float]:
    """Median and smallest distance to the nearest photo or its mirror image.

    The distance is the root mean square difference over pixels in 0..255.

    - `generated` and `held_out`: from the images, and from the held-out photos, to the training
      photos. A model that copies has far smaller distances than the held-out photos.
    - `generated_to_held_out` and `generated_to_seen`: from the images to the held-out photos, and
      to as many training photos. A model that copies is closer to the photos it has seen.
    """
    pool = torch.cat([train.images, train.images.flip(-1)]).flatten(1).float()
    unseen = torch.cat([held_out.images, held_out.images.flip(-1)]).flatten(1).float()
    seen = (
        torch.cat([train.images[: len(held_out)], train.images[: len(held_out)].flip(-1)])
        .flatten(1)
        .float()
    )
    result = {}
    for what, rows, others in (
        ("generated", images, pool),
        ("held_out", held_out.images, pool),
        ("generated_to_held_out", images, unseen),
        ("generated_to_seen", images, seen),
    ):
        distances = torch.cdist(rows.flatten(1).float(), others).amin(1) / rows[0].numel() ** 0.5
        result |= {
            f"{what}_median": distances.median().item(),
            f"{what}_min": distances.min().item(),
        }
    return result
