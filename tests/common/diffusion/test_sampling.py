"""The shared sampler settings, and the loop over chunks of images."""

import dataclasses

import pytest
import torch
from torch import Tensor

from common.diffusion.samplers import SAMPLERS, Callback
from common.diffusion.sampling import GuidedSamplerConfig, SamplerConfig, sample_in_chunks
from common.diffusion.schedule import SPACINGS
from common.errors import InputError
from common.latent.generate import ControlledGenerationConfig, GenerationConfig
from p1_diffusion.sampling import SamplingConfig as DigitSampling
from p2_ddim.sampling import SamplingConfig as FaceSampling

NAN, INF = float("nan"), float("inf")
SHARED = {field.name for field in dataclasses.fields(SamplerConfig)}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, r"--steps must be between 1 and 1\d+, not 0"),
        ({"steps": 1001}, "--steps must be between 1 and 1000, not 1001"),
        ({"steps": 600, "spacing": "leading"}, "would start near t = 600 of 1000, not at noise"),
        ({"steps": 334, "spacing": "homework"}, "would start near t = 668 of 1000, not at noise"),
        ({"chunk_size": 0}, "--chunk-size must be between 1 and 4096, not 0"),
        ({"seed": -1}, "--seed must be between"),
        ({"sampler": "ddim", "eta": NAN}, r"--eta must be a finite number, not nan"),
        ({"sampler": "ddim", "eta": 1.5}, r"--eta must be between 0 and 1, not 1.5"),
        ({"eta": 0.5}, "--eta applies to DDIM only: with --sampler dpmpp_2m it must be 0"),
        ({"guidance_scale": NAN}, "--guidance-scale must be a finite number, not nan"),
        ({"guidance_scale": -INF}, "--guidance-scale must be a finite number, not -inf"),
        ({"guidance_interval": (700, 150)}, "the lowest t and then the highest, not 700 and 150"),
        ({"guidance_rescale": 1.1}, r"--guidance-rescale must be between 0 and 1, not 1.1"),
    ],
)
def test_numbers_out_of_range_are_refused_in_every_problem(
    values: dict[str, object], sentence: str
) -> None:
    configs = [GuidedSamplerConfig, DigitSampling, GenerationConfig, ControlledGenerationConfig]
    if values.keys() <= SHARED:
        configs += [SamplerConfig, FaceSampling]
    for config in configs:
        sampler = {} if "eta" not in values else {"sampler": "dpmpp_2m"}  # P2's own is DDIM
        with pytest.raises(InputError, match=sentence):
            config(**(sampler | values)).check()


def test_few_steps_and_divisors_pass_with_every_spacing() -> None:
    for spacing in SPACINGS:
        for steps in (1, 3, 30, 300, 500, 1000):
            SamplerConfig(spacing=spacing, steps=steps).check()


@pytest.mark.parametrize("config", [DigitSampling(), FaceSampling(), GenerationConfig()])
def test_the_defaults_pass_with_every_sampler(config: SamplerConfig) -> None:
    for sampler in SAMPLERS:
        dataclasses.replace(config, sampler=sampler).check()


# ----------------------------------------------------------------------------
# The loop. Items are numbers, and the image of k is full of k.


def draw(
    count: int, size: int, calls: list[list[int]], fits: int = 99, **options: object
) -> list[tuple[list[int], list[float]]]:
    """What the loop yields, as (items, first pixels); `calls` gets the items of each call."""

    def sample_chunk(chunk: list[int], callback: Callback) -> Tensor:
        if len(chunk) > fits:
            raise torch.OutOfMemoryError
        calls.append(chunk)
        images = torch.tensor(chunk, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        for i in range(2):
            callback(i, 1 - i, images, images)
        return images

    config = SamplerConfig(steps=2, chunk_size=size)
    found = sample_in_chunks(range(count), sample_chunk, config, **options)
    pixels = []
    for items, images in found:
        assert images.dtype == torch.float32 and images.shape == (len(items), 3, 2, 2)
        pixels.append((list(items), images[:, 0, 0, 0].tolist()))
    return pixels


def test_the_last_chunk_is_padded_and_the_padding_is_not_given() -> None:
    calls: list[list[int]] = []
    assert draw(5, 2, calls) == [([0, 1], [0.0, 1.0]), ([2, 3], [2.0, 3.0]), ([4], [4.0])]
    assert calls == [[0, 1], [2, 3], [4, 4]]
    assert draw(0, 2, calls) == []


def test_shares_are_whole_chunks_and_cover_all() -> None:
    calls: list[list[int]] = []
    shares = [draw(5, 2, calls, share=(rank, 2)) for rank in range(2)]
    assert calls == [[0, 1], [4, 4], [2, 3]]
    assert sorted(item for share in shares for items, _ in share for item in items) == [*range(5)]


def test_the_callback_sees_each_step_of_each_chunk() -> None:
    seen: list[tuple[int, int, int]] = []
    draw(3, 2, [], callback=lambda i, t, x_t, x0: seen.append((i, t, len(x_t))))
    assert seen == [(0, 1, 2), (1, 0, 2)] * 2


@pytest.mark.parametrize(("fits", "tries"), [(3, 1), (1, 3)])
def test_where_memory_is_short_smaller_chunks_are_tried_once(
    fits: int, tries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[int]] = []
    found = draw(8, 5, calls, fits)
    assert [item for items, _ in found for item in items] == [*range(8)]
    assert [pixel for _, pixels in found for pixel in pixels] == [float(k) for k in range(8)]
    said = capsys.readouterr()
    assert (said.out + said.err).count("images at once do not fit") == tries
    assert max(map(len, calls)) <= fits


def test_memory_for_not_even_one_image_is_an_error() -> None:
    with pytest.raises(InputError, match="memory does not hold one image"):
        draw(3, 2, [], fits=0)


def test_an_image_that_is_not_finite_is_named() -> None:
    def nan_for_second(chunk: list[str], callback: Callback) -> Tensor:
        return torch.tensor([[NAN if k == "second" else 1.0] for k in chunk])

    config = SamplerConfig(steps=1, chunk_size=3)
    with pytest.raises(InputError, match="the image of digit second is not finite"):
        list(sample_in_chunks(["first", "second"], nan_for_second, config, name="digit {}".format))


def test_progress_counts_steps_and_images(capsys: pytest.CaptureFixture[str]) -> None:
    draw(3, 2, [])
    said = capsys.readouterr().err
    assert "4 of 4 steps" in said and "3 of 3 images" in said
    draw(3, 2, [], show_progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("chunk_size", "images", "used"),
    [(10, 3, 10), (64, 3, 64), (4096, 50, 64), (4096, 500, 500), (300, 500, 300)],
)
def test_a_chunk_is_not_far_larger_than_the_job(chunk_size: int, images: int, used: int) -> None:
    assert SamplerConfig(chunk_size=chunk_size).for_job(images).chunk_size == used
