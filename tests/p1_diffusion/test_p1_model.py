"""The network of Problem 1: its shape, what it depends on, and its folder."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import CONFIG, tiny_network
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InputError
from p1_diffusion.model import NULL_DIGIT, Attention, ContextUNet, ContextUNetConfig, ResBlock


def inputs(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(count, 3, 28, 28, generator=generator)
    context = torch.stack([torch.arange(count) % 10, torch.arange(count) % 2], dim=1)
    return x_t, torch.arange(count) * 100, context


@pytest.mark.parametrize(
    "change",
    [{}, {"blocks": (2, 1)}, {"channels": (8, 16, 32), "blocks": (1, 1, 2)}, {"attention": (0, 1)}],
)
def test_the_output_is_like_the_input(change: dict) -> None:
    network = ContextUNet(dataclasses.replace(CONFIG, **change))
    x_t, t, context = inputs()
    assert network(x_t, t, context).shape == x_t.shape


def test_parameter_count_is_that_of_the_layers() -> None:
    """Counted by hand from the layers of the default network: convolution k k a b + b, linear a b +
    b, norm 2 a."""
    fine, middle, coarse, width = 32, 96, 192, 256

    def conv(a: int, b: int, k: int = 3) -> int:
        return k * k * a * b + b

    def linear(a: int, b: int) -> int:
        return a * b + b

    def block(a: int, b: int) -> int:
        skip = conv(a, b, 1) if a != b else 0
        return 2 * a + conv(a, b) + linear(width, 2 * b) + 2 * b + conv(b, b) + skip

    attention = 2 * coarse + linear(coarse, 3 * coarse) + linear(coarse, coarse)
    expected = (
        linear(2 * fine, width) + linear(width, width) + (11 + 2) * width
    )  # time, digits and null, datasets
    expected += (
        conv(3, fine)
        + sum(block(c, c) + block(2 * c, c) for c in (fine, middle, coarse))
        + 2 * attention
    )
    expected += (
        conv(fine, middle, 2)
        + conv(middle, coarse, 2)
        + conv(coarse, middle, 2)
        + conv(middle, fine, 2)
    )
    expected += (
        2 * fine + conv(fine, 3) + 22 * coarse * 7 * 7
    )  # a map for each digit and null, of each dataset
    count = sum(param.numel() for param in ContextUNet(ContextUNetConfig()).parameters())
    assert count == expected
    assert 2 * count < 20e6  # bytes of the shipped weights


@torch.no_grad()
def test_augmentation_is_told_and_silent_where_nothing_was_done() -> None:
    network = ContextUNet(dataclasses.replace(CONFIG, augmentation=4))
    for param in network.parameters():
        nn.init.normal_(param, std=0.1)
    told = torch.zeros(4, 4)
    assert torch.equal(network(*inputs(), told), network(*inputs()))
    assert not torch.equal(network(*inputs(), told + 1.0), network(*inputs()))


def test_a_new_network_predicts_zero() -> None:
    """The last convolution starts at zero, and so does the second one of each block."""
    network = ContextUNet(CONFIG)
    assert not network(*inputs()).any()
    block = ResBlock(16, 16, 32, 0.0)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x, torch.randn(2, 32)), x)
    attention = Attention(32, 2)
    x = torch.randn(2, 32, 7, 7)
    assert torch.equal(attention(x), x)


@torch.no_grad()
def test_time_digit_and_dataset_each_change_the_output() -> None:
    network = tiny_network()
    x_t, t, context = inputs(1)
    outputs = [network(x_t, t, context), network(x_t, t + 500, context)]
    for digit in (*range(1, 10), NULL_DIGIT):
        outputs.append(network(x_t, t, torch.tensor([[digit, 0]])))
    outputs.append(network(x_t, t, torch.tensor([[0, 1]])))
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert float((a - b).abs().max()) > 1e-4


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch() -> None:
    network = tiny_network()
    x_t, t, context = inputs(6)
    together = network(x_t, t, context)
    torch.testing.assert_close(together.flip(0), network(x_t.flip(0), t.flip(0), context.flip(0)))
    alone = torch.cat([network(x_t[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    network = tiny_network()
    x_t, t, context = inputs(8)
    network(x_t, t, context).square().mean().backward()
    missing = [
        name
        for name, param in network.named_parameters()
        if param.grad is None or not param.grad.any()
    ]
    assert not missing


def test_attention_is_softmax_attention_over_pixels() -> None:
    attention = Attention(32, 2)
    with torch.no_grad():
        nn.init.normal_(attention.out.weight, std=0.1)
        x = torch.randn(2, 32, 3, 4)
        tokens = attention.norm(x).flatten(2).transpose(1, 2)
        q, k, v = attention.qkv(tokens).chunk(3, dim=-1)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            weights = F.softmax(q[..., head] @ k[..., head].transpose(1, 2) / 16**0.5, dim=-1)
            heads.append(weights @ v[..., head])
        expected = x + attention.out(torch.cat(heads, -1)).transpose(1, 2).unflatten(2, (3, 4))
        torch.testing.assert_close(attention(x), expected)


def test_dropout_acts_in_training_alone() -> None:
    network = ContextUNet(dataclasses.replace(CONFIG, dropout=0.5))
    network.load_state_dict(tiny_network().state_dict())
    x = inputs()
    with torch.no_grad():
        assert not torch.equal(network.train()(*x), network(*x))
        assert torch.equal(network.eval()(*x), network(*x))


@torch.no_grad()
def test_the_network_comes_back_from_its_folder(tmp_path: Path) -> None:
    network = ContextUNet(
        dataclasses.replace(CONFIG, blocks=(2, 1), parameterization="eps", schedule="linear")
    )
    for param in network.parameters():
        param.normal_(std=0.1)
    network.save(tmp_path / "model")
    loaded = ContextUNet.load(tmp_path / "model")
    assert loaded.config == network.config
    assert not loaded.training
    stored = copy.deepcopy(network).half().float().eval()  # as float16
    torch.testing.assert_close(loaded(*inputs()), stored(*inputs()), rtol=1e-3, atol=1e-3)
    loaded.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": [10, 20]},
        {"channels": 3},
        {"blocks": [1]},
        {"blocks": [0, 1]},
        {"attention": [2]},
        {"heads": 0},
        {"colour": "red"},
        {"embedding": "wide"},
        {"channels": None},
    ],
)
def test_a_configuration_that_builds_no_network_is_refused(tmp_path: Path, change: dict) -> None:
    tiny_network().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=str(tmp_path / "config.json")):
        ContextUNet.load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    tiny_network().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"blocks": [1, 2]}))
    with pytest.raises(InputError, match=r"do not fit the model: \d+ missing \(down\.1\.1\."):
        ContextUNet.load(tmp_path)
