"""The documents' tables of Problem 3, 2025, made from results/p3_controlnet_*.json."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from common.report import Results, Tables, listing, select, table

BASE = "model=checkpoints/ldm_shapes"
CONTROL = "control=checkpoints/controlnet_circles, sampling.control_text=empty"
SHORT = "runs/short/control_"
"""ControlNets of scripts/study_control_text.sh."""
SHIPPED = f"rows[{BASE}, {CONTROL}]"
SETS = {
    ("two", "each"): "two circles, two colours",
    ("two_shared", "each"): "two circles, one colour",
    ("two_shared", "count"): 'the same, prompt "two ... circles"',
    ("two_shared", "single"): "the same, prompt of one circle",
    ("three", "each"): "three circles, three colours",
    ("touching", "each"): "two circles that touch",
    ("cut", "each"): "two circles, one cut by the border",
    ("one_wide", "each"): "one circle, small or large",
    ("two_wide", "each"): "two circles, small or large",
}
DEFAULT = {
    "sampler": "dpmpp_2m",
    "steps": 20,
    "spacing": "trailing",
    "guidance_scale": 2.0,
    "pag_scale": 0.0,
    "guidance_interval": [0, 999],
    "guidance_rescale": 0.0,
    "eta": 0.0,
    "control_scales": [1.0],
    "control_start": 0.0,
    "control_end": 1.0,
    "control_text": "empty",
    "guess_mode": False,
    "seed": 0,
}
"""The default sampling of the small model with its ControlNet."""
WITHOUT_CONTROL = {**DEFAULT, "guidance_scale": 1.0, "pag_scale": 3.0}
"""The default sampling of the small model alone."""


def label(row: dict[str, Any]) -> str:
    """A row's name: the sampling settings that differ from the default, or "the default"."""
    usual = DEFAULT if "control" in row else WITHOUT_CONTROL
    changes = {name: value for name, value in row["sampling"].items() if value != usual.get(name)}
    words = [
        name.replace("_", " ") + ("" if value is True else f" {str(value).strip('[]')}")
        for name, value in changes.items()
    ]
    return ", ".join(words) or "the default"


def layouts(row: dict[str, Any]) -> str:
    """The name in `SETS` of a row's layouts."""
    return SETS[row["kind"], row["wording"]]


def base_models(results: Results) -> str:
    """Table of the shipped base model with the default sampling and of all others measured."""
    rows = [
        row
        for row in results["p3_controlnet_base"]["rows"]
        if label(row) == "the default" or row["model"] != "checkpoints/ldm_shapes"
    ]
    return table(rows, {"base model": lambda row: f"`{row['model']}`", **BASE_COLUMNS})


def binding(rows: Sequence[dict[str, Any]]) -> str:
    """Table of several circles in their own colours, over all seeds of the study two_circles.

    A line is of one base, ControlNet, text that the ControlNet read, and set of layouts. Colours
    are in place if each circle's median colour is within 10 (CIEDE2000) of the one that the prompt
    names for it, from left to right. Rows from before that was measured are left out.
    """
    together: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "bound" in row:
            names = (row["model"], row["control"], row["sampling"]["control_text"], layouts(row))
            together.setdefault(names, []).append(row)
    lines = []
    for (model, control, text, name), seeds in together.items():
        errors = [error for row in seeds for line in row["lines"] for error in line["own_errors"]]
        means = {
            key: fmean(row[key] for row in seeds)
            for key in ("bound", "bound_any_order", "iou", "iou_each")
        }
        lines.append(
            {"model": model, "control": control, "text": text, "layouts": name, **means}
            | {"pictures": sum(row["layouts"] for row in seeds)}
            | {"worst": min(row["iou_worst"] for row in seeds)}
            | {"median": median(errors), "mean": fmean(errors)}
        )
    return table(lines, BINDING_COLUMNS)


def short_trainings(results: Results) -> str:
    """Table of the short trainings of scripts/study_control_text.sh; a sentence if there are none.

    A line is of one training, over all seeds. For two, three and touching circles it has the
    layouts whose colours are in place, as in `binding`, and the mean IoU of each circle.
    """
    together: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in results["p3_controlnet_two_circles"]["rows"]:
        if row["control"].startswith(SHORT) and row["wording"] == "each":
            together.setdefault(row["control"], {}).setdefault(row["kind"], []).append(row)
    lines = [
        {"control": control}
        | {f"{kind}_bound": fmean(row["bound"] for row in seeds) for kind, seeds in kinds.items()}
        | {f"{kind}_iou": fmean(row["iou_each"] for row in seeds) for kind, seeds in kinds.items()}
        for control, kinds in together.items()
    ]
    return table(lines, SHORT_COLUMNS) if lines else "*None was trained.*"


