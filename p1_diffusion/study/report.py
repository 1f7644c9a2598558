"""What REPORT.md, the README and the model cards say of Problem 1, made of results/p1_*.json."""

from pathlib import Path
from typing import Any

from common.data.digits import DATASETS
from common.report import load, table

LABELS = {"mnistm": "MNIST-M", "svhn": "SVHN"}
TARGETS = {"accuracy": "97 %", "frechet": "at most 6", "spread": "at least 0.8"}  # on the 1000 images of the 2024 set
ALWAYS = [0, 999]  # guidance at every t
SAMPLER_LABELS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "heun": "Heun"}


def section(results: Path) -> list[str]:
    """Problem 1 in REPORT.md."""
    evaluation = load(results, "p1_evaluation_2024")
    if not evaluation:
        return []
    parts = [METHOD, GRIDS, _numbers(results), REVERSE]
    guidance, samplers = load(results, "p1_guidance"), load(results, "p1_samplers")
    if guidance:
        parts.append(_guidance(guidance["rows"], guidance["command"]))
    if samplers:
        parts.append(_samplers(samplers["rows"], samplers["command"]))
    return parts


def readme_rows(results: Path) -> list[list[str]]:
    """Problem 1 in the README's table."""
    rows = []
    for edition in ("2025", "2024"):
        found = load(results, f"p1_evaluation_{edition}")
        if found:
            for dataset in DATASETS:
                accuracy, quality = found["datasets"][dataset]["accuracy"], found["quality"][dataset]
                task, command = f"P1, {edition} set, {LABELS[dataset]}", "`bash scripts/study_p1.sh`"
                target = TARGETS if edition == "2024" else dict.fromkeys(TARGETS, "-")
                rows.append([task, "accuracy (project's classifier)", f"{accuracy:.1%}", target["accuracy"], command])
                ratio, spread = quality["frechet_ratio"], quality["spread_ratio"]
                rows.append([task, "Frechet distance / real at equal N", f"{ratio:.2f}", target["frechet"], command])
                rows.append([task, "within-class spread / real", f"{spread:.2f}", target["spread"], command])
    return rows


def cards(results: Path) -> dict[str, list[str]]:
    """The numbers of Problem 1's model cards."""
    return {"p1_digits": _measured(results), "p1_grader": _judge(results)}


def recipes(results: Path) -> str:
    """The table of docs/experiments.md: what trainings on equal numbers of images came to, without guidance."""
    header = ["recipe", "held-out error of v", "accuracy", "Frechet / real", "recognised, MNIST-M", "SVHN"]
    rows = [
        [
            row["name"],
            f"{row['validation_loss']:.4f}",
            f"{row['accuracy']:.0%}",
            f"{row['frechet_ratio']:.1f}",
            *[f"{row['recognised'][dataset]:.0%}" for dataset in DATASETS],
        ]
        for row in load(results, "p1_recipes")["rows"]
    ]
    return table(header, sorted(rows))


METHOD = """## Problem 1: conditional diffusion on digits

**Method.** One network for both datasets predicts v (Salimans and Ho 2022) on a cosine schedule of 1000 steps with the
weight min(SNR + 1, 5) on the error of x0. It is a U-Net whose first down-sampling is a
pixel-unshuffle, so all work is done at 14x14 and 7x7; time,
digit and dataset are embedded, summed, and scale and shift every residual block. The digit is hidden in a tenth of the training
images, the dataset never: guidance (w) pulls towards the digit and leaves the dataset's look alone. It acts at t = 150..700 only
(guidance in an interval, Kynkäänniemi et al. 2024, arXiv:2404.07724): the table of the guidance sweep has both. SVHN's unbalanced classes
are drawn equally often. A tenth of the real digits was held out from every model. Code: `p1_diffusion/`, `common/`; training:
`bash scripts/train_p1.sh`; model card: [checkpoints/p1_digits](checkpoints/p1_digits/README.md)."""

