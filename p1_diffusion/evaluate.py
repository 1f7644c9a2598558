"""Grades digits as Problem 1's grader does, on a CPU, and adds metrics of image quality.

    # with the project's classifier
    python3 -m p1_diffusion.evaluate --images OUT
    # with the course's LeNet for MNIST-M
    python3 -m p1_diffusion.evaluate --images OUT --classifier Classifier.pth
    # with comparisons to the real digits
    python3 -m p1_diffusion.evaluate --images OUT --data hw2_data/digits
    # a page with every image, the worst first
    python3 -m p1_diffusion.evaluate --images OUT --html page.html

The exit code is 0 if the mean accuracy reaches the strong baseline (95 %), 1 if it does not, and 2
if the folder cannot be graded.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from common import cli
from common.data.digits import (
    DATASETS,
    NUM_DIGITS,
    SIZE,
    Edition,
    datasets_in,
    load_digits,
    pairing,
)
from common.errors import InputError
from common.files import ROOT, check_files, write_json
from common.images import read_rgb
from common.metrics.classifier import (
    Classifier,
    DigitClassifier,
    classify,
    find_published_svhn,
    load_lenet,
    load_published_svhn,
    log_probabilities,
)
from common.page import Grade, Measure, Picture, write_grade
from p1_diffusion.quality import (
    detail,
    dropped_context_rate,
    load_reference,
    nearest_training,
    quality,
)
from p1_diffusion.sampling import class_keys, file_name

GRADER = ROOT / "checkpoints" / "p1_grader"
BASELINES = {"simple": 0.90, "strong": 0.95}  # on the mean of the two accuracies
WRONG_FIRST = 1e6  # badness of a wrong image over that of any right one


@dataclasses.dataclass(frozen=True)
class Config:
    """Grades a folder of generated digits by classification accuracy and image quality."""

    GRADES: ClassVar[bool] = True

    images: Path
    """Folder of the generated digits, with the subfolders mnistm/ and svhn/."""
    grader: Path = GRADER
    """Folder of the project's classifier and of the reference statistics of real digits."""
    classifier: Path | None = None
    """Weight file of the course's LeNet (Classifier.pth), to grade MNIST-M. If it is not given, the
    project's classifier does."""
    svhn_classifier: Path | None = None
    """Weight file of the published SVHN ResNet-34 (edadaltocg/resnet34_svhn), to grade SVHN. If it
    is not given, the file in the Hugging Face cache is used, else the project's classifier."""
    data: Path | None = None
    """Folder of the real digits. Adds detail, distances to the nearest training image and the
    classifiers' accuracy on held-out digits."""
    result: Path | None = None
    """JSON file to write; none is written if it is not given."""
    html: Path | None = None
    """Page to write, with every image and its verdict; none is written if it is not given."""


def main(config: Config) -> None:
    """Prints the table and writes the result; exits with 1 below the strong baseline."""
    check_files(config.result, config.html)
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
    if config.html:
        pictures = judged_pictures(images, digits, datasets, judges)
        write_grade(config.html, page_content(config.images, result, pictures))
    passes = result["mean_accuracy"] >= BASELINES["strong"]
    print(
        f"{'PASS' if passes else 'FAIL'}: mean accuracy {result['mean_accuracy']:.2%} (the strong"
        f" baseline is {BASELINES['strong']:.0%})"
    )
    if not passes:
        raise SystemExit(1)


# ----------------------------------------------------------------------------
# What the grader does: checks of names, counts and sizes, and the two accuracies.


def read_output(folder: Path) -> tuple[Edition, Tensor, Tensor, Tensor]:
    """Reads a folder of generated digits: (edition, images, digits, datasets).

    `images` are uint8 [N, 3, 28, 28]; `digits` and `datasets` are long [N], where a dataset is an
    index into `DATASETS`. Raises InputError that names a missing file, a file that does not belong
    there, or an image of another size.
    """
    if not Path(folder).is_dir():
        raise InputError(f"the folder {folder} does not exist")
    names = {
        f"{dataset}/{path.name}" for dataset in DATASETS for path in _entries(folder / dataset)
    }
    wanted = {edition: _edition_jobs(edition) for edition in ("2025", "2024")}
    edition: Edition = "2025" if names <= wanted["2025"].keys() else "2024"
    unexpected = sorted(names - wanted[edition].keys())
    missing = sorted(wanted[edition].keys() - names)
    if unexpected:
        raise InputError(
            f"{folder} holds {len(unexpected)} entries that break the grader, such as"
            f" {unexpected[0]}: remove them"
        )
    if missing:
        count = len(wanted[edition])
        raise InputError(
            f"{folder} lacks {len(missing)} of the {count} images of the edition {edition}, such"
            f" as {missing[0]}"
        )
    keys = wanted[edition]
    images = torch.stack([read_rgb(folder / name, (SIZE, SIZE)) for name in keys])
    datasets = torch.tensor([DATASETS.index(dataset) for dataset, _, _ in keys.values()])
    return edition, images, torch.tensor([digit for _, digit, _ in keys.values()]), datasets


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _edition_jobs(edition: Edition) -> dict[str, tuple[str, int, int]]:
    return {file_name(key): key for key in class_keys(pairing(edition))}