def failures(results: Results) -> str:
    """Table of the shipped models' failed images of circles; a sentence if there are none."""
    rows = [
        {"layouts": layouts(row), "seed": row["sampling"]["seed"], "number": number, **line}
        for row in select(results["p3_controlnet_two_circles"], SHIPPED)
        for number, line in enumerate(row["lines"], 1)
        if line["failures"]
    ]
    columns = {"layouts": "layouts text", "seed": "seed number", "number": "number number"}
    columns |= {"prompt": "prompt text", "failures": lambda row: "; ".join(row["failures"])}
    return table(rows, columns) if rows else "*No picture failed.*"


BASE_COLUMNS = {
    "colour error": "error number1",
    "of objects": "objects_error number1",
    "of the background": "background_error number1",
    "named colour nearest": "right percent",
    "without an object": "without_object number",
    "shape as asked": "shape_right percent?",
    "pairs in place": "bound percent?",
}
COLOUR_COLUMNS = {
    "colour error, circle": "circle_error number1",
    "colour error, background": "background_error number1",
    "named colour nearest, circle": "circle_right percent",
    "named colour nearest, background": "background_right percent",
}
CIRCLE_COLUMNS = {
    "sampling": label,
    "evaluations": "evaluations number",
    "IoU": "iou number3",
    **COLOUR_COLUMNS,
}
TWO_CIRCLE_COLUMNS = {
    "layouts": layouts,
    "seed": "sampling.seed number",
    "IoU of all": "iou number3",
    "IoU of each": "iou_each number3",
    "worst circle": "iou_worst number2",
    **COLOUR_COLUMNS,
    "failed": lambda row: f"{row['failed']} of {row['layouts']}",
}
BINDING_COLUMNS = {
    "base": "model text",
    "ControlNet": "control text",
    "its text": "text text",
    "layouts": "layouts text",
    "pictures": "pictures number",
    "colours in place": "bound percent",
    "in any order": "bound_any_order percent",
    "median colour error": "median number1",
    "mean": "mean number1",
    "IoU of all": "iou number3",
    "IoU of each": "iou_each number3",
    "worst circle": "worst number2",
}
SHORT_COLUMNS = {
    "ControlNet": lambda row: f"`{row['control']}`",
    **{
        f"{kind}, {what}": f"{kind}_{column}"
        for kind in ("two", "three", "touching")
        for what, column in (("colours in place", "bound percent"), ("IoU", "iou number3"))
    },
}
CANVAS_COLUMNS = {
    "canvas": lambda row: f"every {row['stride']} latents" if row["stride"] else "at once",
    "IoU of all": "iou number3",
    "IoU of each": "iou_each number3",
    **COLOUR_COLUMNS,
}
SPEED_COLUMNS = {
    "training step": "recipe text",
    "images/s": "images_per_second digits3",
    "speed over diffusers'": "speed number2",
    "peak memory, GiB": "peak_gib number2",
    "memory over diffusers'": "memory number2",
}
TABLES: Tables = {
    "p3_base": listing(f"p3_controlnet_base rows[{BASE}]", {"sampling": label, **BASE_COLUMNS}),
    "p3_base_models": base_models,
    "p3_circles": listing(f"p3_controlnet_circles {SHIPPED}", CIRCLE_COLUMNS),
    "p3_two_circles": listing(f"p3_controlnet_two_circles {SHIPPED}", TWO_CIRCLE_COLUMNS),
    "p3_binding": lambda results: binding(
        [
            row
            for row in results["p3_controlnet_two_circles"]["rows"]
            if not row["control"].startswith(SHORT)
        ]
    ),
    "p3_short_trainings": short_trainings,
    "p3_failures": failures,
    "p3_canvas": listing(f"p3_controlnet_canvas {SHIPPED}", CANVAS_COLUMNS),
    "p3_speed_sd14": listing("p3_controlnet_speed sd14.rows[*]", SPEED_COLUMNS),
    "p3_speed_small": listing("p3_controlnet_speed small.rows[*]", SPEED_COLUMNS),
}
