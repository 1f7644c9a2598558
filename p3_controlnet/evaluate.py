"""Evaluates the images of circles that a ControlNet drew, and replicates the 2025 grader on a CPU.

    python3 -m p3_controlnet.evaluate --images OUT --prompts prompt.json --sources DIR --targets DIR
    # for a model that draws at 128x128 pixels: colours are measured farther from the edges
    python3 -m p3_controlnet.evaluate ... --resolution 128
    # a page with every image between its control image and its target, the worst first
    python3 -m p3_controlnet.evaluate ... --html page.html
    # with the grader's own networks
    python3 -m p3_controlnet.evaluate ... --clip ViT-B-32.pt --sam2 FOLDER

The grader compares only the mask at the image's centre and the CLIP similarity. This program also
measures the IoU with the true circle, and the colour errors of circle and background.

Exit code: 0 if every image is present and IoU and colour errors reach their thresholds, 1 if not,
2 if the folder cannot be evaluated.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from common import cli
from common.clip.loading import load_judge
from common.config import NonNegative, Probability, Side
from common.data.fill50k import SIZE, Pair, read_prompts
from common.data.layouts import Description, parse_caption
from common.errors import InputError
from common.files import check_files, write_json
from common.images import read_rgb, to_pil
from common.metrics.circles import Circle, disc, fit_circles
from common.metrics.clip_scores import FORMS
from common.metrics.segmentation import (
    NO_OBJECT_ERROR,
    ColourScore,
    centre_mask,
    inner_region,
    iou,
    judge_colour,
    load_sam2,
    median_colour,
    object_mask,
)
from common.page import Grade, Measure, Picture, write_grade
from common.progress import Progress

if TYPE_CHECKING:
    from common.clip.model import Clip

BEST = 10  # images whose scores the grader averages
MEASURES = (
    "iou",
    "iou_target",
    "circle_error",
    "background_error",
    "circle_right",
    "background_right",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluates a folder of images of circles, drawn from control images by a ControlNet."""

    GRADES: ClassVar[bool] = True

    images: Path
    """Folder of the generated images."""
    prompts: Path
    """prompt.json: one JSON object per image, with the keys source, target and prompt."""
    sources: Path
    """Folder of the control images."""
    targets: Path
    """Folder of the target images."""
    resolution: Side = SIZE
    """Side, in pixels, of the images that the model draws before they are enlarged to 512. Colours
    are measured at least 4 of these pixels away from an edge."""
    clip: str = "auto"
    """Weight file of OpenAI's CLIP ViT-B/32; "auto" takes it from the hub's cache or downloads it,
    "none" leaves the CLIP factor out of the grader's score."""
    sam2: Path | None = None
    """Folder of a SAM2 in transformers' format, which finds the mask at the centre. By default the
    mask comes from splitting the image into two colours, which needs no network."""
    iou_bar: Probability = 0.95
    """Lowest mean IoU with the true circles, in [0, 1], at which the evaluation passes."""
    colour_bar: NonNegative = 8.0
    """Highest mean colour error (CIEDE2000), of circles and of background, at which the evaluation
    passes."""
    result: Path | None = None
    """JSON file for the results; none is written by default."""
    html: Path | None = None
    """Page for the results, with every image and its verdict; none is written by default."""


