"""Samplers: short functions from a denoiser and noise to images.

Each walks an explicit list of pairs `(t, t_prev)` (see `common/diffusion/schedule.py`) and takes

- `denoise(x_t, t) -> (x0, eps)`, made by `common.diffusion.process.denoiser`;
- `schedule`, the tables; `x_T` [N, ...], the noise to start from; `timestep_pairs`, descending;
- `noise()`, a fresh standard normal like `x_T` at each call, for the samplers that draw any;
- `callback(i, t, x_t, x0)`, called at each step i, after the network, with the step's input and the
  predicted clean image.

It returns x at the last `t_prev`. Coefficients are float64 numbers. A sampler is added in one
place: `SAMPLERS`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from common.diffusion.process import Denoise
from common.diffusion.schedule import NoiseSchedule, TimestepPairs

Callback = Callable[[int, int, Tensor, Tensor], None]


def sample_ddpm(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timestep_pairs: TimestepPairs,
    *,
    noise: Callable[[], Tensor],
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling from the posterior q(x_prev | x_t, x0), which on any pairs is Equation 7
    of DDPM (arXiv:2006.11239).

    The variance is the posterior's, "beta tilde". No noise is drawn where it is 0.
    """
    x_t = x_T
    for i, (t, t_prev) in enumerate(timestep_pairs):
        x0, _ = denoise(x_t, t)
        if callback:
            callback(i, t, x_t, x0)
        x0_weight, x_t_weight, std = ddpm_posterior(schedule, t, t_prev)
        x_t = x0_weight * x0 + x_t_weight * x_t
        if std > 0.0:
            x_t = x_t + std * noise()
    return x_t


def ddpm_posterior(schedule: NoiseSchedule, t: int, t_prev: int) -> tuple[float, float, float]:
    """The weights of x0 and x_t in the mean of q(x_prev | x_t, x0), and its standard deviation
    (Equation 7 of arXiv:2006.11239)."""
    abar_t, abar_prev = schedule.abar(t), schedule.abar(t_prev)
    alpha_step = abar_t / abar_prev
    x0_weight = math.sqrt(abar_prev) * (1.0 - alpha_step) / (1.0 - abar_t)
    x_t_weight = math.sqrt(alpha_step) * (1.0 - abar_prev) / (1.0 - abar_t)
    return x0_weight, x_t_weight, math.sqrt((1.0 - abar_prev) / (1.0 - abar_t) * (1.0 - alpha_step))


def sample_ddim(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timestep_pairs: TimestepPairs,
    *,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Equation 12 of Song et al. 2020, arXiv:2010.02502): deterministic at eta 0, where no
    noise is drawn; DDPM's variance at 1."""
    x_t = x_T
    for i, (t, t_prev) in enumerate(timestep_pairs):
        x0, eps = denoise(x_t, t)
        if callback:
            callback(i, t, x_t, x0)
        sigma = ddim_sigma(schedule, t, t_prev, eta)
        abar_prev = schedule.abar(t_prev)
        x_t = math.sqrt(abar_prev) * x0 + math.sqrt(max(1.0 - abar_prev - sigma**2, 0.0)) * eps
        if sigma > 0.0:
            x_t = x_t + sigma * noise()
    return x_t


def ddim_sigma(schedule: NoiseSchedule, t: int, t_prev: int, eta: float) -> float:
    """The standard deviation of DDIM's fresh noise (Equation 16 of arXiv:2010.02502)."""
    abar_t, abar_prev = schedule.abar(t), schedule.abar(t_prev)
    # max: the homework's list may end with a step from t = 0 to 0, where rounding could turn the
    # difference negative.
    return eta * math.sqrt((1.0 - abar_prev) / (1.0 - abar_t) * max(1.0 - abar_t / abar_prev, 0.0))


