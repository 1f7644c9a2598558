"""What REPORT.md, the README and the model cards say of Problem 2, made of results/p2_*.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.report import figure, joined, load, table
from p2_ddim.evaluate import PASS_BELOW

FIGURES = "p2"
STUDY = "`bash scripts/study_p2.sh`"
BENCHMARK = "`python3 scripts/benchmark_p2.py`"
SPEED_BAR = 1.1  # times the naive step's speed
KEPT = 1.1  # quality counts as kept up to so many times the distance at a path's ends
MEASURES = {
    "contrast": "contrast, grey levels",
    "detail": "detail, grey levels",
    "frechet_distance": "Frechet distance to photos",
}
SAMPLER_LABELS = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)"}
STEP_LABELS = {"naive": "naive", "this project": "this project's", "diffusers": "diffusers'"}

Row = dict[str, Any]


def section(results: Path) -> list[str]:
    """Problem 2 in REPORT.md."""
    parts = [part(results) for part in (_eta, _paths, _steps, _faces, _features, _speed)]
    parts = [part for part in parts if part]
    return [METHOD, *parts] if parts else []


def readme_rows(results: Path) -> list[list[str]]:
    """Problem 2 in the README's table."""
    rows = []
    if found := load(results, "p2_faces"):
        task, near = f"P2, {found['images']} faces of 64x64", found["nearest_photo"]
        ratio, seen = found["quality"]["frechet_ratio"], _seen_over_unseen(near)
        rows.append([task, "Frechet distance / real at equal N", f"{ratio:.2f}", "-", STUDY])
        rows.append([task, "distance to seen / to unseen photos (1: no copies)", f"{seen:.2f}", "-", STUDY])
    if found := load(results, "p2_speed"):
        own, task = _own(found["rows"]), f"P2, full-size step, {found['device'].upper()}"
        target = f"at least {SPEED_BAR:g}"
        rows.append([task, "speed over the naive step", f"{own['speed_over_naive']:.2f}", target, BENCHMARK])
        rows.append([task, "speed over diffusers' step", f"{_over_diffusers(found['rows']):.2f}", "-", BENCHMARK])
    return rows


def cards(results: Path) -> dict[str, list[str]]:
    """The numbers of Problem 2's model cards."""
    faces, features = load(results, "p2_faces"), load(results, "p2_features")
    found = {}
    if faces:
        found["p2_faces"] = [_quality_table(faces), _nearest_table(faces["nearest_photo"])]
    if features:
        found["p2_features"] = [_recognition(features), _changes_table(features)]
    return found


METHOD = """## Problem 2: DDIM on faces

**Method.** A face is what DDIM makes of a fixed noise (Song et al. 2020, arXiv:2010.02502, Equations 12 and 16). With abar the
cumulative product of 1 - beta, p the index after t, and eps the network's output at x_t and t:

```
x0    = clamp((x_t - sqrt(1 - abar[t]) eps) / sqrt(abar[t]), -1, 1)
sigma = eta sqrt((1 - abar[p]) / (1 - abar[t])) sqrt(1 - abar[t] / abar[p])
x_p   = sqrt(abar[p]) x0 + sqrt(1 - abar[p] - sigma^2) eps + sigma z,    z ~ N(0, I)
```

The convention is that of the homework's reference faces: 1000 betas in equal steps from 0.0001 to 0.02; t = 981, 961, ..., 21, 1,
and after the last step abar[0] = 0.9999, not 1; eps is not recomputed after the clamp; eta is 0; each image is stretched from its own
smallest and largest value. `python3 -m p2_ddim.study.calibrate` finds it among eight conventions from one noise and its image. With the
course's `UNet.pt` (114 million weights, 256x256) `bash hw2_2.sh NOISE_DIR OUT UNET.pt` follows it; without, it samples the model that
was trained here on 64x64 photos: the same class of U-Net, on squares of 4x4 pixels, with v prediction (Salimans and Ho 2022,
arXiv:2202.00512). Code: `p2_ddim/`, `common/diffusion/` (samplers, interpolation); training: `bash scripts/train_p2.sh`."""


