"""What REPORT.md, the README and the model cards say of Problem 3, 2025, made of results/p3_controlnet_*.json."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.latent.generate import GenerationConfig
from common.latent.small import DEFAULT_GUIDANCE_SCALE
from common.report import figure, joined, load, table

FIGURES = "p3_controlnet"
SHIPPED, SHIPPED_CONTROL = "checkpoints/ldm_shapes", "checkpoints/controlnet_circles"
STUDY = "`bash scripts/study_controlnet.sh`"
BASE_COLUMNS = ["colour error", "of objects", "of the background", "named colour nearest", "without an object"]
COLUMNS = [
    "IoU of the circle",
    "colour error, circle",
    "colour error, background",
    "named colour nearest, circle",
    "background",
]
SET_LABELS = {
    ("two", "each"): "two circles, two colours",
    ("two_shared", "each"): "two circles, one colour",
    ("two_shared", "count"): 'the same, told as "two ... circles"',
    ("two_shared", "single"): "the same, told as one circle",
    ("three", "each"): "three circles, three colours",
    ("touching", "each"): "two circles that touch",
    ("cut", "each"): "two circles, one cut by the border",
}
MAIN_SETS = (("two_shared", "each"), ("two", "each"))
RECIPE_LABELS = {"diffusers": "diffusers' step", "this project": "this project's step"}


@dataclasses.dataclass(frozen=True)
class Demand:
    """A number and what it must reach."""

    what: str
    value: float
    bound: float
    at_least: bool
    form: Callable[[float], str]

    @property
    def met(self) -> bool:
        """Whether it does."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def target(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.form(self.bound)}"


def section(results: Path) -> list[str]:
    """Problem 3, 2025, in REPORT.md."""
    parts = [part(results) for part in (_base, _circles, _two_circles, _canvas, _speed)]
    parts = [part for part in parts if part]
    return [METHOD, *parts] if parts else []


def readme_rows(results: Path) -> list[list[str]]:
    """Problem 3, 2025, in the README's table."""
    groups = {
        "P3, 2025, small model without control": (base_demands(results), STUDY),
        "P3, 2025, 100 real pairs": (circle_demands(results), STUDY),
        "P3, 2025, ten layouts of two circles": (two_circle_demands(results), STUDY),
        "P3, 2025, training at Stable Diffusion's size": (
            speed_demands(results),
            "`python3 scripts/benchmark_controlnet.py --size sd14`",
        ),
    }
    return [
        [task, demand.what, demand.form(demand.value), demand.target, command]
        for task, (demands, command) in groups.items()
        for demand in demands
    ]


def cards(results: Path) -> dict[str, list[str]]:
    """The numbers of the model cards of Problem 3, 2025."""
    found = {
        "ldm_shapes": base_demands(results),
        "controlnet_circles": circle_demands(results) + two_circle_demands(results),
    }
    return {name: [_demand_table(demands)] for name, demands in found.items() if demands}


# ----------------------------------------------------------------------------
# What is demanded.


def base_demands(results: Path) -> list[Demand]:
    """Of the base model without control, and of its autoencoder."""
    demands = []
    if row := default_row(load(results, "p3_controlnet_base")):
        demands.append(Demand("mean colour error (CIEDE2000) of 200 prompts", row["error"], 6.0, False, _number))
        demands.append(Demand("named CSS colour is the nearest", row["right"], 0.6, True, _share))
    if found := _shipped_autoencoder(results):
        demands.append(Demand("PSNR of the autoencoder on real pictures", found["psnr"], 32.0, True, _decibel))
    return demands


def circle_demands(results: Path) -> list[Demand]:
    """Of the real testing pairs."""
    row = default_row(load(results, "p3_controlnet_circles"))
    if not row:
        return []
    return [
        Demand("mean IoU of the circle", row["iou"], 0.95, True, _precise),
        Demand("colour error of the circle (CIEDE2000)", row["circle_error"], 8.0, False, _number),
        Demand("colour error of the background", row["background_error"], 8.0, False, _number),
    ]


def two_circle_demands(results: Path) -> list[Demand]:
    """Of two circles in one colour and in two."""
    found = load(results, "p3_controlnet_two_circles")
    rows = {(row["kind"], row["wording"]): row for row in reversed(shipped_rows(found))}  # the first seed's
    return [
        Demand(f"mean IoU, {SET_LABELS[key].split(', ')[1]}", rows[key]["iou"], 0.9, True, _precise)
        for key in MAIN_SETS
        if key in rows
    ]


