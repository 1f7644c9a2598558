"""ControlNet: what it starts from, what it learns through, its twin in diffusers, its folder; a
test for each known mistake."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file
from tiny_latent import (
    HINT_CHANNELS,
    SCHEDULE,
    TWO_LEVELS,
    awake,
    condition,
    controlled_model,
    inputs,
    tiny_model,
    tiny_unet,
)
from torch import Tensor, nn

from common.checkpoint import state_hash
from common.diffusion.loss import diffusion_loss
from common.errors import InputError
from common.images import to_hint
from common.latent.model import LatentDiffusion
from common.seeds import Draws, StackedRandomGenerator
from common.training import TrainingConfig, fit
from p3_controlnet.model import CONFIG_FILE, ControlNet

# What of Stable Diffusion v1.4's unet/config.json differs from diffusers' defaults; its head count,
# 8, does not.
SD14 = {"sample_size": 64, "cross_attention_dim": 768}


def diffusers_twin(control: ControlNet, unet: UNet2DConditionModel) -> ControlNetModel:
    twin = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=control.hint_channels
    )
    twin.load_state_dict(control.state_dict())
    return twin.eval()


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------
# The start.


def test_at_the_start_the_output_is_the_frozen_bases_bit_for_bit() -> None:
    unet = tiny_unet()
    model = tiny_model(ControlNet.from_unet(unet, HINT_CHANNELS), unet=unet)
    x_t, t = inputs()
    cond = condition()
    with torch.no_grad():
        base = unet(x_t, t, cond.context).sample
        assert torch.equal(model.apply_model(x_t, t, cond), base)
        awake(model.controlnet)
        assert not torch.equal(model.apply_model(x_t, t, cond), base)


def test_the_encoder_starts_as_a_trainable_copy_of_the_bases() -> None:
    unet = tiny_unet().requires_grad_(False)
    control = ControlNet.from_unet(unet, HINT_CHANNELS)
    base, own = unet.state_dict(), control.state_dict()
    copied = {key for key in own if not key.startswith("controlnet_")}
    expected = {
        key
        for key in base
        if key.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block"))
    }
    assert copied == expected and len(copied) > 100
    for key in copied:
        assert torch.equal(own[key], base[key]) and own[key].data_ptr() != base[key].data_ptr()
    assert all(param.requires_grad for param in control.parameters())
    assert {key for key in own.keys() - copied if not own[key].any()} == {
        *(f"controlnet_down_blocks.{i}.{part}" for i in range(12) for part in ("weight", "bias")),
        *(f"controlnet_mid_block.{part}" for part in ("weight", "bias")),
        *(f"controlnet_cond_embedding.conv_out.{part}" for part in ("weight", "bias")),
    }


@pytest.fixture(scope="module")
def sd14() -> tuple[UNet2DConditionModel, ControlNet]:
    """Stable Diffusion v1.4's U-Net and its ControlNet on the meta device: shapes without
    numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD14)
        return unet, ControlNet.from_unet(unet)


def test_stable_diffusions_keys_shapes_and_13_residuals(
    sd14: tuple[UNet2DConditionModel, ControlNet],
) -> None:
    _, own = sd14
    with torch.device("meta"):
        twin = ControlNetModel(cross_attention_dim=768)
        residuals = own(
            torch.zeros(1, 4, 64, 64),
            torch.zeros(1, 3, 512, 512),
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, 77, 768),
        )
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    assert shapes == {key: value.shape for key, value in twin.state_dict().items()}
    assert [(r.shape[1], r.shape[2]) for r in residuals] == [
        *[(320, 64)] * 3,
        (320, 32),
        *[(640, 32)] * 2,
        (640, 16),
        *[(1280, 16)] * 2,
        *[(1280, 8)] * 4,
    ]
    assert own.downscale == 8


@torch.no_grad()
def test_a_new_network_has_ordinary_random_weights() -> None:
    """The encoder is built without memory first: each layer must have been filled afterwards."""
    torch.manual_seed(0)
    control = ControlNet(tiny_unet().config, HINT_CHANNELS)
    twin = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=HINT_CHANNELS)
    theirs = dict(twin.named_parameters())
    for name, own in control.named_parameters():
        assert own.isfinite().all(), name
        if not theirs[name].any():
            assert not own.any(), name
        elif own.numel() > 500:
            assert 0.8 < float(own.std() / theirs[name].std()) < 1.25, name


# ----------------------------------------------------------------------------
# Parity.

