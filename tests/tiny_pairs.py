"""Pairs in fill50k's layout."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data.layouts import render_control, render_target
from common.data.shapes import draw_scene
from common.images import write_png


def write_pairs(
    folder: Path, count: int = 3, names: Sequence[str] = ("source/{}.png", "target/{}.png")
) -> Path:
    """`source/K.png`, `target/K.png` and prompt.json, whose lines name the files in one of the two
    forms."""
    lines = []
    for k in range(count):
        scene = draw_scene(np.random.default_rng(k), kinds=("circle",))
        for part, picture in (("source", render_control(scene)), ("target", render_target(scene))):
            (folder / part).mkdir(parents=True, exist_ok=True)
            write_png(folder / part / f"{k}.png", picture)
        line = {"source": names[0].format(k), "target": names[1].format(k), "prompt": scene.caption}
        lines.append(json.dumps(line) + "\n")
    (folder / "prompt.json").write_text("".join(lines))
    return folder / "prompt.json"
