"""Samplers against closed forms, oracle denoisers, their orders of convergence, and diffusers."""

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from common.diffusion.process import Denoise, denoiser, output_target, q_sample
from common.diffusion.samplers import (
    SAMPLERS,
    count_evaluations,
    ddim_sigma,
    ddpm_posterior,
    sample,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_heun,
)
from common.diffusion.schedule import (
    SPACINGS,
    NoiseSchedule,
    TimestepPairs,
    chain,
    homework_pairs,
    leading_pairs,
    linear_schedule,
    make_schedule,
    trailing_pairs,
)

SCHEDULE = linear_schedule()
MEAN, STD = 0.3, 0.5  # of the Gaussian oracle
EVERY_STEP = chain(list(reversed(range(1000))))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise_source(*shape: int, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, dtype=torch.float64, generator=generator)


def no_noise() -> Tensor:
    raise AssertionError("noise was drawn")


def gaussian_oracle(schedule: NoiseSchedule) -> Denoise:
    """The exact denoiser of data N(MEAN, STD^2): eps = sigma_t (x - alpha_t MEAN) / (alpha_t^2
    STD^2 + sigma_t^2)."""

    def predict(x_t: Tensor, t: int) -> Tensor:
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        return sigma_t * (x_t - alpha_t * MEAN) / (alpha_t**2 * STD**2 + sigma_t**2)

    return denoiser(predict, schedule, "eps", clip_x0=False)


def point_oracle(schedule: NoiseSchedule, point: Tensor, parameterization: str = "eps") -> Denoise:
    """The exact denoiser of data that is `point` alone: eps = (x - alpha_t point) / sigma_t."""

    def predict(x_t: Tensor, t: int) -> Tensor:
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        return output_target(
            parameterization, point, (x_t - alpha_t * point) / sigma_t, alpha_t, sigma_t
        )

    return denoiser(predict, schedule, parameterization, clip_x0=False)


# ----------------------------------------------------------------------------
# Closed forms.


def test_ddim_at_eta_1_and_stride_1_is_ddpms_posterior() -> None:
    """Equations 6 and 7 of DDPM (arXiv:2006.11239) in its own betas, for all 1000 steps: variance
    to 2e-16, mean to 3e-13."""
    for t, t_prev in EVERY_STEP:
        beta, abar, abar_prev = SCHEDULE.betas[t].item(), SCHEDULE.abar(t), SCHEDULE.abar(t_prev)
        variance = beta * (1 - abar_prev) / (1 - abar)
        x0_weight = math.sqrt(abar_prev) * beta / (1 - abar)
        x_t_weight = math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
        sigma = ddim_sigma(SCHEDULE, t, t_prev, 1.0)
        eps_weight = math.sqrt(
            max(1 - abar_prev - sigma**2, 0.0)
        )  # eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar)
        ddim_x_t_weight = eps_weight / math.sqrt(1 - abar)
        ddim_x0_weight = math.sqrt(abar_prev) - ddim_x_t_weight * math.sqrt(abar)
        posterior = ddpm_posterior(SCHEDULE, t, t_prev)
        assert abs(sigma**2 - variance) < 2e-16 and abs(posterior[2] ** 2 - variance) < 2e-16
        assert abs(ddim_x0_weight - x0_weight) < 3e-13 and abs(posterior[0] - x0_weight) < 3e-13
        assert abs(ddim_x_t_weight - x_t_weight) < 3e-13 and abs(posterior[1] - x_t_weight) < 3e-13


@pytest.mark.parametrize(
    "pairs", [trailing_pairs(1000, 20), homework_pairs(), EVERY_STEP], ids=["20", "50", "1000"]
)
def test_ddpm_is_ddim_at_eta_1_on_any_pairs(pairs: TimestepPairs) -> None:
    """Both draw from q(x_prev | x_t, x0) (Section 4.1 of arXiv:2010.02502), so the same noise gives
    the same images."""
    denoise, x_T = gaussian_oracle(SCHEDULE), normal(4, 6)
    ddpm = sample_ddpm(denoise, SCHEDULE, x_T, pairs, noise=noise_source(4, 6, seed=1))
    ddim = sample_ddim(denoise, SCHEDULE, x_T, pairs, eta=1.0, noise=noise_source(4, 6, seed=1))
    torch.testing.assert_close(ddpm, ddim, rtol=0, atol=1e-10)