GRIDS = """**Ten images of each digit** (2024: one grid for each dataset; 2025: even digits from MNIST-M, odd ones from SVHN). Rows are
digits, columns are noises. Nothing was picked: these are the images number 1 to 10 of `bash hw2_1.sh OUT 2024`, drawn by
`python3 -m p1_diffusion.study.figures`.

| MNIST-M | SVHN | mixed |
| --- | --- | --- |
| ![](results/figures/p1/grid_mnistm.png) | ![](results/figures/p1/grid_svhn.png) | ![](results/figures/p1/grid_mixed.png) |"""

REVERSE = """**The reverse process**, six moments from pure noise to the image: the first 0 and the first 1 (2025), and the first 0 of
each dataset (2024). `python3 -m p1_diffusion.study.figures`

![](results/figures/p1/reverse_2025.png)

![](results/figures/p1/reverse_2024.png)"""


def _measured(results: Path) -> list[str]:
    """The table of the grader's accuracy and of what the grader does not see."""
    rows = []
    for edition in ("2025", "2024"):
        found = load(results, f"p1_evaluation_{edition}")
        if not found:
            continue
        for dataset in DATASETS:
            part, quality = found["datasets"][dataset], found["quality"][dataset]
            nearest = found.get("nearest_training", {}).get(dataset)
            rows.append(
                [
                    f"{edition}, {LABELS[dataset]}",
                    f"{part['accuracy']:.1%}",
                    f"{quality['frechet_distance']:.2f}",
                    f"{quality['frechet_distance_real']:.2f}",
                    f"{quality['spread_ratio']:.2f}",
                    f"{nearest['generated_median']:.1f} / {nearest['held_out_median']:.1f}" if nearest else "-",
                ]
            )
    header = [
        "set",
        "accuracy",
        "Frechet distance",
        "of real digits",
        "spread / real",
        "nearest training image / of real",
    ]
    return [table(header, rows)] if rows else []


def _judge(results: Path) -> list[str]:
    """The accuracy of the classifier that judges, on held-out real digits."""
    found = load(results, "p1_evaluation_2024")
    if not found:
        return []
    rows = [[LABELS[dataset], f"{value:.2%}"] for dataset, value in found["judge_accuracy"].items()]
    return [table(["held-out real digits", "accuracy"], rows)]


def _numbers(results: Path) -> str:
    """The measured numbers, with the weakest digit and the most frequent confusion."""
    parts = load(results, "p1_evaluation_2024")["datasets"]
    remarks = [f"On {LABELS[dataset]} {_weakest(parts[dataset])}" for dataset in DATASETS]
    text = (
        "**Measured** by a classifier trained by this project on real digits (`p1_diffusion/study/train_classifier.py`):\n"
        "its accuracy, the Frechet distance of its features to those of the real training digits beside that of equally many\n"
        "held-out real digits,\n"
        "the spread within a class relative to real, and the median distance to the nearest training image (root mean square over\n"
        "pixels, 0..255) beside that of held-out digits, which says whether images are copied. `bash scripts/study_p1.sh`"
    )
    return "\n\n".join([text, *_measured(results), " ".join(remarks)])


def _weakest(part: dict[str, Any]) -> str:
    digit, value = min(part["accuracy_by_digit"].items(), key=lambda item: item[1])
    confusions = [(n, a, p) for a, row in enumerate(part["confusion"]) for p, n in enumerate(row) if a != p and n]
    if not confusions:
        return "every digit is recognised."
    count, asked, predicted = max(confusions)
    return (
        f"the weakest digit is {digit} ({value:.0%}), and the most frequent confusion is a {asked} that is read as "
        f"{predicted} ({count} of 50)."
    )