def sample_dpmpp_2m(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timestep_pairs: TimestepPairs,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order with one evaluation a step, by x0's history (Algorithm 2 of
    arXiv:2211.01095).

    A step to alpha-bar 1 returns x0 itself (first order): extrapolating over an infinite step in
    lambda is undefined.
    """
    x_t, x0_before, h_before = x_T, None, None
    for i, (t, t_prev) in enumerate(timestep_pairs):
        x0, _ = denoise(x_t, t)
        if callback:
            callback(i, t, x_t, x0)
        alpha_prev, sigma_prev = schedule.alpha_sigma(t_prev)
        h = _lambda(schedule, t_prev) - _lambda(schedule, t)
        x0_now = x0
        if x0_before is not None and sigma_prev > 0.0:
            weight = h / (2.0 * h_before)
            x0 = (1.0 + weight) * x0 - weight * x0_before
        x_t = sigma_prev / schedule.alpha_sigma(t)[1] * x_t - alpha_prev * math.expm1(-h) * x0
        x0_before, h_before = x0_now, h
    return x_t


def sample_heun(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timestep_pairs: TimestepPairs,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method (Algorithm 1 of arXiv:2206.00364) on dx/dphi = v = alpha_t eps -
    sigma_t x0, tan(phi) = sigma_t / alpha_t.

    Along the angle phi (Appendix D of arXiv:2202.00512) every step is a rotation by at most a
    quarter turn, whereas in sigma_t / alpha_t the first step of a cosine schedule spans four orders
    of magnitude, and any error of eps times them. tan(step / 2) in place of step / 2 makes a step
    exact where x0 and eps stay the same. v is taken from x and x0, so that clipping x0 bends the
    path. Two evaluations a step, but one for a step to alpha-bar 1, which is DDIM's.
    """
    x_t = x_T
    for i, (t, t_prev) in enumerate(timestep_pairs):
        x0, _ = denoise(x_t, t)
        if callback:
            callback(i, t, x_t, x0)
        v, step = _velocity(schedule, t, x_t, x0), _angle(schedule, t) - _angle(schedule, t_prev)
        x_prev = math.cos(step) * x_t - math.sin(step) * v
        if _heun_corrects(schedule, t_prev):
            x0_prev, _ = denoise(x_prev, t_prev)
            x_prev = x_t - math.tan(step / 2.0) * (v + _velocity(schedule, t_prev, x_prev, x0_prev))
        x_t = x_prev
    return x_t


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler, and what has to be known of it to use it by its name."""

    label: str
    """Its name in figures and tables."""
    run: Callable[..., Tensor]
    draws_noise: bool = False
    takes_eta: bool = False
    evaluations: Callable[[NoiseSchedule, TimestepPairs], int] = lambda schedule, timestep_pairs: (
        len(timestep_pairs)
    )


SAMPLERS = {
    "ddpm": Sampler("DDPM", sample_ddpm, draws_noise=True),
    "ddim": Sampler("DDIM", sample_ddim, draws_noise=True, takes_eta=True),
    "dpmpp_2m": Sampler("DPM-Solver++(2M)", sample_dpmpp_2m),
    "heun": Sampler(
        "Heun",
        sample_heun,
        evaluations=lambda schedule, timestep_pairs: (
            len(timestep_pairs)
            + sum(_heun_corrects(schedule, t_prev) for _, t_prev in timestep_pairs)
        ),
    ),
}
SamplerName = Literal[*SAMPLERS]


def count_evaluations(
    sampler: SamplerName, schedule: NoiseSchedule, timestep_pairs: TimestepPairs
) -> int:
    """How often the sampler calls `denoise` on these pairs (a guided pair of network outputs is one
    evaluation)."""
    return SAMPLERS[sampler].evaluations(schedule, timestep_pairs)


def sample(
    sampler: SamplerName,
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timestep_pairs: TimestepPairs,
    *,
    eta: float = 0.0,
    noise: Callable[[], Tensor],
    callback: Callback | None = None,
) -> Tensor:
    """Runs the sampler of that name; `eta` is DDIM's and `noise` is used by those that draw any."""
    chosen = SAMPLERS[sampler]
    extra = ({"noise": noise} if chosen.draws_noise else {}) | (
        {"eta": eta} if chosen.takes_eta else {}
    )
    return chosen.run(denoise, schedule, x_T, timestep_pairs, callback=callback, **extra)


def _lambda(schedule: NoiseSchedule, t: int) -> float:
    """lambda_t = log(alpha_t / sigma_t); minus or plus infinity where one of them is 0."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    if sigma_t == 0.0:
        return math.inf
    return math.log(alpha_t / sigma_t) if alpha_t > 0.0 else -math.inf


def _heun_corrects(schedule: NoiseSchedule, t_prev: int) -> bool:
    return schedule.abar(t_prev) < 1.0


def _angle(schedule: NoiseSchedule, t: int) -> float:
    """phi in [0, pi/2]."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    return math.atan2(sigma_t, alpha_t)


def _velocity(schedule: NoiseSchedule, t: int, x_t: Tensor, x0: Tensor) -> Tensor:
    """v from x_t and x0, where there is noise."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    return (alpha_t * x_t - x0) / sigma_t
