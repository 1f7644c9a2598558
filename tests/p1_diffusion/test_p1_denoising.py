"""The denoising study: a Wiener filter, and the calibration of a network's predictions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import refused, tiny_network
from torch import Tensor

from common.data.digits import Digits
from common.diffusion.schedule import make_schedule
from common.files import read_json
from common.images import to_model_range
from p1_diffusion.study import sweeps
from p1_diffusion.study.denoising import TIMESTEPS, WienerFilter, denoising_errors


def test_wiener_filter_of_white_noise_is_a_shrinkage() -> None:
    """For x0 ~ N(0, s^2) the best estimate is alpha s^2 / (alpha^2 s^2 + sigma^2) x_t."""
    x0 = 0.5 * torch.randn(4000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = 0.6, 0.8
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    expected = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * x_t
    torch.testing.assert_close(WienerFilter(x0)(x_t, alpha, sigma), expected, atol=0.1, rtol=0)


class HalfTheImage:
    """A network whose predicted x0 is half of the image that it knows."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0
        self.config = tiny_network().config

    def parameters(self) -> Iterator[Tensor]:
        return iter([self.x0])

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha_t, sigma_t = make_schedule("cosine").alpha_sigma_like(t, x_t)
        return (alpha_t * x_t - 0.5 * self.x0) / sigma_t


def test_an_image_of_half_its_contrast_has_slope_two() -> None:
    images = torch.randint(
        256, (1, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    digits = Digits(
        images.repeat(8, 1, 1, 1),
        torch.zeros(8).long(),
        torch.tensor([0, 1] * 4),
        names=[str(n) for n in range(8)],
    )
    x0 = to_model_range(images)
    rows = denoising_errors(HalfTheImage(x0), digits, digits)
    assert [(row["dataset"], row["t"]) for row in rows] == [
        (dataset, t) for dataset in ("mnistm", "svhn") for t in TIMESTEPS
    ]
    for row in rows:
        assert row["slope"] == pytest.approx(2.0, rel=1e-3)
        assert row["error"] == pytest.approx(x0.square().mean().item() / 4, rel=1e-3)
        assert row["wiener"] < 1e-6  # all images are the mean


def test_a_run_that_was_trained_further_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(sweeps, "load_digits", lambda *_: None)
    monkeypatch.setattr(sweeps, "denoising_errors", lambda *_: measured.append(1) or len(measured))
    config = sweeps.Config("denoising", runs=(tmp_path / "run",), results=tmp_path, device="cpu")
    network = tiny_network()
    for change, errors in ((0.0, 1), (0.0, 1), (0.1, 2)):
        next(network.parameters()).data += change
        network.save(tmp_path / "run" / "last")
        sweeps.main(config)
        (row,) = read_json(tmp_path / "p1_denoising.json")["rows"]
        assert row["errors"] == errors


@pytest.mark.parametrize("study", ["denoising", "recipes"])
def test_a_comparison_of_no_runs_is_refused(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--runs" in refused(capsys, sweeps.main, sweeps.Config, study)
