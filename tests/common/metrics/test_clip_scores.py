"""CLIP scores in every form from one cosine, and the 2024 grader's rule."""

import pytest
import torch

from common.metrics.clip_scores import FORMS, grade_personalised, image_cosines, text_cosines


@pytest.mark.parametrize(
    ("form", "of_03", "of_minus_02"),
    [
        ("cos", 0.3, -0.2),
        ("clipscore", 0.75, 0.0),
        ("x100", 30.0, 0.0),
        ("dlcv2024", 30.0, -20.0),
        ("dlcv2025", 0.65, 0.4),
    ],
)
def test_every_form_from_one_cosine(form: str, of_03: float, of_minus_02: float) -> None:
    values = FORMS[form](torch.tensor([0.3, -0.2], dtype=torch.float64))
    assert values.tolist() == pytest.approx([of_03, of_minus_02])


def test_scores_are_means_over_references_and_one_text() -> None:
    images = torch.eye(3)[:2]
    references = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
    assert torch.allclose(image_cosines(images, references), torch.tensor([0.8, 0.4]))

    class Encoder:
        def encode_texts(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(texts), 3)

    assert text_cosines(Encoder(), images, "a dog").tolist() == [0.0, 1.0]


def test_the_best_five_of_25_are_chosen_by_image_plus_text_and_both_must_pass() -> None:
    """Text counts 2.5 times: pictures 20..24 lose 0.1 in image and gain 0.05 in text, 0.125 in
    sum."""
    image, text = torch.full((25,), 0.8), torch.full((25,), 0.3)
    image[20:], text[20:] = 0.7, 0.35
    verdict = grade_personalised(image, text, (70.0, 35.0))
    assert sorted(verdict.kept) == [20, 21, 22, 23, 24]
    assert (verdict.image, verdict.text) == pytest.approx((70.0, 35.0), abs=1e-4)
    assert grade_personalised(image, text, (69.9, 34.9)).passed
    assert not grade_personalised(image, text, (70.1, 34.9)).passed
    assert not grade_personalised(image, text, (69.9, 35.1)).passed
    # The rule keeps by the sum, not by what would pass: 79 would be reached by the others.
    assert not grade_personalised(image, text, (79.0, 30.0)).passed