def pick_judges(config: Config, network: DigitClassifier) -> dict[str, tuple[str, Classifier]]:
    """Returns (name, classifier) for each dataset.

    The course's classifiers are used where their weight files were given or found, the project's
    `network` otherwise.
    """
    judges: dict[str, tuple[str, Classifier]] = {
        dataset: ("project", network) for dataset in DATASETS
    }
    if config.classifier:
        judges["mnistm"] = ("course LeNet", load_lenet(config.classifier))
    svhn = config.svhn_classifier or find_published_svhn()
    if svhn:
        judges["svhn"] = ("published ResNet-34", load_published_svhn(svhn))
    return judges


def grade(
    images: Tensor, digits: Tensor, datasets: Tensor, judges: dict[str, tuple[str, Classifier]]
) -> dict[str, Any]:
    """Accuracy and confusion matrix for each dataset, and the mean of the two accuracies.

    Accuracies are fractions in [0, 1]. A confusion matrix counts images, [10, 10]: rows are the
    requested digits, columns the recognised ones.
    """
    parts = {}
    for i, dataset in datasets_in(datasets):
        name, judge = judges[dataset]
        mine = datasets == i
        predicted, asked = classify(judge, images[mine]), digits[mine]
        confusion = torch.zeros(NUM_DIGITS, NUM_DIGITS, dtype=torch.long)
        confusion.index_put_((asked, predicted), torch.ones_like(asked), accumulate=True)
        totals = confusion.sum(1)
        parts[dataset] = {
            "judge": name,
            "accuracy": (predicted == asked).double().mean().item(),
            "accuracy_by_digit": {
                str(d): confusion[d, d].item() / totals[d].item() for d in asked.unique().tolist()
            },
            "confusion": confusion.tolist(),
        }
    return {
        "datasets": parts,
        "mean_accuracy": sum(part["accuracy"] for part in parts.values()) / len(parts),
    }


# ----------------------------------------------------------------------------
# The page of --html.


def judged_pictures(
    images: Tensor, digits: Tensor, datasets: Tensor, judges: dict[str, tuple[str, Classifier]]
) -> list[Picture]:
    """What each image was read as.

    The badness is -log p(requested digit), plus a constant that puts wrong images first.
    """
    pictures = []
    for i, dataset in datasets_in(datasets):
        mine = datasets == i
        log_p = log_probabilities(judges[dataset][1], images[mine]).double()
        numbers = dict.fromkeys(range(NUM_DIGITS), 0)
        for image, digit, row in zip(images[mine], digits[mine].tolist(), log_p, strict=True):
            numbers[digit] += 1
            read, asked = int(row.argmax()), float(row[digit])
            pictures.append(
                Picture(
                    name=file_name((dataset, digit, numbers[digit])),
                    images={"image": image},
                    verdict=f"read as {read}, p({digit}) = {math.exp(asked):.3f}",
                    passed=read == digit,
                    badness=-asked + (WRONG_FIRST if read != digit else 0.0),
                )
            )
    return pictures


def page_content(folder: Path, result: dict[str, Any], pictures: list[Picture]) -> Grade:
    """The grade of a folder with its thresholds, confusion matrices and images."""
    accuracy = result["mean_accuracy"]
    measures = [
        Measure(
            f"mean accuracy, {name} baseline", f"{accuracy:.2%}", f">= {bar:.0%}", accuracy >= bar
        )
        for name, bar in BASELINES.items()
    ]
    parts = result["datasets"]
    for dataset, part in parts.items():
        name = f"accuracy, {dataset} (classifier: {part['judge']})"
        measures.append(Measure(name, f"{part['accuracy']:.2%}"))
    measures += [
        Measure(f"{key.replace('_', ' ')}, {dataset}", f"{value:.3f}")
        for dataset, values in result["quality"].items()
        for key, value in values.items()
    ]
    return Grade(
        title=f"Problem 1, edition {result['edition']}: digits",
        folder=folder,
        passed=accuracy >= BASELINES["strong"],
        measures=measures,
        pictures=pictures,
        confusion={dataset: part["confusion"] for dataset, part in parts.items()},
        note="The verdict is that of the strong baseline.",
    )


def _print(result: dict[str, Any]) -> None:
    table = pd.DataFrame(
        {
            dataset: {
                "classifier": part["judge"],
                "accuracy": f"{part['accuracy']:.2%}",
                **{
                    f"  digit {d}": (
                        f"{part['accuracy_by_digit'][str(d)]:.0%}"
                        if str(d) in part["accuracy_by_digit"]
                        else "-"
                    )
                    for d in range(NUM_DIGITS)
                },
                "accuracy on held-out real digits": (
                    f"{result['judge_accuracy'][dataset]:.2%}"
                    if "judge_accuracy" in result
                    else "-"
                ),
                **{
                    key.replace("_", " "): f"{value:.3f}"
                    for key, value in result["quality"][dataset].items()
                },
                **{
                    f"nearest training, {key.replace('_', ' ')}": f"{value:.1f}"
                    for key, value in result.get("nearest_training", {}).get(dataset, {}).items()
                },
                **{
                    f"detail, {key}": f"{value:.3f}"
                    for key, value in result.get("detail", {}).get(dataset, {}).items()
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
        f"{result['images']} images of {result['edition']}, mean accuracy"
        f" {result['mean_accuracy']:.2%}: {', '.join(verdict)}"
    )


if __name__ == "__main__":
    cli.run(main, Config)
