"""How much a ControlNet acts: scales of its outputs, and the steps at which they are added."""

import dataclasses
import math

from common.diffusion.schedule import TimestepPairs
from common.errors import InputError


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """How a ControlNet acts."""

    control_scales: tuple[float, ...] = (1.0,)
    """Strength of the control: one number for all residuals, or one for each (Stable Diffusion has
    13)."""
    control_start: float = 0.0
    """Fraction of the trajectory at which control sets in."""
    control_end: float = 1.0
    """Fraction of the trajectory at which control ends."""
    guess_mode: bool = False
    """Control on the conditional half alone, weaker towards the outer layers (the authors' guess
    mode)."""

    def check_control(self) -> None:
        """Raises InputError on a number outside its range."""
        if not self.control_scales or not all(
            math.isfinite(scale) for scale in self.control_scales
        ):
            raise InputError(f"--control-scales must be finite numbers, not {self.control_scales}")
        if not 0.0 <= self.control_start <= self.control_end <= 1.0:
            raise InputError(
                "--control-start and --control-end must be fractions 0 <= start <= end <= 1, "
                f"not {self.control_start} and {self.control_end}"
            )


def residual_scales(config: ControlConfig, count: int) -> tuple[float, ...]:
    """The factor of each of `count` control residuals. Raises InputError if `config` has neither
    one nor `count` of them."""
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
    """Control scales that fall from the middle outwards, strength 0.825^(12 - i) for Stable
    Diffusion's 13 residuals.

    Those of the authors' code for arXiv:2302.05543; with the hint on the conditional half alone it
    is their guess mode.
    """
    return tuple(strength * decay ** (count - 1 - i) for i in range(count))


def control_interval(
    timestep_pairs: TimestepPairs, start: float = 0.0, end: float = 1.0
) -> tuple[int, int]:
    """The lowest and highest t of the steps that lie between the fractions `start` and `end` of the
    trajectory.

    Step i of S covers i/S to (i + 1)/S. An interval without any step is (0, -1), which no t is in.
    Raises InputError if not 0 <= start <= end <= 1.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise InputError(
            f"control must start and end at fractions 0 <= start <= end <= 1, not {start} and {end}"
        )
    first = math.ceil(start * len(timestep_pairs) - 1e-9)
    last = math.floor(end * len(timestep_pairs) + 1e-9)
    inside = [t for t, _ in timestep_pairs[first:last]]
    return (min(inside), max(inside)) if inside else (0, -1)
