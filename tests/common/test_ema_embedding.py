"""The moving average by its geometric sum, the embedding of time by its formula."""

import math

import pytest
import torch

from common.ema import EMA, Place
from common.embedding import SinusoidalEmbedding


def parameters(*values: float) -> dict[str, torch.nn.Parameter]:
    return {
        f"p{i}": torch.nn.Parameter(torch.full((2, 3), value)) for i, value in enumerate(values)
    }


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_is_the_geometric_sum(decay: float) -> None:
    """After n updates: product of all d_i times the start, plus each value times (1 - d_i) and the
    later d's."""
    params = parameters(1.0, -3.0)
    ema = EMA(params, decay)
    rates = [min(decay, (1 + i) / (10 + i)) for i in range(30)]
    values = [math.sin(i) for i in range(30)]
    for value in values:
        with torch.no_grad():
            for name, factor in (("p0", 1.0), ("p1", 2.0)):
                params[name].fill_(factor * value)
        ema.update(params)
    tail = [math.prod(rates[i + 1 :]) for i in range(30)]
    total = sum((1 - d) * v * later for d, v, later in zip(rates, values, tail, strict=True))
    for name, start, factor in (("p0", 1.0, 1.0), ("p1", -3.0, 2.0)):
        expected = torch.full((2, 3), math.prod(rates) * start + factor * total)
        torch.testing.assert_close(ema.average[name], expected, rtol=1e-5, atol=1e-6)
    assert ema.updates == 30


def test_ema_warm_up_forgets_the_start_and_ends_at_the_decay() -> None:
    """d = 1/10 at first, so 0.1 * 0 + 0.9 * 1; d = 0.9 from (1 + n) / (10 + n) = 0.9 on (n = 80),
    so 0.9 * 0.9 + 0.1 * 1."""
    params = parameters(0.0)
    ema = EMA(params, 0.9)
    with torch.no_grad():
        params["p0"].fill_(1.0)
    ema.update(params)
    torch.testing.assert_close(ema.average["p0"], torch.full((2, 3), 0.9))
    ema.updates = 200
    ema.update(params)
    torch.testing.assert_close(ema.average["p0"], torch.full((2, 3), 0.91))


def test_ema_is_independent_of_the_order_of_names_and_takes_no_gradient() -> None:
    params = parameters(1.0, 2.0)
    ema = EMA(params, 0.5)
    ema.update(dict(reversed(params.items())))
    assert ema.average["p0"].unique().item() == 1.0 and ema.average["p1"].unique().item() == 2.0
    assert not any(value.requires_grad for value in ema.average.values())


def test_ema_is_applied_inside_the_block_alone() -> None:
    """Own values come back bit for bit, also after an error, and the average does not move."""
    params = parameters(1.0)
    ema = EMA(params, 0.9)
    with torch.no_grad():
        params["p0"].fill_(1 / 3)
    with pytest.raises(KeyError), ema.applied_to(params):
        assert params["p0"].unique().item() == 1.0
        raise KeyError
    assert torch.equal(params["p0"], torch.full((2, 3), 1 / 3))
    assert ema.average["p0"].unique().item() == 1.0


@pytest.mark.parametrize("place", ["cpu", "none"])
def test_the_average_is_kept_on_the_cpu_or_nowhere(place: Place) -> None:
    """Without an average, the parameters stay what they are inside the block."""
    params = parameters(1.0)
    ema = EMA(params, 0.5, place)
    with torch.no_grad():
        params["p0"].fill_(2.0)
    ema.update(params)
    assert list(ema.average) == (["p0"] if place == "cpu" else []) and ema.updates == 1
    with ema.applied_to(params):
        expected = 0.1 * 1.0 + 0.9 * 2.0 if place == "cpu" else 2.0
        torch.testing.assert_close(params["p0"], torch.full((2, 3), expected))
    assert params["p0"].unique().item() == 2.0


def test_embedding_is_sines_then_cosines() -> None:
    """sin and cos of t exp(-ln(10000) 2i / dim), i < dim / 2: frequencies from 1 down to nearly 1 /
    10000."""
    t = torch.tensor([0, 1, 37, 999])
    embedding = SinusoidalEmbedding(8)(t)
    assert embedding.shape == (4, 8) and embedding.dtype == torch.float32
    for row, step in enumerate(t.tolist()):
        angles = [step * 10000.0 ** (-2 * i / 8) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(embedding[row], torch.tensor(expected), rtol=0, atol=1e-4)


def test_embedding_tells_all_timesteps_apart() -> None:
    rows = SinusoidalEmbedding(80)(torch.arange(1000)).double()
    distances = torch.cdist(rows, rows) + 10 * torch.eye(1000)
    assert distances.min() > 0.1
