"""The numbers behind the zero-shot report, and the 2024 grader's rule for personalised pictures.

    python3 -m p3_clip.evaluate zero-shot --run OUT  (OUT as written by p3_clip.inference)
    python3 -m p3_clip.evaluate personalised --images OUT --input input.json \
        --references hw2_data/textual_inversion

The first writes OUT/evaluation.json: top-1 and top-5 with Wilson intervals, a table of classes, the
most confused pairs and the calibration. The second answers by exit code: 0 if every prompt reaches
its baseline, 1 if not, 2 if it cannot be graded.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from common import cli
from common.files import write_json
from p3_clip.inference import Run, accuracy
from p3_clip.personalisation.evaluate import Personalised, grade

BINS = 15
SCALES = (0.1, 1e4)  # within which inverse temperatures are fitted
Prompts = Literal["single", "ensemble"]


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Intervals, classes, confusions and calibration of a zero-shot run."""

    run: Path
    """Folder that p3_clip.inference wrote."""
    prompts: Prompts = "single"
    """Which prompts to report on."""
    result: Path | None = None
    """JSON file to write; by default RUN/evaluation.json."""


Config = (
    Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
    | Annotated[Personalised, tyro.conf.subcommand("personalised")]
)


def main(config: ZeroShot | Personalised) -> None:
    """Prints the tables, writes the result and answers by exit code."""
    if isinstance(config, Personalised):
        grade(config)
    else:
        report(config)


# ----------------------------------------------------------------------------
# Zero-shot.


def report(config: ZeroShot) -> None:
    """Measures, writes and prints."""
    run = Run.load(config.run)
    cosines, labels = run.cosines[config.prompts], run.labels
    result: dict[str, Any] = {
        "prompts": config.prompts,
        "images": len(labels),
        "classes": len(run.ids),
    }
    for name in ("acc1", "acc5"):
        value = accuracy(cosines, labels)[name]
        low, high = wilson_interval(round(value * len(labels)), len(labels))
        result[name] = {"value": value, "low": low, "high": high}
    result["mean_per_class_recall"] = accuracy(cosines, labels)["mean_per_class_recall"]
    table = class_table(run, config.prompts)
    result["per_class"] = table.to_dict("records")
    result["confused"] = confused_pairs(run, config.prompts)
    result["calibration"] = calibration(cosines, labels, run.scale)
    write_json(config.result or config.run / "evaluation.json", result)
    print(table.to_string(index=False))
    for pair in result["confused"]:
        print(f"{pair['truth']} taken for {pair['prediction']}: {pair['count']} times")
    for name in ("acc1", "acc5"):
        print("{}: {value:.2%}, 95 % interval {low:.2%} to {high:.2%}".format(name, **result[name]))
    fitted = result["calibration"]
    print(
        f"expected calibration error {fitted['ece']:.3f} at the model's temperature; on the other"
        f" half, {fitted['ece_fitted']:.3f} with the scale fitted to one half,"
        f" {fitted['fitted_scale']:.1f}, and {fitted['ece_unfitted']:.3f} without"
    )


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2))
    / (1 + z^2/n)."""
    p, square = hits / count, z * z / count
    middle, half = p + square / 2.0, z * math.sqrt(p * (1.0 - p) / count + square / (4.0 * count))
    return max(0.0, (middle - half) / (1.0 + square)), min(1.0, (middle + half) / (1.0 + square))


def class_table(run: Run, prompts: str) -> pd.DataFrame:
    """For each class present: pictures, recall, precision and the class it is most often taken
    for."""
    matrix = confusion_matrix(run, prompts)
    rows = []
    for c in range(len(run.ids)):
        if (count := int(matrix[c].sum())) == 0:
            continue
        wrong = matrix[c].clone()
        wrong[c] = 0
        predicted = int(matrix[:, c].sum())
        rows.append(
            {
                "class_id": run.ids[c],
                "name": run.names[c],
                "images": count,
                "recall": round(int(matrix[c, c]) / count, 4),
                "precision": round(int(matrix[c, c]) / predicted, 4) if predicted else None,
                "taken_for": run.names[int(wrong.argmax())] if wrong.any() else "",
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"precision": object}).where(table.notna(), None)


def confusion_matrix(run: Run, prompts: str) -> Tensor:
    """Long [C, C]: rows are the truth, columns the prediction."""
    pairs = run.labels * len(run.ids) + run.cosines[prompts].argmax(1)
    return torch.bincount(pairs, minlength=len(run.ids) ** 2).view(len(run.ids), len(run.ids))


def confused_pairs(run: Run, prompts: str, count: int = 10) -> list[dict[str, Any]]:
    """The most frequent mistakes: truth, prediction and how often."""
    matrix = confusion_matrix(run, prompts)
    matrix.fill_diagonal_(0)
    order = matrix.flatten().argsort(descending=True, stable=True)[:count].tolist()
    cells = [(*divmod(i, len(run.ids)), int(matrix.flatten()[i])) for i in order]
    return [
        {"truth": run.names[t], "prediction": run.names[p], "count": n} for t, p, n in cells if n
    ]


class Reliability(NamedTuple):
    """Bins of equal width in confidence: pictures, mean confidence and accuracy of each."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: the gap between confidence and accuracy, weighted by
        pictures (Guo et al. 2017, arXiv:1706.04599, Equation 3)."""
        return float(
            ((self.confidence - self.accuracy).abs() * self.counts).sum() / self.counts.sum()
        )


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """How often the first guess is right, by how sure it was; probabilities [N, C]."""
    confidence, prediction = probabilities.double().max(dim=1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    right = (prediction == labels).double()
    counts = torch.bincount(index, minlength=bins).double()
    safe = counts.clamp(min=1.0)
    sums = [
        torch.zeros(bins, dtype=torch.float64).index_add_(0, index, values)
        for values in (confidence, right)
    ]
    return Reliability(counts, sums[0] / safe, sums[1] / safe)


def fit_scale(cosines: Tensor, labels: Tensor) -> float:
    """The inverse temperature that makes the truth likeliest, by golden-section search over its
    logarithm within SCALES."""
    cosines = cosines.double()

    def loss(log_scale: float) -> float:
        return F.cross_entropy(math.exp(log_scale) * cosines, labels).item()

    low, high, golden = *map(math.log, SCALES), (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2.0)


def halves(count: int) -> tuple[slice, slice]:
    """The pictures that the scale is fitted to, every second one, and those that it is measured
    on."""
    return slice(0, None, 2), slice(1, None, 2) if count > 1 else slice(None)


def calibration(cosines: Tensor, labels: Tensor, scale: float) -> dict[str, Any]:
    """Calibration errors at the model's scale and at one fitted to every second picture, measured
    on the others."""
    part, other = halves(len(labels))
    fitted = fit_scale(cosines[part], labels[part])

    def error(part: slice, at: float) -> float:
        return reliability((at * cosines[part]).softmax(1), labels[part]).error

    return {
        "scale": scale,
        "fitted_scale": fitted,
        "ece": error(slice(None), scale),
        "ece_unfitted": error(other, scale),
        "ece_fitted": error(other, fitted),
        "bins": BINS,
    }


if __name__ == "__main__":
    cli.run(main, Config)
