"""CLIP scores from one stored cosine, in every form in use, and the rule of the 2024 grader for
personalised pictures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": lambda cosine: cosine,
    "clipscore": lambda cosine: (
        2.5 * cosine.clamp(min=0.0)
    ),  # Hessel et al. 2021, arXiv:2104.08718, Equation 1
    "x100": lambda cosine: 100.0 * cosine.clamp(min=0.0),  # torchmetrics
    "dlcv2024": lambda cosine: 100.0 * cosine,  # the course's graders, both editions
    "dlcv2025": lambda cosine: (cosine + 1.0) / 2.0,
}
TEXT_WEIGHT = 2.5
KEPT = 5


class Encoder(Protocol):
    """Any CLIP: texts and preprocessed pictures to unit vectors [N, D]."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors of pictures."""
        ...


def text_cosines(encoder: Encoder, images: Tensor, text: str) -> Tensor:
    """The cosine [N] of each picture's unit vector [N, D] with the text's."""
    return images @ encoder.encode_texts([text])[0]


def image_cosines(images: Tensor, references: Tensor) -> Tensor:
    """The mean cosine [N] of each picture's unit vector [N, D] with all reference pictures' [R,
    D]."""
    return (images @ references.T).mean(dim=1)


class Verdict(NamedTuple):
    """What the 2024 grader says of the pictures of one prompt: both scores of the kept ones, and
    whether they reach the baseline."""

    kept: list[int]
    image: float
    text: float
    passed: bool


def grade_personalised(image: Tensor, text: Tensor, baseline: tuple[float, float]) -> Verdict:
    """The 2024 rule: of the pictures the five with the largest image + 2.5 text are kept, and the
    means of both scores must reach the baseline (image, text). `image` and `text` are cosines [N];
    scores are 100 times as much (`dlcv2024`).
    """
    image, text = FORMS["dlcv2024"](image.double()), FORMS["dlcv2024"](text.double())
    kept = torch.argsort(image + TEXT_WEIGHT * text, descending=True, stable=True)[:KEPT]
    means = image[kept].mean().item(), text[kept].mean().item()
    return Verdict(
        kept.tolist(), *means, passed=means[0] >= baseline[0] and means[1] >= baseline[1]
    )
