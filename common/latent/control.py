"""Strength of a ControlNet: scales of its residuals, and the steps at which they are added."""

import dataclasses
import math
from typing import Literal

from common.config import Probability
from common.diffusion.schedule import TimestepPairs
from common.errors import InputError

ControlText = Literal["full", "empty"]


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """Strength of a ControlNet, and when it acts."""

    control_scales: tuple[float, ...] = (1.0,)
    """Factor of the control residuals: one number for all, or one for each (Stable Diffusion has
    13)."""
    control_start: Probability = 0.0
    """Fraction of the sampling steps, in [0, 1], at which control begins."""
    control_end: Probability = 1.0
    """Fraction of the sampling steps, in [0, 1], at which control ends."""
    control_text: ControlText | None = None
    """Text that the ControlNet reads: the full prompt or the empty one; by default that with which
    it was trained, which its config.json names, else full. The base model reads the full prompt."""
    guess_mode: bool = False
    """Guess mode of the ControlNet authors: control acts on the conditional half only, and is
    weaker in the outer layers."""

    def check_control(self) -> None:
        """Raises InputError if a value is outside its range."""
        if not self.control_scales or not all(
            math.isfinite(scale) for scale in self.control_scales
        ):
            raise InputError(f"--control-scales must be finite numbers, not {self.control_scales}")
        if self.control_start > self.control_end:
            raise InputError(
                f"--control-start {self.control_start} is above --control-end {self.control_end}"
            )


def residual_scales(config: ControlConfig, count: int) -> tuple[float, ...]:
    """The factors of `count` control residuals.

    Raises InputError if `config` holds neither one factor nor `count` of them.
    """
    given = config.control_scales
    if len(given) not in (1, count):
        raise InputError(
            f"--control-scales needs 1 number, or {count} for this model's residuals, not"
            f" {len(given)}"
        )
    scales = given if len(given) == count else given * count
    if not config.guess_mode:
        return scales
    return tuple(a * b for a, b in zip(scales, guess_mode_scales(count), strict=True))


def guess_mode_scales(
    count: int = 13, strength: float = 1.0, decay: float = 0.825
) -> tuple[float, ...]:
    """Control scales of guess mode, decreasing from the middle block to the outer layers.

    strength decay^(count - 1 - i), as in the authors' code for arXiv:2302.05543; 0.825^(12 - i) for
    Stable Diffusion's 13 residuals. Guess mode also restricts the hint to the conditional half.
    """
    return tuple(strength * decay ** (count - 1 - i) for i in range(count))


def control_interval(
    timestep_pairs: TimestepPairs, start: float = 0.0, end: float = 1.0
) -> tuple[int, int]:
    """Lowest and highest t of the steps between the fractions `start` and `end` of the trajectory.

    Step i of S covers i/S to (i + 1)/S. If no step lies in the interval, the result is (0, -1),
    which contains no t. Raises InputError if not 0 <= start <= end <= 1.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise InputError(
            f"control must start and end at fractions 0 <= start <= end <= 1, not {start} and {end}"
        )
    first = math.ceil(start * len(timestep_pairs) - 1e-9)
    last = math.floor(end * len(timestep_pairs) + 1e-9)
    inside = [t for t, _ in timestep_pairs[first:last]]
    return (min(inside), max(inside)) if inside else (0, -1)
