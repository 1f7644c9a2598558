"""The numbers behind the zero-shot report, and the 2024 grader's rule for personalised pictures.

    python3 -m p3_clip.evaluate zero-shot --run OUT                       (OUT as written by p3_clip.inference)
    python3 -m p3_clip.evaluate zero-shot --run OUT --colours             (adds the study of colours, for coloured shapes)
    python3 -m p3_clip.evaluate personalised --images OUT --input input.json --references hw2_data/textual_inversion

The first writes OUT/evaluation.json: top-1 and top-5 with Wilson intervals, a table of classes, the most confused pairs and the
calibration. The second answers by exit code: 0 if every prompt reaches its baseline, 1 if not, 2 if it cannot be graded.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from common import cli
from common.clip import DEFAULT_MODEL, Clip, ClipConfig, load_clip
from common.clip.features import extract_features
from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.shapes import KINDS
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.images import image_files
from common.metrics.clip_scores import grade_personalised, image_cosines, text_cosines
from p3_clip.inference import Run, accuracy
from p3_clip.model import zero_shot_classifier
from p3_clip.personalisation.task import Task, read_tasks

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
    colours: bool = False
    """Also classify among all colours and shapes, by colour distance; the class names must be COLOUR SHAPE."""
    cache: Path = ROOT / "outputs" / "clip_features"
    """Folder in which image features are kept by content (for --colours)."""
    result: Path | None = None
    """JSON file to write; by default RUN/evaluation.json."""


@dataclasses.dataclass(frozen=True)
class Personalised:
    """The 2024 grader's rule: the best five of each prompt's 25 pictures against the baselines, by the grader's own CLIP, OpenAI's
    ViT-B/32, unless another one is named."""

    images: Path
    """Folder with CONCEPT/PROMPT_INDEX/*.png."""
    input: Path
    """The input.json that the pictures were made from."""
    references: Path
    """Folder with CONCEPT/*.jpg, the photos that the concepts were learned from."""
    clip: Annotated[ClipConfig, tyro.conf.arg(name="")] = ClipConfig()
    count: int = 25
    """Pictures that each prompt must have."""
    result: Path | None = None
    """JSON file to write."""


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
    result: dict[str, Any] = {"prompts": config.prompts, "images": len(labels), "classes": len(run.ids)}
    for name in ("acc1", "acc5"):
        value = accuracy(cosines, labels)[name]
        low, high = wilson_interval(round(value * len(labels)), len(labels))
        result[name] = {"value": value, "low": low, "high": high}
    result["mean_per_class_recall"] = accuracy(cosines, labels)["mean_per_class_recall"]
    table = class_table(run, config.prompts)
    result["per_class"] = table.to_dict("records")
    result["confused"] = confused_pairs(run, config.prompts)
    result["calibration"] = calibration(cosines, labels, run.scale)
    if config.colours:
        result["colours"] = colour_study(config, run)
    write_json(config.result or config.run / "evaluation.json", result)
    print(table.to_string(index=False))
    for pair in result["confused"]:
        print(f"{pair['truth']} taken for {pair['prediction']}: {pair['count']} times")
    for name in ("acc1", "acc5"):
        print("{}: {value:.2%}, 95 % interval {low:.2%} to {high:.2%}".format(name, **result[name]))
    fitted = result["calibration"]
    print(
        f"expected calibration error {fitted['ece']:.3f} at the model's temperature; on the other half, "
        f"{fitted['ece_fitted']:.3f} with the scale fitted to one half, {fitted['fitted_scale']:.1f}, and "
        f"{fitted['ece_unfitted']:.3f} without"
    )
    if config.colours:
        print(pd.DataFrame(result["colours"]["by_distance"]).to_string(index=False))
        harder = result["colours"]["open"]
        print(
            f"among all {harder['classes']} colours and shapes: top-1 {harder['acc1']:.2%}, the shape {harder['kind_right']:.2%}, the "
            f"shape and a colour within 5 (CIEDE2000) {harder['within_5']:.2%}"
        )
        print(pd.DataFrame(harder["by_distance"]).to_string(index=False))


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, square = hits / count, z * z / count
    middle, half = p + square / 2.0, z * math.sqrt(p * (1.0 - p) / count + square / (4.0 * count))
    return max(0.0, (middle - half) / (1.0 + square)), min(1.0, (middle + half) / (1.0 + square))


def class_table(run: Run, prompts: str) -> pd.DataFrame:
    """For each class present: pictures, recall, precision and the class it is most often taken for."""
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
    return [{"truth": run.names[t], "prediction": run.names[p], "count": n} for t, p, n in cells if n]


class Reliability(NamedTuple):
    """Bins of equal width in confidence: pictures, mean confidence and accuracy of each."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: the gap between confidence and accuracy, weighted by pictures (Guo et al. 2017,
        arXiv:1706.04599, Equation 3)."""
        return float(((self.confidence - self.accuracy).abs() * self.counts).sum() / self.counts.sum())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """How often the first guess is right, by how sure it was; probabilities [N, C]."""
    confidence, prediction = probabilities.double().max(dim=1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    right = (prediction == labels).double()
    counts = torch.bincount(index, minlength=bins).double()
    safe = counts.clamp(min=1.0)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add_(0, index, values) for values in (confidence, right)]
    return Reliability(counts, sums[0] / safe, sums[1] / safe)


def fit_scale(cosines: Tensor, labels: Tensor) -> float:
    """The inverse temperature that makes the truth likeliest, by golden-section search over its logarithm within SCALES."""
    cosines = cosines.double()

    def loss(log_scale: float) -> float:
        return F.cross_entropy(math.exp(log_scale) * cosines, labels).item()

    low, high, golden = *map(math.log, SCALES), (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2.0)


def halves(count: int) -> tuple[slice, slice]:
    """The pictures that the scale is fitted to, every second one, and those that it is measured on."""
    return slice(0, None, 2), slice(1, None, 2) if count > 1 else slice(None)


def calibration(cosines: Tensor, labels: Tensor, scale: float) -> dict[str, Any]:
    """Calibration errors at the model's scale and at one fitted to every second picture, measured on the others."""
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


# ----------------------------------------------------------------------------
# Colours: how far apart must two be to be told apart?

DISTANCES = (0.0, 5.0, 7.5, 10.0, 15.0, 1000.0)


def parse_shape(name: str) -> tuple[str, str]:
    """(colour, kind) of a class name. Raises InputError if it is not COLOUR SHAPE."""
    colour, _, kind = name.rpartition(" ")
    if colour not in CSS_COLOURS or kind not in KINDS:
        raise InputError(f"--colours needs class names of the form COLOUR SHAPE, and {name!r} is none")
    return colour, kind


def colour_study(config: ZeroShot, run: Run) -> dict[str, Any]:
    """Accuracy by the CIEDE2000 distance to the nearest other class of the same kind, and the harder task with every colour of
    every kind as a class, neighbours included: accuracy by distance to the nearest colour, and how far off wrong colours are.
    """
    shapes = [parse_shape(name) for name in run.names]
    right = run.cosines[config.prompts].argmax(1) == run.labels
    nearest = [_nearest(shape, shapes) for shape in shapes]
    known = read_json(config.run / "results.json")
    try:
        settings = known["settings"]
        model, pretrained = (_from_root(settings[name]) for name in ("model", "pretrained"))
        folder, device = ROOT / settings["images"], settings["device"]
        templates = known["templates"] if config.prompts == "single" else known["ensemble"]["templates"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{config.run}/results.json was not written by p3_clip.inference: it lacks {error}") from None
    clip, _ = load_clip(model, pretrained, device)
    files = [folder / name for name in run.files]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"the image {missing[0]} of the run does not exist any more")
    everything = [(colour, kind) for colour in NAMES for kind in KINDS]
    matrix = zero_shot_classifier(clip, [" ".join(shape) for shape in everything], templates)
    guesses = [everything[i] for i in (extract_features(clip, files, cache=config.cache) @ matrix).argmax(1)]
    truths = [shapes[label] for label in run.labels]
    exact = torch.tensor([guess == truth for guess, truth in zip(guesses, truths, strict=True)])
    kinds = [guess[1] == truth[1] for guess, truth in zip(guesses, truths, strict=True)]
    off = colour_difference(*(np.array([CSS_COLOURS[c] for c, _ in what]) for what in (guesses, truths)))
    neighbour = [_nearest(shape, everything) for shape in shapes]
    return {
        "by_distance": _by_distance(right, run.labels, nearest, "nearest other class of the kind"),
        "open": {
            "classes": len(everything),
            "acc1": exact.float().mean().item(),
            "kind_right": float(np.mean(kinds)),
            "mean_colour_distance": float(np.mean(off)),
            "within_5": float(np.mean(np.array(kinds) & (off < 5.0))),
            "by_distance": _by_distance(exact, run.labels, neighbour, "nearest CSS colour"),
        },
    }


def _from_root(name: str | None) -> str | None:
    """A model or its weights as the settings show them: a name, or a path that may be relative to the checkout."""
    return str(ROOT / name) if name and (ROOT / name).exists() else name


def _nearest(shape: tuple[str, str], others: Sequence[tuple[str, str]]) -> float:
    colours = [CSS_COLOURS[colour] for colour, kind in others if kind == shape[1] and colour != shape[0]]
    return float(colour_difference(np.array([CSS_COLOURS[shape[0]]]), np.array(colours)).min()) if colours else math.inf


def _by_distance(right: Tensor, labels: Tensor, distance: Sequence[float], what: str) -> list[dict[str, Any]]:
    mine = torch.tensor(distance)[labels].clamp(max=DISTANCES[-1] - 1.0)
    rows = []
    for low, high in zip(DISTANCES, DISTANCES[1:], strict=False):
        part = right[(mine >= low) & (mine < high)]
        if len(part):
            name = f"{low:g} to {high:g}" if high < DISTANCES[-1] else f"{low:g} and more"
            rows.append({what: name, "images": len(part), "acc1": round(part.float().mean().item(), 4)})
    return rows


# ----------------------------------------------------------------------------
# Personalised pictures.


def grade(config: Personalised) -> None:
    """Grades every prompt of every concept."""
    tasks = read_tasks(config.input)
    wrong = [
        f"{folder} holds {found} images"
        for folder in _folders(config, tasks)
        if (found := len(image_files(folder))) != config.count
    ]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; {config.count} are expected")
    for task in tasks:
        _references(config, task)
    clip, note = load_judge(config.clip)
    print(note, flush=True)
    rows = []
    for task in tasks:
        references = extract_features(clip, _references(config, task), show_progress=False)
        for index, (text, baseline) in enumerate(zip(task.texts, task.baselines, strict=True)):
            files = image_files(config.images / task.key / str(index))
            images = extract_features(clip, files, show_progress=False)
            cosines = image_cosines(images, references), text_cosines(clip, images, text)
            verdict = grade_personalised(*cosines, baseline)
            rows.append(
                {
                    "concept": task.key,
                    "prompt": index,
                    "image": round(verdict.image, 2),
                    "text": round(verdict.text, 2),
                    "image_baseline": baseline[0],
                    "text_baseline": baseline[1],
                    "passed": verdict.passed,
                    "kept": [files[i].name for i in verdict.kept],
                    "cosines": {  # common.metrics.clip_scores.FORMS makes every other form of them
                        file.name: {"image": image, "text": text}
                        for file, image, text in zip(files, *(values.tolist() for values in cosines), strict=True)
                    },
                }
            )
    print(pd.DataFrame(rows).drop(columns=["kept", "cosines"]).to_string(index=False))
    if config.result:
        write_json(
            config.result, {"model": clip.name, "pretrained": clip.pretrained, "identity": clip.identity, "rows": rows}
        )
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


def load_judge(config: ClipConfig) -> tuple[Clip, str]:
    """The CLIP that was named, else OpenAI's ViT-B/32, which the baselines were made with, and never the project's small CLIP in its
    place. Raises InputError if it is not to be had."""
    return load_clip(config.model or DEFAULT_MODEL, config.pretrained, config.device)


def _folders(config: Personalised, tasks: Sequence[Task]) -> list[Path]:
    return [config.images / task.key / str(index) for task in tasks for index in range(len(task.prompts))]


def _references(config: Personalised, task: Task) -> list[Path]:
    files = image_files(config.references / task.key)
    if not files:
        raise InputError(f"{config.references / task.key} holds no image")
    return files


if __name__ == "__main__":
    cli.run(main, Config)
