"""How much a ControlNet acts: scales of its outputs, and the steps at which they are added."""

import math

from common.diffusion.schedule import Pairs
from common.errors import InputError


def guess_mode_scales(count: int = 13, strength: float = 1.0, decay: float = 0.825) -> tuple[float, ...]:
    """Control scales that fall from the middle outwards, strength 0.825^(12 - i) for Stable Diffusion's 13 residuals.

    Those of the authors' code for arXiv:2302.05543; with the hint on the conditional half alone it is their guess mode.
    """
    return tuple(strength * decay ** (count - 1 - i) for i in range(count))


def control_interval(pairs: Pairs, start: float = 0.0, end: float = 1.0) -> tuple[int, int]:
    """The lowest and highest t of the steps that lie between the fractions `start` and `end` of the trajectory.

    Step i of S covers i/S to (i + 1)/S. An interval without any step is (0, -1), which no t is in. Raises InputError if not
    0 <= start <= end <= 1.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise InputError(f"control must start and end at fractions 0 <= start <= end <= 1, not {start} and {end}")
    first, last = math.ceil(start * len(pairs) - 1e-9), math.floor(end * len(pairs) + 1e-9)
    inside = [t for t, _ in pairs[first:last]]
    return (min(inside), max(inside)) if inside else (0, -1)