def _guidance(rows: list[dict[str, Any]], command: str) -> str:
    """The guidance sweep with what it shows."""
    rows = sorted(rows, key=lambda row: (row["sampling"]["guidance_interval"] != ALWAYS, row["sampling"]["guide_w"]))
    cells = [
        [
            f"{row['sampling']['guide_w']:g}",
            _where(row),
            *(f"{row['datasets'][d]['accuracy']:.1%}" for d in DATASETS),
            *(f"{row['datasets'][d]['frechet_ratio']:.2f}" for d in DATASETS),
            *(f"{row['datasets'][d]['spread_ratio']:.2f}" for d in DATASETS),
        ]
        for row in rows
    ]
    header = [
        "w",
        "guided at",
        *(f"{what}, {LABELS[d]}" for what in ("accuracy", "Frechet / real", "spread / real") for d in DATASETS),
    ]
    everywhere = [row for row in rows if row["sampling"]["guidance_interval"] == ALWAYS]
    none, strong = everywhere[0], everywhere[-1]
    nearest = min(rows, key=lambda row: row["frechet_ratio"])
    text = (
        f"Guided along the whole trajectory, from w = {none['sampling']['guide_w']:g} to "
        f"{strong['sampling']['guide_w']:g} the mean accuracy goes from {none['accuracy']:.1%} to {strong['accuracy']:.1%} "
        f"and the spread from {none['spread_ratio']:.2f} to {strong['spread_ratio']:.2f} of real. The distance to real "
        f"digits is smallest at w = {nearest['sampling']['guide_w']:g}, guided at {_where(nearest)} "
        f"({nearest['frechet_ratio']:.2f} times real against real). {_within_targets(rows)}"
    )
    return (
        f"**Guidance.** {rows[0]['images']} images for each row, the 2024 classes, {rows[0]['evaluations']} evaluations; "
        f"along the whole trajectory, and in an interval of t alone (Kynkäänniemi et al. 2024). "
        f"`{command}`\n\n![](results/figures/p1/guidance.png)\n\n{table(header, cells)}\n\n{text}"
    )


def _where(row: dict[str, Any]) -> str:
    """The t at which a row's guidance acts."""
    low, high = row["sampling"]["guidance_interval"]
    return "every t" if [low, high] == ALWAYS else f"t = {low}..{high}"


def _within_targets(rows: list[dict[str, Any]]) -> str:
    """Which rows reach all targets on both datasets: accuracy 97 %, Frechet distance 6 times real, spread 0.8 of real."""
    reached = [
        f"w = {row['sampling']['guide_w']:g} at {_where(row)}"
        for row in rows
        if all(
            part["accuracy"] >= 0.97 and part["frechet_ratio"] <= 6.0 and part["spread_ratio"] >= 0.8
            for part in row["datasets"].values()
        )
    ]
    which = ", ".join(reached) if reached else "no row"
    return f"Accuracy of 97 %, a distance of at most 6 times real and a spread of 0.8 on both datasets: {which}."


def _samplers(rows: list[dict[str, Any]], command: str) -> str:
    """The table of samplers with what it shows."""
    cells = [
        [
            SAMPLER_LABELS[row["sampling"]["sampler"]],
            str(row["evaluations"]),
            str(row["images"]),
            f"{row['accuracy']:.1%}",
            f"{row['frechet_ratio']:.2f}",
            f"{row['spread_ratio']:.2f}",
            f"{1000 * row['seconds'] / row['images']:.0f}",
        ]
        for row in rows
    ]
    header = [
        "sampler",
        "evaluations",
        "images",
        "accuracy",
        "Frechet / real at equal N",
        "spread / real",
        "ms an image",
    ]
    few = [row for row in rows if row["evaluations"] <= 25]
    best = min(few, key=lambda row: row["frechet_ratio"])
    text = (
        f"With at most 25 evaluations the smallest distance is that of {SAMPLER_LABELS[best['sampling']['sampler']]} at "
        f"{best['evaluations']} ({best['frechet_ratio']:.2f} times real against real). Distances are comparable between rows of "
        "equal image counts."
    )
    return f"**Samplers**, at the default guidance; means of both datasets. `{command}`\n\n{table(header, cells)}\n\n{text}"