def speed_demands(results: Path) -> list[Demand]:
    """Of a training step at Stable Diffusion's size."""
    found = (load(results, "p3_controlnet_speed") or {}).get("sd14")
    if not found:
        return []
    own = next(row for row in found["rows"] if row["recipe"] == "this project")
    return [
        Demand("speed over diffusers' step", own["speed"], 1.3, True, _number),
        Demand("peak memory over diffusers' step", own["memory"], 0.95, False, _number),
    ]


def verdict(demands: Sequence[Demand]) -> str:
    """A sentence on which of the demands are met."""
    missed = [f"{demand.what} {demand.form(demand.value)} ({demand.target})" for demand in demands if not demand.met]
    if not missed:
        return "All of what was demanded is met."
    return f"Not yet met: {'; '.join(missed)}."


# ----------------------------------------------------------------------------
# The parts.

METHOD = """## Problem 3, 2025: ControlNet

**Method.** A latent-diffusion model in Stable Diffusion's form and of a CPU's size was trained here: pictures of 64x64, a
deep-compression autoencoder (arXiv:2410.10733) to 16x16 latents normalised channel by channel, a U-Net with cross-attention to the
text tower of the project's small CLIP. A contrastive loss leaves that tower's output vague about which colour is whose, so it was first
tuned, on captions alone, until linear readouts of it name every colour (`p3_controlnet/base/train_text.py`), and then frozen. The U-Net
predicts v under a schedule that ends in pure noise, and its steps start there, so that flat colours come from the prompt and not from
the noise. ControlNet is a trained copy of the frozen U-Net's encoder whose residuals enter the decoder through convolutions that start
at zero. Shape is measured against the disc inside the control picture's outline, colours as the CIEDE2000 distance of a region's median
colour from the named one; a picture without an object counts as IoU 0 and error 50. Code: `p3_controlnet/`,
`common/latent/model.py`; training:
`bash scripts/train_ldm.sh`, `bash scripts/train_controlnet.sh`."""


def _base(results: Path) -> str:
    found = load(results, "p3_controlnet_base")
    rows, default = shipped_rows(found), default_row(found)
    if not default:
        return ""
    header = ["sampling", *BASE_COLUMNS]
    cells = [[label(row["sampling"]), *_base_measures(row)] for row in rows]
    best = min(rows, key=lambda row: row["error"])
    text = (
        f"{default['prompts']} prompts of one or two shapes name every CSS colour. Of {default['regions']} regions the colours are "
        f"{default['error']:.1f} away from the named ones on average, and {default['right']:.0%} are nearer to it than to any other "
        f"name; {default['without_object']} pictures show no object. Colours alone are judged here, not which shape has them. "
        f"The smallest error of the table has {label(best['sampling'])} ({best['error']:.1f}). {verdict(base_demands(results))}"
    )
    return joined(
        f"**The base model without control.** {STUDY}",
        _figure(results, "base"),
        table(header, cells),
        text,
        _autoencoder(results),
        _other_models(found),
    )


def _autoencoder(results: Path) -> str:
    found = _shipped_autoencoder(results)
    if not found:
        return ""
    resized, again = found["resized"], found["reconstructed"]
    return (
        f"The autoencoder reconstructs {found['pairs']} real targets at {found['side']}x{found['side']} with {found['psnr']:.1f} dB on "
        f"average and {found['psnr_worst']:.1f} dB at worst. Enlarged to 512x512 these reconstructions have an IoU of "
        f"{again['iou']:.3f} and colour errors of {again['circle_error']:.1f} and {again['background_error']:.1f}, which bounds what "
        f"the model can reach; without the autoencoder, resizing alone gives {resized['iou']:.3f}."
    )


def _shipped_autoencoder(results: Path) -> dict[str, Any] | None:
    found = load(results, "p3_controlnet_autoencoder")
    return found if found and found["model"] == SHIPPED else None


def _other_models(found: Any) -> str:
    """The same sampling with bases trained otherwise, where they were measured."""
    default = default_row(found)
    rows = [row for row in found["rows"] if row["sampling"] == default["sampling"]]
    if len(rows) < 2:
        return ""
    cells = [[f"`{row['model']}`", *_base_measures(row)] for row in rows]
    header = ["base model", *BASE_COLUMNS]
    return (
        "What schedule, prediction and normalisation give: U-Nets trained briefly from scratch, one choice changed in each, sampled "
        f"alike. `bash scripts/study_ldm.sh`\n\n{table(header, cells)}"
    )


