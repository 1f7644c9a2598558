"""Describes in words how an image of circles fails."""

from typing import Any

from common.data.layouts import parse_caption

IOU_BAR = 0.9  # least IoU of each circle
COLOUR_BAR = 8.0  # highest colour error (CIEDE2000) of each circle and of the background
OWN_COLOUR = 10.0  # highest CIEDE2000 at which a shape has its own colour and not another's


def failures(line: dict[str, Any]) -> list[str]:
    """The failures of one image of circles, in words; an empty list if there are none.

    `line` holds the prompt and the image's `p3_controlnet.evaluate.measure`. Circles are numbered
    from 1, from the left.
    """
    if line["iou"] == 0.0:
        return ["no circle"]
    words = []
    each = zip(*(line[f"circle_{name}"] for name in ("errors", "asked", "nearest")), strict=True)
    for k, (overlap, colour) in enumerate(zip(line["iou_circles"], each, strict=True), 1):
        if overlap < 0.5:
            words.append(f"circle {k} is missing")
            continue
        if overlap < IOU_BAR:
            words.append(f"circle {k} is misshapen (IoU {overlap:.2f})")
        words += _colour_failure(f"circle {k}", *colour)
    asked = parse_caption(line["prompt"]).background
    return words + _colour_failure(
        "the background", line["background_error"], asked, line["background_nearest"]
    )


def _colour_failure(what: str, error: float, asked: str, nearest: str) -> list[str]:
    if error <= COLOUR_BAR:
        return []
    return [
        f"{what} is {nearest}, not {asked}"
        if nearest != asked
        else f"{what} is {error:.0f} away from {asked}"
    ]
