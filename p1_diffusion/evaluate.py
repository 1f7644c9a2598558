"""A CPU-capable replica of Problem 1's grader, and what the grader does not see.

    python3 -m p1_diffusion.evaluate --images OUT                              (the project's classifier)
    python3 -m p1_diffusion.evaluate --images OUT --classifier Classifier.pth  (the course's LeNet for MNIST-M)
    python3 -m p1_diffusion.evaluate --images OUT --data hw2_data/digits       (adds what needs the real digits)

Exit code 0 if the mean accuracy passes the strong baseline, 1 if not, 2 if the folder cannot be graded.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from common import cli
from common.checkpoint import load_tensors, save_tensors
from common.data.digits import DATASETS, NUM_DIGITS, SIZE, Digits, Edition, load_digits, pairing
from common.diffusion.guidance import drop_context
from common.errors import InputError
from common.files import ROOT, write_json
from common.images import read_rgb, to_model_range
from common.metrics.classifier import (
    Classifier,
    DigitClassifier,
    classify,
    find_published_svhn,
    load_lenet,
    load_published_svhn,
)
from common.metrics.detail import mean_difference
from common.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from common.seeds import BatchDraws, derive_seed
from p1_diffusion.inference import edition_jobs, file_name
from p1_diffusion.model import NULL_DIGIT

GRADER = ROOT / "checkpoints" / "p1_grader"
BASELINES = {"simple": 0.90, "strong": 0.95}  # on the mean of the two accuracies
REAL_DRAWS = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """Grades a folder of digits and measures what the grader does not see."""

    images: Path
    """Folder with mnistm/ and svhn/."""
    grader: Path = GRADER
    """The project's classifier and its reference statistics."""
    classifier: Path | None = None
    """The course's Classifier.pth, to judge MNIST-M."""
    svhn_classifier: Path | None = None
    """Weight file of the published SVHN ResNet-34 (edadaltocg/resnet34_svhn), to judge SVHN; found by itself in the hub cache."""
    data: Path | None = None
    """The real digits; adds detail, nearest-training distances and the judges' own accuracy on held-out digits."""
    result: Path | None = None
    """JSON file to write."""


def main(config: Config) -> None:
    """Prints the table, writes the result and answers by exit code."""
    edition, images, digits, datasets = read_output(config.images)
    network = DigitClassifier.load(config.grader)
    judges = pick_judges(config, network)
    result: dict[str, Any] = {"edition": edition, "images": len(images)}
    result |= grade(images, digits, datasets, judges)
    result["quality"] = quality(images, digits, datasets, network, load_reference(config.grader))
    result["dropped_context_rate"] = dropped_context_rate()
    if config.data:
        real = load_digits(config.data, "train")
        held_out = load_digits(config.data, "held_out")
        result["nearest_training"] = nearest_training(images, digits, datasets, real, held_out)
        result["detail"] = detail(images, datasets, real)
        judged = grade(held_out.images, held_out.digits, held_out.datasets, judges)["datasets"]
        result["judge_accuracy"] = {dataset: part["accuracy"] for dataset, part in judged.items()}
    _print(result)
    if config.result:
        write_json(config.result, result)
    if result["mean_accuracy"] < BASELINES["strong"]:
        raise SystemExit(1)


# ----------------------------------------------------------------------------
# The grader's part: names, counts, sizes, strays and two accuracies.


def read_output(folder: Path) -> tuple[Edition, Tensor, Tensor, Tensor]:
    """The edition and the images uint8 [N, 3, 28, 28], digits and datasets [N] of an output folder.

    Raises InputError that names what is missing, strange or of the wrong size.
    """
    if not Path(folder).is_dir():
        raise InputError(f"the folder {folder} does not exist")
    names = {f"{dataset}/{path.name}" for dataset in DATASETS for path in _entries(folder / dataset)}
    wanted = {edition: _edition_jobs(edition) for edition in ("2025", "2024")}
    edition: Edition = "2025" if names <= wanted["2025"].keys() else "2024"
    strays, missing = sorted(names - wanted[edition].keys()), sorted(wanted[edition].keys() - names)
    if strays:
        raise InputError(f"{folder} holds {len(strays)} entries that break the grader, such as {strays[0]}")
    if missing:
        count = len(wanted[edition])
        raise InputError(f"{folder} lacks {len(missing)} of the {count} images of {edition}, such as {missing[0]}")
    jobs = wanted[edition]
    images = torch.stack([read_rgb(folder / name, (SIZE, SIZE)) for name in jobs])
    datasets = torch.tensor([DATASETS.index(dataset) for dataset, _, _ in jobs.values()])
    return edition, images, torch.tensor([digit for _, digit, _ in jobs.values()]), datasets


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _edition_jobs(edition: Edition) -> dict[str, tuple[str, int, int]]:
    return {file_name(job): job for job in edition_jobs(pairing(edition))}