def main(config: Config) -> None:
    """Prints the measures, writes the result file and exits with 1 if the evaluation fails."""
    if not 16 <= config.resolution <= SIZE:
        raise InputError(f"--resolution must be between 16 and {SIZE}, not {config.resolution}")
    if not config.images.is_dir():
        raise InputError(f"the folder {config.images} does not exist")
    check_files(config.result, config.html, inputs=[config.prompts])
    pairs = read_prompts(config.prompts, config.sources, config.targets)
    judge, note = load_judge(pretrained=None if config.clip == "auto" else config.clip)
    if judge is None and config.clip == "auto":
        # `load_judge` names --pretrained, the flag of other programs.
        note = f"left out, since {note.replace('--pretrained', '--clip')}"
    segmenter = load_sam2(config.sam2) if config.sam2 else centre_mask
    lines: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    ungraded: dict[str, str] = {}
    for pair in Progress(pairs, desc="grading", unit="images"):
        name = pair.target.relative_to(config.targets)
        line: dict[str, Any] = {"target": pair.target.name, "prompt": pair.prompt}
        picture, target = None, pair.read_target()
        try:
            picture = read_output(config.images, name)
        except InputError as error:
            dropped[str(name)] = str(error)
        else:
            line["iou_centre"] = iou(segmenter(picture), segmenter(target))
            line["cosine"] = cosine(judge, picture, pair.prompt) if judge else None
        circles = fit_circles(pair.read_source())
        try:
            described = read_description(pair, circles)
        except UngradedError as error:
            ungraded[str(name)] = str(error)
        else:
            line |= measure(picture, target, circles, described, config.resolution)
        lines.append(line)
    if len(dropped) == len(pairs):
        raise InputError(
            f"none of the {len(pairs)} images can be read from {config.images}; the first:"
            f" {next(iter(dropped.values()))}"
        )
    if len(ungraded) == len(pairs):
        raise InputError(
            f"none of the {len(pairs)} lines of {config.prompts} can be graded; the first:"
            f" {next(iter(ungraded.values()))}"
        )
    result = {
        "images": len(lines) - len(dropped),
        "dropped": dropped,
        "ungraded": ungraded,
        "resolution": config.resolution,
        "grader": grade(lines) | {"mask": "SAM2" if config.sam2 else "two colours", "clip": note},
        **means(lines),
        "bar": {"iou": config.iou_bar, "colour_error": config.colour_bar},
    }
    result["passes"] = passes(result)
    result["lines"] = lines
    if config.result:
        write_json(config.result, result)
    if config.html:
        write_grade(config.html, page_content(config, result, pairs))
    _print(result)  # its last line is the verdict
    if not result["passes"]:
        raise SystemExit(1)


def means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each of `MEASURES` over the lines that could be graded."""
    graded = [line for line in lines if "iou" in line]
    return {name: sum(line[name] for line in graded) / len(graded) for name in MEASURES}


def passes(result: dict[str, Any]) -> bool:
    """Whether every image is present and the IoU and both colour errors reach their thresholds."""
    return not result["dropped"] and reaches(result, result["bar"])


def reaches(measures: Mapping[str, Any], bar: Mapping[str, float]) -> bool:
    """Whether the IoU and both colour errors reach their thresholds."""
    errors = max(measures["circle_error"], measures["background_error"])
    return measures["iou"] >= bar["iou"] and errors <= bar["colour_error"]


# ----------------------------------------------------------------------------
# Reading images and scenes.


class UngradedError(InputError):
    """A line whose prompt and control image do not say what its image should show."""


def read_output(folder: Path, name: Path) -> Tensor:
    """The named image of a folder, or of its subfolder target/, uint8 [3, 512, 512].

    Raises InputError if it is missing, unreadable or of another size; the grader drops such lines.
    """
    found = (path for path in (folder / name, folder / "target" / name) if path.is_file())
    return read_rgb(next(found, folder / name), (SIZE, SIZE))


def read_description(pair: Pair, circles: Sequence[Circle]) -> Description:
    """The colours that the prompt of a pair names, for the circles in its control image.

    Raises UngradedError if the control image shows no circle, or as `describe` does.
    """
    if not circles:
        raise UngradedError(f"{pair.source} shows no circle: white outlines on black are expected")
    return describe(pair.prompt, circles, str(pair.source))


def describe(prompt: str, circles: Sequence[Circle], source: str) -> Description:
    """The colours that a prompt names for the circles of the control image `source`.

    Raises UngradedError if the prompt has another form, names another number of circles or neither
    one colour nor one for each circle, or if a circle has the background's colour, so that it
    cannot be seen.
    """
    try:
        described = parse_caption(prompt)
    except InputError as error:
        raise UngradedError(str(error)) from None
    count = described.count or len(described.colours)
    if len(described.colours) not in (1, len(circles)):
        raise UngradedError(
            f"{source} shows {len(circles)} circles, but its prompt names {count} circle colours:"
            f" {prompt!r}"
        )
    if described.count not in (None, 1, len(circles)):
        raise UngradedError(
            f"{source} shows {len(circles)} circles, but its prompt asks for {count}: {prompt!r}"
        )
    if described.background in described.colours:
        raise UngradedError(f"a circle in the background's colour cannot be seen: {prompt!r}")
    return described


# ----------------------------------------------------------------------------
# The grader's score.


def cosine(judge: "Clip", picture: Tensor, prompt: str) -> float:
    """CLIP's cosine similarity of an image uint8 [3, H, W] and its prompt, in [-1, 1]."""
    image = judge.preprocess(to_pil(picture))
    return float(judge.encode_images(image[None])[0] @ judge.encode_texts([prompt])[0])