# ----------------------------------------------------------------------------
# What fresh noise does.


def _eta(results: Path) -> str:
    found = load(results, "p2_eta")
    if not found:
        return ""
    rows, unrelated, real = found["rows"], found["unrelated_mse"], found["real"]
    measures = _measures(rows)
    cells = [
        [f"{row['eta']:g}", f"{row['mse']:.1f}", f"{row['mse'] / unrelated:.0%}", *_values(row, measures)]
        for row in rows
    ]
    if real:
        cells.append(["photos", "-", "-", *_values(real, measures)])
    header = ["eta", "MSE to eta 0", "over that of two noises", *(MEASURES[name] for name in measures)]
    return joined(
        f"**Fresh noise.** Rows are eta, columns the first four noises; in a column the fresh noise is the same but for its strength. "
        f"Nothing was picked: these are the noises of `python3 scripts/make_noise.py`. {STUDY}",
        figure(results, FIGURES, "eta"),
        f"Over {found['images']} noises, {found['steps']} steps of `{found['model']}`; contrast is the spread within an image, detail the "
        f"difference of neighbouring pixels{_features_note(found)}:",
        table(header, cells),
        _eta_finding(rows, unrelated, real),
    )


def _eta_finding(rows: Sequence[Row], unrelated: float, real: Row | None) -> str:
    """What eta does, by the numbers."""
    first, last = rows[0], rows[-1]
    share = last["mse"] / unrelated
    decides = (
        "the first noise still decides most of the face" if share < 0.5 else "the fresh noise decides most of the face"
    )
    detail = "more" if last["detail"] > first["detail"] else "less"
    text = (
        f"At eta {last['eta']:g} the mean squared error to the image of eta 0 is {share:.0%} of that between faces of two noises "
        f"({last['mse']:.1f} of {unrelated:.1f}): {decides}. The images have {detail} detail than at eta {first['eta']:g} "
        f"({last['detail']:.1f} against {first['detail']:.1f}{_of_photos(real, 'detail', 1)})."
    )
    if "frechet_distance" not in first:
        return text
    best = min(rows, key=lambda row: row["frechet_distance"])
    return (
        f"{text} The Frechet distance to photos is smallest at eta {best['eta']:g} ({best['frechet_distance']:.3f}"
        f"{_of_photos(real, 'frechet_distance', 3)})."
    )


# ----------------------------------------------------------------------------
# Between two noises.


def _paths(results: Path) -> str:
    found = load(results, "p2_paths")
    if not found:
        return ""
    rows, real = found["rows"], found["real"]
    measures = _measures(rows)
    lines = _lines(rows)
    cells = [
        [name, f"{row['alpha']:g}", f"{row['norm']:.3f}", *_values(row, measures)]
        for name, line in lines.items()
        for row in (line[0], _halfway(line), line[-1])
    ]
    if real:
        cells.append(["photos", "-", "-", *_values(real, measures)])
    header = ["path", "alpha", "norm / sqrt(d)", *(MEASURES[name] for name in measures)]
    return joined(
        f"**Between two noises**, alpha = 0.0, 0.1, ..., 1.0 from noise 00 to noise 01: along the great circle (slerp, over the flattened "
        f"tensor; Shoemake 1985) and along the straight line (lerp). The strips are stretched as the homework's images are, which hides "
        f"lost contrast; what is measured is not. {STUDY}",
        figure(results, FIGURES, "slerp"),
        figure(results, FIGURES, "lerp"),
        f"Over {found['pairs']} pairs of noises, {found['evaluations']} evaluations of `{found['model']}`{_features_note(found)}; "
        "`python3 -m p2_ddim.study.sweeps paths`:",
        figure(results, FIGURES, "paths"),
        table(header, cells),
        " ".join([_norms(lines), *(_quality_along(name, line, real) for name, line in lines.items()), _better(lines)]),
    )