def pick_judges(config: Config, network: DigitClassifier) -> dict[str, tuple[str, Classifier]]:
    """The name and the classifier that judge each dataset: the course's where they are to be had, else the project's."""
    judges: dict[str, tuple[str, Classifier]] = {dataset: ("project", network) for dataset in DATASETS}
    if config.classifier:
        judges["mnistm"] = ("course LeNet", load_lenet(config.classifier))
    svhn = config.svhn_classifier or find_published_svhn()
    if svhn:
        judges["svhn"] = ("published ResNet-34", load_published_svhn(svhn))
    return judges


def grade(
    images: Tensor, digits: Tensor, datasets: Tensor, judges: dict[str, tuple[str, Classifier]]
) -> dict[str, Any]:
    """Accuracy for each dataset and digit with the confusion matrix (rows: asked for, columns: recognised), and the mean."""
    parts = {}
    for i, dataset in enumerate(DATASETS):
        name, judge = judges[dataset]
        mine = datasets == i
        predicted, asked = classify(judge, images[mine]), digits[mine]
        confusion = torch.zeros(NUM_DIGITS, NUM_DIGITS, dtype=torch.long)
        confusion.index_put_((asked, predicted), torch.ones_like(asked), accumulate=True)
        totals = confusion.sum(1)
        parts[dataset] = {
            "judge": name,
            "accuracy": (predicted == asked).double().mean().item(),
            "accuracy_by_digit": {str(d): confusion[d, d].item() / totals[d].item() for d in asked.unique().tolist()},
            "confusion": confusion.tolist(),
        }
    return {"datasets": parts, "mean_accuracy": sum(part["accuracy"] for part in parts.values()) / len(parts)}


# ----------------------------------------------------------------------------
# What the grader does not see: distance to the real distribution, and variety.


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known of real digits: moments of the training features by class, and the held-out digits' features."""

    mean: Tensor  # [20, D]
    second_moment: Tensor  # [20, D, D]
    features: Tensor  # [M, D], held-out
    classes: Tensor  # [M]
    pixel_spread: Tensor  # [20], held-out

    def statistics(self, classes: list[int]) -> FeatureStatistics:
        """Mean and covariance of the training digits, the given classes weighing equally."""
        mean = self.mean[classes].double().mean(0)
        return FeatureStatistics(mean, self.second_moment[classes].double().mean(0) - torch.outer(mean, mean))


def make_reference(network: DigitClassifier, train: Digits, held_out: Digits, path: Path) -> None:
    """Writes the reference statistics of real digits beside the classifier."""
    features, classes = extract_features(network, train.images), class_index(train.digits, train.datasets)
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
        "pixel_spread": torch.stack([_spread(pixels[held_out_classes == c]) for c in range(len(means))]),
    }
    save_tensors(path, tensors)


def load_reference(folder: Path) -> Reference:
    """The reference statistics beside the classifier."""
    path = Path(folder) / "reference.safetensors"
    tensors = load_tensors(path)[0]
    if tensors.keys() != {field.name for field in dataclasses.fields(Reference)}:
        raise InputError(f"{path} does not hold the reference statistics of real digits")
    return Reference(**tensors)


@torch.no_grad()
def extract_features(network: DigitClassifier, images: Tensor) -> Tensor:
    """The classifier's features [N, D] of uint8 images."""
    return torch.cat([network.features(to_model_range(part)) for part in images.split(200)])


def class_index(digits: Tensor, datasets: Tensor) -> Tensor:
    """One number for each (dataset, digit) class, 0..19."""
    return datasets * NUM_DIGITS + digits


def quality(
    images: Tensor, digits: Tensor, datasets: Tensor, network: DigitClassifier, reference: Reference
) -> dict[str, Any]:
    """For each dataset: Frechet distance to the real training digits, beside that of as many real held-out digits drawn
    class by class in the same numbers (mean of several draws); within-class spread over that of held-out digits,
    in features and in pixels.

    Spread is the root mean square distance from the class mean; its ratio is averaged over classes.
    """
    features, classes = extract_features(network, images), class_index(digits, datasets)
    result = {}
    for i, dataset in enumerate(DATASETS):
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
            spreads.append(_spread(features[classes == c]) / _spread(reference.features[reference.classes == c]))
            pixel_spreads.append(_spread(images[classes == c].flatten(1).double()) / reference.pixel_spread[c])
        result[dataset] = {
            "frechet_distance": distance,
            "frechet_distance_real": real_distance,
            "frechet_ratio": distance / real_distance,
            "spread_ratio": torch.stack(spreads).mean().item(),
            "pixel_spread_ratio": torch.stack(pixel_spreads).mean().item(),
        }
    return result


