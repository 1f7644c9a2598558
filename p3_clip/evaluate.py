"""Evaluates a zero-shot run, or grades personalised images by the 2024 grader's rule.

    python3 -m p3_clip.evaluate zero-shot --run OUT  (OUT as written by p3_clip.inference)
    python3 -m p3_clip.evaluate personalised --images OUT --input input.json \
        --references hw2_data/textual_inversion

`zero-shot` writes OUT/evaluation.json: top-1 and top-5 accuracy with 95 % Wilson intervals, recall
and precision of each class, the most confused pairs of classes and the calibration error.
`personalised` prints the scores and sets the exit code: 0 if every prompt reaches its baseline, 1
if one does not, 2 if the images cannot be graded.
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
from common.files import check_files, write_json
from p3_clip.inference import Run, accuracy
from p3_clip.personalisation.evaluate import Personalised, grade

BINS = 15  # of the confidence, for the calibration error
SCALES = (0.1, 1e4)  # bounds of the fitted logit scale (inverse temperature)
Prompts = Literal["single", "ensemble"]


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Evaluates a zero-shot run: intervals, classes, confusions and calibration."""

    run: Path
    """Folder written by p3_clip.inference."""
    prompts: Prompts = "single"
    """Evaluate the single prompt or the ensemble."""
    result: Path | None = None
    """JSON file to write. Default: RUN/evaluation.json."""


Config = (
    Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
    | Annotated[Personalised, tyro.conf.subcommand("personalised")]
)


def main(config: ZeroShot | Personalised) -> None:
    """Runs the subcommand; grading exits with code 1 if a prompt misses its baseline."""
    if isinstance(config, Personalised):
        grade(config)
    else:
        report(config)


# ----------------------------------------------------------------------------
# Zero-shot classification.


def report(config: ZeroShot) -> None:
    """Evaluates the run, writes the JSON file and prints the tables."""
    check_files(config.result)
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
        print(f"{pair['truth']} classified as {pair['prediction']}: {pair['count']} times")
    for name in ("acc1", "acc5"):
        print("{}: {value:.2%}, 95 % interval {low:.2%} to {high:.2%}".format(name, **result[name]))
    fitted = result["calibration"]
    print(
        f"expected calibration error of all images {fitted['ece']:.3f} at the model's logit scale"
        f" {fitted['scale']:.1f}; of every second image {fitted['ece_unfitted']:.3f} at that scale"
        f" and {fitted['ece_fitted']:.3f} at {fitted['fitted_scale']:.1f}, fitted to the others"
    )


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of the proportion p = hits / count (Wilson 1927); 95 % by default.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with n = count, clipped to [0, 1].
    """
    p, square = hits / count, z * z / count
    middle, half = p + square / 2.0, z * math.sqrt(p * (1.0 - p) / count + square / (4.0 * count))
    return max(0.0, (middle - half) / (1.0 + square)), min(1.0, (middle + half) / (1.0 + square))


def class_table(run: Run, prompts: str) -> pd.DataFrame:
    """Returns a table with one row per class that has images.

    Columns: the class, its number of images, recall, precision (None if it is never predicted), and
    in "taken_for" the most frequent wrong prediction ("" if there is none).
    """
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
    """Confusion matrix, long [C, C]: entry [i, j] counts the images of class i predicted as j."""
    pairs = run.labels * len(run.ids) + run.cosines[prompts].argmax(1)
    return torch.bincount(pairs, minlength=len(run.ids) ** 2).view(len(run.ids), len(run.ids))


def confused_pairs(run: Run, prompts: str, count: int = 10) -> list[dict[str, Any]]:
    """Returns the `count` most frequent confusions: truth, prediction and number of images."""
    matrix = confusion_matrix(run, prompts)
    matrix.fill_diagonal_(0)
    order = matrix.flatten().argsort(descending=True, stable=True)[:count].tolist()
    cells = [(*divmod(i, len(run.ids)), int(matrix.flatten()[i])) for i in order]
    return [
        {"truth": run.names[t], "prediction": run.names[p], "count": n} for t, p, n in cells if n
    ]


class Reliability(NamedTuple):
    """Reliability diagram: number of images, mean confidence and accuracy in each bin.

    The bins divide the confidence in [0, 1] into equal widths; each field is float64 [bins].
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, Equation 3).

        The mean over all images of |accuracy - mean confidence| of the image's bin.
        """
        return float(
            ((self.confidence - self.accuracy).abs() * self.counts).sum() / self.counts.sum()
        )


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Bins the predictions by confidence, which is the largest class probability.

    `probabilities` is [N, C], `labels` long [N]. A bin includes its upper edge, not its lower one.
    """
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
    """Fits the logit scale (inverse temperature) by minimising the cross-entropy.

    `cosines` is [N, C], `labels` long [N]. Golden-section search over the scale's logarithm, within
    SCALES.
    """
    cosines = cosines.double()

    def loss(log_scale: float) -> float:
        return F.cross_entropy(math.exp(log_scale) * cosines, labels).item()

    low, high, golden = *map(math.log, SCALES), (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2.0)


def halves(count: int) -> tuple[slice, slice]:
    """Returns the slice of images to fit the logit scale to, every second one, and the test slice.

    The test slice holds the other images, or all of them if there is only one image.
    """
    return slice(0, None, 2), slice(1, None, 2) if count > 1 else slice(None)


def calibration(cosines: Tensor, labels: Tensor, scale: float) -> dict[str, Any]:
    """Expected calibration errors at the model's logit scale and at a fitted one.

    "ece" is over all images at `scale`. "fitted_scale" is fitted to every second image;
    "ece_unfitted" and "ece_fitted" are over the other images, at `scale` and at "fitted_scale".
    """
    fitting, testing = halves(len(labels))
    fitted = fit_scale(cosines[fitting], labels[fitting])

    def error(part: slice, at_scale: float) -> float:
        return reliability((at_scale * cosines[part]).softmax(1), labels[part]).error

    return {
        "scale": scale,
        "fitted_scale": fitted,
        "ece": error(slice(None), scale),
        "ece_unfitted": error(testing, scale),
        "ece_fitted": error(testing, fitted),
        "bins": BINS,
    }


if __name__ == "__main__":
    cli.run(main, Config)
