"""Which shape an object is: the best-fitting ideal circle, square, triangle or star, or a ring."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from common.data.shapes import KINDS, Shape, render_coverage

SIDE = 128  # pixels at which shapes are compared
GOOD_FIT = 0.85  # least IoU with the ideal shape of its kind
RING = "ring"
HOLLOW = 0.05  # least area of a ring's hole, as a fraction of the filled ring's
TURN = {"circle": 0.0, "square": math.pi / 2, "triangle": 2 * math.pi / 3, "star": 2 * math.pi / 5}
"""The rotation, in radians, after which a shape looks the same."""
TURNS = 3  # initial angles within that rotation
GROWTHS = (1.0, 1.3, 1.7)  # of objects at the border: initial radii, relative to the visible part's
EVALUATIONS = 120  # of the overlap, from each start
Parameters = tuple[float, float, float, float]
"""Centre x and y, and radius, as fractions of the side; rotation in radians."""


class Fit(NamedTuple):
    """An ideal shape fitted to an object."""

    kind: str
    """One of `common.data.shapes.KINDS`, or RING."""
    iou: float
    """Its intersection over union with the object, inside the picture; of a ring see `fit_ring`."""

    def shows(self, kind: str) -> bool:
        """Whether the object is a shape of this kind: none fits better, and the fit is good."""
        return self.kind == kind and self.iou >= GOOD_FIT


def recognise(mask: Tensor) -> Fit:
    """The ideal shape that fits an object with the mask bool [S, S] best; see `fit_shape`."""
    fits = [Fit(kind, fit_shape(mask, kind)) for kind in KINDS]
    return max([*fits, Fit(RING, fit_ring(mask))], key=lambda fit: fit.iou)


def fit_ring(mask: Tensor) -> float:
    """The lower IoU with an ideal circle of the filled object and of its hole; 0 without a hole.

    A ring is closed: an open one has no hole to fill. `mask` is as in `fit_shape`; what several
    holes cover counts as one hole.
    """
    filled = torch.from_numpy(ndimage.binary_fill_holes(mask.numpy()))
    hole = filled & ~mask
    if hole.sum() < max(HOLLOW * float(filled.sum()), 1.0):
        return 0.0
    return min(fit_shape(filled, "circle"), fit_shape(hole, "circle"))


def fit_shape(mask: Tensor, kind: str) -> float:
    """The highest IoU of an ideal shape of this kind with an object, 0 for an empty mask.

    `mask` is bool [S, S], a multiple of SIDE. The shape is moved, scaled and rotated by Nelder and
    Mead's simplex search, from the object's centroid and area and from several angles. Both are
    compared inside the picture, by the covered fractions of the pixels, so a shape may be cut by
    the border.
    """
    if not mask.any():
        return 0.0
    object_ = F.avg_pool2d(mask.float()[None], mask.shape[-1] // SIDE)[0]

    def overlap(parameters: Parameters) -> float:
        x, y, radius, angle = parameters
        if not (0.0 < radius < 2.0):
            return 0.0
        ideal = render_coverage(Shape(kind, "", x, y, radius, angle), SIDE).float() / 255.0
        return float(torch.minimum(ideal, object_).sum() / torch.maximum(ideal, object_).sum())

    best = 0.0
    for start in sorted(_starts(object_, kind), key=overlap, reverse=True)[:2]:
        steps = np.vstack([np.zeros(4), np.diag([0.02, 0.02, 0.02, 0.2])])
        if not TURN[kind]:
            steps[-1] = 0.0
        found = minimize(
            lambda parameters: -overlap(parameters),
            start,
            method="Nelder-Mead",
            options={"initial_simplex": np.array(start) + steps, "maxfev": EVALUATIONS},
        )
        best = max(best, -float(found.fun))
    return best


def _starts(object_: Tensor, kind: str) -> list[Parameters]:
    """Positions from which the search may start."""
    at = (torch.arange(SIDE) + 0.5) / SIDE
    total = object_.sum()
    x, y = float((object_ * at).sum() / total), float((object_ * at[:, None]).sum() / total)
    unit = render_coverage(Shape(kind, "", 0.5, 0.5, 0.4), SIDE).float().sum() / 255.0
    radius = 0.4 * math.sqrt(float(total / unit))
    outward = [
        float(object_[:, -1].any()) - float(object_[:, 0].any()),
        float(object_[-1].any()) - float(object_[0].any()),
    ]
    length = math.hypot(*outward)
    starts = []
    for growth in GROWTHS if length else GROWTHS[:1]:
        shift = radius * (growth - 1.0) / max(length, 1.0)
        for turn in range(TURNS if TURN[kind] else 1):
            starts.append(
                (
                    x + shift * outward[0],
                    y + shift * outward[1],
                    radius * growth,
                    TURN[kind] * turn / TURNS,
                )
            )
    return starts
