"""Noise schedules and timestep sequences; the conventions of the whole project are decided here.

- `t` is the 0-based index into `alphas_cumprod`, and what a network is fed. It runs from 0 (nearly
  clean) to T - 1.
- `alphas_cumprod[t]` is alpha-bar of DDPM (Ho et al. 2020, arXiv:2006.11239); DDIM (Song et al.
  2020, arXiv:2010.02502) calls the same quantity alpha_t.
- x_t = alpha_t x_0 + sigma_t eps with alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 -
  alphas_cumprod[t]), as in DPM-Solver (arXiv:2206.00927).
- A sampler walks an explicit list of pairs `(t, t_prev)`, descending. `t_prev = -1` stands for
  alpha-bar 1, the clean image. No stride is ever recomputed from the list.
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
        # Plain floats as well: samplers index them by integer, without a tensor in between.
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - self.betas, 0))
        object.__setattr__(self, "_abar", self.alphas_cumprod.tolist())

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
        """(alpha_t, sigma_t) for a batch: `t` long [N], two tensors [N, 1, ...] with the dtype,
        device and rank of `x` [N, ...]."""
        shape = (-1, *[1] * (x.dim() - 1))
        tables = (self.alphas_cumprod.sqrt(), (1.0 - self.alphas_cumprod).sqrt())
        return tuple(table.to(x.dtype).to(x.device)[t].view(shape) for table in tables)

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio abar / (1 - abar) for `t` long [N]; float32 [N] on the device
        of `t`."""
        table = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        return table.to(torch.float32).to(t.device)[t]


def linear_schedule(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
) -> NoiseSchedule:
    """Betas in equal steps (Section 4 of DDPM, arXiv:2006.11239)."""
    return NoiseSchedule(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


def scaled_linear_schedule(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> NoiseSchedule:
    """Square roots of betas in equal steps: the schedule of latent diffusion; the defaults are
    Stable Diffusion v1's."""
    roots = torch.linspace(
        math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64
    )
    return NoiseSchedule(roots**2)


def cosine_schedule(
    num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
) -> NoiseSchedule:
    """alpha-bar follows a squared cosine (Equation 17 of Nichol and Dhariwal 2021,
    arXiv:2102.09672)."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    abar = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return NoiseSchedule((1.0 - abar[1:] / abar[:-1]).clamp(max=max_beta))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule shifted and scaled so that the last alpha-bar is exactly 0 (Algorithm 1 of Lin
    et al. 2023, arXiv:2305.08891).

    The first alpha-bar is kept. eps prediction is undefined at the last step: use v or x0
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
    """The schedule of that name with its default constants, with a terminal SNR of zero if
    asked."""
    schedule = SCHEDULES[name](num_timesteps)
    return zero_terminal_snr(schedule) if zero_terminal else schedule


# ----------------------------------------------------------------------------
# Timestep sequences: exactly `steps` pairs (t, t_prev), descending.


def leading_pairs(num_timesteps: int, steps: int) -> TimestepPairs:
    """t = i floor(T / S): starts below T - 1 and ends at 0 (the spacing of DDIM's published
    code)."""
    _check_steps(num_timesteps, steps)
    return chain([i * (num_timesteps // steps) for i in reversed(range(steps))])


def trailing_pairs(num_timesteps: int, steps: int) -> TimestepPairs:
    """t = round(T - i T / S) - 1: starts at T - 1, the only spacing that begins at pure noise
    (Table 2 of arXiv:2305.08891)."""
    _check_steps(num_timesteps, steps)
    return chain([round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)])


def linspace_pairs(num_timesteps: int, steps: int) -> TimestepPairs:
    """S equally spaced t with both ends, T - 1 and 0, among them (T - 1 alone for a single
    step)."""
    _check_steps(num_timesteps, steps)
    return chain([round(t) for t in np.linspace(num_timesteps - 1, 0, steps)])


def homework_pairs(num_timesteps: int = 1000, steps: int = 50) -> TimestepPairs:
    """The list behind the homework's reference faces: (981, 961), ..., (21, 1), (1, 0) for 50 steps
    of 1000.

    t = 1 + i floor(T / S), t_prev = t - floor(T / S), but 0 after the last step: the walk ends at
    alphas_cumprod[0], not at 1. With S = T there is no room for the offset 1: the list is then
    every timestep, (T - 1, T - 2), ..., (1, 0), (0, 0).
    """
    _check_steps(num_timesteps, steps)
    stride = num_timesteps // steps
    offset = 0 if steps == num_timesteps else 1
    return [
        (offset + i * stride, max(offset + (i - 1) * stride, 0)) for i in reversed(range(steps))
    ]


SPACINGS: dict[str, Callable[[int, int], TimestepPairs]] = {
    "leading": leading_pairs,
    "trailing": trailing_pairs,
    "linspace": linspace_pairs,
    "homework": homework_pairs,
}


def chain(timesteps: list[int]) -> TimestepPairs:
    """Pairs each t with its successor in a descending list, the last one with -1."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def _check_steps(num_timesteps: int, steps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"the number of steps must be between 1 and {num_timesteps}, not {steps}")
