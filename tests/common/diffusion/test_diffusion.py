"""The maths between images and networks, by closed forms and identities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.diffusion.guidance import drop_context, guide, guided, rescale_guidance
from common.diffusion.loss import (
    TEMPERATURE,
    Discrimination,
    LogVariance,
    LossWeighting,
    TrainedGuidance,
    diffusion_loss,
    draw_timesteps,
    min_snr_weight,
)
from common.diffusion.process import denoiser, output_target, predict_eps, predict_x0, q_sample
from common.diffusion.schedule import NoiseSchedule, linear_schedule, zero_terminal_snr
from common.seeds import StackedRandomGenerator

PARAMETERIZATIONS = ["eps", "x0", "v"]
SCHEDULE = linear_schedule()
PURE_NOISE = NoiseSchedule(torch.ones(1, dtype=torch.float64))  # One timestep, of alpha-bar 0.


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------
# The forward process and the parameterizations.


def test_q_sample_has_the_moments_of_equation_4() -> None:
    """Mean sqrt(abar) x0 and variance 1 - abar (arXiv:2006.11239), exact for noise whose own
    moments are exactly 0 and 1."""
    eps = normal(3, 1000)
    eps = (eps - eps.mean(1, keepdim=True)) / eps.std(1, correction=0, keepdim=True)
    t = torch.tensor([0, 300, 999])
    x0 = torch.full((3, 1000), 0.7, dtype=torch.float64)
    x_t = q_sample(SCHEDULE, x0, t, eps)
    abar = SCHEDULE.alphas_cumprod[t]
    torch.testing.assert_close(x_t.mean(1), abar.sqrt() * 0.7)
    torch.testing.assert_close(x_t.var(1, correction=0), 1 - abar)


def test_q_sample_is_the_chain_of_single_steps() -> None:
    """q(x_t | x_{t-1}) has mean sqrt(1 - beta) x_{t-1} and variance beta (Equation 2): composed, it
    must be q(x_t | x_0)."""
    mean, variance = 1.0, 0.0
    one = torch.ones(1, 1, dtype=torch.float64)
    for step, beta in enumerate(SCHEDULE.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if step in (0, 99, 999):
            t = torch.tensor([step])
            assert q_sample(SCHEDULE, one, t, 0 * one).item() == pytest.approx(mean, rel=1e-12)
            assert q_sample(SCHEDULE, 0 * one, t, one).item() ** 2 == pytest.approx(
                variance, rel=1e-12
            )


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("t", [0, 500, 999])
def test_target_and_predictions_are_inverse(parameterization: str, t: int) -> None:
    x0, eps = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    alpha_t, sigma_t = SCHEDULE.alpha_sigma(t)
    x_t = alpha_t * x0 + sigma_t * eps
    output = output_target(parameterization, x0, eps, alpha_t, sigma_t)
    # Relative to 1 / rate, by which rounding grows where the rate is small.
    assert (
        predict_x0(parameterization, output, x_t, alpha_t, sigma_t) - x0
    ).abs().max() < 1e-14 / alpha_t
    assert (
        predict_eps(parameterization, output, x_t, alpha_t, sigma_t) - eps
    ).abs().max() < 1e-14 / sigma_t


def test_v_is_the_derivative_by_the_angle() -> None:
    """v = d x / d phi for x = cos(phi) x0 + sin(phi) eps (Appendix D of arXiv:2202.00512), here by
    central differences."""
    x0, eps, phi, h = normal(5), normal(5, seed=1), 0.8, 1e-5
    slope = (
        math.cos(phi + h) * x0
        + math.sin(phi + h) * eps
        - math.cos(phi - h) * x0
        - math.sin(phi - h) * eps
    ) / (2 * h)
    torch.testing.assert_close(
        output_target("v", x0, eps, math.cos(phi), math.sin(phi)), slope, rtol=0, atol=1e-9
    )


# ----------------------------------------------------------------------------
# Training.


class Oracle:
    """A network that knows x0 and puts out the exact target, plus `error`; it keeps what it was
    shown."""

    def __init__(self, x0: Tensor, parameterization: str, error: float = 0.0) -> None:
        self.x0, self.parameterization, self.error = x0, parameterization, error

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.x_t, self.t, self.condition = x_t, t, condition
        alpha_t, sigma_t = SCHEDULE.alpha_sigma_like(t, x_t)
        eps = (x_t - alpha_t * self.x0) / sigma_t
        return output_target(self.parameterization, self.x0, eps, alpha_t, sigma_t) + self.error


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_loss_is_the_squared_error_of_the_output(parameterization: str) -> None:
    x0, condition = normal(4, 3, 8, 8), torch.arange(4)
    for error in (0.0, 0.5):
        network = Oracle(x0, parameterization, error)
        generators = StackedRandomGenerator([1, 2, 3, 4])
        loss = diffusion_loss(
            network, SCHEDULE, x0, condition, generators, parameterization=parameterization
        )
        assert loss.item() == pytest.approx(error**2, abs=1e-6)
        assert network.condition is condition and network.t.dtype == torch.long


def test_loss_of_an_image_depends_on_its_own_seed() -> None:
    """The batch's loss is the mean of the losses that the images have alone."""
    x0 = normal(3, 1, 4, 4).float()
    seeds = [7, 8, 9]

    def loss(rows: list[int]) -> float:
        generators = StackedRandomGenerator([seeds[row] for row in rows])
        return diffusion_loss(
            lambda x, t, c: 0 * x, SCHEDULE, x0[rows], rows, generators, parameterization="v"
        ).item()

    assert loss([0, 1, 2]) == pytest.approx(sum(loss([row]) for row in (0, 1, 2)) / 3, rel=1e-6)
    assert loss([2, 0, 1]) == pytest.approx(loss([0, 1, 2]), rel=1e-6)