def _draw_real(reference: Reference, counts: dict[int, int], draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw)
    rows = []
    for c, count in counts.items():
        members = torch.nonzero(reference.classes == c).flatten()
        rows.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return reference.features[torch.cat(rows)]


def _spread(rows: Tensor) -> Tensor:
    return rows.var(0).sum().sqrt()


def nearest_training(
    images: Tensor, digits: Tensor, datasets: Tensor, train: Digits, held_out: Digits
) -> dict[str, dict[str, float]]:
    """Median and smallest distance (root mean square over pixels, 0..255) to the nearest training image of the same class,
    of the generated images and of held-out real ones. A copying model would lie far below the held-out ones.
    """
    train_classes = class_index(train.digits, train.datasets)
    result: dict[str, dict[str, float]] = {}
    for what, rows, classes, kinds in (
        ("generated", images, class_index(digits, datasets), datasets),
        ("held_out", held_out.images, class_index(held_out.digits, held_out.datasets), held_out.datasets),
    ):
        distances = torch.empty(len(rows))
        for c in classes.unique().tolist():
            own, pool = rows[classes == c].flatten(1).float(), train.images[train_classes == c].flatten(1).float()
            distances[classes == c] = torch.cdist(own, pool).amin(1) / own.shape[1] ** 0.5
        for i, dataset in enumerate(DATASETS):
            mine = distances[kinds == i]
            result.setdefault(dataset, {}).update(
                {f"{what}_median": mine.median().item(), f"{what}_min": mine.min().item()}
            )
    return result


def detail(images: Tensor, datasets: Tensor, real: Digits) -> dict[str, dict[str, float]]:
    """For each dataset the mean absolute difference of neighbouring pixels in grey levels, of generated and of real digits."""
    found = {}
    for i, dataset in enumerate(DATASETS):
        generated = mean_difference(images[datasets == i])
        of_real = mean_difference(real.images[real.datasets == i])
        found[dataset] = {"generated": generated, "real": of_real, "ratio": generated / of_real}
    return found


def dropped_context_rate(probability: float = 0.1, seed: int = 0, steps: int = 500, batch_size: int = 32) -> float:
    """How often training really hides the digit, counted over the draws of its first steps."""
    dropped = 0
    for step in range(steps):
        draws = BatchDraws(derive_seed(seed, step), batch_size).part(slice(None))
        digits = drop_context(torch.zeros(batch_size, dtype=torch.long), NULL_DIGIT, probability, draws)
        dropped += int((digits == NULL_DIGIT).sum())
    return dropped / (steps * batch_size)


def _print(result: dict[str, Any]) -> None:
    table = pd.DataFrame(
        {
            dataset: {
                "judge": part["judge"],
                "accuracy": f"{part['accuracy']:.2%}",
                **{
                    f"  digit {d}": f"{part['accuracy_by_digit'][str(d)]:.0%}"
                    if str(d) in part["accuracy_by_digit"]
                    else "-"
                    for d in range(NUM_DIGITS)
                },
                "judge on held-out digits": f"{result['judge_accuracy'][dataset]:.2%}"
                if "judge_accuracy" in result
                else "-",
                **{key.replace("_", " "): f"{value:.3f}" for key, value in result["quality"][dataset].items()},
                **{
                    f"nearest training, {key.replace('_', ' ')}": f"{value:.1f}"
                    for key, value in result.get("nearest_training", {}).get(dataset, {}).items()
                },
                **{
                    f"detail, {key}": f"{value:.3f}" for key, value in result.get("detail", {}).get(dataset, {}).items()
                },
            }
            for dataset, part in result["datasets"].items()
        }
    )
    print(table.fillna("-").to_string())
    verdict = [
        f"{'passes' if result['mean_accuracy'] >= bar else 'fails'} the {name} baseline ({bar:.0%})"
        for name, bar in BASELINES.items()
    ]
    print(
        f"{result['images']} images of {result['edition']}, mean accuracy {result['mean_accuracy']:.2%}: {', '.join(verdict)}"
    )


if __name__ == "__main__":
    cli.run(main, Config)
