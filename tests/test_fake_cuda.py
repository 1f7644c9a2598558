"""Every loss, network and sampler on device "cuda" without a GPU: fake tensors know shapes and devices, and compute nothing.

A table or a noise that stays on the CPU where the network's tensors are on CUDA fails here as it would there.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from common.diffusion import denoiser, diffusion_loss, drop_context, guided, q_sample
from common.embedding import SinusoidalEmbedding
from common.metrics.classifier import DigitClassifier, LeNet
from common.samplers import SAMPLERS, sample
from common.schedule import SCHEDULES, make_schedule, trailing_pairs
from common.seeds import ImageGenerators
from p1_diffusion.inference import SamplingConfig, sample_digits
from p1_diffusion.model import NULL_DIGIT, ContextUNet, ContextUNetConfig
from p1_diffusion.train_classifier import augment

PARAMETERIZATIONS = ["eps", "x0", "v"]


@pytest.fixture(autouse=True)
def cuda() -> Iterator[torch.device]:
    """Real tensors (the schedules' tables) may come in, as they do in a program."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")


def network(device: torch.device, **config: object) -> ContextUNet:
    with device:
        return ContextUNet(ContextUNetConfig(channels=(16, 32), embedding=32, **config))


def context(device: torch.device, digit: int = 3) -> Tensor:
    return torch.tensor([[digit, 0], [digit, 1]], device=device)


def is_on_cuda(tensor: Tensor, *shape: int) -> bool:
    return tensor.device.type == "cuda" and tensor.shape == shape


def test_a_cpu_table_indexed_by_a_cuda_tensor_is_caught(cuda: torch.device) -> None:
    """The mistake that this file is there to find."""
    with pytest.raises(Exception, match="(?i)device"):
        torch.arange(10)[torch.zeros(2, dtype=torch.long, device=cuda)]
    with pytest.raises(Exception, match="(?i)device"):
        torch.zeros(2) * torch.zeros(2, device=cuda)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss(cuda: torch.device, parameterization: str, min_snr_gamma: float | None, schedule: str) -> None:
    model, generators = network(cuda, dropout=0.1), ImageGenerators([1, 2], cuda)
    dropped = drop_context(context(cuda)[:, 0], NULL_DIGIT, 0.1, generators)
    loss = diffusion_loss(
        model,
        make_schedule(schedule),
        torch.zeros(2, 3, 28, 28, device=cuda),
        torch.stack([dropped, context(cuda)[:, 1]], dim=1),
        generators,
        parameterization=parameterization,
        min_snr_gamma=min_snr_gamma,
    )
    loss.backward()
    assert is_on_cuda(loss)
    assert all(is_on_cuda(param.grad, *param.shape) for param in model.parameters())


def test_q_sample(cuda: torch.device) -> None:
    x0, t = torch.zeros(2, 3, 8, 8, device=cuda), torch.zeros(2, dtype=torch.long, device=cuda)
    assert is_on_cuda(q_sample(make_schedule("linear"), x0, t, x0), 2, 3, 8, 8)


def test_networks(cuda: torch.device) -> None:
    images, t = torch.zeros(2, 3, 28, 28, device=cuda), torch.zeros(2, dtype=torch.long, device=cuda)
    assert is_on_cuda(network(cuda)(images, t, context(cuda)), 2, 3, 28, 28)
    with cuda:
        embedding, lenet = SinusoidalEmbedding(16), LeNet()
    assert is_on_cuda(embedding(t), 2, 16)
    assert is_on_cuda(lenet(images), 2, 10)


def test_classifier_loss(cuda: torch.device) -> None:
    with cuda:
        classifier = DigitClassifier()
    images = augment(torch.zeros(2, 3, 28, 28, device=cuda), ImageGenerators([1, 2], cuda))
    loss = torch.nn.functional.cross_entropy(classifier(images), context(cuda)[:, 0])
    loss.backward()
    assert is_on_cuda(loss)
    assert all(is_on_cuda(param.grad, *param.shape) for param in classifier.parameters())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(cuda: torch.device, sampler: str, parameterization: str) -> None:
    """Guided in an interval, rescaled, clipped, with fresh noise; also from a terminal SNR of zero where x0 is defined."""
    model, generators = network(cuda), ImageGenerators([1, 2], cuda)
    predict = guided(model, context(cuda), context(cuda, NULL_DIGIT), 2.0, interval=(0, 700), rescale=0.7)
    for zero_terminal in (False, True)[: 1 if parameterization == "eps" else 2]:
        schedule = make_schedule("linear", zero_terminal=zero_terminal)
        denoise = denoiser(predict, schedule, parameterization, clip_x0=True)
        seen = []
        with torch.no_grad():
            x = sample(
                sampler,
                denoise,
                schedule,
                generators.randn(3, 28, 28),
                trailing_pairs(1000, 3),
                eta=1.0,
                noise=lambda: generators.randn(3, 28, 28),
                callback=lambda i, t, x_t, x0, seen=seen: seen.extend([x_t, x0]),
            )
        assert len(seen) == 6
        assert all(is_on_cuda(tensor, 2, 3, 28, 28) for tensor in [*seen, x])


def test_sampling_digits(cuda: torch.device) -> None:
    """The whole of P1's sampling; its images come back to the CPU."""
    jobs = [("mnistm", 0, 1), ("svhn", 1, 1), ("svhn", 1, 2)]
    chunks = list(sample_digits(network(cuda), jobs, SamplingConfig(steps=2, chunk_size=2), show_progress=False))
    assert [job for part, _ in chunks for job in part] == jobs
    assert [(images.device.type, len(images)) for _, images in chunks] == [("cpu", 2), ("cpu", 1)]
