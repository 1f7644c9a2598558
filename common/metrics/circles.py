"""Circles of a control picture: fitting them to white outlines, and drawing them as discs."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from common.errors import InputError

WHITE = 128  # least grey level of a white pixel
TRIALS = 600  # random circles per RANSAC search
HALF_LINE = 2.5 / 512  # half the thickness of fill50k's outlines, as a fraction of the side
SUPPORT = 0.8
REST = 0.04
CROWDED = 0.25
MIN_RADIUS = 0.03  # of a circle drawn by hand, as a fraction of the side
UNEVEN = 0.25  # largest deviation from the circle (RMS) of a line drawn by hand, over the radius
CLOSED = 0.75  # least part of the circle that a line drawn by hand goes around
NEW = 0.6
LARGE_HOLE = 0.2  # of the largest: smaller ones come from where the ends of a line cross


class Circle(NamedTuple):
    """A circle in pixels; the centre of pixel i is at i + 1/2."""

    x: float
    y: float
    radius: float

    def distances(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Signed distances [N] of points [N, 2] (x, y) to the circle; negative inside."""
        return np.hypot(points[:, 0] - self.x, points[:, 1] - self.y) - self.radius


def disc(circle: Circle, size: int = 512) -> Tensor:
    """The pixels whose centre lies in the circle, bool [size, size].

    The part of the circle outside the picture is cut off.
    """
    at = torch.arange(size, dtype=torch.float64) + 0.5
    return (at - circle.x).square() + (at[:, None] - circle.y).square() <= circle.radius**2


def fit_circles(outline: Tensor, seed: int = 0) -> list[Circle]:
    """The circles of a control picture, from left to right; an empty list if there are none.

    `outline` is uint8 [3, S, S] with white outlines on black. A fitted circle runs along the middle
    of its outline, which is where fill50k's targets change colour. It may be cut by the border, and
    may touch or cross others.

    Circles are found one after another by RANSAC (Fischler and Bolles 1981). Of circles through
    three random white pixels, the one with most pixels on its line is refined by least squares. It
    is accepted if at least the fraction SUPPORT of its line is white. The search ends when less
    than the fraction REST of the white pixels lies on no circle. A picture of which more than the
    fraction CROWDED is white holds no outlines.
    """
    white = outline.float().mean(0).numpy() >= WHITE
    side = white.shape[1]
    points = np.argwhere(white)[:, ::-1] + 0.5
    random = np.random.default_rng(seed)
    total = len(points)
    tolerance = max(1.0, 1.4 * HALF_LINE * side)
    circles: list[Circle] = []
    if total > CROWDED * white.size:
        return circles
    while len(points) > max(REST * total, 10):
        circle = _refine(_best_through_three(points, tolerance, random), points, tolerance)
        if _support(circle, white) < SUPPORT:
            break
        circles.append(circle)
        points = points[np.abs(circle.distances(points)) > tolerance]
    return sorted(circles)


def circles_of_drawing(drawing: Tensor) -> list[Circle]:
    """The nearest circle of each closed line drawn by hand, from left to right.

    `drawing` is uint8 [3, S, S] with white lines of any thickness on black. White pixels that touch
    are one line; it may also be a filled disc, or circles that cross. Specks with a radius below
    MIN_RADIUS of the side are left out. Raises InputError if a line is nothing of these.
    """
    white = drawing.float().mean(0).numpy() >= WHITE
    lines, count = ndimage.label(white, np.ones((3, 3)))
    circles: list[Circle] = []
    for k in range(1, count + 1):
        line = lines == k
        points = np.argwhere(line)[:, ::-1] + 0.5
        if np.ptp(points, axis=0).max() >= 2.0 * MIN_RADIUS * len(white):
            found = _circles_of_line(line, points)
            if not found:
                raise InputError(
                    "a line of the drawing goes around no circle: draw closed lines, and rub out"
                    " what belongs to none"
                )
            circles += found
    return sorted(circles)


def _circles_of_line(line: NDArray[np.bool_], points: NDArray[np.float64]) -> list[Circle]:
    """The circles of one connected line, bool [S, S], with the pixels `points`; [] if none fits."""
    regions, _ = ndimage.label(~np.pad(line, 1))
    holes = np.delete(np.bincount(regions.ravel()), [0, regions[0, 0]])
    least = max(LARGE_HOLE * holes.max(initial=0), (MIN_RADIUS * len(line)) ** 2)
    if (holes >= least).sum() > 1:
        return _crossing(line, points)
    circle = _refine(Circle(*points.mean(0).tolist(), 0.0), points, np.inf)
    away = np.abs(circle.distances(points))
    if np.sqrt((away**2).mean()) <= UNEVEN * circle.radius and _closed(circle, points, line):
        return [circle]
    filled = Circle(*points.mean(0).tolist(), float(np.sqrt(len(points) / np.pi)))
    if filled.distances(points).max() <= UNEVEN * filled.radius:
        return [filled]
    return []


