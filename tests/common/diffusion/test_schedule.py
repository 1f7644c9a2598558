"""Schedules by their closed forms, and timestep sequences for every number of steps."""

import math

import pytest
import torch

from common.diffusion.schedule import (
    SPACINGS,
    NoiseSchedule,
    chain,
    cosine_schedule,
    homework_pairs,
    karras_pairs,
    leading_pairs,
    linear_schedule,
    linspace_pairs,
    make_schedule,
    scaled_linear_schedule,
    trailing_pairs,
    zero_terminal_snr,
)

NAMES = ["linear", "scaled_linear", "cosine"]


# ----------------------------------------------------------------------------
# Tables.


@pytest.mark.parametrize(
    ("name", "snr", "root"),
    [
        ("linear", 4.035993e-05, 0.006353),
        ("scaled_linear", 0.004682, 0.068265),
        ("cosine", 2.428735e-09, 4.928220e-05),
    ],
)
def test_terminal_snr_is_the_published_one(name: str, snr: float, root: float) -> None:
    """Table 1 of Lin et al. 2023 (arXiv:2305.08891), whose own tables are float32."""
    schedule = make_schedule(name)
    abar = schedule.abar(999)
    assert abar / (1 - abar) == pytest.approx(snr, rel=1e-4)
    assert math.sqrt(abar) == pytest.approx(root, rel=1e-4)


def test_linear_schedule_is_the_homeworks() -> None:
    """abar is the product of 1 - beta over evenly spaced betas; the last three values are the
    homework's check values."""
    schedule = linear_schedule()
    product, expected = 1.0, []
    for i in range(1000):
        product *= 1.0 - (1e-4 + (2e-2 - 1e-4) * i / 999)
        expected.append(product)
    torch.testing.assert_close(
        schedule.alphas_cumprod, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    for t, value in ((1, 0.9997801), (21, 0.9932204), (981, 5.7878e-05)):
        assert schedule.abar(t) == pytest.approx(value, rel=1e-5)


def test_scaled_linear_roots_are_evenly_spaced() -> None:
    roots = scaled_linear_schedule(11, 0.01, 0.09).betas.sqrt()
    torch.testing.assert_close(roots, torch.linspace(0.1, 0.3, 11, dtype=torch.float64))


def test_cosine_schedule_is_equation_17() -> None:
    """abar_t = f(t) / f(0) with f(t) = cos((t/T + s) / (1 + s) pi/2)^2, counted from 1 in
    arXiv:2102.09672."""
    schedule = cosine_schedule(100)

    def f(step: int) -> float:
        return math.cos((step / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in range(99):  # The last beta is clipped.
        assert schedule.abar(t) == pytest.approx(f(t + 1) / f(0), rel=1e-12)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_tables_are_consistent(name: str, zero_terminal: bool) -> None:
    """float64, decreasing, and abar_t = (1 - beta_t) abar_{t-1}, with abar 1 before the first
    step."""
    schedule = make_schedule(name, 200, zero_terminal=zero_terminal)
    abar = schedule.alphas_cumprod
    assert abar.dtype == torch.float64 and schedule.num_timesteps == len(abar) == 200
    assert bool((abar.diff() < 0).all()) and schedule.abar(-1) == 1.0
    for t in range(200):
        assert schedule.abar(t) == abar[t].item()
        assert schedule.abar(t) == pytest.approx(
            (1 - schedule.betas[t].item()) * schedule.abar(t - 1), rel=1e-15
        )


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_keeps_the_first_and_zeroes_the_last(name: str) -> None:
    """Algorithm 1 of arXiv:2305.08891: an affine map of sqrt(abar) that fixes the first value and
    sends the last one to 0."""
    before = make_schedule(name).alphas_cumprod.sqrt()
    after = zero_terminal_snr(make_schedule(name)).alphas_cumprod.sqrt()
    assert after[-1] == 0.0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-15)
    expected = (before - before[-1]) / (before[0] - before[-1]) * before[0]
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-15)


def test_rates_agree_in_every_form() -> None:
    schedule = linear_schedule()
    t = torch.tensor([0, 500, 999])
    x = torch.zeros(3, 2, 4, 4)
    alpha_t, sigma_t = schedule.alpha_sigma_like(t, x)
    assert alpha_t.shape == sigma_t.shape == (3, 1, 1, 1) and alpha_t.dtype == x.dtype
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones(3, 1, 1, 1))
    for row, step in enumerate(t.tolist()):
        number = schedule.alpha_sigma(step)
        assert (alpha_t[row].item(), sigma_t[row].item()) == pytest.approx(number, rel=1e-7)
        assert schedule.snr(t)[row].item() == pytest.approx((number[0] / number[1]) ** 2, rel=1e-6)
    assert schedule.alpha_sigma(-1) == (1.0, 0.0)


