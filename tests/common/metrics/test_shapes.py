"""Recognising shapes in masks."""

import numpy as np
import pytest
import torch

from common.data.shapes import KINDS, Shape, draw_scene, render_mask
from common.metrics.segmentation import SIZE
from common.metrics.shapes import GOOD_FIT, fit_shape, recognise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut_off", [False, True])
def test_a_drawn_shape_is_recognised(kind: str, cut_off: bool) -> None:
    scene = draw_scene(np.random.default_rng(3), first=("red", kind), cut_off=cut_off)
    fit = recognise(render_mask(scene.shapes[0], SIZE))
    assert fit.shows(kind) and fit.iou > 0.97


def test_a_half_cut_circle_is_a_circle() -> None:
    assert recognise(render_mask(Shape("circle", "", 0.95, 0.3, 0.25), SIZE)).shows("circle")


def test_a_blob_is_no_shape() -> None:
    """Two overlapping discs side by side, like an eight, fit nothing well."""
    eight = render_mask(Shape("circle", "", 0.3, 0.5, 0.18), SIZE) | render_mask(
        Shape("circle", "", 0.62, 0.5, 0.18), SIZE
    )
    assert recognise(eight).iou < GOOD_FIT
    assert not any(recognise(eight).shows(kind) for kind in KINDS)


def test_nothing_is_no_shape() -> None:
    assert fit_shape(torch.zeros(SIZE, SIZE, dtype=torch.bool), "star") == 0.0
