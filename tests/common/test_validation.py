"""The held-out loss: a mean over images, by the same draws each time, without touching the
model."""

import pytest
import torch
from torch import Tensor, nn

from common.seeds import StackedRandomGenerator, derive_seeds
from common.training import Batch
from common.validation import held_out_loss


def noisy_loss(batch: Batch, generators: StackedRandomGenerator) -> Tensor:
    """A different random number for each image."""
    return (batch["image"] + generators.rand()).mean()


def test_the_mean_is_over_images_by_the_same_draws_each_time() -> None:
    model, images = nn.Linear(1, 1), {"image": torch.arange(7.0), "digit": torch.zeros(7)}
    expected = (
        (images["image"] + StackedRandomGenerator(derive_seeds(0, count=7)).rand()).mean().item()
    )
    for size in (1, 3, 7, 100):
        torch.rand(3)
        assert held_out_loss(model, noisy_loss, images, size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_evaluation_mode_meanwhile_and_keeps_no_graph(training: bool) -> None:
    model = nn.Linear(1, 1).train(training)

    def loss(batch: Batch, generators: StackedRandomGenerator) -> Tensor:
        assert not model.training and len(batch["image"]) == 2
        result = model(batch["image"][:, None]).mean()
        assert not result.requires_grad
        return result

    held_out_loss(model, loss, {"image": torch.ones(4)}, 2)
    assert model.training == training
