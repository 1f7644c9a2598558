"""The face U-Net: the keys of UNet.pt, every form that a network may come in, and a trusted second
implementation."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_faces import CONFIG, noise, tiny_faces
from torch import Tensor, nn

from common.errors import InputError
from p2_ddim import model as model_module
from p2_ddim.model import Block, FaceUNet, FaceUNetConfig, fold_upsampling, load_network
from p2_ddim.train import Config as TrainConfig

KEYS = Path(__file__).parents[1] / "data" / "unet_keys.tsv"


def listed_keys() -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the homework's UNet.pt."""
    lines = [line.split("\t") for line in KEYS.read_text().splitlines()]
    return {
        name: ast.literal_eval(shape) for name, shape, dtype in lines if dtype == "torch.float32"
    }


def run(network: nn.Module, x_t: Tensor, t: int) -> Tensor:
    with torch.no_grad():
        return network(x_t, torch.full((len(x_t),), t))


@pytest.fixture
def small_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain state dict is then that of the small network, so that no test handles 114M
    parameters."""
    monkeypatch.setattr(model_module, "FaceUNetConfig", lambda: CONFIG)


# ----------------------------------------------------------------------------
# The architecture.


def test_the_default_has_the_keys_and_shapes_of_unet_pt() -> None:
    with torch.device("meta"):
        state = FaceUNet(FaceUNetConfig()).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == listed_keys()
    assert len(state) == 427
    assert sum(value.numel() for value in state.values()) == 113_673_283


def test_the_default_attends_where_the_homework_does_and_wants_multiples_of_32() -> None:
    with torch.device("meta"):
        network = FaceUNet(FaceUNetConfig())
    attending = {
        name
        for name, part in network.named_children()
        if isinstance(part, Block) and part.attention
    }
    assert attending == {"down14", "down15", "mid1", "up5", "up6", "up7"}
    assert network.side_multiple == 32
    with torch.device("meta"):
        assert run(network, torch.empty(2, 3, 64, 32), 981).shape == (2, 3, 64, 32)


def test_the_trained_model_is_small_enough_to_ship() -> None:
    """Under 25 MB as float16, the way training stores it."""
    with torch.device("meta"):
        network = FaceUNet(TrainConfig(Path("unused")).model)
    assert network.side_multiple == 16
    assert 2 * sum(param.numel() for param in network.parameters()) < 24e6


def test_a_patch_is_refined_at_full_resolution() -> None:
    """The last block sees the noisy pixels themselves: with nothing but its own path, a pixel
    depends on those near it alone."""
    network = tiny_faces(dataclasses.replace(CONFIG, patch=2, refine=16))
    assert network.side_multiple == 4 and run(network, torch.zeros(2, 3, 8, 12), 5).shape == (
        2,
        3,
        8,
        12,
    )
    with torch.no_grad():
        network.unfold[2].weight.zero_()
        network.refine.norm1.weight.zero_()  # normalisation spans the image
        network.refine.norm2.weight.zero_()
    network.out[0] = nn.Identity()
    x = torch.zeros(1, 3, 16, 16)
    x[0, :, 7, 6] = 1.0
    changed = (run(network, x, 5) - run(network, torch.zeros_like(x), 5)).abs().sum((0, 1)) > 1e-7
    rows, columns = torch.nonzero(changed, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (
        5,
        9,
        4,
        8,
    )  # two 3x3 convolutions


def test_the_time_embedding_is_the_homeworks() -> None:
    """sin || cos of t exp(-ln(10000) arange(0, 128, 2) / 128)."""
    embedding = FaceUNet(FaceUNetConfig(channels=(128,), blocks=1, attention=())).time[0]
    angles = 981 * torch.exp(
        -torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(0, 128, 2) / 128
    )
    expected = torch.cat([angles.sin(), angles.cos()])[None].float()
    torch.testing.assert_close(
        embedding(torch.tensor([981])), expected, atol=2e-4, rtol=0
    )  # float32 angles near 981


def to_diffusers(network: FaceUNet) -> dict[str, Tensor]:
    """The network's weights under the names of a diffusers UNet2DModel."""
    state: dict[str, Tensor] = {}

    def take(source: nn.Module, name: str) -> None:
        state.update({f"{name}.{key}": value for key, value in source.state_dict().items()})

    def take_block(block: Block, name: str, index: int) -> None:
        res = f"{name}.resnets.{index}"
        for own, theirs in {
            "norm1": "norm1",
            "conv1": "conv1",
            "norm2": "norm2",
            "conv2": "conv2",
        }.items():
            take(getattr(block.resblocks, own), f"{res}.{theirs}")
        take(block.resblocks.time[1], f"{res}.time_emb_proj")
        take(block.resblocks.skip, f"{res}.conv_shortcut")
        if block.attention:
            attention = f"{name}.attentions.{index}"
            take(block.attention.norm, f"{attention}.group_norm")
            for part in ("weight", "bias"):
                for letter, value in zip(
                    "qkv", getattr(block.attention.qkv, part).chunk(3), strict=True
                ):
                    state[f"{attention}.to_{letter}.{part}"] = (
                        value.flatten(1) if part == "weight" else value
                    )
                value = getattr(block.attention.out, part)
                state[f"{attention}.to_out.0.{part}"] = (
                    value.flatten(1) if part == "weight" else value
                )

    take(network.time[1], "time_embedding.linear_1")
    take(network.time[3], "time_embedding.linear_2")
    take(network.down1, "conv_in")
    for names, folder, sampler in (
        (network._down[1:], "down", "downsamplers"),
        (network._up, "up", "upsamplers"),
    ):
        level, index = 0, 0
        for name in names:
            part = getattr(network, name)
            if isinstance(part, Block):
                take_block(part, f"{folder}_blocks.{level}", index)
                index += 1
            else:
                take(part[-1], f"{folder}_blocks.{level}.{sampler}.0.conv")
                level, index = level + 1, 0
    take_block(network.mid1, "mid_block", 0)
    take_block(network.mid2, "mid_block", 1)
    take(network.out[0], "conv_norm_out")
    take(network.out[2], "conv_out")
    return state