def _norms(lines: dict[str, list[Row]]) -> str:
    halves = " and ".join(f"{_halfway(line)['norm']:.3f} sqrt(d) along {name}" for name, line in lines.items())
    return f"Halfway the norm of the noise is {halves}; a straight line between independent noises dips to 1 / sqrt(2) = 0.707."


def _quality_along(name: str, line: Sequence[Row], real: Row | None) -> str:
    """What becomes of the images along a path, relative to its ends."""
    half, words = _halfway(line), []
    for measure in ("contrast", "detail"):
        words.append(f"{half[measure] / _at_ends(line, measure):.0%} of the {measure}")
    text = f"Halfway along {name} the images have {' and '.join(words)} of those at its ends"
    if "frechet_distance" not in half:
        return f"{text}."
    rise, where = _rise(line)
    text += (
        f"; the Frechet distance is at most {rise:.2f} times that of the ends (at alpha {where['alpha']:g}), so the quality "
        f"{'is kept' if rise <= KEPT else 'is not kept'}."
    )
    best = min(line, key=lambda row: row["frechet_distance"])
    if best in (line[0], line[-1]):
        return text
    return (
        f"{text} It is smallest at alpha {best['alpha']:g} ({best['frechet_distance']:.3f}), where the norm is {best['norm']:.3f} sqrt(d) "
        f"and the detail {best['detail']:.1f} (at the end {line[0]['detail']:.1f}{_of_photos(real, 'detail', 1)})."
    )


