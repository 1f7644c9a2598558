"""An image depends on its own seed alone: not on the batch around it, its place in it, or how a job
is split."""

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_network
from torch import Tensor

from common.diffusion.process import denoiser
from common.diffusion.samplers import SAMPLERS, sample
from common.diffusion.schedule import linear_schedule, trailing_pairs
from common.errors import InputError
from common.seeds import (
    BatchDraws,
    StackedRandomGenerator,
    batch_seed,
    derive_seed,
    derive_seeds,
    layers_seed,
    noise_seed,
    padded_chunks,
    views_seed,
)
from p1_diffusion.sampling import SamplingConfig, image_noise, sample_digits

SEEDS = [11, 22, 33, 44, 55, 66, 77]
ORDERS = {
    "alone": [[k] for k in range(7)],
    "pairs": [[0, 1], [2, 3], [4, 5], [6]],
    "backwards": [[6, 5, 4, 3], [2, 1, 0]],
    "two processes": [[0, 2, 4, 6], [1, 3, 5]],
}
JOBS = [
    (dataset, digit, number)
    for dataset in ("mnistm", "svhn")
    for digit in (0, 3)
    for number in (1, 2, 3)
]


@pytest.mark.parametrize("batches", ORDERS.values(), ids=ORDERS)
def test_draws_of_an_image_depend_on_its_seed_alone(batches: list[list[int]]) -> None:
    """Bit for bit, at the first draw and at later ones."""

    def draws(seeds: list[int]) -> tuple[Tensor, ...]:
        generators = StackedRandomGenerator(seeds)
        return (
            generators.randn(3, 4, 4),
            generators.randint(1000),
            generators.rand(),
            generators.randn(3, 4, 4),
        )

    together = draws(SEEDS)
    for batch in batches:
        for whole, part in zip(together, draws([SEEDS[k] for k in batch]), strict=True):
            assert torch.equal(whole[batch], part)


@pytest.mark.parametrize("batches", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 1.0)])
def test_samples_of_an_image_depend_on_its_seed_alone(
    batches: list[list[int]], sampler: str, eta: float
) -> None:
    """The whole walk, with an elementwise network, which has no order of summation: bit for bit,
    noise of each step included."""
    schedule = linear_schedule()
    denoise = denoiser(lambda x, t: 0.5 * x, schedule, "v", clip_x0=True)

    def run(seeds: list[int]) -> Tensor:
        generators = StackedRandomGenerator(seeds)

        def noise() -> Tensor:
            return generators.randn(3, 4, 4)

        return sample(
            sampler, denoise, schedule, noise(), trailing_pairs(1000, 5)[:-1], eta=eta, noise=noise
        )

    together = run(SEEDS)
    assert len(together.flatten(1).unique(dim=0)) == len(SEEDS)
    for batch in batches:
        assert torch.equal(together[batch], run([SEEDS[k] for k in batch]))


