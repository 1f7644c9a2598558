"""What REPORT.md, the README and the model card say of CLIP zero-shot classification, made of results/p3_clip_*.json."""

from pathlib import Path
from typing import Any

from common.report import figure, joined, load, table
from p3_clip.evaluate import SCALES, wilson_interval
from p3_clip.study.figures import EACH

STUDY = "`bash scripts/study_clip.sh`"
BAR = 0.9  # top-1 on the held-out classes of the shapes
SECONDS = 10  # for a second run on 2,500 pictures
SETS = {"shapes": "Unseen coloured shapes, the small CLIP", "course": "The course's pictures, OpenAI's ViT-B/32"}
PROMPTS = ("single", "ensemble")
OUTCOMES = ("successes", "failures")


def section(results: Path) -> list[str]:
    """CLIP zero-shot classification in REPORT.md."""
    parts = [part for name in SETS for part in _set(results, name)]
    return [METHOD, *parts, *_speed(results)] if parts else []


def readme_rows(results: Path) -> list[list[str]]:
    """CLIP zero-shot classification in the README's table."""
    found = load(results, "p3_clip_shapes")
    if not found:
        return []
    task = f"P3, 2024, CLIP zero-shot, {found['classes']} unseen classes of coloured shapes"
    rows = [
        [task, f"top-1, {prompts} prompt", f"{_metrics(found, prompts)['acc1']:.1%}", f"at least {BAR:.0%}", STUDY]
        for prompts in PROMPTS
    ]
    speed = load(results, "p3_clip_speed")
    if speed:
        second = "{program, second run:.1f} s, {imports alone:.1f} s of it imports".format(**speed["seconds"])
        what = f"whole program, second run with another template on {speed['images']:,} images"
        rows.append([task, what, second, f"under {SECONDS} s", STUDY])
    return rows


def cards(results: Path) -> dict[str, list[str]]:
    """The numbers of the small CLIP's card."""
    found, evaluation = load(results, "p3_clip_shapes"), load(results, "p3_clip_shapes_evaluation")
    if not found or not evaluation:
        return {}
    return {"clip_shapes": [_accuracy(found, evaluation), *_colours(evaluation)]}


METHOD = """## Problem 3, 2024: CLIP zero-shot classification

**How CLIP does it.** An image tower f and a text tower g are trained on pairs so that the cosine of a picture and its own caption is
the largest in the batch, both ways (Radford et al. 2021, arXiv:2103.00020): the mean of the cross-entropies of the rows and of the columns
of the matrix τ · f(xᵢ)·g(yⱼ), with features of length one and a learned inverse temperature τ. A class then needs no training picture,
only its name: with the templates T₁ … Tₖ (a single one, or an ensemble) its weight vector is

    w_c = normalise( mean over k of normalise( g(Tₖ(name of c)) ) ),    p(c | x) = softmax over c of τ · f(x)·w_c,

built once for all pictures. Code: `p3_clip/model.py`, `common/clip/`; any model of open_clip and any weights:
`python3 -m p3_clip.inference --images DIR --labels id2label.json --model NAME --pretrained TAG_OR_FILE --output-dir OUT`."""

SHAPES = """The small CLIP ([its card](checkpoints/clip_shapes/README.md)) was trained here on drawn pictures of coloured shapes and the
real circles of fill50k. Its test is compositional: it saw every colour and every shape, but never these pairs of them (squares,
triangles and stars in CSS colours, drawn from a seed, colours of one shape at least 5 CIEDE2000 apart);
`scripts/make_clip_testset.py` writes the pictures in the course's file layout."""


def _set(results: Path, name: str) -> list[str]:
    """The paragraphs of one set of pictures."""
    found, evaluation = load(results, f"p3_clip_{name}"), load(results, f"p3_clip_{name}_evaluation")
    if not found or not evaluation:
        return []
    figures = f"p3_clip/{name}"
    text = (
        f"**{SETS[name]}**: {found['images']:,} pictures of {found['classes']} classes, chance is {1 / found['classes']:.0%}; "
        f"single template `{found['templates'][0]}`, ensemble of {len(found['ensemble']['templates'])}. {STUDY}"
    )
    parts = [
        text,
        *([SHAPES] if name == "shapes" else []),
        _accuracy(found, evaluation),
        _comparison(found),
        joined(_examples(found), figure(results, figures, "examples")),
        _mistakes(evaluation),
        figure(results, figures, "confusion"),
        _classes(evaluation),
        joined(_calibration(evaluation["calibration"]), figure(results, figures, "reliability")),
        *_colours(evaluation),
    ]
    return [part for part in parts if part]


def _examples(found: dict[str, Any]) -> str:
    """What the picture of examples shows: up to five of each, as many as there are."""
    right = round(found["metrics"]["acc1"] * found["images"])
    shown = [
        f"{min(EACH, count)} of {count:,} {what}"
        for count, what in zip((right, found["images"] - right), OUTCOMES, strict=True)
    ]
    return f"Drawn by a seed, of different classes where possible, {' and '.join(shown)} of the single template:"


def _metrics(found: dict[str, Any], prompts: str) -> dict[str, float]:
    return (found if prompts == "single" else found["ensemble"])["metrics"]