def _circles(results: Path) -> str:
    found = load(results, "p3_controlnet_circles")
    default = default_row(found)
    if not default:
        return ""
    cells = [[label(row["sampling"]), str(row["evaluations"]), *_measures(row)] for row in shipped_rows(found)]
    worst = min(default["lines"], key=lambda line: line["iou"]) if default.get("lines") else None
    text = (
        f"At {default['evaluations']} evaluations the circles have an IoU of {default['iou']:.3f} and colour errors of "
        f"{default['circle_error']:.1f} (circle) and {default['background_error']:.1f} (background). "
        + (f'The worst shape is that of "{worst["prompt"]}" (IoU {worst["iou"]:.2f}). ' if worst else "")
        + verdict(circle_demands(results))
    )
    return joined(
        f"**The {default['pairs']} real testing pairs**, which no training saw. {STUDY}",
        _figure(results, "circles"),
        table(["sampling", "evaluations", *COLUMNS], cells),
        text,
        _grader(results),
        _captioned(results, "failures", "The worst pictures above, the best below:"),
        _captioned(results, "control_scale", "The same noise under more and more control:"),
    )


def _grader(results: Path) -> str:
    found = load(results, "p3_controlnet_evaluation")
    if not found:
        return ""
    grader = found["grader"]
    factor = (
        "times (CLIP cosine + 1)/2" if grader["with_clip"] else "without its CLIP factor, for want of OpenAI's weights"
    )
    return (
        f"The replica of the 2025 grader gives {grader['score']:.4f}: the mean of its ten best lines by the IoU of the mask at the "
        f"centre (by {grader['mask']}), {factor}."
    )


def _two_circles(results: Path) -> str:
    rows = shipped_rows(load(results, "p3_controlnet_two_circles"))
    if not rows:
        return ""
    cells = [
        [
            SET_LABELS[row["kind"], row["wording"]],
            str(row["sampling"]["seed"]),
            f"{row['iou']:.3f}",
            f"{row['iou_each']:.3f}",
            f"{row['iou_worst']:.2f}",
            *_measures(row)[1:],
            f"{row['failed']} of {row['layouts']}",
        ]
        for row in rows
    ]
    header = ["layouts", "seed", "IoU of all", "IoU of each", "worst circle", *COLUMNS[1:], "failed"]
    return joined(
        f"**Two circles**, which ControlNet never saw in training: ten fixed layouts, in one colour and in two. {STUDY}",
        _figure(results, "two_circles"),
        table(header, cells),
        _discussion(rows),
        verdict(two_circle_demands(results)),
        _captioned(results, "more_circles", "Three circles, two that touch, and one cut by the border:"),
    )


def _discussion(rows: Sequence[dict[str, Any]]) -> str:
    """The two sets compared, and every failure of theirs by name."""
    first = {(row["kind"], row["wording"]): row for row in reversed(rows)}
    if not all(key in first for key in MAIN_SETS):
        return ""
    shared, named = (first[key] for key in MAIN_SETS)
    easier = "harder" if named["circle_error"] > shared["circle_error"] + 1.0 else "no harder"
    text = (
        f"Two named colours are {easier} than one: their error is {named['circle_error']:.1f} against {shared['circle_error']:.1f}, at an "
        f"IoU of {named['iou']:.3f} against {shared['iou']:.3f}. "
    )
    alone = named.get("uncontrolled_circle_error")
    if alone is not None and named["circle_error"] > alone + 1.0:
        text += (
            f"Without control the same prompts' circles are {alone:.1f} off, so it is the control that mixes them up: in its training "
            "all outlines of a picture had one colour. "
        )
    lists = []
    for row, name in ((shared, "one colour"), (named, "two colours")):
        wrong = [
            f"layout {k} ({', '.join(line['failures'])})" for k, line in enumerate(row["lines"], 1) if line["failures"]
        ]
        lists.append(f"With {name}, {'no layout fails' if not wrong else 'these fail: ' + '; '.join(wrong)}.")
    return text + " ".join(lists)