def _closed(circle: Circle, points: NDArray[np.float64], line: NDArray[np.bool_]) -> bool:
    """Whether points near the circle lie all around it, as far as it is inside the picture."""
    near = points[np.abs(circle.distances(points)) <= 0.5 * circle.radius]
    turns = np.arctan2(near[:, 1] - circle.y, near[:, 0] - circle.x)
    angles = np.linspace(-np.pi, np.pi, 73)
    x, y = circle.x + circle.radius * np.cos(angles), circle.y + circle.radius * np.sin(angles)
    inside = ((x >= 0) & (x < line.shape[1]) & (y >= 0) & (y < line.shape[0]))[:-1]
    there = np.histogram(turns, angles)[0] > 0
    return bool(inside.any() and there[inside].mean() >= CLOSED)


def _crossing(line: NDArray[np.bool_], points: NDArray[np.float64]) -> list[Circle]:
    """Circles drawn by hand that cross or touch; [] if they leave a fifth of the line over.

    They are found as in `fit_circles`, but pixels are on a circle's line within 2 HALF_LINE and
    half the thickness of what was drawn, which is four times the mean distance to its edge. At
    least the fraction NEW of a circle's line must be on pixels of no circle before it.
    """
    thickness = 4.0 * float(ndimage.distance_transform_edt(line)[line].mean())
    reach = 2.0 * HALF_LINE * len(line) + 0.5 * thickness
    random, rest, circles = np.random.default_rng(0), points, list[Circle]()
    while len(rest) > 0.2 * len(points):
        circle = _refine(_best_through_three(rest, reach, random), rest, reach)
        new = np.zeros_like(line)
        new[tuple((rest[:, ::-1] - 0.5).astype(int).T)] = True
        near, near_new = (ndimage.distance_transform_edt(~there) <= reach for there in (line, new))
        if _support(circle, near) < SUPPORT or _support(circle, near_new) < NEW:
            return []
        circles.append(circle)
        rest = rest[np.abs(circle.distances(rest)) > reach]
    return circles


def _best_through_three(
    points: NDArray[np.float64], tolerance: float, random: np.random.Generator
) -> Circle:
    """The circle through three of the points with most points within `tolerance`.

    TRIALS random triples are tried.
    """
    a, b, c = (points[random.integers(len(points), size=TRIALS)] for _ in range(3))
    b, c = b - a, c - a  # relative to a, as is the circumcentre below
    twice_area = 2.0 * (b[:, 0] * c[:, 1] - b[:, 1] * c[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        bb, cc = (b**2).sum(1) / twice_area, (c**2).sum(1) / twice_area
        centre = np.stack([c[:, 1] * bb - b[:, 1] * cc, b[:, 0] * cc - c[:, 0] * bb], axis=1)
    radius = np.hypot(*centre.T)
    usable = np.isfinite(radius)
    centre, radius = (a + centre)[usable], radius[usable]
    if not len(radius):  # each triple lies on one line
        return Circle(*points[0], 0.0)
    some = points[random.permutation(len(points))[:1000]]
    distance = np.hypot(some[:, 0] - centre[:, :1], some[:, 1] - centre[:, 1:])  # [trials, points]
    best = (np.abs(distance - radius[:, None]) <= tolerance).sum(1).argmax()
    return Circle(*centre[best].tolist(), float(radius[best]))


def _refine(circle: Circle, points: NDArray[np.float64], tolerance: float) -> Circle:
    """The least-squares circle through the points near `circle`.

    x^2 + y^2 = 2 a x + 2 b y + c is linear in the centre (a, b) and c.
    """
    for reach in (2.0 * tolerance, 1.5 * tolerance, tolerance, tolerance):
        near = points[np.abs(circle.distances(points)) <= reach]
        if len(near) < 3:
            return circle
        middle = near.mean(0)
        x, y = (near - middle).T
        a, b, c = np.linalg.lstsq(
            np.stack([2.0 * x, 2.0 * y, np.ones_like(x)], 1), x**2 + y**2, rcond=None
        )[0]
        circle = Circle(
            float(a + middle[0]), float(b + middle[1]), float(np.sqrt(max(c + a * a + b * b, 0.0)))
        )
    return circle


def _support(circle: Circle, white: NDArray[np.bool_]) -> float:
    """Fraction of the circle's line inside the picture that is white.

    It is 0 for a radius outside 0.01 to 10 times the picture's width.
    """
    if not 0.01 * white.shape[1] < circle.radius < 10.0 * white.shape[1]:
        return 0.0
    angles = np.linspace(0.0, 2.0 * np.pi, max(64, int(4.0 * circle.radius)), endpoint=False)
    x, y = circle.x + circle.radius * np.cos(angles), circle.y + circle.radius * np.sin(angles)
    inside = (x >= 0) & (x < white.shape[1]) & (y >= 0) & (y < white.shape[0])
    return (
        float(white[y[inside].astype(int), x[inside].astype(int)].mean()) if inside.any() else 0.0
    )
