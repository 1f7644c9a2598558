"""Samplers: short functions from a denoiser and initial noise to images.

Each follows an explicit list of pairs `(t, t_prev)` (see `common/diffusion/schedule.py`) and takes

- `denoise(x_t, t) -> (x0, eps)`, made by `common.diffusion.process.denoiser`;
- `schedule`, the noise schedule; `x_T` [N, ...], the initial noise; `timestep_pairs`, descending;
- `noise()`, which returns new standard normal noise of the shape of `x_T` at each call, for the
  samplers that add noise;
- `callback(i, t, x_t, x0)`, called at each step i, after the network, with the step's input and the
  predicted clean image.

It returns x at the last `t_prev`. Coefficients are Python floats (float64). A new sampler needs one
entry in `SAMPLERS`.
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
    """DDPM: ancestral sampling from the posterior q(x_prev | x_t, x0).

    Equation 7 of Ho et al. 2020 (arXiv:2006.11239), applied to any pair (t, t_prev). The variance
    is the posterior's, "beta tilde"; where it is 0, no noise is drawn.
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
    """Weights of x0 and of x_t in the mean of q(x_prev | x_t, x0), and its standard deviation.

    Equation 7 of Ho et al. 2020 (arXiv:2006.11239).
    """
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
    """DDIM (Equation 12 of Song et al. 2020, arXiv:2010.02502).

    Deterministic at eta = 0, where no noise is drawn; eta = 1 has DDPM's variance.
    """
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
    """The standard deviation of the noise that DDIM adds (Equation 16 of arXiv:2010.02502)."""
    abar_t, abar_prev = schedule.abar(t), schedule.abar(t_prev)
    # max: the homework's list may end with a step from t = 0 to 0, where rounding could make the
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
    """DPM-Solver++(2M): second order with one evaluation a step (Algorithm 2 of arXiv:2211.01095).

    It extrapolates x0 from the previous step's x0. A step to alpha-bar 1 returns x0 itself (first
    order), because the step in lambda = log(alpha_t / sigma_t) is infinite there.
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
    """Heun's second-order method in the angle phi, tan(phi) = sigma_t / alpha_t.

    Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364), applied to dx/dphi = v = alpha_t eps -
    sigma_t x0 (Appendix D of arXiv:2202.00512). Along phi every step is a rotation by at most pi /
    2. In sigma_t / alpha_t, by contrast, the first step of a cosine schedule spans four orders of
    magnitude and multiplies any error of eps by them. tan(step / 2) in place of step / 2 makes a
    step exact if x0 and eps are constant. v is computed from x and x0, so clipping x0 changes the
    path.

    Two evaluations a step; a step to alpha-bar 1 takes one and equals DDIM's.
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
    """A sampler and its properties, by which `sample` calls it."""

    label: str
    """Name in figures and tables."""
    run: Callable[..., Tensor]
    draws_noise: bool = False
    """Whether `run` takes `noise`."""
    takes_eta: bool = False
    """Whether `run` takes `eta`."""
    evaluations: Callable[[NoiseSchedule, TimestepPairs], int] = lambda schedule, timestep_pairs: (
        len(timestep_pairs)
    )
    """Number of network evaluations on a list of timestep pairs."""


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
    """The number of calls of `denoise` on these pairs; a guided pair of outputs counts as one."""
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
    """Runs the named sampler. `eta` reaches DDIM only, `noise` only the samplers that add noise."""
    chosen = SAMPLERS[sampler]
    extra = ({"noise": noise} if chosen.draws_noise else {}) | (
        {"eta": eta} if chosen.takes_eta else {}
    )
    return chosen.run(denoise, schedule, x_T, timestep_pairs, callback=callback, **extra)


def _lambda(schedule: NoiseSchedule, t: int) -> float:
    """lambda_t = log(alpha_t / sigma_t); infinite at sigma_t = 0, minus infinity at alpha_t = 0."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    if sigma_t == 0.0:
        return math.inf
    return math.log(alpha_t / sigma_t) if alpha_t > 0.0 else -math.inf


def _heun_corrects(schedule: NoiseSchedule, t_prev: int) -> bool:
    """Whether Heun's method evaluates the network a second time in a step to `t_prev`."""
    return schedule.abar(t_prev) < 1.0


def _angle(schedule: NoiseSchedule, t: int) -> float:
    """The angle phi in [0, pi / 2], tan(phi) = sigma_t / alpha_t."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    return math.atan2(sigma_t, alpha_t)


def _velocity(schedule: NoiseSchedule, t: int, x_t: Tensor, x0: Tensor) -> Tensor:
    """v = alpha_t eps - sigma_t x0, computed from x_t and x0; sigma_t must not be 0."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    return (alpha_t * x_t - x0) / sigma_t
