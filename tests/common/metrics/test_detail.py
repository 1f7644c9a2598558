"""Fine detail of images, against images whose answer is known."""

import math

import pytest
import torch

from common.metrics.detail import luminance_power, mean_difference, rms_difference


def test_neighbours_of_a_board_and_of_stripes() -> None:
    """A chess board differs by its contrast along both axes, stripes along one alone."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = ((rows + columns) % 2 * 100).to(torch.uint8).expand(1, 3, -1, -1)
    stripes = (columns % 2 * 100).to(torch.uint8).expand(1, 3, -1, -1)
    assert mean_difference(board) == rms_difference(board) == 100.0
    assert mean_difference(stripes) == rms_difference(stripes) == 50.0
    assert mean_difference(torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)) == 0.0


def test_the_root_mean_square_weighs_large_steps_more() -> None:
    """One step of 90 among nine differences: mean 10 along the row, root mean square 30."""
    image = torch.zeros(1, 1, 1, 10, dtype=torch.uint8)
    image[..., 5:] = 90
    both = torch.cat([image, image], dim=2)  # two equal rows: no difference along columns
    assert mean_difference(both) == pytest.approx(5.0)
    assert rms_difference(both) == pytest.approx(15.0)


def test_power_of_a_wave_is_at_its_frequency() -> None:
    """A cosine of amplitude a and frequency k along rows of N pixels has |DFT|^2 = (a N / 2)^2 at k
    and none elsewhere."""
    n, k, amplitude = 64, 16, 40.0
    wave = (128.0 + amplitude * torch.cos(2.0 * math.pi * k * torch.arange(n) / n)).round()
    images = wave.to(torch.uint8).expand(2, 3, n, n)
    assert luminance_power(images, k) == pytest.approx(
        (amplitude * n / 2.0) ** 2 / 2.0, rel=1e-4
    )  # rows, not columns
    assert luminance_power(images, 32) == pytest.approx(0.0, abs=1.0)
