"""Recognising shapes in masks."""

import numpy as np
import pytest
import torch

from common.data.shapes import KINDS, Shape, draw_scene, render_mask
from common.metrics.segmentation import SIZE
from common.metrics.shapes import GOOD_FIT, fit_ring, fit_shape, recognise


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


def ring(hole: str = "circle", size: float = 0.55) -> torch.Tensor:
    """A disc with a hole; `size` is the hole's radius relative to the disc's."""
    disc = render_mask(Shape("circle", "", 0.4, 0.45, 0.25), SIZE)
    return disc & ~render_mask(Shape(hole, "", 0.4, 0.45, size * 0.25), SIZE)


def test_a_closed_ring_is_a_ring() -> None:
    assert recognise(ring()).shows("ring") and fit_ring(ring()) > 0.97
    assert recognise(ring(size=0.1)).shows("circle")  # a speck is no hole
    assert fit_ring(render_mask(Shape("circle", "", 0.4, 0.45, 0.25), SIZE)) == 0.0


def test_an_open_ring_or_another_hole_makes_no_ring() -> None:
    gap = ring()
    gap[SIZE // 2 - 20 : SIZE // 2 + 5, SIZE // 2 :] = False
    frame = render_mask(Shape("square", "", 0.5, 0.5, 0.3), SIZE)
    frame &= ~render_mask(Shape("square", "", 0.5, 0.5, 0.2), SIZE)
    for mask in (gap, ring("triangle"), frame):
        assert recognise(mask).kind != "ring" or recognise(mask).iou < GOOD_FIT
    assert fit_ring(gap) == 0.0


def test_nothing_is_no_shape() -> None:
    assert fit_shape(torch.zeros(SIZE, SIZE, dtype=torch.bool), "star") == 0.0
