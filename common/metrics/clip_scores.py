"""CLIP scores computed from a cosine, in all common scalings, and the 2024 grader's rule."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": lambda cosine: cosine,
    # Equation 1 of Hessel et al. 2021 (arXiv:2104.08718).
    "clipscore": lambda cosine: 2.5 * cosine.clamp(min=0.0),
    "x100": lambda cosine: 100.0 * cosine.clamp(min=0.0),  # torchmetrics
    "dlcv2024": lambda cosine: 100.0 * cosine,  # the course's graders, both editions
    "dlcv2025": lambda cosine: (cosine + 1.0) / 2.0,
}
"""CLIP scores in common use, by name, each a function of the cosine of image and text vectors."""
TEXT_WEIGHT = 2.5
"""Weight of the text score in the 2024 grader's ranking, image + 2.5 text."""
KEPT = 5
"""Number of pictures that the 2024 grader keeps for one prompt."""


class Encoder(Protocol):
    """Interface of a CLIP: texts and preprocessed pictures to unit vectors [N, D]."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of texts."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [N, D] of preprocessed pictures [N, 3, S, S]."""
        ...


def text_cosines(encoder: Encoder, images: Tensor, text: str) -> Tensor:
    """Cosines [N] of the pictures' unit vectors [N, D] with the text's."""
    return images @ encoder.encode_texts([text])[0]


def image_cosines(images: Tensor, references: Tensor) -> Tensor:
    """Mean cosine [N] of each picture's unit vector [N, D] with the reference pictures' [R, D]."""
    return (images @ references.T).mean(dim=1)


class Verdict(NamedTuple):
    """The 2024 grader's result for one prompt."""

    kept: list[int]
    """Indices of the kept pictures, best first."""
    image: float
    """Mean image score of the kept pictures (`dlcv2024`)."""
    text: float
    """Mean text score of the kept pictures (`dlcv2024`)."""
    passed: bool
    """Whether both means reach the baseline."""


def grade_personalised(image: Tensor, text: Tensor, baseline: tuple[float, float]) -> Verdict:
    """Grades the pictures of one prompt by the 2024 rule.

    The five pictures with the largest image + 2.5 text are kept; the means of both scores over them
    must reach `baseline` = (image, text). `image` and `text` are cosines [N]; the scores, and the
    baseline, are 100 times the cosines (`dlcv2024`).
    """
    image, text = FORMS["dlcv2024"](image.double()), FORMS["dlcv2024"](text.double())
    kept = torch.argsort(image + TEXT_WEIGHT * text, descending=True, stable=True)[:KEPT]
    means = image[kept].mean().item(), text[kept].mean().item()
    return Verdict(
        kept.tolist(), *means, passed=means[0] >= baseline[0] and means[1] >= baseline[1]
    )