def test_timesteps_of_training_are_uniform() -> None:
    """Each t of 10 has probability 1/10: over 4000 draws a count stays within 5 standard
    deviations, 5 sqrt(4000 0.1 0.9) = 95."""
    schedule = linear_schedule(10)
    shown = []
    x0 = torch.zeros(4000, 1)
    diffusion_loss(
        lambda x, t, c: shown.append(t) or x,
        schedule,
        x0,
        x0,
        StackedRandomGenerator(range(4000)),
        parameterization="eps",
    )
    counts = torch.bincount(shown[0], minlength=10)
    assert len(counts) == 10 and bool(((counts - 400).abs() < 95).all())


def test_min_snr_weights_are_one_weight_on_the_x0_error() -> None:
    """An error d of x0 is SNR d^2 in eps and (SNR + 1) d^2 in v, so all three must come to min(SNR,
    gamma) d^2."""
    snr = torch.tensor([1e-4, 0.5, 1.0, 5.0, 40.0, 9999.0], dtype=torch.float64)
    expected = snr.clamp(max=5.0)
    for parameterization, factor in (("eps", snr), ("x0", torch.ones_like(snr)), ("v", snr + 1)):
        torch.testing.assert_close(min_snr_weight(snr, 5.0, parameterization) * factor, expected)


@pytest.mark.parametrize(("parameterization", "weight"), [("eps", 1.0), ("x0", 0.0), ("v", 0.0)])
def test_min_snr_is_finite_at_snr_zero(parameterization: str, weight: float) -> None:
    """The limits of min(SNR, g) / SNR, min(SNR, g) and min(SNR, g) / (SNR + 1); the gradient is
    finite as well."""
    assert min_snr_weight(torch.zeros(1), 5.0, parameterization).item() == weight
    scale = torch.ones((), requires_grad=True)
    loss = diffusion_loss(
        lambda x, t, c: scale * (x + 1),
        PURE_NOISE,
        torch.ones(4, 3),
        torch.zeros(4),
        StackedRandomGenerator(range(4)),
        parameterization=parameterization,
        min_snr_gamma=5.0,
    )
    loss.backward()
    assert math.isfinite(loss.item()) and math.isfinite(scale.grad.item())
    assert (loss.item() > 0) == (weight > 0)


