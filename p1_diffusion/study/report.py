"""The Markdown tables of Problem 1, made from results/p1_*.json."""

from typing import Any

from common.diffusion.samplers import SAMPLERS
from common.report import Results, Tables, listing, table

DATASETS = {"mnistm": "MNIST-M", "svhn": "SVHN"}


def measured(results: Results) -> str:
    """Accuracy, Frechet distance, spread and nearest-training distance for both editions."""
    rows = [
        {"set": f"{edition}, {label}", **found["datasets"][name]}
        | {**found["quality"][name], **found["nearest_training"][name]}
        for edition in ("2024", "2025")
        for found in [results[f"p1_evaluation_{edition}"]]
        for name, label in DATASETS.items()
    ]
    columns = {
        "digits": "set text",
        "accuracy": "accuracy percent1",
        "Frechet distance": "frechet_distance number2",
        "of real digits": "frechet_distance_real number2",
        "ratio": "frechet_ratio number2",
        "spread / real": "spread_ratio number2",
        "nearest training image": "generated_median number1",
        "that of real digits": "held_out_median number1",
    }
    return table(rows, columns)


def guidance(results: Results) -> str:
    """The sweep over guidance strengths w: first at every timestep, then in the interval only."""

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return row["sampling"]["guidance_interval"][0], row["sampling"]["guide_w"]

    columns = {
        "w": "sampling.guide_w number",
        "guided at": lambda row: "t = {}..{}".format(*row["sampling"]["guidance_interval"]),
        **_for_both("accuracy", "accuracy percent1"),
        **_for_both("Frechet / real", "frechet_ratio number2"),
        **_for_both("spread / real", "spread_ratio number2"),
    }
    return table(sorted(results["p1_guidance"]["rows"], key=order), columns)


def _for_both(heading: str, column: str) -> dict[str, str]:
    """The same column for each dataset, under the heading "HEADING, DATASET"."""
    return {f"{heading}, {label}": f"datasets.{name}.{column}" for name, label in DATASETS.items()}


SAMPLER_COLUMNS = {
    "sampler": lambda row: SAMPLERS[row["sampling"]["sampler"]].label,
    "evaluations": "evaluations number",
    "images": "images number",
    "accuracy": "accuracy percent1",
    "Frechet / real": "frechet_ratio number2",
    "spread / real": "spread_ratio number2",
    "pixel spread / real": "pixel_spread_ratio number2",
    **_for_both("detail", "detail number1"),
    "ms per image": lambda row: f"{1000 * row['seconds'] / row['images']:.0f}",
}
RECIPE_COLUMNS = {
    "recipe": "name text",
    "held-out error of v": "validation_loss number4?",
    "accuracy": "accuracy percent",
    "Frechet / real": "frechet_ratio number1",
    "recognised, MNIST-M": "recognised.mnistm percent",
    "SVHN": "recognised.svhn percent",
}
LONG_RUN_COLUMNS = {
    **RECIPE_COLUMNS,
    **_for_both("accuracy", "accuracy percent"),
    **_for_both("detail", "detail number1"),
}


def denoising(results: Results) -> str:
    """Errors of each network over those of the Wiener filter, and slopes, at a few timesteps."""
    rows = []
    for run in results["p1_denoising"]["rows"]:
        for name, label in DATASETS.items():
            at = {error["t"]: error for error in run["errors"] if error["dataset"] == name}
            rows.append(
                {"network": run["name"].replace("_", " "), "dataset": label}
                | {f"error_{t}": at[t]["error"] / at[t]["wiener"] for t in (200, 500, 950)}
                | {f"slope_{t}": at[t]["slope"] for t in (200, 500, 950)}
            )
    columns = {"network": "network text", "digits": "dataset text"}
    for t in (200, 500, 950):
        columns |= {
            f"error / Wiener, t = {t}": f"error_{t} number2",
            f"slope, t = {t}": f"slope_{t} number2",
        }
    return table(rows, columns)


TABLES: Tables = {
    "p1_measured": measured,
    "p1_guidance": guidance,
    "p1_samplers": listing("p1_samplers rows[*]", SAMPLER_COLUMNS),
    "p1_denoising": denoising,
    "p1_recipes": listing("p1_recipes rows[images=64000]", RECIPE_COLUMNS),
    "p1_long_runs": listing("p1_recipes rows[images>64000]", LONG_RUN_COLUMNS),
}
