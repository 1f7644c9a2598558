"""The Markdown tables of Problem 2, made from results/p2_*.json."""

from common.diffusion.samplers import SAMPLERS
from common.report import Results, Tables, listing, table

MEASURES = {
    "contrast, grey levels": "contrast number1",
    "detail, grey levels": "detail number1",
    "Frechet distance to photos": "frechet_distance number3",
}


def eta(results: Results) -> str:
    """Metrics for each eta, and the MSE to the images of eta 0; the last row is held-out photos."""
    found = results["p2_eta"]
    rows = [{"images": f"eta {row['eta']:g}"} | row for row in found["rows"]]
    for row in rows:
        row["share"] = row["mse"] / found["unrelated_mse"]
    columns = {
        "images": "images text",
        "MSE to eta 0": "mse number1?",
        "over that of two noises": "share percent?",
    }
    return table([*rows, {"images": "photos"} | found["real"]], {**columns, **MEASURES})


def paths(results: Results) -> str:
    """Metrics at alpha 0, 0.5 and 1 of each interpolation; the last row is held-out photos."""
    found = results["p2_paths"]
    rows = [row for row in found["rows"] if row["alpha"] in (0.0, 0.5, 1.0)]
    columns = {"path": "path text", "alpha": "alpha number?", "norm / sqrt(d)": "norm number3?"}
    return table([*rows, {"path": "photos", **found["real"]}], {**columns, **MEASURES})


STEP_COLUMNS = {
    "sampler": lambda row: SAMPLERS[row["sampler"]].label,
    "spacing": "spacing text",
    "evaluations": "evaluations number",
    "MSE": "mse number2",
    "standard error": "mse_standard_error number2",
}
FEATURE_COLUMNS = {
    "held-out photos": "photos text",
    "Frechet distance to the training photos": "frechet_distance number3",
    "over the unchanged": "ratio number2",
}
SPEED_COLUMNS = {
    "step": "name text",
    "seconds": "seconds number2",
    "speed over naive": "speed_over_naive number2",
    "of the measured peak": "fraction_of_peak percent",
    "minutes for ten faces": "minutes_for_ten_faces number1",
}
TABLES: Tables = {
    "p2_eta": eta,
    "p2_paths": paths,
    "p2_steps": listing("p2_steps rows[*]", STEP_COLUMNS),
    "p2_features": listing("p2_features rows[*]", FEATURE_COLUMNS),
    "p2_speed": listing("p2_speed rows[*]", SPEED_COLUMNS),
}