def _canvas(results: Path) -> str:
    rows = shipped_rows(load(results, "p3_controlnet_canvas"))
    if not rows:
        return ""
    cells = [[_stride(row["stride"]), f"{row['iou_each']:.3f}", *_measures(row)] for row in rows]
    best = max(rows, key=lambda row: row["iou"])
    text = f"The highest IoU has the canvas drawn {_stride(best['stride'])} ({best['iou']:.3f})."
    return joined(
        f"**A canvas of 4 x 4 pictures** with seven circles, drawn patch by patch: in every step the latents and the control picture are "
        f"cut at the same places, and the network's outputs are blended. {STUDY}",
        _figure(results, "canvas"),
        table(["canvas", "IoU of each circle", *COLUMNS], cells),
        text,
    )


def _stride(stride: int | None) -> str:
    return "at once" if stride is None else f"in patches every {stride} latents"


def _speed(results: Path) -> str:
    found = load(results, "p3_controlnet_speed")
    if not found:
        return ""
    parts = [
        "**Speed and memory of training**, against diffusers' own step for the same networks; medians of runs that take turns."
    ]
    for size, name in (("sd14", "Stable Diffusion v1.4"), ("small", "The small model")):
        if size in found:
            parts.append(_speed_table(found[size], name))
    parts.append(
        "The step is what is compared. `p3_controlnet.train` also keeps the encoders, for its previews, and a moving average of the "
        "weights, which diffusers' script has not; their rows say what each costs."
    )
    if demands := speed_demands(results):
        parts.append(verdict(demands))
    return "\n\n".join(parts)


def _speed_table(part: dict[str, Any], name: str) -> str:
    header = ["training step", "images/s", "speed over diffusers'", "peak memory, GiB", "memory over diffusers'"]
    cells = [
        [
            RECIPE_LABELS.get(row["recipe"], f"this project's, {row['recipe']}"),
            f"{row['images_per_second']:.3g}",
            f"{row['speed']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['memory']:.2f}",
        ]
        for row in part["rows"]
    ]
    return (
        f"{name}, {part['batch_size']} x {part['image']}x{part['image']}, {part['threads']} threads. `{part['command']}`\n\n"
        f"{table(header, cells)}"
    )


# ----------------------------------------------------------------------------
# Rows and words.


def shipped_rows(found: Any) -> list[dict[str, Any]]:
    """The rows of the shipped model and control in a study's file (None: none), in the order of the study."""
    rows = found["rows"] if found else []
    return [row for row in rows if row["model"] == SHIPPED and row.get("control", SHIPPED_CONTROL) == SHIPPED_CONTROL]


def default_row(found: Any) -> dict[str, Any] | None:
    """The shipped model's row of default sampling, or its first."""
    rows = shipped_rows(found)
    return next((row for row in rows if not _changes(row["sampling"])), rows[0] if rows else None)


def label(sampling: dict[str, Any]) -> str:
    """How a row's pictures were drawn, by what differs from the default."""
    changes = _changes(sampling)
    return ", ".join(_change(name, value) for name, value in changes.items()) if changes else "the default"


def _changes(sampling: dict[str, Any]) -> dict[str, Any]:
    default = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(GenerationConfig(guidance_scale=DEFAULT_GUIDANCE_SCALE)).items()
    }
    return {name: value for name, value in sampling.items() if value != default.get(name)}


def _change(name: str, value: Any) -> str:
    if name == "guess_mode":
        return "guess mode"
    if isinstance(value, list):
        value = " ".join(f"{number:g}" for number in value)
    return f"{name.replace('_', ' ').replace('scales', 'scale')} {value}"


def _base_measures(row: dict[str, Any]) -> list[str]:
    errors = (f"{row[name]:.1f}" for name in ("error", "objects_error", "background_error"))
    return [*errors, f"{row['right']:.0%}", str(row["without_object"])]


def _measures(row: dict[str, Any]) -> list[str]:
    errors = (f"{row[name]:.1f}" for name in ("circle_error", "background_error"))
    return [f"{row['iou']:.3f}", *errors, *(f"{row[name]:.0%}" for name in ("circle_right", "background_right"))]


def _demand_table(demands: Sequence[Demand]) -> str:
    return table(["measured", "value", "demanded"], [[d.what, d.form(d.value), d.target] for d in demands])


def _figure(results: Path, name: str) -> str:
    return figure(results, FIGURES, name)


def _captioned(results: Path, name: str, words: str) -> str:
    """The picture under its caption, or nothing where it was not made yet."""
    link = _figure(results, name)
    return joined(words, link) if link else ""


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _precise(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _decibel(value: float) -> str:
    return f"{value:.1f} dB"
