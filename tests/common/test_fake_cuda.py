"""Every loss, network and sampler on device "cuda" without a GPU: fake tensors know shapes and
devices, and compute nothing.

A table or a noise that stays on the CPU where the network's tensors are on CUDA fails here as it
would there.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tiny_faces import CONFIG as FACES
from tiny_latent import HINT_CHANNELS, WIDTH, tiny_model
from torch import Tensor
from torch._subclasses import FakeTensorMode

from common.data.faces import Faces
from common.devices import pick_device
from common.diffusion.guidance import drop_context, guided
from common.diffusion.loss import LossWeighting, diffusion_loss
from common.diffusion.process import denoiser, q_sample
from common.diffusion.samplers import SAMPLERS, sample
from common.diffusion.schedule import (
    NoiseSchedule,
    linear_schedule,
    make_schedule,
    trailing_pairs,
)
from common.embedding import SinusoidalEmbedding
from common.errors import InputError
from common.images import to_model_range
from common.latent.generate import ControlledGenerationConfig, Request, generate
from common.metrics.classifier import DigitClassifier, LeNet
from common.seeds import StackedRandomGenerator
from p1_diffusion.model import NULL_DIGIT, ContextUNet, ContextUNetConfig
from p1_diffusion.sampling import SamplingConfig, sample_digits
from p1_diffusion.study.train_classifier import augment
from p2_ddim import sampling as faces_sampling
from p2_ddim.model import FaceUNet
from p2_ddim.train import draw_faces
from p3_controlnet.loss import latent_loss
from p3_controlnet.model import ControlNet

PARAMETERIZATIONS = ["eps", "x0", "v"]
# Real tables, made before the fake tensors: a schedule looks at its numbers.
SCHEDULE, ZERO_TERMINAL = make_schedule("cosine"), make_schedule("cosine", zero_terminal=True)
LINEAR = linear_schedule()


@pytest.fixture(autouse=True)
def cuda() -> Iterator[torch.device]:
    """Real tensors, the tables, may come in."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")


def network(device: torch.device, **config: object) -> ContextUNet:
    with device:
        return ContextUNet(
            ContextUNetConfig(
                channels=(16, 32), blocks=(1, 1), attention=(1,), embedding=32, heads=2, **config
            )
        )


def context(device: torch.device, digit: int = 3) -> Tensor:
    return torch.tensor([[digit, 0], [digit, 1]], device=device)


def is_on_cuda(tensor: Tensor, *shape: int) -> bool:
    return tensor.device.type == "cuda" and tensor.shape == shape


def test_a_cpu_table_indexed_by_a_cuda_tensor_is_caught(cuda: torch.device) -> None:
    """The mistakes that this file is there to find. Indexing alone passes, but what it gives stays
    on the CPU."""
    table = SCHEDULE.alphas_cumprod
    t = torch.zeros(2, dtype=torch.long, device=cuda)
    x = torch.zeros(2)
    for mistake in (
        lambda: table[t] * x.to(cuda),
        lambda: x * x.to(cuda),
        lambda: table.gather(0, t),
    ):
        with pytest.raises(Exception, match="same device"):
            mistake()


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
def test_loss(cuda: torch.device, parameterization: str, min_snr_gamma: float | None) -> None:
    model, generators = network(cuda, dropout=0.1), StackedRandomGenerator([1, 2], cuda)
    dropped = drop_context(context(cuda)[:, 0], NULL_DIGIT, 0.1, generators)
    loss = diffusion_loss(
        model,
        SCHEDULE,
        torch.zeros(2, 3, 28, 28, device=cuda),
        torch.stack([dropped, context(cuda)[:, 1]], dim=1),
        generators,
        parameterization=parameterization,
        min_snr_gamma=min_snr_gamma,
    )
    assert is_on_cuda(loss) and loss.requires_grad


def test_q_sample(cuda: torch.device) -> None:
    x0, t = torch.zeros(2, 3, 8, 8, device=cuda), torch.zeros(2, dtype=torch.long, device=cuda)
    assert is_on_cuda(q_sample(SCHEDULE, x0, t, x0), 2, 3, 8, 8)


def test_networks(cuda: torch.device) -> None:
    images = torch.zeros(2, 3, 28, 28, device=cuda)
    t = torch.zeros(2, dtype=torch.long, device=cuda)
    assert is_on_cuda(network(cuda)(images, t, context(cuda)), 2, 3, 28, 28)
    with cuda:
        embedding, lenet = SinusoidalEmbedding(16), LeNet()
    assert is_on_cuda(embedding(t), 2, 16)
    assert is_on_cuda(lenet(images), 2, 10)


