"""A CPU replica of the 2025 grader of Problem 3, and what the grader does not see: the true circle
and its colours.

    python3 -m p3_controlnet.evaluate --images OUT --prompts prompt.json --sources DIR --targets DIR
    # of a model that works at 64x64: colours are measured farther inside
    python3 -m p3_controlnet.evaluate ... --resolution 64
    # the grader's own networks
    python3 -m p3_controlnet.evaluate ... --clip ViT-B-32.pt --sam2 FOLDER

Exit code 0 if shape and colours reach the bar and every image is there, 1 if not, 2 if the folder
cannot be graded.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from common import cli
from common.clip.loading import load_judge
from common.data.fill50k import SIZE, Pair, read_prompts
from common.data.layouts import Description, parse_caption
from common.errors import InputError
from common.files import write_json
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

if TYPE_CHECKING:
    from common.clip.model import Clip

BEST = 10
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
    """Grades a folder of circles drawn by control pictures."""

    images: Path
    """Folder of the generated images."""
    prompts: Path
    """prompt.json: a line of source, target and prompt for each image."""
    sources: Path
    """Folder of the control pictures."""
    targets: Path
    """Folder of the images that they stand for."""
    resolution: int = SIZE
    """Side of the pictures that the model works on; colours are measured at least 4 of its pixels
    inside an edge."""
    clip: str = "auto"
    """OpenAI's ViT-B/32: its weight file, auto for the local caches, none to leave it out."""
    sam2: Path | None = None
    """Folder of SAM2 in transformers' form, to find the mask at the centre (default: two colours,
    which needs no network)."""
    iou_bar: float = 0.95
    """Mean IoU of the true circle to reach."""
    colour_bar: float = 8.0
    """Mean colour error (CIEDE2000) to stay within, for circle and background each."""
    result: Path | None = None
    """JSON file to write."""


def main(config: Config) -> None:
    """Prints the table, writes the result and answers by exit code."""
    if not 16 <= config.resolution <= SIZE:
        raise InputError(f"--resolution must be between 16 and {SIZE}, not {config.resolution}")
    if not config.images.is_dir():
        raise InputError(f"the folder {config.images} does not exist")
    pairs = read_prompts(config.prompts, config.sources, config.targets)
    scenes = [read_scene(pair) for pair in pairs]
    pictures, dropped = read_output(
        config.images, [pair.target.relative_to(config.targets) for pair in pairs]
    )
    judge, note = load_judge(pretrained=None if config.clip == "auto" else config.clip)
    if judge is None and config.clip == "auto":
        note = f"left out, since {note.replace('--pretrained', '--clip')}"  # the flag here
    segmenter = load_sam2(config.sam2) if config.sam2 else centre_mask
    lines = []
    for pair, scene, picture in zip(
        pairs, scenes, tqdm(pictures, unit="image", dynamic_ncols=True), strict=True
    ):
        line: dict[str, Any] = {"target": pair.target.name, "prompt": pair.prompt}
        if picture is not None:
            line["iou_centre"] = iou(segmenter(picture), segmenter(pair.read_target()))
            line["cosine"] = cosine(judge, picture, pair.prompt) if judge else None
        lines.append(line | measure(picture, pair.read_target(), *scene, config.resolution))
    result = {
        "images": len(lines) - len(dropped),
        "dropped": dropped,
        "resolution": config.resolution,
        "grader": grade(lines) | {"mask": "SAM2" if config.sam2 else "two colours", "clip": note},
        **means(lines),
        "bar": {"iou": config.iou_bar, "colour_error": config.colour_bar},
    }
    result["passes"] = passes(result)
    result["lines"] = lines
    _print(result)
    if config.result:
        write_json(config.result, result)
    if not result["passes"]:
        raise SystemExit(1)


def means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each of `MEASURES` over the lines."""
    return {name: sum(line[name] for line in lines) / len(lines) for name in MEASURES}


def passes(result: dict[str, Any]) -> bool:
    """Whether every image is there and shape and colours reach the bar."""
    errors = max(result["circle_error"], result["background_error"])
    return (
        not result["dropped"]
        and result["iou"] >= result["bar"]["iou"]
        and errors <= result["bar"]["colour_error"]
    )


# ----------------------------------------------------------------------------
# Reading.


def read_output(folder: Path, names: Sequence[Path]) -> tuple[list[Tensor | None], dict[str, str]]:
    """The images uint8 [3, 512, 512] by their names, and for each that is None why: missing,
    unreadable, of the wrong size.

    The grader drops such lines. An image may lie in OUT or in OUT/target. Raises InputError if none
    can be graded.
    """
    pictures: list[Tensor | None] = []
    dropped: dict[str, str] = {}
    for name in names:
        path = next(
            (path for path in (folder / name, folder / "target" / name) if path.is_file()),
            folder / name,
        )
        try:
            pictures.append(read_rgb(path, (SIZE, SIZE)))
        except InputError as error:
            pictures.append(None)
            dropped[str(name)] = str(error)
    if len(dropped) == len(names):
        raise InputError(
            f"{folder} holds none of the {len(names)} images: {next(iter(dropped.values()))}"
        )
    return pictures, dropped


def read_scene(pair: Pair) -> tuple[list[Circle], Description]:
    """The circles of the control picture and what the prompt says. Raises InputError if they do not
    go together."""
    circles, described = fit_circles(pair.read_source()), parse_caption(pair.prompt)
    if not circles:
        raise InputError(f"{pair.source} shows no circle: white outlines on black are expected")
    if len(described.colours) not in (1, len(circles)):
        count = len(described.colours)
        raise InputError(
            f"{pair.source} shows {len(circles)} circles, but its prompt names {count}:"
            f" {pair.prompt!r}"
        )
    return circles, described


# ----------------------------------------------------------------------------
# The grader's part.


def cosine(judge: "Clip", picture: Tensor, prompt: str) -> float:
    """CLIP's cosine between a picture, uint8 [3, H, W], and its prompt."""
    image = judge.preprocess(to_pil(picture))
    return float(judge.encode_images(image[None])[0] @ judge.encode_texts([prompt])[0])


