"""Which rows the tables of Problem 3, 2025, take from its results, and what they call them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from common.files import read_json, write_json
from common.latent.generate import ControlledGenerationConfig
from common.latent.small import DEFAULT_CONTROLLED_GUIDANCE, DEFAULT_GUIDANCE
from common.report import Results
from p3_controlnet.loading import SHIPPED_CONTROL
from p3_controlnet.study import report

MEASURES = {"iou": 0.97, "circle_error": 3.0, "background_error": 2.0, "iou_each": 0.96}
MEASURES |= {"circle_right": 0.9, "background_right": 0.8, "iou_worst": 0.9, "evaluations": 20}
SHIPPED = {"model": "checkpoints/ldm_shapes", "control": "checkpoints/controlnet_circles"}


def row(sampling: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return SHIPPED | MEASURES | {"sampling": report.DEFAULT | (sampling or {})} | more


def test_the_default_sampling_is_that_of_the_programs() -> None:
    """But for the guidance and the ControlNet's text, which are the small models' own."""
    config = ControlledGenerationConfig(
        guidance_scale=DEFAULT_CONTROLLED_GUIDANCE.scale,
        pag_scale=DEFAULT_CONTROLLED_GUIDANCE.pag_scale,
        control_text=read_json(SHIPPED_CONTROL / "config.json")["control_text"],
    )
    written = dataclasses.asdict(config)
    lists = {name: list(v) if isinstance(v, tuple) else v for name, v in written.items()}
    assert {name: lists[name] for name in report.DEFAULT} == report.DEFAULT


@pytest.mark.parametrize(
    ("sampling", "label"),
    [
        ({}, "the default"),
        ({"guidance_scale": 1.5}, "guidance scale 1.5"),
        ({"control_scales": [0.5]}, "control scales 0.5"),
        ({"guess_mode": True, "steps": 10}, "steps 10, guess mode"),
    ],
)
def test_a_row_is_called_by_what_differs(sampling: dict[str, Any], label: str) -> None:
    assert report.label(row(sampling)) == label


def test_without_control_perturbed_attention_is_the_default() -> None:
    scale, pag_scale = DEFAULT_GUIDANCE
    sampling = {"guidance_scale": scale, "pag_scale": pag_scale}
    assert report.label({"sampling": report.DEFAULT | sampling}) == "the default"
    assert report.label(row(sampling)) == "guidance scale 1.0, pag scale 3.0"


def test_only_rows_of_the_shipped_models_are_taken(tmp_path: Path) -> None:
    rows = [row(), row({"steps": 10}, evaluations=10), row(control="runs/other"), row(model="x")]
    rows.append(row({"control_text": "full"}))
    write_json(tmp_path / "p3_controlnet_circles.json", {"rows": rows})
    lines = report.TABLES["p3_circles"](Results(tmp_path)).splitlines()
    assert lines[2:] == [
        "| the default | 20 | 0.970 | 3.0 | 2.0 | 90 % | 80 % |",
        "| steps 10 | 10 | 0.970 | 3.0 | 2.0 | 90 % | 80 % |",
    ]


def test_failures_are_named(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "failures": []}, {"prompt": "b", "failures": ["one", "two"]}]
    layouts = {"wording": "each", "lines": lines, "failed": 1, "layouts": 2}
    rows = [row(kind="two", **layouts), row({"seed": 1}, kind="three", **layouts)]
    rows.append(row(kind="two", control="runs/other", **layouts))
    write_json(tmp_path / "p3_controlnet_two_circles.json", {"rows": rows})
    results = Results(tmp_path)
    text = report.TABLES["p3_failures"](results).splitlines()
    assert text[2:] == [
        "| two circles, two colours | 0 | 2 | b | one; two |",
        "| three circles, three colours | 1 | 2 | b | one; two |",
    ]
    text = report.TABLES["p3_two_circles"](results).splitlines()
    assert len(text) == 4 and text[3].startswith("| three circles, three colours | 1 |")
    assert text[3].endswith("| 1 of 2 |")
    write_json(tmp_path / "p3_controlnet_two_circles.json", {"rows": rows[2:]})
    assert report.TABLES["p3_failures"](Results(tmp_path)) == "*No picture failed.*"


def test_colours_in_place_are_counted_over_the_seeds() -> None:
    def measured(bound: float, errors: list[list[float]], **sampling: Any) -> dict[str, Any]:
        found = {"bound": bound, "bound_any_order": 1.0, "iou_each": 0.9, "iou_worst": bound}
        lines = [{"own_errors": each} for each in errors]
        of = {"kind": "two", "wording": "each", "layouts": 2, "lines": lines}
        return row({"control_text": "empty", **sampling}, iou=0.9, **found, **of)

    rows = [
        measured(0.5, [[1.0, 2.0], [30.0, 3.0]]),
        measured(1.0, [[1.0, 2.0], [2.0, 1.0]], seed=1),
        measured(0.0, [[90.0, 90.0], [90.0, 90.0]], control_text="full"),
        row(kind="two", wording="each"),  # measured before colours in place were
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[3:-1]]
        for line in report.binding(rows).splitlines()[2:]
    ]
    two = "two circles, two colours"
    assert lines == [
        ["empty", two, "4", "75 %", "100 %", "2.0", "5.2", "0.900", "0.900", "0.50"],
        ["full", two, "2", "0 %", "100 %", "90.0", "90.0", "0.900", "0.900", "0.00"],
    ]


def test_each_short_training_has_one_line_over_all_seeds(tmp_path: Path) -> None:
    def measured(name: str, kind: str, bound: float, iou: float, **of: Any) -> dict[str, Any]:
        given = {"control": f"runs/short/control_{name}/last", "wording": "each", **of}
        return row(kind=kind, bound=bound, **given) | {"iou_each": iou}

    rows = [
        measured(name, kind, bound, 0.9)
        for name, bound in (("full_one", 0.5), ("empty_one", 0.75))
        for kind in ("two", "three", "touching")
    ]
    rows.append(measured("full_one", "two", 0.0, 0.8))  # another seed
    rows.append(measured("full_one", "two_shared", 0.0, 0.1, wording="count"))
    rows.append(measured("full_one", "two", 0.0, 0.1, control="runs/other"))
    write_json(tmp_path / "p3_controlnet_two_circles.json", {"rows": rows})
    lines = report.TABLES["p3_short_trainings"](Results(tmp_path)).splitlines()[2:]
    assert lines == [
        "| `runs/short/control_full_one/last` | 25 % | 0.850 | 50 % | 0.900 | 50 % | 0.900 |",
        "| `runs/short/control_empty_one/last` | 75 % | 0.900 | 75 % | 0.900 | 75 % | 0.900 |",
    ]
    write_json(tmp_path / "p3_controlnet_two_circles.json", {"rows": rows[-1:]})
    assert report.TABLES["p3_short_trainings"](Results(tmp_path)) == "*None was trained.*"
