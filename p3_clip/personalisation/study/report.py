"""What REPORT.md and the README say of learned concepts, made of results/p3_personalisation.json."""

from pathlib import Path
from typing import Any

from common.report import load, table

COLOUR_BAR, BINDING_BAR = 6.0, 0.8


def section(results: Path) -> list[str]:
    """Learned concepts in REPORT.md."""
    found = load(results, "p3_personalisation")
    if not found:
        return []
    methods = found["methods"]
    return [
        METHOD,
        _singles(methods, found["images"], found["clip"]),
        _pairs(methods, found["images"]),
        _findings(methods),
    ]


def readme_rows(results: Path) -> list[list[str]]:
    """Learned concepts in the README's table."""
    found = load(results, "p3_personalisation")
    if not found:
        return []
    task, command = "P3, 2024, learned concepts", "`bash scripts/study_personalisation.sh`"
    inversion, (joint, how) = found["methods"]["textual inversion"], _best_joint(found["methods"])
    rows = [
        [
            f"{task}: {name}",
            "colour error (CIEDE2000)",
            f"{numbers['colour_error']:.1f}",
            f"at most {COLOUR_BAR:g}",
            command,
        ]
        for name, numbers in inversion["singles"].items()
        if "colour_error" in numbers
    ]
    for pair, numbers in joint["pairs"].items():
        ours = f"{numbers['bound']:.0%}"
        rows.append([f"{task}: two, {pair} ({how})", "each in its place", ours, f"at least {BINDING_BAR:.0%}", command])
    return rows


def cards(results: Path) -> dict[str, list[str]]:
    """What the shipped concepts reach, each by itself and two in one picture."""
    found = load(results, "p3_personalisation")
    if not found:
        return {}
    joint, _ = _best_joint(found["methods"])
    rows = [
        [f"`{name}`", "is there", f"{numbers['presence']:.0%}", _number(numbers.get("colour_error"))]
        for name, numbers in joint["singles"].items()
    ]
    rows += [
        [f"`{numbers['prompt']}`", "each in its place", f"{numbers['bound']:.0%}", "-"]
        for numbers in joint["pairs"].values()
    ]
    return {"concepts_shapes": [table(["asked for", "measured", "pictures", "colour error (CIEDE2000)"], rows)]}


METHOD = """## Problem 3, 2024: learned concepts

**Method.** Textual inversion (Gal et al. 2022) learns a word's vector from five photos, everything else is frozen; Custom Diffusion
(Kumari et al. 2023) learns a word and the key and value matrices of the cross-attention, with pictures of the base model's own
against forgetting, several concepts jointly or apart and then merged in closed form. With cut-mix (SVDiff, Han et al. 2023) some of
the training pictures are two photos side by side, which tells what "next to" means for the new words. The concepts have no name in
the small model's vocabulary: wine and mauve are colours at least 15 CIEDE2000 from every CSS colour, slate_triangle is a triangle in a
third such colour, ring is a shape that it never saw. Everything is measured from pixels
(`p3_clip/personalisation/study/measure.py`), beside the same prompts with a word that was not trained; a slate object counts as
the triangle if it is angular, so a rough star or square passes as well, and an oval does not.
Code: `p3_clip/personalisation/`; all of it: `bash scripts/study_personalisation.sh`"""


def _singles(methods: dict[str, Any], images: int, clip: str | None) -> str:
    """The table of single concepts."""
    header = [
        "method",
        "concept",
        "is there",
        "colour error (CIEDE2000)",
        "image score",
        "text score, held out",
        "norm",
    ]
    scores = ("colour_error", "image_score", "text_score")
    rows = [
        [method, name, f"{found['presence']:.0%}", *(_number(found.get(key)) for key in scores), f"{found['norm']:.2f}"]
        for method, part in methods.items()
        for name, found in part["singles"].items()
    ]
    judge = (
        f"Scores are 100 cos of CLIP ({clip.rstrip('.')})" if clip else "There was no CLIP for image and text scores"
    )
    if clip and "clip_shapes" in clip:
        judge += ", whose text tower conditions the small model: they are no independent judgement"
    text = (
        f"**One concept**, {images} pictures each. {judge}; the norm is that of the word's vector over that of a usual word.\n\n"
        "![](results/figures/p3_personalisation/single.png)"
    )
    return f"{text}\n\n{table(header, rows)}"


def _pairs(methods: dict[str, Any], images: int) -> str:
    """The tables of two concepts in one picture."""
    parts = [
        f"**Two concepts in one picture**, {images} pictures of fixed seeds each; in the figures successes stand beside failures."
    ]
    header = ["method", "first is there", "second is there", "each in its place", "swapped", "blended"]
    for pair, untrained in methods["untrained placeholder"]["pairs"].items():
        rows = [
            [method, *(f"{part['pairs'][pair][key]:.0%}" for key in ("first", "second", "bound", "swapped", "blended"))]
            for method, part in methods.items()
            if pair in part["pairs"]
        ]
        parts.append(
            f"`{untrained['prompt']}`\n\n![](results/figures/p3_personalisation/{pair}.png)\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts)


def _findings(methods: dict[str, Any]) -> str:
    """What the numbers say."""
    inversion, (joint, how) = methods["textual inversion"], _best_joint(methods)
    errors = [numbers["colour_error"] for numbers in inversion["singles"].values() if "colour_error" in numbers]
    sentences = [
        f"After textual inversion the largest colour error of a single concept is {max(errors):.1f} "
        f"({'within' if max(errors) <= COLOUR_BAR else 'above'} the bar of {COLOUR_BAR:g})."
    ]
    for pair, numbers in joint["pairs"].items():
        bound, plain = numbers["bound"], inversion["pairs"][pair]["bound"]
        others = [
            f"{found['pairs'][pair]['bound']:.0%} with {method}"
            for method, found in methods.items()
            if method not in ("textual inversion", how) and pair in found["pairs"]
        ]
        sentences.append(
            f"For `{pair}` {how} puts both concepts into their places in {bound:.0%} of the pictures "
            f"({'at least' if bound >= BINDING_BAR else 'below'} {BINDING_BAR:.0%}), "
            f"{'more often than' if bound > plain else 'not more often than'} textual inversion with {plain:.0%}; it is "
            f"{', '.join(others)}."
        )
    return "**Findings.** " + " ".join(sentences)


def _best_joint(methods: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What joint Custom Diffusion reached, with cut-mix where that was measured, and what to call it."""
    for name in ("Custom Diffusion, joint, cut-mix", "Custom Diffusion, joint"):
        if name in methods:
            return methods[name], name
    raise KeyError("joint Custom Diffusion was not measured")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