def test_rates_keep_float64() -> None:
    """A table rounded to float32 on the way would be off by about 1e-8."""
    alpha_t, _ = linear_schedule().alpha_sigma_like(
        torch.tensor([500]), torch.zeros(1, 2, dtype=torch.float64)
    )
    assert alpha_t.item() == pytest.approx(linear_schedule().alpha_sigma(500)[0], rel=1e-15)


@pytest.mark.parametrize("t", [-2, 1000])
def test_timesteps_outside_the_table_are_refused(t: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        linear_schedule().abar(t)


@pytest.mark.parametrize(
    "betas",
    [
        torch.tensor([0.1], dtype=torch.float32),
        torch.tensor([[0.1]], dtype=torch.float64),
        torch.tensor([0.0], dtype=torch.float64),
        torch.tensor([1.1], dtype=torch.float64),
        torch.tensor([math.nan], dtype=torch.float64),
    ],
)
def test_impossible_betas_are_refused(betas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="betas must"):
        NoiseSchedule(betas)


# ----------------------------------------------------------------------------
# Timestep sequences.


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_every_number_of_steps_gives_that_many_descending_pairs(
    name: str, num_timesteps: int
) -> None:
    end, schedule = 0 if name == "homework" else -1, linear_schedule(num_timesteps)
    for steps in range(1, num_timesteps + 1):
        pairs = SPACINGS[name](schedule, steps)
        timesteps = [t for t, _ in pairs]
        assert len(pairs) == steps
        assert all(
            later < earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False)
        )
        assert timesteps[-1] >= 0 and timesteps[0] < num_timesteps
        assert [t_prev for _, t_prev in pairs] == [*timesteps[1:], end]


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_numbers_of_steps_are_refused(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 10"):
        SPACINGS[name](cosine_schedule(10), steps)


def test_karras_pairs_follow_equation_5_of_edm() -> None:
    """Noise levels are EDM's within the rounding to timesteps, from 80 to 0.02 on a cosine."""
    schedule = cosine_schedule()
    timesteps = [t for t, _ in karras_pairs(schedule, 18)]
    for i, t in enumerate(timesteps):
        level = (80 ** (1 / 7) + i / 17 * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        alpha, sigma = schedule.alpha_sigma(t)
        neighbours = [schedule.alpha_sigma(t + step) for step in (-1, 1)]
        low, high = (sigma / alpha for alpha, sigma in neighbours)
        assert low < level < high and abs(sigma / alpha - level) <= high - low


def test_karras_pairs_reach_the_schedules_own_highest_level() -> None:
    """That of Stable Diffusion is 14.6, below EDM's 80; a terminal SNR of 0 is above it."""
    assert karras_pairs(scaled_linear_schedule(), 20)[0][0] == 999
    assert karras_pairs(make_schedule("cosine", zero_terminal=True), 20)[0][0] < 999


def test_homework_pairs_are_exactly_the_homeworks() -> None:
    expected = [(t, t - 20) for t in range(981, 1, -20)] + [(1, 0)]
    assert homework_pairs() == homework_pairs(1000, 50) == expected
    assert (
        len(expected) == 50 and expected[:1] == [(981, 961)] and expected[-2:] == [(21, 1), (1, 0)]
    )


def test_spacings_are_the_published_ones() -> None:
    """Table 2 of arXiv:2305.08891 (T = 1000, S = 10), which counts from 1: leading 1..901, linspace
    1..1000, trailing 100..1000."""
    table = {
        leading_pairs: [1, 101, 201, 301, 401, 501, 601, 701, 801, 901],
        linspace_pairs: [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000],
        trailing_pairs: [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000],
    }
    for spacing, counted_from_1 in table.items():
        assert spacing(1000, 10) == chain([t - 1 for t in reversed(counted_from_1)])


@pytest.mark.parametrize("steps", [2, 3, 7, 37, 333, 501, 999, 1000])
def test_linspace_and_trailing_are_even_to_rounding(steps: int) -> None:
    """linspace between both ends; trailing down from T - 1, so that a terminal SNR of 0 is met
    (Section 3.3 of arXiv:2305.08891)."""
    exact = {
        linspace_pairs: [999 * (steps - 1 - i) / (steps - 1) for i in range(steps)],
        trailing_pairs: [1000 - 1000 * i / steps - 1 for i in range(steps)],
    }
    for spacing, expected in exact.items():
        timesteps = [t for t, _ in spacing(1000, steps)]
        assert timesteps[0] == 999
        assert max(abs(t - e) for t, e in zip(timesteps, expected, strict=True)) <= 0.5 + 1e-9


def test_one_step_starts_at_the_top() -> None:
    assert linspace_pairs(1000, 1) == trailing_pairs(1000, 1) == [(999, -1)]
