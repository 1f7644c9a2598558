"""A diffusion model as a classifier: it finds the digit under which an image's noise is predicted
best."""

from collections.abc import Iterator

import torch
from tiny import tiny_network
from torch import Tensor

from common.data.digits import DATASETS
from common.diffusion.schedule import make_schedule
from p1_diffusion.study.classify import classify_by_error


class Knowing:
    """A network that knows one image for each digit and dataset: it predicts v as if that image
    were x0."""

    def __init__(self, known: Tensor) -> None:
        self.known = known  # [2, 10, 3, 28, 28] in [-1, 1]
        self.config = tiny_network().config

    def parameters(self) -> Iterator[Tensor]:
        return iter([self.known])

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha_t, sigma_t = make_schedule("cosine").alpha_sigma_like(t, x_t)
        x0 = self.known[context[:, 1], context[:, 0]]
        return (alpha_t * x_t - x0) / sigma_t


def test_a_model_that_knows_each_class_recognises_every_image() -> None:
    images = torch.randint(
        256, (2, 10, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    model = Knowing(images.float() / 127.5 - 1.0)
    datasets = torch.arange(len(DATASETS)).repeat_interleave(10)
    found = classify_by_error(model, images.flatten(0, 1), datasets, chunk_size=7)
    assert found.tolist() == list(range(10)) * 2


def test_the_answer_does_not_depend_on_the_batch() -> None:
    network = tiny_network()
    images = torch.randint(
        256, (6, 3, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    datasets = torch.tensor([0, 1] * 3)
    together = classify_by_error(network, images, datasets)
    assert torch.equal(together, classify_by_error(network, images, datasets, chunk_size=2))
    assert torch.equal(
        together[3:4], classify_by_error(network, images, datasets, chunk_size=6)[3:4]
    )
