"""Zero-shot accuracy by colour distance, for runs whose class names are COLOUR SHAPE.

    # OUT as written by p3_clip.inference and then p3_clip.evaluate
    python3 -m p3_clip.study.colours --run OUT

Adds the entry "colours" to OUT/evaluation.json: top-1 accuracy by the CIEDE2000 distance to the
nearest other class, and the accuracy of a harder task, in which every CSS colour of every shape is
a class.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from common import cli
from common.clip.features import extract_features
from common.clip.loading import load_clip
from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.shapes import KINDS
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from p3_clip.evaluate import Prompts
from p3_clip.inference import Run
from p3_clip.model import zero_shot_classifier

DISTANCES = (0.0, 5.0, 7.5, 10.0, 15.0, 1000.0)  # edges of the bins, CIEDE2000


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures zero-shot accuracy by colour distance, and among all colours and shapes."""

    run: Path
    """Folder written by p3_clip.inference."""
    prompts: Prompts = "single"
    """Evaluate the single prompt or the ensemble."""
    cache: Path = ROOT / "outputs" / "clip_features"
    """Folder of the image-feature cache, which identifies images by content."""
    result: Path | None = None
    """JSON file of p3_clip.evaluate to add to. Default: RUN/evaluation.json."""


def main(config: Config) -> None:
    """Measures the accuracies, adds them to the evaluation file and prints them."""
    path = config.result or config.run / "evaluation.json"
    evaluation = read_json(path)
    if evaluation.get("prompts", config.prompts) != config.prompts:
        raise InputError(
            f"{path} holds the numbers of --prompts {evaluation['prompts']}, not {config.prompts}"
        )
    found = colour_study(config, Run.load(config.run))
    write_json(path, evaluation | {"colours": found})
    print(pd.DataFrame(found["by_distance"]).to_string(index=False))
    harder = found["open"]
    print(
        f"among all {harder['classes']} colours and shapes: top-1 {harder['acc1']:.2%}; correct"
        f" shape {harder['kind_right']:.2%}; correct shape and a colour within 5 (CIEDE2000)"
        f" {harder['within_5']:.2%}"
    )
    print(pd.DataFrame(harder["by_distance"]).to_string(index=False))


def parse_shape(name: str) -> tuple[str, str]:
    """Splits a class name into (colour, kind). Raises InputError if it is not COLOUR SHAPE."""
    colour, _, kind = name.rpartition(" ")
    if colour not in CSS_COLOURS or kind not in KINDS:
        raise InputError(
            f"the study of colours needs class names of the form COLOUR SHAPE, not {name!r}"
        )
    return colour, kind


def colour_study(config: Config, run: Run) -> dict[str, Any]:
    """Returns accuracies by colour distance, among the run's classes and among all classes.

    "by_distance" is the run's top-1 accuracy by the CIEDE2000 distance from the true class to the
    nearest other class of the same kind. "open" is the harder task in which every CSS colour of
    every kind is a class: top-1 accuracy, fraction with the correct kind, mean CIEDE2000 between
    the predicted and the true colour over all images, fraction with the correct kind and a colour
    within 5, and top-1 accuracy by the distance to the nearest CSS colour. Raises InputError if
    the run's names, settings or images are missing or of another form.
    """
    shapes = [parse_shape(name) for name in run.names]
    right = run.cosines[config.prompts].argmax(1) == run.labels
    nearest = [_nearest(shape, shapes) for shape in shapes]
    known = read_json(config.run / "results.json")
    try:
        settings = known["settings"]
        model, pretrained = (_from_root(settings[name]) for name in ("model", "pretrained"))
        folder, device = ROOT / settings["images"], settings["device"]
        templates = (
            known["templates"] if config.prompts == "single" else known["ensemble"]["templates"]
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{config.run}/results.json was not written by p3_clip.inference: it lacks {error}"
        ) from None
    clip, _ = load_clip(model, pretrained, device)
    if known.get("identity", clip.identity) != clip.identity:
        raise InputError(
            f"{config.run} was made by another CLIP than {model or 'the default'} is now: run"
            " p3_clip.inference again"
        )
    files = [folder / name for name in run.files]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"the image {missing[0]} of the run no longer exists")
    everything = [(colour, kind) for colour in NAMES for kind in KINDS]
    matrix = zero_shot_classifier(clip, [" ".join(shape) for shape in everything], templates)
    guesses = [
        everything[i]
        for i in (extract_features(clip, files, cache=config.cache) @ matrix).argmax(1)
    ]
    truths = [shapes[label] for label in run.labels]
    exact = torch.tensor([guess == truth for guess, truth in zip(guesses, truths, strict=True)])
    kinds = [guess[1] == truth[1] for guess, truth in zip(guesses, truths, strict=True)]
    off = colour_difference(
        *(np.array([CSS_COLOURS[c] for c, _ in what]) for what in (guesses, truths))
    )
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
    """Resolves a setting that is a name, or a path that may be relative to the checkout."""
    return str(ROOT / name) if name and (ROOT / name).exists() else name


def _nearest(shape: tuple[str, str], others: Sequence[tuple[str, str]]) -> float:
    """CIEDE2000 from a shape to the nearest other colour of its kind in `others`; inf if none."""
    colours = [
        CSS_COLOURS[colour] for colour, kind in others if kind == shape[1] and colour != shape[0]
    ]
    return (
        float(colour_difference(np.array([CSS_COLOURS[shape[0]]]), np.array(colours)).min())
        if colours
        else math.inf
    )


def _by_distance(
    right: Tensor, labels: Tensor, distance: Sequence[float], what: str
) -> list[dict[str, Any]]:
    """Top-1 accuracy in each bin of DISTANCES; `distance` is per class, `right` per image."""
    of_image = torch.tensor(distance)[labels].clamp(max=DISTANCES[-1] - 1.0)
    rows = []
    for low, high in zip(DISTANCES, DISTANCES[1:], strict=False):
        part = right[(of_image >= low) & (of_image < high)]
        if len(part):
            name = f"{low:g} to {high:g}" if high < DISTANCES[-1] else f"{low:g} and more"
            rows.append(
                {what: name, "images": len(part), "acc1": round(part.float().mean().item(), 4)}
            )
    return rows


if __name__ == "__main__":
    cli.run(main, Config)