def _accuracy(found: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """Top-1 and top-5 of both kinds of prompts, with the 95 % intervals of Wilson."""

    def cell(value: float) -> str:
        low, high = wilson_interval(round(value * evaluation["images"]), evaluation["images"])
        return f"{value:.1%} ({low:.1%} to {high:.1%})"

    rows = []
    for prompts in PROMPTS:
        metrics = _metrics(found, prompts)
        rows.append([prompts, cell(metrics["acc1"]), cell(metrics["acc5"]), f"{metrics['mean_per_class_recall']:.1%}"])
    return table(["prompt", "top-1 (95 % interval)", "top-5 (95 % interval)", "mean recall of the classes"], rows)


def _comparison(found: dict[str, Any]) -> str:
    """What the ensemble changes, against the sampling error of one proportion."""
    single, ensemble = (_metrics(found, prompts)["acc1"] for prompts in PROMPTS)
    low, high = wilson_interval(round(single * found["images"]), found["images"])
    gain = f"The ensemble changes top-1 by {100 * (ensemble - single):+.1f} points"
    return f"{gain}, {'within' if low <= ensemble <= high else 'beyond'} the single template's interval."


def _mistakes(evaluation: dict[str, Any]) -> str:
    """The weakest classes and the most confused pairs."""
    pairs = evaluation["confused"]
    if not pairs:
        return "No picture is confused."
    weakest = [row for row in sorted(evaluation["per_class"], key=lambda row: row["recall"]) if row["recall"] < 1.0][:3]
    classes = ", ".join(f"{row['name']} ({row['recall']:.0%})" for row in weakest)
    rows = [[pair["truth"], pair["prediction"], str(pair["count"])] for pair in pairs]
    first = f"The weakest classes are {classes}" if len(weakest) > 1 else f"The one class with mistakes is {classes}"
    return f"{first}. The most confused pairs:\n\n" + table(["truth", "taken for", "pictures"], rows)


def _classes(evaluation: dict[str, Any]) -> str:
    """The table of all classes, folded."""
    rows = [
        [
            row["name"],
            f"{row['recall']:.0%}",
            "-" if row["precision"] is None else f"{row['precision']:.0%}",
            row["taken_for"] or "-",
        ]
        for row in evaluation["per_class"]
    ]
    content = table(["class", "recall", "precision", "most often taken for"], rows)
    return f"<details><summary>All {len(rows)} classes</summary>\n\n{content}\n\n</details>"


def _calibration(found: dict[str, Any]) -> str:
    """How far the probabilities can be believed."""
    start = (
        f"**Calibration.** The expected calibration error (Guo et al. 2017, {found['bins']} bins) is {found['ece']:.3f} at the model's "
        f"inverse temperature, {found['scale']:.1f}."
    )
    if not 1.01 * SCALES[0] < found["fitted_scale"] < 0.99 * SCALES[1]:
        return f"{start} Fitted to every second picture it has no finite optimum: every one of them is right, or they say nothing of it."
    fitted, scale = (f"{found[name]:.1f}" for name in ("fitted_scale", "scale"))
    before, after = (f"{found[name]:.3f}" for name in ("ece_unfitted", "ece_fitted"))
    sure = "too sure" if found["fitted_scale"] < found["scale"] else "not sure enough"
    sure = "about as sure of itself as it should be" if fitted == scale else f"{sure} of itself"
    direction = "goes down" if found["ece_fitted"] < found["ece_unfitted"] else "goes up"
    change = f"stays at {after}" if before == after else f"{direction} from {before} to {after}"
    return f"{start} Fitted to every second picture it becomes {fitted}, so the model is {sure}; on the other half the error {change}."


def _colours(evaluation: dict[str, Any]) -> list[str]:
    """Accuracy by the distance of colours, among the test's classes and among all colours and shapes."""
    found = evaluation.get("colours")
    if not found:
        return []
    harder = found["open"]
    parts = []
    for rows in (found["by_distance"], harder["by_distance"]):
        what = next(iter(rows[0]))
        cells = [[row[what], f"{row['images']:,}", f"{row['acc1']:.1%}"] for row in rows]
        parts.append(table([f"CIEDE2000 to the {what}", "pictures", "top-1"], cells))
    text = (
        f"**How near may colours be?** Top-1 by the distance to the nearest other class of the same shape; and, harder, among all "
        f"{harder['classes']} colours and shapes, neighbours included: top-1 {harder['acc1']:.1%}, the shape right in "
        f"{harder['kind_right']:.1%}, the shape right and a colour within 5 of the true one in {harder['within_5']:.1%}; the colours "
        f"named are {harder['mean_colour_distance']:.1f} from the true ones on average."
    )
    return [text, *parts]


def _speed(results: Path) -> list[str]:
    """The loop of open_clip's README against this project's, in one run."""
    found = load(results, "p3_clip_speed")
    if not found:
        return []
    plain = found["seconds"]["open_clip loop"]
    rows = [
        [name, f"{seconds:.1f}", f"{found['images'] / seconds:,.0f}", f"{plain / seconds:.1f}"]
        for name, seconds in found["seconds"].items()
    ]
    text = (
        f"**Speed** on {found['images']:,} pictures, {found['model']}, medians of {found['repeats']} runs, {found['threads']} threads. "
        "Features alone: the loop of "
        "open_clip's README, this project's (pictures read ahead, cache empty), and its second run, with features from the cache. "
        'The rows "program" are whole processes of `p3_clip.inference`, the second with the features of the first and another '
        f"template; what importing PyTorch and open_clip alone takes is the row before them.\n{STUDY}"
    )
    gain = plain / found["seconds"]["this project, first run"]
    verdict = "pays" if gain > 1.05 else "gains nothing" if gain > 0.95 else "costs more than it gains"
    remark = f"Reading ahead {verdict} here: a first run has {gain:.2f} times the loop's speed"
    if found["device"] == "cpu" and gain <= 1.05:
        remark += ", since on the CPU the network and the reading share the same cores"
    return [f"{text}\n\n{table(['', 'seconds', 'images/s', 'times the loop'], rows)}\n\n{remark}."]
