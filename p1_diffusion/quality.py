"""Metrics of generated digits that the grader lacks: Frechet distance, spread, detail, copies."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_tensors, save_tensors
from common.data.digits import DATASETS, NUM_DIGITS, Digits, datasets_in
from common.diffusion.guidance import drop_context
from common.errors import InputError
from common.images import to_model_range
from common.metrics.classifier import DigitClassifier
from common.metrics.detail import mean_difference
from common.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from common.seeds import BatchDraws, noise_seed
from p1_diffusion.model import NULL_DIGIT

REAL_DRAWS = 5  # random sets of held-out digits whose Frechet distances are averaged


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real digits for the 20 (dataset, digit) classes of `class_index`.

    Features are the D activations of the project's classifier; there are M held-out digits.
    """

    mean: Tensor  # [20, D], mean features of the training digits
    second_moment: Tensor  # [20, D, D], E[f f^T] of the training digits
    features: Tensor  # [M, D], of the held-out digits
    classes: Tensor  # [M], class indices of the held-out digits
    pixel_spread: Tensor  # [20], spread of the held-out digits' pixels (see `quality`), 0..255

    def statistics(self, classes: list[int]) -> FeatureStatistics:
        """Mean and covariance of the training features, with equal weight for each given class."""
        mean = self.mean[classes].double().mean(0)
        return FeatureStatistics(
            mean, self.second_moment[classes].double().mean(0) - torch.outer(mean, mean)
        )


def make_reference(network: DigitClassifier, train: Digits, held_out: Digits, path: Path) -> None:
    """Writes the reference statistics of real digits to the safetensors file `path`."""
    features = extract_features(network, train.images)
    classes = class_index(train.digits, train.datasets)
    means, moments = [], []
    for c in range(len(DATASETS) * NUM_DIGITS):
        mine = features[classes == c].double()
        means.append(mine.mean(0))
        moments.append(mine.T @ mine / len(mine))
    held_out_classes = class_index(held_out.digits, held_out.datasets)
    pixels = held_out.images.flatten(1).double()
    tensors = {
        "mean": torch.stack(means).float(),
        "second_moment": torch.stack(moments).float(),
        "features": extract_features(network, held_out.images),
        "classes": held_out_classes,
        "pixel_spread": torch.stack(
            [_spread(pixels[held_out_classes == c]) for c in range(len(means))]
        ),
    }
    save_tensors(path, tensors)


def load_reference(folder: Path) -> Reference:
    """Reads `reference.safetensors` from the classifier's folder.

    Raises InputError if the file does not hold exactly the tensors of `Reference`.
    """
    path = Path(folder) / "reference.safetensors"
    tensors = load_tensors(path)[0]
    if tensors.keys() != {field.name for field in dataclasses.fields(Reference)}:
        raise InputError(f"{path} does not hold the reference statistics of real digits")
    return Reference(**tensors)


@torch.no_grad()
def extract_features(network: DigitClassifier, images: Tensor) -> Tensor:
    """The classifier's features [N, D] of uint8 images [N, 3, 28, 28]."""
    return torch.cat([network.features(to_model_range(part)) for part in images.split(200)])


def class_index(digits: Tensor, datasets: Tensor) -> Tensor:
    """Index of the (dataset, digit) class, 10 dataset + digit, long [N] in 0..19."""
    return datasets * NUM_DIGITS + digits


