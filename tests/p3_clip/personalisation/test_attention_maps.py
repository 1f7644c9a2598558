"""The loss that keeps a word's attention on its concept."""

import pytest
import torch
from tiny_base import tiny_base

from common.latent.model import LatentCondition
from p3_clip.personalisation.attention_maps import attention_outside, keep_maps


def test_the_fraction_outside_in_closed_form() -> None:
    """0 for attention on the concept alone, 1 elsewhere, the rest's area for a uniform map."""
    region = torch.zeros(1, 1, 4, 4)
    region[..., :1] = 1.0
    places = torch.tensor([[[False, True, False]]])
    for own, expected in ((region, 0.0), (1.0 - region, 1.0), (torch.ones(1, 1, 4, 4), 0.75)):
        attention = torch.rand(1, 16, 3)
        attention[:, :, 1] = 0.1 * own.flatten(2)[0]
        assert attention_outside([attention], places, region).item() == pytest.approx(expected)
    coarse = torch.ones(1, 4, 3)  # a map of 2x2 places, of which the left two are half covered
    assert attention_outside([coarse], places, region).item() == pytest.approx(0.75)


def test_only_concepts_that_are_named_and_shown_count() -> None:
    attention, regions = torch.rand(3, 16, 5), torch.zeros(3, 2, 4, 4)
    regions[0, 0], regions[1, 1, 0, 0] = 1.0, 1.0
    places = torch.zeros(3, 2, 5, dtype=torch.bool)
    places[1, 0, 2] = places[2, 1, 3] = True
    assert attention_outside([attention], places, regions) == 0.0
    places[0, 0, 1] = places[1, 1, 3] = True
    own = attention[1, :, 3]
    expected = (1.0 - own[0] / own.sum()) / 3  # of three images; the first one's is 0
    assert attention_outside([attention], places, regions).item() == pytest.approx(expected.item())
    whole = attention_outside([attention], places, regions)
    parts = [
        attention_outside([attention[i : i + 1]], places[i : i + 1], regions[i : i + 1])
        for i in range(3)
    ]
    assert torch.allclose(whole, torch.stack(parts).mean())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keeping_maps_changes_no_output_and_passes_gradients(checkpointing: bool) -> None:
    model = tiny_base()
    x, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([9, 700]),
    )
    context = LatentCondition(model.encode_text(["red circle", "lime star"]))
    before = model.apply_model(x, t, context)
    maps = keep_maps(model.unet)
    model.enable_gradient_checkpointing(checkpointing)
    model.unet.train(checkpointing)
    assert torch.allclose(model.apply_model(x, t, context), before, atol=1e-5)
    assert {each.map.shape[1] for each in maps} == {16 * 16, 8 * 8}
    for each in maps:
        assert torch.allclose(each.map.sum(-1), torch.ones(each.map.shape[:2]), atol=1e-5)

    learned = context.context.clone().requires_grad_(True)
    model.apply_model(x, t, LatentCondition(learned))
    places = torch.zeros(2, 1, learned.shape[1], dtype=torch.bool)
    places[:, :, 1] = True
    regions = torch.zeros(2, 1, 16, 16)
    regions[..., :5, :5] = 1.0
    attention_outside([each.map for each in maps], places, regions).backward()
    assert learned.grad[:, 1].abs().sum() > 0.0
