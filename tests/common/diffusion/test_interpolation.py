"""Interpolation between noises: end points, norms, and the directions where the great circle is not
unique."""

import math

import pytest
import torch
from torch import Tensor

from common.diffusion.interpolation import lerp, slerp

ALPHAS = [i / 10 for i in range(11)]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (3, 16, 16), generator=torch.Generator().manual_seed(seed))


def directions() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of every kind."""
    a = noise(0)
    return {
        "independent": (a, noise(1)),
        "same": (a, a),
        "nearly parallel": (a, a + 1e-9 * noise(1)),
        "slightly apart": (a, a + 1e-3 * noise(1)),
        "opposite": (a, -a),
        "opposite, another norm": (a, -2.0 * a),
        "nearly opposite": (a, -a + 1e-9 * noise(1)),
        "zero": (torch.zeros(3, 16, 16), a),
        "double": (a.double(), noise(1).double()),
    }


@pytest.mark.parametrize("path", [slerp, lerp])
@pytest.mark.parametrize("kind", directions())
def test_end_points_are_exact_and_the_rest_is_finite(path, kind: str) -> None:
    a, b = directions()[kind]
    assert torch.equal(path(a, b, 0.0), a) and torch.equal(path(a, b, 1.0), b)
    for alpha in ALPHAS:
        between = path(a, b, alpha)
        assert between.isfinite().all() and between.shape == a.shape and between.dtype == a.dtype


@pytest.mark.parametrize(
    "kind",
    ["independent", "same", "nearly parallel", "slightly apart", "opposite", "nearly opposite"],
)
def test_slerp_keeps_an_equal_norm(kind: str) -> None:
    a, b = directions()[kind]
    b = b * (a.norm() / b.norm())
    for alpha in ALPHAS:
        assert slerp(a, b, alpha).norm().item() == pytest.approx(a.norm().item(), rel=1e-5)


def test_slerp_turns_at_constant_speed_in_the_plane_of_its_ends() -> None:
    """Closed form: between two axes, (cos, sin) of alpha times a right angle."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for alpha in ALPHAS:
        expected = torch.tensor([math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)])
        torch.testing.assert_close(slerp(x, y, alpha), expected)


def test_slerp_of_opposite_ends_turns_too() -> None:
    """Every step of a tenth turns by 18 degrees, also across the point in the middle."""
    a = noise(0)
    path = [slerp(a, -a, alpha) for alpha in ALPHAS]
    for before, after in zip(path, path[1:], strict=False):
        cosine = torch.nn.functional.cosine_similarity(
            before.flatten(), after.flatten(), dim=0
        ).item()
        assert cosine == pytest.approx(math.cos(math.pi / 10), abs=1e-5)


def test_slerp_is_over_the_flattened_tensor() -> None:
    a, b = noise(0), noise(1)
    torch.testing.assert_close(slerp(a, b, 0.3).flatten(), slerp(a.flatten(), b.flatten(), 0.3))


def test_lerp_of_independent_noises_dips_where_slerp_does_not() -> None:
    """In high dimensions independent noises are at right angles and of norm sqrt(d): lerp's middle
    has 1 / sqrt(2) of it."""
    a, b = noise(0, 3, 64, 64), noise(1, 3, 64, 64)
    root = math.sqrt(a.numel())
    assert lerp(a, b, 0.5).norm().item() / root == pytest.approx(math.sqrt(0.5), abs=0.01)
    assert slerp(a, b, 0.5).norm().item() / root == pytest.approx(1.0, abs=0.01)


def test_both_are_symmetric() -> None:
    a, b = noise(0), noise(1)
    for path in (slerp, lerp):
        torch.testing.assert_close(path(a, b, 0.2), path(b, a, 0.8))