def quality(
    images: Tensor, digits: Tensor, datasets: Tensor, network: DigitClassifier, reference: Reference
) -> dict[str, Any]:
    """Frechet distance and within-class spread of generated digits, for each dataset.

    - `frechet_distance`: to the real training digits, in the classifier's features.
      `frechet_distance_real` is that of held-out real digits, with the same number of images in
      each class, averaged over REAL_DRAWS random sets; `frechet_ratio` is their quotient.
    - `spread_ratio`, `pixel_spread_ratio`: spread of the generated digits over that of the held-out
      ones, in features and in pixels. Spread is the root mean square distance from the class mean;
      the ratio is averaged over classes.
    """
    features, classes = extract_features(network, images), class_index(digits, datasets)
    result = {}
    for i, dataset in datasets_in(datasets):
        present = classes[datasets == i].unique().tolist()
        target = reference.statistics(present)
        distance = frechet_distance(feature_statistics(features[datasets == i]), target)
        counts = {c: int((classes == c).sum()) for c in present}
        real = [
            frechet_distance(feature_statistics(_draw_real(reference, counts, draw)), target)
            for draw in range(REAL_DRAWS)
        ]
        real_distance = sum(real) / len(real)
        spreads, pixel_spreads = [], []
        for c in present:
            spreads.append(
                _spread(features[classes == c])
                / _spread(reference.features[reference.classes == c])
            )
            pixel_spreads.append(
                _spread(images[classes == c].flatten(1).double()) / reference.pixel_spread[c]
            )
        result[dataset] = {
            "frechet_distance": distance,
            "frechet_distance_real": real_distance,
            "frechet_ratio": distance / real_distance,
            "spread_ratio": torch.stack(spreads).mean().item(),
            "pixel_spread_ratio": torch.stack(pixel_spreads).mean().item(),
        }
    return result


def _draw_real(reference: Reference, counts: dict[int, int], draw: int) -> Tensor:
    """Features of held-out digits, `counts[c]` of class c without replacement; seeded by `draw`."""
    generator = torch.Generator().manual_seed(draw)
    rows = []
    for c, count in counts.items():
        members = torch.nonzero(reference.classes == c).flatten()
        rows.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return reference.features[torch.cat(rows)]


def _spread(rows: Tensor) -> Tensor:
    """Root mean square distance of the rows of [N, D] from their mean, a scalar."""
    return rows.var(0).sum().sqrt()


def nearest_training(
    images: Tensor, digits: Tensor, datasets: Tensor, train: Digits, held_out: Digits
) -> dict[str, dict[str, float]]:
    """Median and smallest distance to the nearest training image of the same class.

    The distance is the root mean square difference over pixels in 0..255, computed for generated
    and for held-out real images. A model that copies has far smaller distances than the held-out
    images.
    """
    train_classes = class_index(train.digits, train.datasets)
    result: dict[str, dict[str, float]] = {}
    for what, rows, classes, row_datasets in (
        ("generated", images, class_index(digits, datasets), datasets),
        (
            "held_out",
            held_out.images,
            class_index(held_out.digits, held_out.datasets),
            held_out.datasets,
        ),
    ):
        distances = torch.empty(len(rows))
        for c in classes.unique().tolist():
            own = rows[classes == c].flatten(1).float()
            pool = train.images[train_classes == c].flatten(1).float()
            distances[classes == c] = torch.cdist(own, pool).amin(1) / own.shape[1] ** 0.5
        for i, dataset in datasets_in(datasets):
            mine = distances[row_datasets == i]
            result.setdefault(dataset, {}).update(
                {f"{what}_median": mine.median().item(), f"{what}_min": mine.min().item()}
            )
    return result


def detail(images: Tensor, datasets: Tensor, real: Digits) -> dict[str, dict[str, float]]:
    """Mean absolute difference of neighbouring pixels, generated and real, for each dataset.

    The unit is grey levels (0..255); `ratio` is generated over real.
    """
    found = {}
    for i, dataset in datasets_in(datasets):
        generated = mean_difference(images[datasets == i])
        of_real = mean_difference(real.images[real.datasets == i])
        found[dataset] = {"generated": generated, "real": of_real, "ratio": generated / of_real}
    return found


def dropped_context_rate(
    probability: float = 0.1, seed: int = 0, steps: int = 500, batch_size: int = 32
) -> float:
    """Measured fraction of training images whose digit is dropped, over the first `steps` steps."""
    dropped = 0
    for step in range(steps):
        draws = BatchDraws(noise_seed(seed, step), batch_size).part(slice(None))
        digits = drop_context(
            torch.zeros(batch_size, dtype=torch.long), NULL_DIGIT, probability, draws
        )
        dropped += int((digits == NULL_DIGIT).sum())
    return dropped / (steps * batch_size)