def test_classifier_loss(cuda: torch.device) -> None:
    with cuda:
        classifier = DigitClassifier()
    images = augment(torch.zeros(2, 3, 28, 28, device=cuda), StackedRandomGenerator([1, 2], cuda))
    loss = torch.nn.functional.cross_entropy(classifier(images), context(cuda)[:, 0])
    assert is_on_cuda(loss) and loss.requires_grad


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_denoiser(cuda: torch.device, parameterization: str) -> None:
    x_t = torch.zeros(2, 3, 28, 28, device=cuda)
    denoise = denoiser(lambda x, t: 0.5 * x, SCHEDULE, parameterization, clip_x0=True)
    assert all(is_on_cuda(tensor, 2, 3, 28, 28) for tensor in denoise(x_t, 500))


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_TERMINAL], ids=["cosine", "zero-terminal"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(cuda: torch.device, sampler: str, schedule: NoiseSchedule) -> None:
    """Guided in an interval, rescaled, clipped, with fresh noise."""
    model, generators = network(cuda), StackedRandomGenerator([1, 2], cuda)
    predict = guided(
        model, context(cuda), context(cuda, NULL_DIGIT), 2.0, interval=(0, 700), rescale=0.7
    )
    seen = []
    with torch.no_grad():
        x = sample(
            sampler,
            denoiser(predict, schedule, "v", clip_x0=True),
            schedule,
            generators.randn(3, 28, 28),
            trailing_pairs(1000, 3),
            eta=1.0,
            noise=lambda: generators.randn(3, 28, 28),
            callback=lambda i, t, x_t, x0: seen.extend([x_t, x0]),
        )
    assert len(seen) == 6
    assert all(is_on_cuda(tensor, 2, 3, 28, 28) for tensor in [*seen, x])


def test_sampling_digits(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of P1's sampling; its images come back to the CPU."""
    monkeypatch.setattr("p1_diffusion.sampling.make_schedule", lambda name: SCHEDULE)
    monkeypatch.setattr(
        "common.diffusion.sampling._check_finite", lambda images, names: None
    )  # looks at values
    keys = [("mnistm", 0, 1), ("svhn", 1, 1), ("svhn", 1, 2)]
    chunks = list(
        sample_digits(
            network(cuda), keys, SamplingConfig(steps=2, chunk_size=2), show_progress=False
        )
    )
    assert [key for part, _ in chunks for key in part] == keys
    assert [(images.device.type, len(images)) for _, images in chunks] == [("cpu", 2), ("cpu", 1)]


def test_a_process_of_several_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1) and pick_device("cpu") == torch.device(
        "cpu"
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK is 2, but there are 2 CUDA devices"):
        pick_device("auto")


# ----------------------------------------------------------------------------
# Faces, and latent diffusion with ControlNet.


def test_training_and_sampling_faces(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2_ddim.sampling.linear_schedule", lambda length: LINEAR)
    monkeypatch.setattr("common.diffusion.sampling._check_finite", lambda images, names: None)
    with cuda:
        faces = FaceUNet(dataclasses.replace(FACES, patch=2, refine=8, parameterization="v"))
        weighting = LossWeighting("learned", "v", "logit_normal")
    data = Faces(torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=cuda), ["0", "1", "2", "3"])
    batch = draw_faces(data, 2, torch.Generator(), flip=False)
    loss = diffusion_loss(
        lambda x_t, t, _: faces(x_t, t),
        LINEAR,
        to_model_range(batch["image"]),
        {},
        StackedRandomGenerator([1, 2], cuda),
        parameterization="v",
        **weighting.options,
    )
    assert is_on_cuda(loss) and loss.requires_grad
    noises = [(name, torch.zeros(3, 16, 16)) for name in "abc"]
    config = faces_sampling.SamplingConfig(steps=2, eta=1.0, chunk_size=2)
    chunks = list(faces_sampling.sample_faces(faces, noises, config, cuda, show_progress=False))
    assert [(images.device.type, len(images)) for _, images in chunks] == [("cpu", 2), ("cpu", 1)]


def test_training_and_sampling_with_controlnet(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.diffusion.sampling._check_finite", lambda images, names: None)
    with cuda:
        model = tiny_model()
        model.controlnet = ControlNet.from_unet(model.unet, HINT_CHANNELS)
    model.enable_gradient_checkpointing()
    batch = {
        "latent": torch.zeros(2, 4, 16, 16, dtype=torch.float16, device=cuda),
        "context": torch.zeros(2, 77, WIDTH, dtype=torch.float16, device=cuda),
        "hint": torch.zeros(2, 1, 128, 128, dtype=torch.uint8, device=cuda),
    }
    draws = StackedRandomGenerator([1, 2], cuda)
    weight = {"min_snr_gamma": 5.0, "snr_offset": 0.0}
    null = batch["context"][0]
    loss = latent_loss(model, batch, null, draws, cond_drop_prob=0.3, **weight)
    assert is_on_cuda(loss) and loss.requires_grad

    hint = torch.zeros(3, 128, 128, dtype=torch.uint8)
    requests = [Request("red circle", seed, hint) for seed in (1, 2)]
    config = ControlledGenerationConfig(steps=1, chunk_size=2)
    ((_, pictures),) = generate(model, requests, config, show_progress=False)
    assert pictures.shape == (2, 3, 128, 128) and pictures.device.type == "cpu"
