"""How near faces are to photos: Frechet distance, and the nearest photo, which would show
copies."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.data.faces import Faces
from common.errors import InputError
from common.metrics.detail import luminance_power, rms_difference
from common.metrics.frechet import feature_statistics, frechet_distance
from p2_ddim.study.features import Features

REAL_DRAWS = 5


def stack_like(images: Mapping[str, Tensor], photos: Faces) -> Tensor:
    """The images as one tensor [N, 3, S, S]. Raises InputError if one is not of the photos'
    size."""
    for name, image in images.items():
        if image.shape != photos.images.shape[1:]:
            raise InputError(
                f"the image {name} is {tuple(image.shape)}, the photos are"
                f" {tuple(photos.images.shape[1:])}"
            )
    return torch.stack(list(images.values()))


def quality(images: Tensor, train: Faces, held_out: Faces, features: Features) -> dict[str, float]:
    """How near uint8 images [N, 3, S, S] are to photos.

    - `frechet_distance` to the training photos, beside `frechet_distance_real` of as many held-out
      photos (mean of several draws).
    - `detail`, the root mean square difference of neighbouring pixels in grey levels, beside the
      photos' `detail_real`.
    - `luminance_power_K_ratio` over the photos' at the frequencies K = S/4 and S/2, where grain
      would show.
    """
    target = feature_statistics(features(train.images))
    count = min(len(images), len(held_out))
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
    """Median and smallest distance (root mean square over pixels, 0..255) to the nearest photo or
    its mirror image.

    - `generated` and `held_out`: of the images and of held-out photos to the training photos. A
      copying model would lie far below the held-out ones.
    - `generated_to_held_out` and `generated_to_seen`: of the images to the held-out photos and to
      as many training photos. A copying model would lie closer to those it has seen.
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
