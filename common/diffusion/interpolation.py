"""Paths between two noises: the great circle and the straight line."""

import math

import torch
from torch import Tensor

PARALLEL = 1e-6
"""Below this sine of the angle, in radians about the angle itself, two directions count as parallel
or opposite."""


def lerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b: halfway between independent noises the norm has fallen to 1 /
    sqrt(2) of theirs."""
    return (1.0 - alpha) * a + alpha * b


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation over the flattened tensors, `a` at alpha 0 and `b` at 1, exactly
    (Shoemake 1985).

    sin((1 - alpha) w) / sin(w) a + sin(alpha w) / sin(w) b, with w the angle between them: inputs
    of equal norm keep it. Nearly parallel inputs (or a zero one) take the straight line, which is
    the limit. Between opposite ones every great circle is as short: the path goes through a fixed
    direction at right angles to `a`.
    """
    u, v = a.flatten().double(), b.flatten().double()
    norms = float(u.norm() * v.norm())
    # The sine from the part of v at right angles to u, which is exact for tiny angles where the
    # cosine's rounding is not.
    cosine = float(u @ v) / norms if norms > 0.0 else 1.0
    sine = float((v / v.norm() - cosine * u / u.norm()).norm()) if norms > 0.0 else 0.0
    if sine < PARALLEL and cosine > 0.0:
        return lerp(a, b, alpha)
    if sine < PARALLEL:
        middle = _perpendicular(u).view(a.shape).to(a)
        return (
            slerp(a, middle, 2.0 * alpha) if alpha <= 0.5 else slerp(middle, b, 2.0 * alpha - 1.0)
        )
    angle = math.atan2(sine, cosine)
    return (
        math.sin((1.0 - alpha) * angle) / math.sin(angle) * a
        + math.sin(alpha * angle) / math.sin(angle) * b
    )


def _perpendicular(u: Tensor) -> Tensor:
    """A vector at right angles to `u` [d] with its norm: the axis on which u is smallest, made
    orthogonal."""
    axis = torch.zeros_like(u)
    axis[u.abs().argmin()] = 1.0
    axis = axis - (axis @ u) / (u @ u) * u
    return axis * (u.norm() / axis.norm())