def test_fresh_noise_keeps_the_marginal_variance() -> None:
    """With the exact x0 known, one step from q(x_t | x0) lands on q(x_prev | x0) for every eta
    (Lemma 1 of arXiv:2010.02502)."""
    for t, t_prev in homework_pairs():
        for eta in (0.0, 0.25, 1.0):
            sigma = ddim_sigma(SCHEDULE, t, t_prev, eta)
            x_prev = sample_ddim(
                lambda x, t: (torch.zeros_like(x), x),
                SCHEDULE,
                torch.ones(1),
                [(t, t_prev)],
                eta=eta,
                noise=lambda: 0.0,
            )
            assert x_prev.item() ** 2 + sigma**2 == pytest.approx(
                1 - SCHEDULE.abar(t_prev), rel=1e-5
            )


def test_sigma_is_proportional_to_eta_and_0_at_the_end() -> None:
    assert ddim_sigma(SCHEDULE, 500, 480, 0.25) == pytest.approx(
        0.25 * ddim_sigma(SCHEDULE, 500, 480, 1.0)
    )
    for t, t_prev in ((20, -1), (0, -1), (0, 0)):
        assert ddim_sigma(SCHEDULE, t, t_prev, 1.0) == ddpm_posterior(SCHEDULE, t, t_prev)[2] == 0.0