def test_pixels_are_weighted() -> None:
    """A mask of mean 1 over half of the pixels counts only those: what lies outside it may be
    anything."""
    x0, mask = normal(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[:, :, :2] = 2.0

    def loss(image: Tensor, **more: Tensor) -> float:
        generators = StackedRandomGenerator([1, 2])
        return diffusion_loss(
            lambda x, t, c: 0 * x, SCHEDULE, image, x0, generators, parameterization="x0", **more
        ).item()

    outside = torch.where(mask > 0, x0, 100.0 * normal(2, 3, 4, 4, seed=1))
    assert loss(outside, weight=mask) == pytest.approx(x0[:, :, :2].square().mean().item())
    assert loss(x0, weight=torch.ones_like(mask)) == pytest.approx(loss(x0))


def test_min_snr_with_an_offset_clips_the_shifted_weight() -> None:
    """One weight min(SNR + 1, gamma) on the x0 error; without a bound it is v prediction's own, 1
    on its error."""
    snr = torch.tensor([0.0, 0.5, 3.9, 4.1, 9999.0], dtype=torch.float64)
    expected = (snr + 1).clamp(max=5.0)
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "x0", 1.0), expected)
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v", 1.0) * (snr + 1), expected)
    torch.testing.assert_close(min_snr_weight(snr, math.inf, "v", 1.0), torch.ones_like(snr))
    with pytest.raises(ValueError, match="x0 or v"):
        min_snr_weight(snr, 5.0, "eps", 1.0)


def test_min_snr_gamma_weights_each_image() -> None:
    """With an output error of 1 everywhere, the loss is the mean weight at the t that were
    drawn."""
    x0 = normal(8, 3)
    network = Oracle(x0, "v", error=1.0)
    generators = StackedRandomGenerator(range(8))
    loss = diffusion_loss(
        network, SCHEDULE, x0, x0, generators, parameterization="v", min_snr_gamma=5.0
    )
    snr = SCHEDULE.alphas_cumprod[network.t] / (1 - SCHEDULE.alphas_cumprod[network.t])
    assert loss.item() == pytest.approx((snr.clamp(max=5.0) / (snr + 1)).mean().item(), rel=1e-5)


def test_the_best_log_variance_is_the_log_of_the_error() -> None:
    """e / exp(u) + u is least at u = log e, where every noise level's error counts as 1 and its own
    size no longer matters."""
    x0 = torch.zeros(8, 1, 4, 4)

    def loss(u: Tensor) -> Tensor:
        return diffusion_loss(
            lambda x_t, t, c: x_t.new_full(x_t.shape, 3.0),
            SCHEDULE,
            x0,
            x0,
            StackedRandomGenerator(range(8)),
            parameterization="x0",
            log_variance=lambda t: u.expand(len(t)),
        )

    u = torch.tensor(math.log(9.0), requires_grad=True)
    loss(u).backward()
    assert loss(u).item() == pytest.approx(1.0 + math.log(9.0), rel=1e-5)
    assert u.grad.item() == pytest.approx(0.0, abs=1e-5)
    assert loss(u.detach() + 0.1) > loss(u.detach()) < loss(u.detach() - 0.1)


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
def test_trained_guidance_comes_to_rest_at_the_guided_output(scale: float) -> None:
    """A network that knows the plain conditional and unconditional mean, and puts out conditional +
    a (conditional - unconditional): the gradient in a vanishes where that is the guided output, a =
    scale - 1."""
    x0 = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def gradient(a: float, interval: tuple[int, int]) -> float:
        extra = torch.tensor(a, requires_grad=True)

        def network(x_t: Tensor, t: Tensor, given: Tensor) -> Tensor:
            # x0 prediction: the conditional mean is x0 itself, the unconditional one 0.
            return torch.where(given.bool().view(-1, 1, 1, 1), (1.0 + extra) * x0, 0.0 * x0)

        diffusion_loss(
            network,
            SCHEDULE,
            x0,
            torch.ones(64),
            StackedRandomGenerator(range(64)),
            parameterization="x0",
            guidance=TrainedGuidance(scale, torch.zeros(64), interval),
        ).backward()
        return extra.grad.item()

    assert gradient(scale - 1.0, (0, 999)) == pytest.approx(0.0, abs=1e-5)
    assert gradient(scale - 0.9, (0, 999)) > 0.0 > gradient(scale - 1.1, (0, 999))
    assert gradient(0.0, (1000, 2000)) == pytest.approx(
        0.0, abs=1e-6
    )  # outside its interval nothing is guided