KINDS = {
    "stable-diffusion-1": {},
    "stable-diffusion-2": {
        "attention_head_dim": (1, 2, 2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "two-levels-without-text-in-the-middle": {
        **TWO_LEVELS,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_agrees_with_diffusers(kind: str) -> None:
    """The residuals alone, then with the base: 1e-5 on shared weights, every zero convolution
    filled."""
    unet = tiny_unet(**KINDS[kind])
    model = controlled_model(unet=unet)
    twin = diffusers_twin(model.controlnet, unet)
    x_t, t = inputs()
    cond = condition()
    own = model.controlnet(x_t, cond.hint, t, cond.context)
    skips, middle = twin(x_t, t, cond.context, cond.hint, return_dict=False)
    assert len(own) == len(skips) + 1 == (5 if kind.startswith("two") else 13)
    assert min(float(r.abs().max()) for r in own) > 1e-2
    assert largest_difference(own, [*skips, middle]) < 1e-5
    expected = unet(
        x_t,
        t,
        cond.context,
        down_block_additional_residuals=skips,
        mid_block_additional_residual=middle,
    ).sample
    torch.testing.assert_close(model.apply_model(x_t, t, cond), expected, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------
# Learning.


def loss_of(model: LatentDiffusion, step: int = 0) -> Tensor:
    x0 = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(step))
    generators = StackedRandomGenerator([2 * step, 2 * step + 1])
    return diffusion_loss(
        model.apply_model, SCHEDULE, x0, condition(), generators, parameterization="eps"
    )


def new_model() -> LatentDiffusion:
    unet = tiny_unet()
    return tiny_model(ControlNet.from_unet(unet, HINT_CHANNELS), unet=unet).train()


def gradients(model: LatentDiffusion, checkpointing: bool) -> dict[str, Tensor]:
    model.enable_gradient_checkpointing(checkpointing)
    model.zero_grad()
    loss_of(model).backward()
    return {name: param.grad.clone() for name, param in model.controlnet.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_control_parameter_learns_by_the_third_step_and_the_base_never(
    checkpointing: bool,
) -> None:
    """Zero convolutions first, then what lies behind them; the counts are those measured at Stable
    Diffusion's structure."""
    model = new_model()
    model.enable_gradient_checkpointing(checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    waiting = []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        waiting.append(
            [
                n
                for n, p in model.controlnet.named_parameters()
                if p.grad is None or not p.grad.any()
            ]
        )
        optimizer.step()
    assert len(waiting[0]) > len(waiting[1]) > 0 and waiting[2] == []
    assert not any(name.startswith(("controlnet_down", "controlnet_mid")) for name in waiting[0])
    base = [
        p for part in (model.unet, model.autoencoder, model.text_encoder) for p in part.parameters()
    ]
    assert all(p.grad is None and not p.requires_grad for p in base)


def test_checkpointing_gives_equal_gradients() -> None:
    model = controlled_model().train()
    plain, checkpointed = gradients(model, False), gradients(model, True)
    assert all(grad.any() for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-6, atol=1e-6)


def test_checkpointing_computes_the_control_and_the_decoder_again_but_not_the_frozen_encoder() -> (
    None
):
    model = controlled_model().train()
    calls: Counter[str] = Counter()
    for name, module in {
        "control encoder": model.controlnet.down_blocks[1].resnets[0],
        "control middle": model.controlnet.mid_block.resnets[0],
        "hint encoder": model.controlnet.controlnet_cond_embedding.conv_in,
        "frozen encoder": model.unet.down_blocks[1].resnets[0],
        "frozen decoder": model.unet.up_blocks[1].resnets[0],
    }.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    gradients(model, False)
    assert set(calls.values()) == {1}
    calls.clear()
    gradients(model, True)
    assert calls == {
        "control encoder": 2,
        "control middle": 2,
        "hint encoder": 2,
        "frozen encoder": 1,
        "frozen decoder": 2,
    }
    calls.clear()
    gradients(model, False)  # and back
    assert set(calls.values()) == {1}


def saved_tensors(model: LatentDiffusion) -> Counter[str]:
    """How many tensors each part of the model keeps for the backward pass."""
    unet, inside = model.unet, ["elsewhere"]
    parts = {
        "control": [model.controlnet],
        "frozen encoder": [unet.conv_in, unet.time_embedding, *unet.down_blocks, unet.mid_block],
        "frozen decoder": [*unet.up_blocks],
    }
    handles = []
    for name, modules in parts.items():
        for module in modules:
            handles.append(
                module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            )
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    counts: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        counts[inside[-1]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    for handle in handles:
        handle.remove()
    return counts


def test_the_frozen_encoder_saves_nothing_for_backward() -> None:
    model = controlled_model().train()
    counts = saved_tensors(model)
    assert counts["frozen encoder"] == 0
    assert counts["control"] > 100 and counts["frozen decoder"] > 100
    model.enable_gradient_checkpointing()
    assert saved_tensors(model)["frozen encoder"] == 0
    model.enable_gradient_checkpointing(False)
    model.unet.requires_grad_(True)  # the count sees what there is to see
    assert saved_tensors(model)["frozen encoder"] > 100


def test_training_changes_the_control_alone(tmp_path: Path) -> None:
    """Through the one training loop, with weight decay, which moves every parameter that an
    optimiser holds."""
    model = new_model()
    params = dict(model.controlnet.named_parameters())
    assert {id(p) for p in params.values()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    frozen = (model.unet, model.autoencoder, model.text_encoder)
    before, control_before = [state_hash(part) for part in frozen], state_hash(model.controlnet)

    def loss(batch: dict[str, Tensor], draws: Draws) -> Tensor:
        cond = condition(len(batch["x0"]))
        return diffusion_loss(
            model.apply_model, SCHEDULE, batch["x0"], cond, draws, parameterization="eps"
        )

    config = TrainingConfig(steps=3, batch_size=2, warmup=1, weight_decay=0.1, device="cpu")
    fit(
        params,
        loss,
        lambda step, generator: {"x0": inputs()[0]},
        config,
        tmp_path,
        save=model.controlnet.save,
    )
    assert [state_hash(part) for part in frozen] == before
    assert state_hash(model.controlnet) != control_before
    assert state_hash(ControlNet.load(tmp_path / "last")) != control_before


# ----------------------------------------------------------------------------
# Mistakes that others made, one test each.


def heads(network: nn.Module) -> set[int]:
    return {module.heads for module in network.modules() if isinstance(module, Attention)}


def test_stable_diffusion_has_8_heads_and_not_heads_of_width_64(
    sd14: tuple[UNet2DConditionModel, ControlNet],
) -> None:
    """diffusers calls the number of heads `attention_head_dim`; no weight's shape shows it, the
    output does."""
    unet, control = sd14
    assert heads(control) == heads(unet) == {8}
    assert {m.inner_dim // m.heads for m in control.modules() if isinstance(m, Attention)} == {
        40,
        80,
        160,
    }
    right, wrong = (
        ControlNet(tiny_unet(attention_head_dim=h).config, HINT_CHANNELS) for h in (2, 4)
    )
    wrong.load_state_dict(right.state_dict())
    awake(right), awake(wrong)
    x_t, t = inputs()
    cond = condition()
    with torch.no_grad():
        a, b = (control(x_t, cond.hint, t, cond.context) for control in (right, wrong))
    assert largest_difference(a, b) > 1e-4


def test_the_control_is_initialised_from_the_base() -> None:
    """Without a hint, and before any training, its encoder computes what the base's does."""
    unet = tiny_unet()
    control = ControlNet.from_unet(unet, HINT_CHANNELS)
    x_t, t = inputs()
    cond = condition()
    seen = {}
    for name, network in (("base", unet), ("control", control)):
        network.mid_block.register_forward_hook(
            lambda *args, name=name: seen.update({name: args[2]})
        )
    with torch.no_grad():
        unet(x_t, t, cond.context)
        control(x_t, cond.hint, t, cond.context)
    assert torch.equal(seen["base"], seen["control"])


def test_residuals_never_enter_the_frozen_encoder() -> None:
    model = controlled_model()
    seen: list[Tensor] = []
    for module in (*model.unet.down_blocks, model.unet.mid_block):
        module.register_forward_hook(
            lambda *args: seen.append(args[2][0] if isinstance(args[2], tuple) else args[2])
        )
    x_t, t = inputs()
    cond = condition()
    with torch.no_grad():
        with_control = model.apply_model(x_t, t, cond)
        without = model.apply_model(x_t, t, cond.without_control())
    assert len(seen) == 10 and all(
        torch.equal(a, b) for a, b in zip(seen[:5], seen[5:], strict=True)
    )
    assert float((with_control - without).abs().max()) > 1e-2


def test_a_hint_is_in_0_to_1() -> None:
    """As diffusers' own pipeline prepares it; floats, which at hand are in [-1, 1], are refused."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    hint = to_hint(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    torch.testing.assert_close(
        hint, processor.preprocess(Image.fromarray(pixels)), rtol=0, atol=1e-7
    )
    assert (
        float(hint.min()) >= 0.0 and float(to_hint(torch.full((1,), 255, dtype=torch.uint8))) == 1.0
    )
    with pytest.raises(ValueError, match="uint8"):
        to_hint(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_no_gradient_is_blocked_on_its_way_through_the_frozen_decoder(checkpointing: bool) -> None:
    """The gradient at the outermost residual, whose only way to the loss is the decoder's last
    block, is the true slope."""
    model = controlled_model().train()
    model.enable_gradient_checkpointing(checkpointing)
    bias = model.controlnet.controlnet_down_blocks[0].bias
    loss_of(model).backward()
    slope, step = float(bias.grad[0]), 1e-2
    losses = []
    with torch.no_grad():
        for move in (step, -2 * step):
            bias[0] += move
            losses.append(float(loss_of(model)))
    assert abs(slope) > 1e-5
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_an_optimiser_over_what_is_trainable_holds_the_control_alone() -> None:
    model = new_model()
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trainable == [f"controlnet.{name}" for name, _ in model.controlnet.named_parameters()]


# ----------------------------------------------------------------------------
# The hint encoder, and what is refused.


@pytest.mark.parametrize(
    ("channels", "strides", "downscale"),
    [((8, 16, 32), None, 4), ((8, 16), (8,), 8), ((8, 16, 32), (2, 1), 2), ((4, 4, 8, 8), None, 8)],
)
def test_the_hint_encoder_fits_any_autoencoder(
    channels: tuple, strides: tuple | None, downscale: int
) -> None:
    control = ControlNet(tiny_unet().config, channels, strides)
    assert control.downscale == downscale
    side = 16 * downscale
    hint, t = torch.rand(1, 3, side, side), torch.zeros(1, dtype=torch.long)
    assert control.controlnet_cond_embedding(hint).shape == (1, 8, 16, 16)
    x_t, context = torch.zeros(1, 4, 16, 16), condition(1).context
    residuals = control(x_t, hint, t, context)
    assert len(residuals) == 13
    features = control.encode_hint(hint)
    for known, encoded in zip(control(x_t, hint, t, context, features), residuals, strict=True):
        torch.testing.assert_close(known, encoded, rtol=0.0, atol=0.0)
    for wrong in (hint[..., :-1], hint[:, :1], hint.expand(2, -1, -1, -1)):
        with pytest.raises(InputError, match=f"need a hint of shape.*{side}, {side}"):
            control(x_t, wrong, t, context)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "bgr"),
        ({"mid_block_type": None}, "mid_block_type = None"),
        ({"down_block_types": ["Unknown"] * 4}, "Unknown"),
        ({"block_out_channels": [8, 16]}, "block_out_channels"),
    ],
)
def test_configurations_of_another_kind_are_refused(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ControlNet({**tiny_unet().config, **change}, HINT_CHANNELS)


def test_a_stride_for_each_step_of_the_channels() -> None:
    for channels, strides in (((8,), None), ((8, 16), (2, 2))):
        with pytest.raises(InputError, match="one stride fewer than channels"):
            ControlNet(tiny_unet().config, channels, strides)


# ----------------------------------------------------------------------------
# The folder.


def assert_same(a: ControlNet, b: Callable) -> None:
    x_t, t = inputs()
    cond = condition()
    with torch.no_grad():
        other = b(x_t, t, cond.context, cond.hint, return_dict=False)
        assert largest_difference(a(x_t, cond.hint, t, cond.context), [*other[0], other[1]]) == 0.0


def test_the_folder_is_read_by_diffusers_and_back(tmp_path: Path) -> None:
    control = awake(ControlNet.from_unet(tiny_unet(), HINT_CHANNELS))
    control.save(tmp_path / "own")
    twin = ControlNetModel.from_pretrained(tmp_path / "own")
    assert_same(control.eval(), twin)
    twin.save_pretrained(tmp_path / "theirs")
    back = ControlNet.load(tmp_path / "theirs")
    assert (
        not back.training
        and state_hash(back) == state_hash(control)
        and back.config == control.config
    )
    assert (
        load_file(tmp_path / "own" / "diffusion_pytorch_model.safetensors").keys()
        == control.state_dict().keys()
    )


def test_other_strides_come_back(tmp_path: Path) -> None:
    control = ControlNet.from_unet(tiny_unet(), (4, 8), (8,))
    control.save(tmp_path)
    back = ControlNet.load(tmp_path)
    assert back.hint_strides == (8,) and state_hash(back) == state_hash(control)


def test_folders_that_hold_no_controlnet_are_refused(tmp_path: Path) -> None:
    control = ControlNet.from_unet(tiny_unet(), HINT_CHANNELS)
    with pytest.raises(InputError, match="does not exist"):
        ControlNet.load(tmp_path / "missing")
    control.save(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="does not exist"):
        ControlNet.load(tmp_path)
    for change, named in (
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"conditioning_embedding_out_channels": 16}, "out_channels must be a list, not 16"),
        ({"conditioning_embedding_out_channels": ["a", "b"]}, "out_channels"),
        ({"layers_per_block": "two"}, "layers_per_block"),
    ):
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**control.config, **change}))
        with pytest.raises(InputError, match=named):
            ControlNet.load(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("[]")
    with pytest.raises(InputError, match="config.json"):
        ControlNet.load(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    ControlNet.from_unet(tiny_unet(), HINT_CHANNELS).save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "cross_attention_dim": 32}))
    with pytest.raises(InputError, match="of another shape.*attn2"):
        ControlNet.load(tmp_path)
