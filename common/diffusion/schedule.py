"""Noise schedules and timestep sequences; defines the conventions of the whole project.

- `t` is the 0-based index into `alphas_cumprod`, and the value that a network receives. It runs
  from 0 (nearly clean) to T - 1.
- `alphas_cumprod[t]` is alpha-bar of DDPM (Ho et al. 2020, arXiv:2006.11239); DDIM (Song et al.
  2020, arXiv:2010.02502) calls the same quantity alpha_t.
- x_t = alpha_t x_0 + sigma_t eps with alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 -
  alphas_cumprod[t]), as in DPM-Solver (arXiv:2206.00927).
- A sampler follows an explicit list of pairs `(t, t_prev)`, descending. `t_prev = -1` stands for
  alpha-bar 1, the clean image. A stride is never recomputed from the list.
- Tables are float64. They are rounded to the images' dtype after the last arithmetic operation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

TimestepPairs = list[tuple[int, int]]
HIGHEST_LEVEL, LOWEST_LEVEL, RHO = 80.0, 0.02, 7.0
"""Of `karras_pairs`; EDM's lowest level, 0.002, is below the rounding of 8-bit images."""
ScheduleName = Literal["linear", "scaled_linear", "cosine"]


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule, given by its `betas`, float64 [T] in (0, 1]."""

    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.dtype != torch.float64 or self.betas.dim() != 1:
            raise ValueError("betas must be a float64 vector")
        if not bool(((self.betas > 0) & (self.betas <= 1)).all()):
            raise ValueError("betas must lie in (0, 1]")
        # Samplers index by a Python integer, so alpha-bar is kept as Python floats as well.
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - self.betas, 0))
        object.__setattr__(self, "_abar", self.alphas_cumprod.tolist())
        object.__setattr__(self, "_tables", {})

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self.betas)

    def abar(self, t: int) -> float:
        """alpha-bar at the index `t` in [-1, T - 1]; 1.0 at -1."""
        if not -1 <= t < self.num_timesteps:
            raise IndexError(f"timestep {t} is outside -1..{self.num_timesteps - 1}")
        return 1.0 if t == -1 else self._abar[t]

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """(alpha_t, sigma_t) = (sqrt(abar_t), sqrt(1 - abar_t)) as floats."""
        abar_t = self.abar(t)
        return math.sqrt(abar_t), math.sqrt(1.0 - abar_t)

    def alpha_sigma_like(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) for a batch of timesteps, in the shape that multiplies `x`.

        `t` is long [N] and `x` [N, ...]; the results are [N, 1, ...] with the dtype, device and
        rank of `x`.
        """
        shape = (-1, *[1] * (x.dim() - 1))
        if (x.dtype, x.device) not in self._tables:  # copied once: the CPU waits for each copy
            tables = (self.alphas_cumprod.sqrt(), (1.0 - self.alphas_cumprod).sqrt())
            self._tables[x.dtype, x.device] = tuple(
                table.to(x.dtype).to(x.device) for table in tables
            )
        return tuple(table[t].view(shape) for table in self._tables[x.dtype, x.device])

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio abar_t / (1 - abar_t), float32 [N], for `t` long [N].

        The result is on the device of `t`.
        """
        if ("snr", t.device) not in self._tables:
            table = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
            self._tables["snr", t.device] = (table.to(torch.float32).to(t.device),)
        return self._tables["snr", t.device][0][t]


def linear_schedule(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
) -> NoiseSchedule:
    """Betas in equal steps (Section 4 of DDPM, arXiv:2006.11239)."""
    return NoiseSchedule(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


def scaled_linear_schedule(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> NoiseSchedule:
    """Square roots of betas in equal steps, the schedule of latent diffusion (arXiv:2112.10752).

    The defaults are Stable Diffusion v1's.
    """
    roots = torch.linspace(
        math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64
    )
    return NoiseSchedule(roots**2)


def cosine_schedule(
    num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
) -> NoiseSchedule:
    """alpha-bar is a squared cosine (Equation 17 of Nichol and Dhariwal 2021, arXiv:2102.09672)."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    abar = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return NoiseSchedule((1.0 - abar[1:] / abar[:-1]).clamp(max=max_beta))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule rescaled so that the last alpha-bar, and so the terminal SNR, is exactly 0.

    sqrt(alpha-bar) is shifted and scaled; the first alpha-bar is kept (Algorithm 1 of Lin et al.
    2023, arXiv:2305.08891). eps prediction is undefined at the last timestep: use v or x0
    prediction.
    """
    roots = schedule.alphas_cumprod.sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    abar = roots**2
    alphas = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return NoiseSchedule(1.0 - alphas)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
}


def make_schedule(
    name: ScheduleName, num_timesteps: int = 1000, *, zero_terminal: bool = False
) -> NoiseSchedule:
    """The named schedule with its default constants.

    `zero_terminal` rescales it to a terminal SNR of 0 (`zero_terminal_snr`).
    """
    schedule = SCHEDULES[name](num_timesteps)
    return zero_terminal_snr(schedule) if zero_terminal else schedule


# ----------------------------------------------------------------------------
# Timestep sequences: exactly S = `steps` pairs (t, t_prev), descending; T = `num_timesteps`.


def leading_pairs(num_timesteps: int, steps: int) -> TimestepPairs:
    """t = i floor(T / S): starts below T - 1 and ends at 0, as diffusers' "leading"."""
    _check_steps(num_timesteps, steps)
    return chain([i * (num_timesteps // steps) for i in reversed(range(steps))])


def trailing_pairs(num_timesteps: int, steps: int) -> TimestepPairs:
    """t = round(T - i T / S) - 1: starts at the noisiest timestep, T - 1, for every S.

    Table 2 of Lin et al. 2023 (arXiv:2305.08891).
    """
    _check_steps(num_timesteps, steps)
    return chain([round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)])


def linspace_pairs(num_timesteps: int, steps: int) -> TimestepPairs:
    """S equally spaced t that include both ends, T - 1 and 0 (T - 1 alone for a single step)."""
    _check_steps(num_timesteps, steps)
    return chain([round(t) for t in np.linspace(num_timesteps - 1, 0, steps)])


def homework_pairs(num_timesteps: int = 1000, steps: int = 50) -> TimestepPairs:
    """The timesteps of the homework's reference faces: (981, 961), ..., (21, 1), (1, 0).

    That is the list for 50 steps of 1000. t = 1 + i floor(T / S) and t_prev = t - floor(T / S), but
    0 after the last step: sampling ends at alphas_cumprod[0], not at alpha-bar 1. With S = T the
    offset 1 does not fit: the list is then every timestep, (T - 1, T - 2), ..., (1, 0), (0, 0).
    """
    _check_steps(num_timesteps, steps)
    stride = num_timesteps // steps
    offset = 0 if steps == num_timesteps else 1
    return [
        (offset + i * stride, max(offset + (i - 1) * stride, 0)) for i in reversed(range(steps))
    ]


def karras_pairs(schedule: NoiseSchedule, steps: int) -> TimestepPairs:
    """Timesteps whose noise levels sigma_t / alpha_t fall as in EDM (Karras et al. 2022).

    Equation 5 of arXiv:2206.00364 with rho = 7, from HIGHEST_LEVEL or the schedule's own highest
    level down to LOWEST_LEVEL, each rounded to the nearest timestep. Equal spacing in t takes one
    step across the levels at which an image's mean colour and contrast are decided; with few steps
    its samples lack contrast.
    """
    _check_steps(schedule.num_timesteps, steps)
    levels = np.log(np.array([sigma / alpha for alpha, sigma in _rates(schedule)]))
    high, low = min(HIGHEST_LEVEL, math.exp(levels[-1])), max(LOWEST_LEVEL, math.exp(levels[0]))
    ramp = np.linspace(high ** (1 / RHO), low ** (1 / RHO), steps) ** RHO
    timesteps: list[int] = []
    for i, level in enumerate(ramp):
        nearest = int(np.abs(levels - math.log(level)).argmin())
        # Distinct timesteps, and room for those that follow.
        below = timesteps[-1] - 1 if timesteps else schedule.num_timesteps - 1
        timesteps.append(min(max(nearest, steps - 1 - i), below))
    return chain(timesteps)


SPACINGS: dict[str, Callable[[NoiseSchedule, int], TimestepPairs]] = {
    "leading": lambda schedule, steps: leading_pairs(schedule.num_timesteps, steps),
    "trailing": lambda schedule, steps: trailing_pairs(schedule.num_timesteps, steps),
    "linspace": lambda schedule, steps: linspace_pairs(schedule.num_timesteps, steps),
    "homework": lambda schedule, steps: homework_pairs(schedule.num_timesteps, steps),
    "karras": karras_pairs,
}


def chain(timesteps: list[int]) -> TimestepPairs:
    """Pairs (t, next t) of a descending list; the last t is paired with -1."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def _rates(schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """(alpha_t, sigma_t) of every t; an alpha_t of 0 is replaced by a tiny one."""
    rates = [schedule.alpha_sigma(t) for t in range(schedule.num_timesteps)]
    return [(max(alpha, 1e-12), sigma) for alpha, sigma in rates]


def _check_steps(num_timesteps: int, steps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"the number of steps must be between 1 and {num_timesteps}, not {steps}")