@pytest.mark.parametrize("ratio", [0.99, 1.0, 1.02])
def test_discrimination_is_the_cross_entropy_of_the_right_condition(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with error 1 given the right condition (0) and `ratio` given the wrong one (1)."""
    x0 = torch.zeros(40, 1, 2, 2)
    seen = []

    def loss(highest: int, **options: Any) -> float:
        monkeypatch.setattr("common.diffusion.loss.HIGHEST_TOLD", highest)

        def network(x_t: Tensor, t: Tensor, given: Tensor) -> Tensor:
            seen.append(t)
            return (ratio ** (0.5 * given)).view(-1, 1, 1, 1).expand_as(x_t)

        draws = StackedRandomGenerator(range(40))
        return diffusion_loss(
            network, SCHEDULE, x0, torch.zeros(40), draws, parameterization="x0", **options
        ).item()

    told = Discrimination(0.5, slice(None, None, 4), torch.ones(10))
    chance = 1.0 / (1.0 + ratio ** (1.0 / TEMPERATURE))  # of the wrong condition
    assert loss(1000) == pytest.approx(1.0, rel=1e-6)
    assert loss(1000, discrimination=told) == pytest.approx(1.0 - 0.5 * math.log(1.0 - chance))
    everyone, some = seen[-2:]
    assert torch.equal(some, everyone[::4])
    taking_part = (some <= 500).float().mean().item()
    assert 0.0 < taking_part < 1.0
    assert loss(500, discrimination=told) == pytest.approx(
        1.0 - taking_part * 0.5 * math.log(1.0 - chance)
    )


def test_a_new_log_variance_leaves_the_loss_as_it_is() -> None:
    t = torch.arange(0, 1000, 100)
    assert not LogVariance()(t).any() and LogVariance()(t).shape == t.shape


@pytest.mark.parametrize(
    ("kind", "parameterization", "expected"),
    [
        ("none", "v", {"timesteps": "uniform"}),
        ("min_snr", "v", {"timesteps": "uniform", "min_snr_gamma": 5.0, "snr_offset": 1.0}),
        ("min_snr", "eps", {"timesteps": "uniform", "min_snr_gamma": 5.0, "snr_offset": 0.0}),
    ],
)
def test_loss_weightings(kind: str, parameterization: str, expected: dict) -> None:
    weighting = LossWeighting(kind, parameterization, "uniform")
    assert weighting.options == expected and not list(weighting.parameters())
    learned = LossWeighting("learned", parameterization, "logit_normal")
    assert learned.options.keys() == {"timesteps", "log_variance"}
    assert all(name.startswith("log_variance.") for name, _ in learned.named_parameters())


def test_logit_normal_timesteps_are_those_of_a_normal_variable() -> None:
    """T sigmoid(n) is below T / 2 for half of all n and below T sigmoid(-1) for 15.9 % of them."""
    t = draw_timesteps(1000, "logit_normal", StackedRandomGenerator(range(4000)))
    assert t.dtype == torch.long and int(t.min()) >= 0 and int(t.max()) < 1000
    assert (t < 500).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (t < 1000 / (1 + math.e)).float().mean().item() == pytest.approx(0.1587, abs=0.02)


def test_mixed_timesteps_are_half_uniform_and_half_logit_normal() -> None:
    """Each tail and the middle hold the mean of both distributions' shares."""
    draws = {
        kind: draw_timesteps(1000, kind, StackedRandomGenerator(range(4000)))
        for kind in ("mixed", "uniform", "logit_normal")
    }
    for low, high in ((0, 100), (100, 900), (900, 1000)):
        share = {kind: ((t >= low) & (t < high)).float().mean().item() for kind, t in draws.items()}
        expected = (share["uniform"] + share["logit_normal"]) / 2
        assert share["mixed"] == pytest.approx(expected, abs=0.03)


def test_shifted_timesteps_have_the_median_of_three_quarters() -> None:
    """Three quarters are T sigmoid(n + log 3), which n = 0 takes to 3 T / 4; the rest are uniform.

    Below 3 T / 4 are 3/4 1/2 + 1/4 3/4, below T / 10 (n = -log 27) 3/4 0.0005 + 1/4 1/10 of them.
    """
    t = draw_timesteps(1000, "shifted", StackedRandomGenerator(range(4000)))
    assert t.dtype == torch.long and int(t.min()) >= 0 and int(t.max()) < 1000
    assert (t < 750).float().mean().item() == pytest.approx(0.5625, abs=0.03)
    assert (t < 100).float().mean().item() == pytest.approx(0.0254, abs=0.01)


def test_drop_context_rate() -> None:
    """Over 4000 draws the rate stays within 5 standard deviations, 5 sqrt(0.1 0.9 / 4000) =
    0.024."""
    context = torch.arange(4000) % 10
    dropped = drop_context(context, 10, 0.1, StackedRandomGenerator(range(4000)))
    changed = dropped != context
    assert abs(changed.float().mean().item() - 0.1) < 0.024
    assert bool((dropped[changed] == 10).all())
    assert torch.equal(drop_context(context, 10, 0.0, StackedRandomGenerator(range(4000))), context)
    assert bool((drop_context(context, 10, 1.0, StackedRandomGenerator(range(4000))) == 10).all())


def test_drop_context_drops_whole_rows() -> None:
    context, null = torch.ones(200, 7, 5), torch.zeros(7, 5)
    sums = drop_context(context, null, 0.5, StackedRandomGenerator(range(200))).sum((1, 2))
    assert set(sums.tolist()) == {0.0, 35.0}


# ----------------------------------------------------------------------------
# Guidance and the denoiser.


class Recorder:
    """A network whose output is its condition (one number per image) times x; it notes the batch
    sizes it saw."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | dict[str, Tensor]) -> Tensor:
        self.rows.append(len(x))
        assert t.dtype == torch.long and t.shape == (len(x),)
        factor = condition["factor"] if isinstance(condition, dict) else condition
        return factor[:, None] * x


X = normal(3, 5).float()
COND, NULL = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 0.5])


def test_guidance_scale_1_is_conditional_and_0_unconditional() -> None:
    cond, uncond = normal(2, 3), normal(2, 3, seed=1)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)
    for scale, condition in ((1.0, COND), (0.0, NULL)):
        network = Recorder()
        assert torch.equal(guided(network, COND, NULL, scale)(X, 5), condition[:, None] * X)
        assert network.rows == [3]


@pytest.mark.parametrize("w", [-0.5, 0.0, 1.0, 6.0])
def test_guidance_scale_is_w_plus_1(w: float) -> None:
    """(1 + w) cond - w uncond, Equation 6 of arXiv:2207.12598."""
    cond, uncond = normal(2, 3), normal(2, 3, seed=1)
    torch.testing.assert_close(guide(cond, uncond, w + 1), (1 + w) * cond - w * uncond)


def test_guidance_is_one_call_for_both_halves() -> None:
    network = Recorder()
    output = guided(network, COND, NULL, 3.0)(X, 5)
    torch.testing.assert_close(output, (NULL + 3.0 * (COND - NULL))[:, None] * X)
    assert network.rows == [6]


def test_guidance_takes_conditions_of_several_tensors() -> None:
    output = guided(Recorder(), {"factor": COND}, {"factor": NULL}, 3.0)(X, 5)
    torch.testing.assert_close(output, guided(Recorder(), COND, NULL, 3.0)(X, 5))


def test_guidance_commutes_with_the_parameterization() -> None:
    """The maps between eps, x0 and v are affine at a fixed x_t, so guiding one of them is guiding
    all."""
    x_t, cond, uncond = normal(4), normal(4, seed=1), normal(4, seed=2)
    alpha_t, sigma_t = SCHEDULE.alpha_sigma(500)
    x0_cond, x0_uncond = (predict_x0("v", v, x_t, alpha_t, sigma_t) for v in (cond, uncond))
    x0_of_guided = predict_x0("v", guide(cond, uncond, 4.0), x_t, alpha_t, sigma_t)
    torch.testing.assert_close(x0_of_guided, guide(x0_cond, x0_uncond, 4.0))


def test_outside_the_interval_the_unconditional_half_is_skipped() -> None:
    network = Recorder()
    predict = guided(network, COND, NULL, 3.0, interval=(200, 600))
    outputs = {t: predict(X, t) for t in (199, 200, 600, 601)}
    assert network.rows == [3, 6, 6, 3]
    for t in (199, 601):
        assert torch.equal(outputs[t], COND[:, None] * X)
    for t in (200, 600):
        assert torch.equal(outputs[t], guided(Recorder(), COND, NULL, 3.0)(X, t))


@pytest.mark.parametrize(
    ("scale", "rows"), [(3.0, [6, 3]), (0.0, [6, 3]), (1.0, [3, 3])], ids=["both", "0", "alone"]
)
def test_perturbed_attention_guidance_adds_one_call(scale: float, rows: list[int]) -> None:
    """uncond + s (cond - uncond) + p (cond - perturbed), inside the interval; at s = 1 without the
    unconditional half."""
    network, weak = Recorder(), torch.tensor([1.5, 2.0, 2.5])
    given = {"perturbed": weak, "pag_scale": 2.0, "interval": (0, 10)}
    output = guided(network, COND, NULL, scale, **given)(X, 5)
    expected = NULL + scale * (COND - NULL) + 2.0 * (COND - weak)
    torch.testing.assert_close(output, expected[:, None] * X)
    assert network.rows == rows
    assert torch.equal(guided(network, COND, NULL, scale, **given)(X, 11), COND[:, None] * X)


def test_rescale_restores_the_conditional_spread() -> None:
    """Equations 15 and 16 of arXiv:2305.08891: phi = 1 gives the conditional output's standard
    deviation, 0 changes nothing."""
    cond, output = normal(3, 2, 8, 8), 4.0 * normal(3, 2, 8, 8, seed=1)
    axes = (1, 2, 3)
    torch.testing.assert_close(rescale_guidance(output, cond, 1.0).std(axes), cond.std(axes))
    torch.testing.assert_close(rescale_guidance(output, cond, 0.0), output)
    halfway = (
        cond.std(axes) + output.std(axes)
    ) / 2  # std is linear along the ray of multiples of `output`
    torch.testing.assert_close(rescale_guidance(output, cond, 0.5).std(axes), halfway)


def test_guided_rescales_inside_the_interval_alone() -> None:
    predict = guided(Recorder(), COND, NULL, 3.0, interval=(0, 10), rescale=1.0)
    torch.testing.assert_close(predict(X, 10).std(1), (COND[:, None] * X).std(1))
    assert not torch.allclose(
        guided(Recorder(), COND, NULL, 3.0)(X, 10).std(1), (COND[:, None] * X).std(1)
    )
    assert torch.equal(predict(X, 11), COND[:, None] * X)


def test_clipping_comes_after_guidance() -> None:
    """1.5 - 3 (2 - 1.5) = 0; the halves clipped first would both be 1, and so would what they guide
    to."""
    predict = guided(Recorder(), torch.tensor([2.0]), torch.tensor([1.5]), -3.0)
    assert denoiser(predict, SCHEDULE, "x0", clip_x0=True)(torch.ones(1, 1), 500)[0].item() == 0.0
    predict = guided(Recorder(), torch.tensor([2.0]), torch.tensor([1.5]), 3.0)
    assert denoiser(predict, SCHEDULE, "x0", clip_x0=True)(torch.ones(1, 1), 500)[0].item() == 1.0


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_eps_is_recomputed_from_the_clipped_x0_on_request_alone(parameterization: str) -> None:
    x0, eps = torch.tensor([[0.5, 3.0, -2.0]], dtype=torch.float64), normal(1, 3)
    alpha_t, sigma_t = SCHEDULE.alpha_sigma(500)
    x_t = alpha_t * x0 + sigma_t * eps
    output = output_target(parameterization, x0, eps, alpha_t, sigma_t)
    free, clipped = (
        denoiser(lambda x, t: output, SCHEDULE, parameterization, clip_x0=clip)(x_t, 500)
        for clip in (False, True)
    )
    torch.testing.assert_close(free[0], x0)
    torch.testing.assert_close(clipped[0], torch.tensor([[0.5, 1.0, -1.0]], dtype=torch.float64))
    torch.testing.assert_close(free[1], eps)
    assert torch.equal(clipped[1], free[1])
    consistent = denoiser(
        lambda x, t: output, SCHEDULE, parameterization, clip_x0=True, eps_of_clipped=True
    )(x_t, 500)
    assert torch.equal(consistent[0], clipped[0])
    torch.testing.assert_close(alpha_t * consistent[0] + sigma_t * consistent[1], x_t)


def test_eps_prediction_is_refused_at_snr_zero() -> None:
    """x0 = (x_t - eps) / 0 says nothing; v prediction says x0 = -v and eps = x_t there."""
    schedule = zero_terminal_snr(SCHEDULE)
    with pytest.raises(ValueError, match="undefined"):
        denoiser(lambda x, t: x, schedule, "eps", clip_x0=True)(X, 999)
    x0, eps = denoiser(lambda x, t: 0.25 * x, schedule, "v", clip_x0=False)(X, 999)
    torch.testing.assert_close(x0, -0.25 * X)
    torch.testing.assert_close(eps, X)