# ----------------------------------------------------------------------------
# Oracles.


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_point_mass_is_returned_exactly(sampler: str, spacing: str, steps: int) -> None:
    """By every sampler on every list that ends at alpha-bar 1; 1e-12 is rounding divided by
    sqrt(abar_T) = 0.006."""
    point = normal(2, 5)
    x_0 = sample(
        sampler,
        point_oracle(SCHEDULE, point),
        SCHEDULE,
        normal(2, 5, seed=1),
        SPACINGS[spacing](SCHEDULE, steps),
        eta=0.0,
        noise=noise_source(2, 5, seed=2),
    )
    torch.testing.assert_close(x_0, point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_on_the_homeworks_list_a_point_mass_keeps_the_noise_of_abar_0(sampler: str) -> None:
    """eps is constant on the path, so the walk ends at sqrt(abar_0) point + sqrt(1 - abar_0)
    eps."""
    point, x_T = normal(2, 5), normal(2, 5, seed=1)
    alpha_t, sigma_t = SCHEDULE.alpha_sigma(981)
    eps = (x_T - alpha_t * point) / sigma_t
    x_0 = sample(
        sampler, point_oracle(SCHEDULE, point), SCHEDULE, x_T, homework_pairs(), noise=no_noise
    )
    torch.testing.assert_close(
        x_0,
        SCHEDULE.alpha_sigma(0)[0] * point + SCHEDULE.alpha_sigma(0)[1] * eps,
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("steps", "std", "mean"),
    [(10, 0.3741, 0.2982), (50, 0.4724, 0.2989), (250, 0.4943, 0.2990), (1000, 0.4985, 0.2990)],
)
def test_ddim_of_a_gaussian(steps: int, std: float, mean: float) -> None:
    """Each step multiplies x - alpha_t m by (alpha_t alpha_t' s^2 + sigma_t sigma_t') / (alpha_t^2
    s^2 + sigma_t^2), so from x_T ~ N(0, 1) the output's std is the product of these over the pairs,
    and its mean m (1 - product signal_T)."""
    pairs = leading_pairs(1000, steps)
    # A linear map of x_T: its values at 0 and 1 tell the mean and the standard deviation.
    out = sample_ddim(
        gaussian_oracle(SCHEDULE), SCHEDULE, torch.tensor([0.0, 1.0], dtype=torch.float64), pairs
    )
    product = 1.0
    for t, t_prev in pairs:
        (alpha_t, sigma_t), (alpha_prev, sigma_prev) = (
            SCHEDULE.alpha_sigma(t),
            SCHEDULE.alpha_sigma(t_prev),
        )
        product *= (alpha_t * alpha_prev * STD**2 + sigma_t * sigma_prev) / (
            alpha_t**2 * STD**2 + sigma_t**2
        )
    assert (
        (out[1] - out[0]).item()
        == pytest.approx(product, rel=1e-10)
        == pytest.approx(std, abs=5e-5)
    )
    expected_mean = MEAN * (1 - product * SCHEDULE.alpha_sigma(pairs[0][0])[0])
    assert out[0].item() == pytest.approx(expected_mean, rel=1e-10) == pytest.approx(mean, abs=6e-5)


def gaussian_path(schedule: NoiseSchedule, t: int, z: Tensor) -> Tensor:
    """The exact probability-flow path of the Gaussian: alpha_t m + sqrt(alpha_t^2 s^2 + sigma_t^2)
    z, with z constant."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    return alpha_t * MEAN + math.sqrt(alpha_t**2 * STD**2 + sigma_t**2) * z


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    """Halving the step divides the error by 2^order: between the alpha-bars of t = 800 and 100,
    uniform in lambda.

    On a table of its own with 160 intervals, so that the nodes of 40 and 80 steps lie on it
    exactly. DPM++(2M) has no history at its first step, which is therefore DDIM's: one error of
    h^2, which hides no order.
    """

    def log_snr_rate(t: int) -> float:
        alpha_t, sigma_t = SCHEDULE.alpha_sigma(t)
        return math.log(alpha_t / sigma_t)

    nodes = torch.linspace(log_snr_rate(100), log_snr_rate(800), 161, dtype=torch.float64)
    abar = torch.sigmoid(2 * nodes)  # lambda = log(abar / (1 - abar)) / 2
    fine = NoiseSchedule(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]]))
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    errors = []
    for stride in (4, 2, 1):
        pairs = [(t, t - stride) for t in range(160, 0, -stride)]
        x = sample(
            sampler, gaussian_oracle(fine), fine, gaussian_path(fine, 160, z), pairs, noise=no_noise
        )
        errors.append((x - gaussian_path(fine, 0, z)).abs().max().item())
    for coarse, finer in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / finer) == pytest.approx(order, abs=0.2)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_few_steps_of_heun_from_pure_noise(zero_terminal: bool) -> None:
    """The cosine schedule starts at sigma = 20,000 or above, and the network is off by 1e-2: ten
    steps still end at the Gaussian."""
    schedule = make_schedule("cosine", zero_terminal=zero_terminal)

    def denoise(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        x0 = (alpha_t * STD**2 * x_t + sigma_t**2 * MEAN) / (alpha_t**2 * STD**2 + sigma_t**2)
        return x0 + 1e-2 * torch.sin(7.0 * x_t + t), x_t

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x_0 = sample_heun(denoise, schedule, z, trailing_pairs(1000, 10))
    torch.testing.assert_close(x_0, MEAN + STD * z, rtol=0, atol=0.05)


def test_ddpm_samples_have_the_gaussians_moments() -> None:
    """20,000 samples of 1000 steps: mean and std within 4 standard errors, 4 s / sqrt(n) = 0.014
    and 0.010, of N(0.3, 0.5^2)."""
    x_0 = sample_ddpm(
        gaussian_oracle(SCHEDULE),
        SCHEDULE,
        normal(20_000),
        EVERY_STEP,
        noise=noise_source(20_000, seed=1),
    )
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x_0.std().item() == pytest.approx(STD, abs=0.012)


# ----------------------------------------------------------------------------
# The promises of every sampler.


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_calls_are_as_announced_and_results_finite(
    sampler: str, spacing: str, zero_terminal: bool
) -> None:
    """v prediction on each schedule, for 1 step up to every step; a first step from SNR 0 and a
    last one to alpha-bar 1 included."""
    for name, num_timesteps in (("linear", 1000), ("scaled_linear", 1000), ("cosine", 40)):
        schedule = make_schedule(name, num_timesteps, zero_terminal=zero_terminal)
        for steps in (1, 2, 3, 10, 25, 39, 40):
            calls = []
            oracle = point_oracle(schedule, torch.full((2, 3), 0.5, dtype=torch.float64), "v")

            def denoise(
                x_t: Tensor, t: int, calls: list[int] = calls, oracle: Denoise = oracle
            ) -> tuple[Tensor, Tensor]:
                calls.append(t)
                return oracle(x_t, t)

            pairs = SPACINGS[spacing](schedule, steps)
            x = sample(
                sampler,
                denoise,
                schedule,
                normal(2, 3),
                pairs,
                eta=1.0,
                noise=noise_source(2, 3, seed=1),
            )
            assert len(calls) == count_evaluations(sampler, schedule, pairs)
            assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_announced_counts(zero_terminal: bool) -> None:
    """Heun on 10 steps: two each, but one for the last (alpha-bar 1)."""
    schedule, pairs = make_schedule("linear", zero_terminal=zero_terminal), trailing_pairs(1000, 10)
    counts = {sampler: count_evaluations(sampler, schedule, pairs) for sampler in SAMPLERS}
    assert counts == {"ddpm": 10, "ddim": 10, "dpmpp_2m": 10, "heun": 19}


def test_from_snr_zero_the_first_step_is_ddims() -> None:
    """x0 = -v and eps = x_T there, so DDIM and DPM++ go to alpha_t' x0 + sigma_t' x_T."""
    schedule, x_T = make_schedule("linear", zero_terminal=True), normal(2, 3)
    denoise = denoiser(lambda x, t: 0.1 * x + 0.2, schedule, "v", clip_x0=False)
    alpha_prev, sigma_prev = schedule.alpha_sigma(949)
    expected = alpha_prev * -(0.1 * x_T + 0.2) + sigma_prev * x_T
    for sampler in (sample_ddim, sample_dpmpp_2m):
        torch.testing.assert_close(sampler(denoise, schedule, x_T, [(999, 949)]), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_callback_sees_each_step(sampler: str) -> None:
    """i, t, x_t and x0 of every step, and once for each of Heun's; the last x0 is the result where
    the list ends at alpha-bar 1."""
    seen = []
    x_T, pairs, denoise = normal(2, 3), trailing_pairs(1000, 5), gaussian_oracle(SCHEDULE)
    x_0 = sample(
        sampler,
        denoise,
        SCHEDULE,
        x_T,
        pairs,
        noise=noise_source(2, 3, seed=1),
        callback=lambda *args: seen.append(args),
    )
    assert [(i, t) for i, t, _, _ in seen] == list(enumerate(t for t, _ in pairs))
    assert seen[0][2] is x_T
    for _, t, x_t, x0 in seen:
        torch.testing.assert_close(x0, denoise(x_t, t)[0])
    torch.testing.assert_close(x_0, seen[-1][3])


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_deterministic_samplers_draw_nothing(sampler: str) -> None:
    denoise, pairs = gaussian_oracle(SCHEDULE), trailing_pairs(1000, 5)
    runs = [
        sample(sampler, denoise, SCHEDULE, normal(2, 3), pairs, eta=0.0, noise=no_noise)
        for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_noise_is_drawn_once_a_step_but_for_the_last(sampler: str, eta: float) -> None:
    draws = []
    source = noise_source(2, 3, seed=1)
    denoise, pairs = gaussian_oracle(SCHEDULE), trailing_pairs(1000, 5)
    sample(
        sampler,
        denoise,
        SCHEDULE,
        normal(2, 3),
        pairs,
        eta=eta,
        noise=lambda: draws.append(source()) or draws[-1],
    )
    assert len(draws) == 4


# ----------------------------------------------------------------------------
# Parity with diffusers.

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
}
PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


def compare_steps(
    scheduler: object,
    pairs: TimestepPairs,
    clip_x0: bool,
    ours: Callable[..., Tensor],
    **arguments: object,
) -> None:
    """One step from each t, from random x_t and network outputs: the next x and the predicted x0.

    diffusers' tables are float32. With them: 1e-5 on the step's result, 1e-6 relative on x0 (which
    reaches hundreds), from t = 100 on; below, 1 - alphas_cumprod has lost up to four of its seven
    digits. With ours in their place: all but equal.
    """
    parameterization = {kind: name for name, kind in PREDICTION_TYPE.items()}[
        scheduler.config.prediction_type
    ]
    shipped = scheduler.alphas_cumprod
    for tables, lowest_t, on_x, on_x0 in (
        (shipped, 100, 1e-5, 1e-6),
        (SCHEDULE.alphas_cumprod, 0, 1e-9, 1e-12),
    ):
        scheduler.alphas_cumprod = tables
        if getattr(scheduler, "final_alpha_cumprod", 1.0) != 1.0:
            scheduler.final_alpha_cumprod = tables[0]
        for t, t_prev in (pair for pair in pairs if pair[0] >= lowest_t):
            x_t, output = normal(2, 3, seed=t), normal(2, 3, seed=t + 1000)
            free, denoise = (
                denoiser(lambda x, t, o=output: o, SCHEDULE, parameterization, clip_x0=clip)
                for clip in (False, clip_x0)
            )
            x0 = denoise(x_t, t)[0]
            x_prev = ours(denoise, SCHEDULE, x_t, [(t, t_prev)], noise=noise_source(2, 3, seed=t))
            # diffusers draws from a generator that starts like ours.
            theirs = scheduler.step(
                output, t, x_t, generator=torch.Generator().manual_seed(t), **arguments
            )
            assert (x_prev - theirs.prev_sample).abs().max() < on_x
            assert (x0 - theirs.pred_original_sample).abs().max() < on_x0 * free(x_t, t)[
                0
            ].abs().max()


@pytest.mark.parametrize("parameterization", PREDICTION_TYPE)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("homework", [False, True])
def test_ddim_agrees_with_diffusers(
    diffusers: ModuleType, parameterization: str, eta: float, clip: bool, homework: bool
) -> None:
    """On leading steps that divide T, to alpha-bar 1; the homework's list is its steps_offset 1,
    ending at alphas_cumprod[0]."""
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=clip,
        set_alpha_to_one=not homework,
        steps_offset=int(homework),
        prediction_type=PREDICTION_TYPE[parameterization],
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(50)
    pairs = homework_pairs(1000, 50) if homework else leading_pairs(1000, 50)
    assert scheduler.timesteps.tolist() == [t for t, _ in pairs]
    compare_steps(scheduler, pairs, clip, partial(sample_ddim, eta=eta), eta=eta)


@pytest.mark.parametrize("parameterization", PREDICTION_TYPE)
@pytest.mark.parametrize("steps", [50, 1000])
def test_ddpm_agrees_with_diffusers(
    diffusers: ModuleType, parameterization: str, steps: int
) -> None:
    """With the posterior's variance ("fixed_small"), on leading steps that divide T."""
    scheduler = diffusers.DDPMScheduler(
        **BETAS,
        clip_sample=False,
        variance_type="fixed_small",
        prediction_type=PREDICTION_TYPE[parameterization],
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    pairs = leading_pairs(1000, steps)
    assert scheduler.timesteps.tolist() == [t for t, _ in pairs]
    # Of 1000 steps, every 7th and the last few.
    compare_steps(
        scheduler, pairs if steps == 50 else [*pairs[:-4:7], *pairs[-4:]], False, sample_ddpm
    )


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers on its own tables
@pytest.mark.parametrize("parameterization", PREDICTION_TYPE)
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_dpmpp_2m_agrees_with_diffusers(
    diffusers: ModuleType, parameterization: str, steps: int
) -> None:
    """The whole path on trailing steps, for its history: both begin with a first-order step and end
    with one to alpha-bar 1.

    diffusers would also lower the order of the last but one step of fewer than 15
    (`lower_order_final`).
    """
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=False,
        final_sigmas_type="zero",
        prediction_type=PREDICTION_TYPE[parameterization],
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    pairs = trailing_pairs(1000, steps)
    assert scheduler.timesteps.tolist() == [t for t, _ in pairs]

    def output(x_t: Tensor, t: int) -> Tensor:
        """A network's output for an x0 that bends with x_t."""
        alpha_t, sigma_t = SCHEDULE.alpha_sigma(t)
        x0 = torch.sin(2.0 * x_t)
        return output_target(parameterization, x0, (x_t - alpha_t * x0) / sigma_t, alpha_t, sigma_t)

    path = []
    denoise = denoiser(output, SCHEDULE, parameterization, clip_x0=False)
    x = normal(2, 3)
    x_0 = sample_dpmpp_2m(
        denoise, SCHEDULE, x, pairs, callback=lambda i, t, x_t, x0: path.append(x_t)
    )
    for (t, _), ours in zip(pairs, [*path[1:], x_0], strict=True):
        x = scheduler.step(output(x, t), t, x).prev_sample
        assert (ours - x).abs().max() < 1e-5


def test_add_noise_agrees_with_diffusers(diffusers: ModuleType) -> None:
    x0, eps, t = normal(5, 3), normal(5, 3, seed=1), torch.tensor([0, 1, 250, 500, 999])
    theirs = diffusers.DDPMScheduler(**BETAS).add_noise(x0, eps, t)
    torch.testing.assert_close(q_sample(SCHEDULE, x0, t, eps), theirs, rtol=0, atol=1e-5)


def test_zero_terminal_snr_agrees_with_diffusers(diffusers: ModuleType) -> None:
    """Whose last alpha-bar is set to 2^-24 in place of 0, for the sake of its divisions."""
    theirs = diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod.double()
    ours = make_schedule("linear", zero_terminal=True).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