def diffusers_twin(network: FaceUNet) -> nn.Module:
    """The same network as a diffusers UNet2DModel."""
    diffusers = pytest.importorskip("diffusers")
    config = network.config
    levels = range(len(config.channels))
    twin = diffusers.UNet2DModel(
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        down_block_types=[
            "AttnDownBlock2D" if i in config.attention else "DownBlock2D" for i in levels
        ],
        up_block_types=[
            "AttnUpBlock2D" if i in config.attention else "UpBlock2D" for i in reversed(levels)
        ],
        attention_head_dim=config.channels[-1],  # one head
        flip_sin_to_cos=False,
    )
    twin.load_state_dict(to_diffusers(network))
    return twin.eval()


@pytest.mark.parametrize("t", [1, 21, 981])
def test_the_network_agrees_with_diffusers(t: int) -> None:
    network = tiny_faces(
        FaceUNetConfig(channels=(32, 64, 64), blocks=2, attention=(1, 2), embedding=128)
    )
    twin = diffusers_twin(network)
    x_t = torch.stack([noise(0), noise(1)])
    with torch.no_grad():
        torch.testing.assert_close(run(network, x_t, t), twin(x_t, t).sample, atol=1e-5, rtol=1e-5)


def test_folded_upsampling_computes_the_same() -> None:
    network = tiny_faces(
        FaceUNetConfig(channels=(32, 64, 64), blocks=1, attention=(), embedding=128)
    )
    x_t = torch.stack([noise(0), noise(1)])
    before = run(network, x_t, 500)
    fold_upsampling(network)
    assert sum(isinstance(part, nn.ConvTranspose2d) for part in network.modules()) == 2
    torch.testing.assert_close(run(network, x_t, 500), before, atol=1e-5, rtol=1e-5)


def test_every_part_has_an_effect() -> None:
    """No parameter is left out of the forward pass."""
    network = tiny_faces().train()
    network(noise(0)[None], torch.tensor([500])).square().sum().backward()
    idle = [
        name
        for name, param in network.named_parameters()
        if param.grad is None or not param.grad.any()
    ]
    assert idle == []


def test_a_patch_folds_pixels_into_channels() -> None:
    network = tiny_faces(
        FaceUNetConfig(channels=(32, 64), blocks=1, attention=(), embedding=32, patch=4, heads=2)
    )
    assert network.side_multiple == 8
    assert network.down1.in_channels == 48
    assert run(network, noise(0, 24)[None], 5).shape == (1, 3, 24, 24)