def grade(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The grader's score: the mean over the ten best lines of mask IoU * (CLIP cosine + 1) / 2.

    The mask is the region at the image's centre. Without a CLIP, the second factor is left out and
    `with_clip` is False. `lines` counts the lines that have an image; only these are scored.
    """
    graded = [line for line in lines if "iou_centre" in line]
    with_clip = all(line["cosine"] is not None for line in graded)
    factors = [
        float(FORMS["dlcv2025"](torch.tensor(line["cosine"]))) if with_clip else 1.0
        for line in graded
    ]
    scores = [line["iou_centre"] * factor for line, factor in zip(graded, factors, strict=True)]
    best = sorted(scores, reverse=True)[:BEST]
    return {"score": sum(best) / len(best), "with_clip": with_clip, "lines": len(graded)}


# ----------------------------------------------------------------------------
# Measures that the grader does not have.


def measure(
    picture: Tensor | None,
    target: Tensor,
    circles: Sequence[Circle],
    described: Description,
    resolution: int,
) -> dict[str, Any]:
    """Measures shape and colours of one image uint8 [3, 512, 512], for a model of this resolution.

    The true discs are those inside the outlines of the control image, given by `circles`.

    - iou: IoU of all objects with all discs; iou_target: with the objects of `target`.
    - iou_circles: IoU with each disc; a pixel of an object counts for the disc nearest to it.
    - circle_errors, background_error: CIEDE2000 between the named colour and the median colour of
      each true region; circle_error: the mean over the circles.
    - circle_right, background_right: whether the CSS colour nearest to the median colour is the
      named one, as a fraction of the circles and as 0 or 1.
    - circle_asked: the named colour of each circle; circle_nearest, background_nearest: the nearest
      CSS colours.

    - own_errors: as circle_errors, where the prompt names the circles' colours from left to right.

    In general a prompt does not say which circle has which of several colours: for the other
    entries the assignment with the lowest error is used. If there is no image, or no object in it,
    the IoUs are 0 and the errors 50.
    """
    colours = len(set(described.colours))
    objects = (
        object_mask(picture, colours)
        if picture is not None
        else torch.zeros(SIZE, SIZE, dtype=torch.bool)
    )
    discs = torch.stack([disc(circle) for circle in circles])
    regions = [*discs, ~discs.any(0)]
    # Without an object no colour is measured, not even that of the background.
    measured = [
        (
            median_colour(picture, inner_region(region, resolution))
            if picture is not None and objects.any()
            else None
        )
        for region in regions
    ]
    judged = assign_colours(measured[:-1], described.colours)
    scores = [score for _, score in judged]
    background = judge_colour(measured[-1], described.background)
    return {
        "iou": iou(objects, discs.any(0)),
        "iou_target": iou(objects, object_mask(target, colours)),
        "iou_circles": [
            iou(objects & mine, one) for mine, one in zip(cells(circles), discs, strict=True)
        ],
        "circle_error": sum(score.error for score in scores) / len(scores),
        "background_error": background.error,
        "circle_right": sum(score.right for score in scores) / len(scores),
        "background_right": float(background.right),
        "circle_errors": [score.error for score in scores],
        "own_errors": [
            judge_colour(rgb, name).error
            for rgb, name in zip(measured[:-1], _for_each(described.colours, circles), strict=True)
        ],
        "circle_asked": [name for name, _ in judged],
        "circle_nearest": [score.nearest for score in scores],
        "background_nearest": background.nearest,
    }


def assign_colours(
    measured: Sequence[tuple[float, float, float] | None], names: Sequence[str]
) -> list[tuple[str, ColourScore]]:
    """Assigns a named colour to each measured one so that the sum of the errors is lowest.

    Returns the assigned name and the score of each measured colour. Each name is used once, but a
    single name is used for all. A measured colour in 0..255 is None if the region is missing.
    """
    names = _for_each(names, measured)
    scores = {
        (i, name): judge_colour(rgb, name) for i, rgb in enumerate(measured) for name in set(names)
    }
    orders = (
        [(name, scores[i, name]) for i, name in enumerate(order)]
        for order in sorted(set(itertools.permutations(names)))
    )
    return min(orders, key=lambda order: sum(score.error for _, score in order))


def _for_each(names: Sequence[str], things: Sequence[Any]) -> Sequence[str]:
    """A name for each thing: the names, or the single one for all."""
    return list(names) * len(things) if len(names) == 1 else names


def badness(line: dict[str, Any]) -> float:
    """(1 - IoU) + (the larger colour error) / `NO_OBJECT_ERROR`; 0 for a perfect image."""
    return 1.0 - line["iou"] + max(line["circle_error"], line["background_error"]) / NO_OBJECT_ERROR


def cells(circles: Sequence[Circle]) -> Tensor:
    """The pixels nearest to each of the K circles, bool [K, 512, 512].

    The distance is that to the circle's edge, negative inside the circle.
    """
    at = torch.arange(SIZE, dtype=torch.float64) + 0.5
    distance = torch.stack([torch.hypot(at - c.x, at[:, None] - c.y) - c.radius for c in circles])
    return distance.argmin(0) == torch.arange(len(circles))[:, None, None]


def page_content(config: Config, result: Mapping[str, Any], pairs: Sequence[Pair]) -> Grade:
    """The grade of a folder, with every image between its control image and its target."""
    bar, shown = result["bar"], []
    for pair, line in zip(pairs, result["lines"], strict=True):
        name = pair.target.relative_to(config.targets)
        images = {"control": pair.read_source(), "target": pair.read_target()}
        if str(name) not in result["dropped"]:
            images["image"] = read_output(config.images, name)
        if "iou" in line:
            verdict = (
                f"IoU {line['iou']:.3f}, colour error {line['circle_error']:.1f} of the circle and"
                f" {line['background_error']:.1f} of the background"
            )
        else:
            verdict = f"not graded: {result['ungraded'][str(name)]}"
        if "image" not in images:
            verdict = "no readable image"
        shown.append(
            Picture(
                name=f"{line['target']}: {line['prompt']}",
                images=images,
                verdict=verdict,
                passed="image" in images and ("iou" not in line or reaches(line, bar)),
                badness=badness(line) if "iou" in line else 0.0,
            )
        )
    error, dropped, grader = bar["colour_error"], len(result["dropped"]), result["grader"]
    measures = [
        Measure("images that are missing or unreadable", str(dropped), "0", not dropped),
        Measure(
            "mean IoU", f"{result['iou']:.4f}", f">= {bar['iou']:g}", result["iou"] >= bar["iou"]
        ),
        *(
            Measure(
                f"mean colour error (CIEDE2000), {part}",
                f"{result[f'{part}_error']:.2f}",
                f"<= {error:g}",
                result[f"{part}_error"] <= error,
            )
            for part in ("circle", "background")
        ),
        Measure("the course's score", f"{grader['score']:.4f}"),
        Measure("CLIP of the course's score", grader["clip"]),
    ]
    note = "A picture counts as wrong where its own numbers miss the thresholds of the means."
    return Grade(
        "Problem 3, 2025: circles", config.images, result["passes"], measures, shown, note=note
    )


def _print(result: dict[str, Any]) -> None:
    columns = ["target", "iou_centre", "iou", "circle_error", "background_error", "prompt"]
    graded = [line for line in result["lines"] if "iou" in line]
    worst = sorted(graded, key=lambda line: line["iou"] - line["circle_error"] / NO_OBJECT_ERROR)[
        :5
    ]
    print(f"the worst {len(worst)} lines, by IoU and colour error of the circle:")
    print(pd.DataFrame(worst).reindex(columns=columns).round(3).to_string(index=False, na_rep="-"))
    for name in MEASURES:
        print(f"{name.replace('_', ' '):<18}{result[name]:7.3f}")
    for name, reason in result["dropped"].items():
        print(f"dropped {name}: {reason}")
    for name, reason in result["ungraded"].items():
        print(f"left out of the means {name}: {reason}")
    grader = result["grader"]
    print(f"CLIP: {grader['clip']}")
    print(
        f"grader's score: {grader['score']:.4f}, the mean over the best"
        f" {min(BEST, grader['lines'])} of {grader['lines']} lines of the IoU of the mask at the"
        f" centre (found by {grader['mask']})"
        + (" times (CLIP cosine + 1)/2" if grader["with_clip"] else "; the CLIP factor is left out")
    )
    bar = result["bar"]
    print(
        f"{'PASS' if result['passes'] else 'FAIL'}: {result['images']} images, mean IoU of the"
        f" circles {result['iou']:.4f} (at least {bar['iou']:g}), mean CIEDE2000 of circles"
        f" {result['circle_error']:.2f} and background {result['background_error']:.2f} (each at"
        f" most {bar['colour_error']:g})"
        + (f", {len(result['dropped'])} lines dropped" if result["dropped"] else "")
        + (f", {len(result['ungraded'])} lines left out" if result["ungraded"] else "")
    )


if __name__ == "__main__":
    cli.run(main, Config)
