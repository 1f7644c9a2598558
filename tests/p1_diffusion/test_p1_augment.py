"""Augmentation that the network is told of: what is told is what was done, and nothing is told
where nothing was."""

import itertools

import pytest
import torch
from torch import Tensor

from common.seeds import BatchDraws, StackedRandomGenerator
from p1_diffusion.augment import AUGMENTATION, augment


def images(count: int = 64) -> Tensor:
    return torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def test_at_probability_0_nothing_is_done_or_told() -> None:
    done, told = augment(images(), 0.0, StackedRandomGenerator(range(64)))
    assert torch.equal(done, images()) and not told.any() and told.shape == (64, AUGMENTATION)


def test_what_is_told_is_what_was_done() -> None:
    """From the vector alone each image that was not moved can be made again."""
    before = images()
    after, told = augment(before, 0.5, StackedRandomGenerator(range(64)))
    still = ~told[:, 6:].any(1)
    assert 10 < int(still.sum()) < 54
    orders = list(itertools.permutations(range(3)))
    for k in torch.nonzero(still)[:, 0].tolist():
        order = orders[int(told[k, :5].argmax()) + 1] if told[k, :5].any() else orders[0]
        sign = 1.0 - 2.0 * float(told[k, 5])
        assert torch.equal(after[k], sign * before[k, list(order)])
    assert bool((after[~still] != before[~still]).flatten(1).any(1).all())
    # An image of which nothing is told is as it was.
    untouched = ~told.any(1)
    assert bool(untouched.any()) and torch.equal(after[untouched], before[untouched])


def test_a_shift_moves_the_image_by_what_is_told() -> None:
    """A bright column moves by 3 pixels times what is told, against the direction in which the grid
    is read."""
    column = torch.full((200, 3, 28, 28), -1.0)
    column[..., 14] = 1.0
    after, told = augment(column, 1.0, StackedRandomGenerator(range(200)))
    after = after * (1.0 - 2.0 * told[:, 5]).view(-1, 1, 1, 1)
    mass = (after[:, 0, 14] + 1.0).clamp(min=0.0)
    centre = (mass * torch.arange(28)).sum(1) / mass.sum(1)
    # x in [-1, 1] of the output shows the input at exp(scale) x + shift.
    wanted = ((14 - 13.5) - 3.0 * told[:, 6]) / (0.15 * told[:, 8]).exp() + 13.5
    assert centre.tolist() == pytest.approx(wanted.tolist(), abs=0.3)


def test_each_kind_comes_with_its_probability() -> None:
    told = augment(images(4000)[:, :, :4, :4], 0.3, BatchDraws(0, 4000).part(slice(None)))[1]
    for kind in (told[:, :5].any(1), told[:, 5] > 0, told[:, 6:].any(1)):
        assert kind.float().mean().item() == pytest.approx(0.3, abs=0.03)
