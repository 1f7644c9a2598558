"""Interpolation between two noise tensors: spherical and linear."""

import math

import torch
from torch import Tensor

PARALLEL = 1e-6
"""Sine of the angle (about the angle itself, in radians) below which two directions count as
parallel or opposite."""


def lerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Linear interpolation (1 - alpha) a + alpha b.

    Halfway between independent noises of equal norm the norm falls to 1 / sqrt(2) of theirs.
    """
    return (1.0 - alpha) * a + alpha * b


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of two tensors, flattened: exactly `a` at alpha 0 and `b` at alpha 1.

    sin((1 - alpha) w) / sin(w) a + sin(alpha w) / sin(w) b, with w the angle between them (Shoemake
    1985): inputs of equal norm keep their norm. Nearly parallel inputs, or a zero one, are
    interpolated linearly, which is the limit of the formula. Between opposite inputs all great
    circles have the same length: the path then passes through a fixed direction perpendicular to
    `a`.
    """
    u, v = a.flatten().double(), b.flatten().double()
    norms = float(u.norm() * v.norm())
    # The sine is the norm of the part of v perpendicular to u, since sqrt(1 - cosine^2) loses all
    # digits at tiny angles.
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
    """A vector perpendicular to `u` [d] and of its norm.

    It is the axis on which `u` is smallest, made orthogonal to `u`.
    """
    axis = torch.zeros_like(u)
    axis[u.abs().argmin()] = 1.0
    axis = axis - (axis @ u) / (u @ u) * u
    return axis * (u.norm() / axis.norm())