def grade(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the ten best lines by IoU of the mask at the centre times (CLIP cosine + 1) / 2;
    without the second factor, and said so, where there is no CLIP. Lines without an image do not
    count.
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
# What the grader does not see.


def measure(
    picture: Tensor | None,
    target: Tensor,
    circles: Sequence[Circle],
    described: Description,
    resolution: int,
) -> dict[str, Any]:
    """Shape and colours of one picture, uint8 [3, 512, 512], against the discs inside the control
    picture's outlines.

    iou: of all objects with all discs, iou_circles: with each (an object's pixel belongs to the
    disc that it is nearest to), iou_target: with the objects of the target; errors and names of the
    colours at the true places, of the circles on average. A prompt does not say which circle has
    which of several colours: the best assignment counts. Without a picture or an object the IoU is
    0 and the error 50.
    """
    colours = len(set(described.colours))
    objects = (
        object_mask(picture, colours)
        if picture is not None
        else torch.zeros(SIZE, SIZE, dtype=torch.bool)
    )
    discs = torch.stack([disc(circle) for circle in circles])
    # A picture without an object has no colours to speak of, not even of its background.
    regions = [*discs, ~discs.any(0)]
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
        "circle_asked": [name for name, _ in judged],
        "circle_nearest": [score.nearest for score in scores],
        "background_nearest": background.nearest,
    }


def assign_colours(
    measured: Sequence[tuple[float, float, float] | None], names: Sequence[str]
) -> list[tuple[str, ColourScore]]:
    """For each measured colour the name that it is compared with and its score. Each name is used
    once (one name: by all), so that the errors' sum is smallest.
    """
    names = list(names) * len(measured) if len(names) == 1 else names
    scores = {
        (i, name): judge_colour(rgb, name) for i, rgb in enumerate(measured) for name in set(names)
    }
    orders = (
        [(name, scores[i, name]) for i, name in enumerate(order)]
        for order in sorted(set(itertools.permutations(names)))
    )
    return min(orders, key=lambda order: sum(score.error for _, score in order))


def cells(circles: Sequence[Circle]) -> Tensor:
    """The pixels that are nearer to each circle's edge, from outside, or deeper in it, than to the
    others; bool [K, 512, 512]."""
    at = torch.arange(SIZE, dtype=torch.float64) + 0.5
    distance = torch.stack([torch.hypot(at - c.x, at[:, None] - c.y) - c.radius for c in circles])
    return distance.argmin(0) == torch.arange(len(circles))[:, None, None]


def _print(result: dict[str, Any]) -> None:
    columns = ["target", "iou_centre", "iou", "circle_error", "background_error", "prompt"]
    worst = sorted(
        result["lines"], key=lambda line: line["iou"] - line["circle_error"] / NO_OBJECT_ERROR
    )[:5]
    print("the worst lines:")
    print(pd.DataFrame(worst).reindex(columns=columns).round(3).to_string(index=False, na_rep="-"))
    for name in MEASURES:
        print(f"{name.replace('_', ' '):<18}{result[name]:7.3f}")
    for name, reason in result["dropped"].items():
        print(f"dropped {name}: {reason}")
    grader = result["grader"]
    print(f"CLIP: {grader['clip']}")
    print(
        f"grader's score {grader['score']:.4f}, mean of the best {min(BEST, grader['lines'])} of"
        f" {grader['lines']} lines: IoU of the mask at the centre ({grader['mask']})"
        + (" times (CLIP cosine + 1)/2" if grader["with_clip"] else "; the CLIP factor is left out")
    )
    bar = result["bar"]
    print(
        f"{'PASS' if result['passes'] else 'FAIL'}: {result['images']} images, IoU of the circle"
        f" {result['iou']:.4f} (at least {bar['iou']:g}), colour errors"
        f" {result['circle_error']:.2f} and {result['background_error']:.2f} (at most"
        f" {bar['colour_error']:g})"
        + (f", {len(result['dropped'])} lines dropped" if result["dropped"] else "")
    )


if __name__ == "__main__":
    cli.run(main, Config)