def test_a_new_network_puts_out_zero() -> None:
    assert not run(FaceUNet(CONFIG), noise(0)[None], 5).any()


# ----------------------------------------------------------------------------
# Files.


def test_a_plain_state_dict_loads(small_default: None, tmp_path: Path) -> None:
    network = tiny_faces()
    torch.save(network.state_dict(), tmp_path / "UNet.pt")
    loaded = load_network(tmp_path / "UNet.pt")
    assert not loaded.training and loaded.parameterization == "eps"
    x_t = noise(0)[None]
    torch.testing.assert_close(run(loaded, x_t, 41), run(network, x_t, 41), atol=1e-5, rtol=1e-5)


def test_missing_extra_and_misshapen_keys_are_named(small_default: None, tmp_path: Path) -> None:
    state = tiny_faces().state_dict()
    path = tmp_path / "UNet.pt"
    for change, sentence in (
        ({"down1.bias": None}, r"1 missing \(down1.bias\)"),
        ({"module.down1.bias": torch.zeros(3)}, r"1 unexpected \(module.down1.bias\)"),
        ({"out.2.bias": torch.zeros(4)}, r"1 of another shape \(out.2.bias\)"),
    ):
        torch.save(
            {name: value for name, value in (state | change).items() if value is not None}, path
        )
        with pytest.raises(InputError, match=sentence):
            load_network(path)


@pytest.mark.parametrize("content", [[1, 2], {"state": 1}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "UNet.pt")
    with pytest.raises(InputError, match="does not hold a dict of named weights"):
        load_network(tmp_path / "UNet.pt")


def test_a_model_folder_round_trips(tmp_path: Path) -> None:
    config = FaceUNetConfig(
        channels=(32, 64),
        blocks=1,
        attention=(),
        embedding=32,
        patch=2,
        heads=2,
        parameterization="v",
    )
    network = tiny_faces(config)
    network.save(tmp_path)
    loaded = load_network(tmp_path)
    assert FaceUNet.load(tmp_path).config == config and loaded.parameterization == "v"
    torch.testing.assert_close(
        run(loaded, noise(0)[None], 7), run(network, noise(0)[None], 7), atol=1e-5, rtol=1e-5
    )


def test_half_precision_storage_keeps_the_frequencies(tmp_path: Path) -> None:
    """t multiplies them: in float16 the angle at t = 999 would be off by half a radian."""
    network = tiny_faces()
    network.save(tmp_path, torch.float16)
    loaded = FaceUNet.load(tmp_path)
    assert torch.equal(loaded.time[0].inv_freq, network.time[0].inv_freq)
    assert all(param.dtype == torch.float32 for param in loaded.parameters())
    difference = run(loaded, noise(0)[None], 999) - run(network, noise(0)[None], 999)
    assert 0 < difference.abs().max() < 1e-3
    assert all(
        param.dtype == torch.float32 for param in network.parameters()
    )  # the one saved is untouched


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"kind": "p1_diffusion.ContextUNet"}))
    with pytest.raises(InputError, match="p1_diffusion.ContextUNet"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": model_module.KIND, "channels": [32]}))
    with pytest.raises(InputError, match=r"config.json: \w+ is missing"):
        load_network(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_a_diffusers_folder_loads(nested: bool, tmp_path: Path) -> None:
    """Alone, or as part of a pipeline's folder."""
    network = tiny_faces()
    diffusers_twin(network).save_pretrained(tmp_path / "unet" if nested else tmp_path)
    if nested:
        (tmp_path / "model_index.json").write_text("{}")
    loaded = load_network(tmp_path)
    assert loaded.side_multiple == 2 and loaded.parameterization == "eps"
    torch.testing.assert_close(
        run(loaded, noise(0)[None], 41), run(network, noise(0)[None], 41), atol=1e-5, rtol=1e-5
    )


def test_a_diffusers_folder_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    diffusers_twin(tiny_faces()).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "conv_in.bias"}, weights)
    with pytest.raises(InputError, match="conv_in.bias"):
        load_network(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_network(tmp_path)