def _better(lines: dict[str, list[Row]]) -> str:
    """Which path's images stay nearer to photos."""
    if not all("frechet_distance" in row for line in lines.values() for row in line):
        return ""
    first, last = (lines["slerp"][k]["frechet_distance"] for k in (0, -1))
    chance = f" The ends are faces of noises as good as each other: what they differ by ({first:.3f} and {last:.3f}) is chance."
    slerp, lerp = (_rise(lines[name])[0] for name in ("slerp", "lerp"))
    if slerp < lerp:
        return f"The great circle stays nearer to what the network was trained on.{chance}"
    return f"In this measure the straight line is no worse than the great circle.{chance}"


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each path, by alpha."""
    rows = sorted(rows, key=lambda row: row["alpha"])
    return {name: [row for row in rows if row["path"] == name] for name in ("slerp", "lerp")}


def _halfway(line: Sequence[Row]) -> Row:
    return min(line, key=lambda row: abs(row["alpha"] - 0.5))


def _at_ends(line: Sequence[Row], measure: str) -> float:
    return (line[0][measure] + line[-1][measure]) / 2.0


def _rise(line: Sequence[Row]) -> tuple[float, Row]:
    """The largest Frechet distance along the path over that of its ends, which are weighted by how near they are, and where."""

    def over_ends(row: Row) -> float:
        first, last = line[0]["frechet_distance"], line[-1]["frechet_distance"]
        return row["frechet_distance"] / ((1.0 - row["alpha"]) * first + row["alpha"] * last)

    worst = max(line, key=over_ends)
    return over_ends(worst), worst


# ----------------------------------------------------------------------------
# How few steps suffice.


def _steps(results: Path) -> str:
    found = load(results, "p2_steps")
    if not found:
        return ""
    rows = found["rows"]
    cells = [
        [
            SAMPLER_LABELS[row["sampler"]],
            row["spacing"],
            str(row["evaluations"]),
            f"{row['mse']:.2f}",
            f"{row['mse_standard_error']:.2f}",
        ]
        for row in rows
    ]
    return joined(
        f"**How few steps suffice.** The mean squared error (grey levels) to {found['reference_steps']} steps of DDIM from the same "
        f"{found['images']} noises, `{found['model']}`. The homework's spacing starts at t = 981 for 50 steps and at 901 for 10, with the "
        "same noise as at 999, where the trailing spacing and the reference start. `python3 -m p2_ddim.study.sweeps steps`",
        figure(results, FIGURES, "steps"),
        table(["sampler", "spacing", "evaluations", "MSE", "standard error"], cells),
        _steps_finding(rows),
    )


def _steps_finding(rows: Sequence[Row]) -> str:
    """Which rows come close, and which of two comes closer."""
    close = [row for row in rows if row["mse"] < PASS_BELOW]
    if close:
        first = min(close, key=lambda row: (row["evaluations"], row["mse"]))
        text = (
            f"The fewest evaluations within the homework's bar, an MSE below {PASS_BELOW:g}, are {first['evaluations']} of "
            f"{SAMPLER_LABELS[first['sampler']]} in {first['spacing']} spacing ({first['mse']:.2f})."
        )
    else:
        text = f"No row is within the homework's bar, an MSE below {PASS_BELOW:g}."
    found = {(row["sampler"], row["spacing"], row["evaluations"]): row["mse"] for row in rows}
    spacings = [
        (mse, found[sampler, "homework", count])
        for (sampler, spacing, count), mse in found.items()
        if spacing == "trailing" and (sampler, "homework", count) in found
    ]
    solvers = [
        (mse, found["ddim", spacing, count])
        for (sampler, spacing, count), mse in found.items()
        if sampler == "dpmpp_2m" and ("ddim", spacing, count) in found
    ]
    for name, other, pairs in (
        ("the trailing spacing", "the homework's", spacings),
        (SAMPLER_LABELS["dpmpp_2m"], SAMPLER_LABELS["ddim"], solvers),
    ):
        if pairs:
            wins = sum(ours < theirs for ours, theirs in pairs)
            text += f" At equal evaluations {name} is closer than {other} in {wins} of {len(pairs)} comparisons."
    return text


# ----------------------------------------------------------------------------
# The face model, and the features that it is judged in.


def _faces(results: Path) -> str:
    found = load(results, "p2_faces")
    if not found:
        return ""
    near, quality = found["nearest_photo"], found["quality"]
    nearer = near["generated_median"] / near["held_out_median"]
    seen = _seen_over_unseen(near)
    return joined(
        f"**The face model**, trained here on nine tenths of the photos: [its card](checkpoints/p2_faces/README.md). "
        f"{found['images']} faces from other noises than above, 50 steps of DDIM, without the stretch; the first 32 are shown. {STUDY}",
        figure(results, FIGURES, "faces"),
        _quality_table(found),
        f"The distance is {quality['frechet_ratio']:.2f} times that of as many real photos that were held out.",
        "The nearest photo or its mirror image, root mean square over pixels, 0..255:",
        _nearest_table(near),
        f"From the training photos the generated faces are {near['generated_median']:.1f} away (median), {_beside(nearer)} the held-out "
        f"photos' {near['held_out_median']:.1f}. From photos that the model has seen they are {near['generated_to_seen_median']:.1f} away, "
        f"{_beside(seen)} the {near['generated_to_held_out_median']:.1f} from as many that it has not. Smooth faces are near to "
        f"everything; the second comparison would show if photos were copied: {'they are' if seen < 0.95 else 'no sign of it'}.",
    )


def _beside(ratio: float) -> str:
    """One distance beside another, in words, by their ratio."""
    if 0.95 <= ratio <= 1.05:
        return "about"
    return f"{abs(1.0 - ratio):.0%} {'below' if ratio < 1.0 else 'above'}"


def _seen_over_unseen(near: dict[str, float]) -> float:
    return near["generated_to_seen_median"] / near["generated_to_held_out_median"]


def _quality_table(found: Row) -> str:
    quality = found["quality"]
    cells = [[f"{quality[name]:.3f}" for name in ("frechet_distance", "frechet_distance_real")]]
    header = [
        f"Frechet distance of {quality['count']} faces to the training photos",
        "of as many held-out photos",
        "features",
    ]
    return table(header, [[*cells[0], quality["features"]]])


def _nearest_table(near: dict[str, float]) -> str:
    labels = {
        "generated": "generated faces to training photos",
        "held_out": "held-out photos to training photos",
        "generated_to_seen": "generated faces to as many training photos as were held out",
        "generated_to_held_out": "generated faces to held-out photos",
    }
    cells = [[label, f"{near[f'{name}_median']:.1f}", f"{near[f'{name}_min']:.1f}"] for name, label in labels.items()]
    return table(["nearest photo", "median", "smallest"], cells)


def _features(results: Path) -> str:
    found = load(results, "p2_features")
    if not found:
        return ""
    return joined(
        "**What the features see.** The Frechet distance is taken in the features of a small network that learned, without labels, to "
        "recognise a photo that is cropped, turned and recoloured (SimCLR, Chen et al. 2020, arXiv:2002.05709; "
        "`bash scripts/train_p2_features.sh`). `python3 -m p2_ddim.study.evaluate_features --photos hw2_data/face`",
        _recognition(found),
        _changes_table(found),
    )


def _recognition(found: Row) -> str:
    return f"Of {found['among']} held-out photos {found['recognised']:.0%} are recognised among all of them."


def _changes_table(found: Row) -> str:
    cells = [[row["photos"], f"{row['frechet_distance']:.3f}", f"{row['ratio']:.2f}"] for row in found["rows"]]
    header = [f"{found['held_out']} held-out photos", "Frechet distance to the training photos", "over the unchanged"]
    return table(header, cells)


# ----------------------------------------------------------------------------
# Speed.


def _speed(results: Path) -> str:
    found = load(results, "p2_speed")
    if not found:
        return ""
    rows = found["rows"]
    cells = [
        [
            STEP_LABELS[row["name"]],
            f"{row['seconds']:.3g}",
            f"{row['speed_over_naive']:.2f}",
            f"{row['fraction_of_peak']:.0%}",
            f"{row['minutes_for_ten_faces']:.1f}",
        ]
        for row in rows
    ]
    own = _own(rows)
    verdict = "reaches" if own["speed_over_naive"] >= SPEED_BAR else "misses"
    return joined(
        f"**Speed.** One DDIM step of the full-size network with random weights on one {found['side']}x{found['side']} image, float32, "
        f"{found['device'].upper()}, {found['threads']} threads; the fastest of {found['rounds']} rounds that take turns. {BENCHMARK}",
        table(["step", "seconds", "speed over naive", "of the measured peak", "minutes for ten faces"], cells),
        f"This project's step {verdict} {SPEED_BAR:g} times the naive speed ({own['speed_over_naive']:.2f}) and has "
        f"{_over_diffusers(rows):.2f} times that of diffusers' `UNet2DModel` and `DDIMScheduler` of the same size. The peak, "
        f"{found['peak_gflop_per_s']:.0f} GFLOP/s, is that of the fastest of the network's own convolutions; operations are counted as the "
        f"network is written ({found['gflop']:.0f} GFLOP a step), of which this project's folded up-samplings save some.",
    )


def _own(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["name"] == "this project")


def _over_diffusers(rows: Sequence[Row]) -> float:
    return next(row["seconds"] for row in rows if row["name"] == "diffusers") / _own(rows)["seconds"]


# ----------------------------------------------------------------------------
# Words and columns.


def _measures(rows: Sequence[Row]) -> list[str]:
    """The measures that the rows have."""
    return [name for name in MEASURES if name in rows[0]]


def _values(row: Row, measures: Sequence[str]) -> list[str]:
    return [f"{row[name]:.3f}" if name == "frechet_distance" else f"{row[name]:.1f}" for name in measures]


def _of_photos(real: Row | None, measure: str, digits: int) -> str:
    return f", photos {real[measure]:.{digits}f}" if real and measure in real else ""


def _features_note(found: Row) -> str:
    """What the Frechet distance is measured in, and what the photos' own row is."""
    if not found["features"]:
        return ""
    return f"; Frechet distances to the training photos in the features of {found['features']}, the photos' row is of as many held-out ones"