def test_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = StackedRandomGenerator([5]).randn(8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(StackedRandomGenerator([5]).randn(8), first)


def test_draws_have_the_stated_types_and_ranges() -> None:
    generators = StackedRandomGenerator(range(500))
    assert generators.randn(2, 3).shape == (500, 2, 3) and generators.randn().dtype == torch.float32
    integers, uniform = generators.randint(4), generators.rand()
    assert integers.dtype == torch.long and set(integers.tolist()) == {0, 1, 2, 3}
    assert uniform.dtype == torch.float32 and bool(((uniform >= 0) & (uniform < 1)).all())


def test_derived_seeds_are_distinct_and_independent_of_the_count() -> None:
    seeds = derive_seeds(3, 1, count=100)
    assert derive_seeds(3, 1, count=7) == seeds[:7] and derive_seed(3, 1) == seeds[0]
    keys = [(seed, step) for seed in range(20) for step in range(20)]
    assert len({derive_seed(*key) for key in keys} | set(seeds)) == 400 + 99  # (3, 1) is in both
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_of_p1_have_noise_of_their_own() -> None:
    """By the run's seed, the dataset, the digit and the number; the same in any company."""
    together = image_noise(JOBS, 0, "cpu")()
    assert len(together.flatten(1).unique(dim=0)) == len(JOBS)
    assert torch.equal(image_noise(JOBS[4:5], 0, "cpu")(), together[4:5])
    assert not torch.equal(image_noise(JOBS[4:5], 1, "cpu")(), together[4:5])


# ----------------------------------------------------------------------------
# Chunks.


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (4, 4), (10, 4), (10, 1), (3, 50)])
def test_padded_chunks_have_one_size_and_lose_nothing(count: int, size: int) -> None:
    chunks = list(padded_chunks(range(count), size))
    assert all(len(chunk) == size for chunk, _ in chunks)
    assert [item for chunk, real in chunks for item in chunk[:real]] == list(range(count))
    assert all(item == chunk[real - 1] for chunk, real in chunks for item in chunk[real:])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads; and a network this small runs fastest in one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(
    sampler: str, eta: float, chunk_size: int, share: tuple[int, int] = (0, 1)
) -> dict[tuple, Tensor]:
    config = SamplingConfig(sampler=sampler, eta=eta, steps=3, chunk_size=chunk_size)
    parts = sample_digits(tiny_network(), JOBS, config, share=share, show_progress=False)
    return {job: image for jobs, images in parts for job, image in zip(jobs, images, strict=True)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpmpp_2m", 0.0)])
def test_a_split_job_makes_the_same_images(sampler: str, eta: float) -> None:
    """Byte-identical between one process and two or three at one chunk size; the last chunk of 12
    by 5 is padded."""
    whole = digits(sampler, eta, 5)
    assert list(whole) == JOBS
    for processes in (2, 3):
        split = {}
        for rank in range(processes):
            part = digits(sampler, eta, 5, (rank, processes))
            assert not split.keys() & part.keys()
            split |= part
        assert split.keys() == whole.keys() and all(
            torch.equal(split[job], whole[job]) for job in JOBS
        )


@pytest.mark.usefixtures("one_thread")
def test_chunk_sizes_agree_to_one_grey_level() -> None:
    """Other batch shapes have other orders of summation."""
    whole = digits("ddim", 1.0, 12)
    assert len(torch.stack(list(whole.values())).unique(dim=0)) == len(JOBS)
    for size in (1, 5):
        other = digits("ddim", 1.0, size)
        assert max((whole[job].int() - other[job].int()).abs().max().item() for job in JOBS) <= 1


def test_keys_of_different_lengths_give_different_seeds() -> None:
    keys = [(), (0,), (1,), (1, 0), (0, 1), (1, 0, 0)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_the_streams_of_a_training_never_change() -> None:
    """A run that is under way resumes with the numbers that it began with."""
    assert noise_seed(5, 7) == derive_seed(5, 7) == 4429277695412761595
    assert batch_seed(5, 7) == derive_seed(5, 7, 1)
    assert layers_seed(5, 7, 1) == derive_seed(5, 7, 2, 1) != layers_seed(5, 7, 0)
    assert views_seed(5) == derive_seed(5, 3)


@pytest.mark.parametrize("word", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(word: int) -> None:
    with pytest.raises(InputError, match="a seed must lie between 0 and 4294967295"):
        derive_seed(0, word)


def test_parts_of_a_step_draw_what_the_whole_draws() -> None:
    """Micro-batches and processes see slices of one global batch; a part's draws do not depend on
    how the batch is cut."""

    def drawn(parts: list[slice]) -> list[torch.Tensor]:
        draws = BatchDraws(5, 6)
        rows = [(d.randn(3, 2), d.rand(), d.randint(1000)) for d in map(draws.part, parts)]
        return [torch.cat(values) for values in zip(*rows, strict=True)]

    whole = drawn([slice(None)])
    for parts in ([slice(0, 3), slice(3, 6)], [slice(k, k + 1) for k in range(6)]):
        for a, b in zip(drawn(parts), whole, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(whole[1], BatchDraws(6, 6).part(slice(None)).rand())
    assert whole[0].shape == (6, 3, 2) and whole[1].shape == whole[2].shape == (6,)
    assert bool(((whole[1] >= 0) & (whole[1] < 1)).all()) and whole[2].dtype == torch.long
