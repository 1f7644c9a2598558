"""Latent diffusion: latents and text, where control acts, guidance and sampling; on CUDA by fake
tensors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_latent import (
    SCHEDULE,
    TWO_LEVELS,
    condition,
    controlled_model,
    inputs,
    text_condition,
    tiny_model,
    tiny_unet,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from common.checkpoint import state_hash
from common.diffusion.guidance import guide
from common.diffusion.loss import diffusion_loss
from common.diffusion.process import denoiser
from common.diffusion.samplers import sample, sample_ddim
from common.diffusion.schedule import trailing_pairs
from common.errors import InputError
from common.latent.control import control_interval, guess_mode_scales
from common.latent.model import SD_SCALE_FACTOR, LatentCondition, LatentDiffusion
from common.seeds import StackedRandomGenerator

PER_CHANNEL = {"latent_mean": (0.1, -0.2, 0.3, 0.0), "latent_std": (0.5, 1.0, 2.0, 0.25)}


@pytest.fixture(scope="module")
def plain() -> LatentDiffusion:
    return tiny_model()


@pytest.fixture(scope="module")
def controlled() -> LatentDiffusion:
    return controlled_model()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1


def calls_of(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of each call of a network from now on."""
    calls: list[tuple] = []
    forward = module.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", record)
    return calls


# ----------------------------------------------------------------------------
# Images and latents.


def test_latents_are_stable_diffusions(plain: LatentDiffusion) -> None:
    """One factor for all channels: the posterior's mean times 0.18215."""
    latents = plain.encode(images())
    with torch.no_grad():
        mean = plain.autoencoder.encode(images()).latent_dist.mode()
    assert latents.shape == (2, 4, 16, 16) and SD_SCALE_FACTOR == 0.18215
    torch.testing.assert_close(latents, mean * 0.18215)


def test_latents_can_be_normalised_by_channel(plain: LatentDiffusion) -> None:
    """With each channel's own mean and deviation, they have mean 0 and deviation 1."""
    with torch.no_grad():
        z = plain.autoencoder.encode(images()).latent_dist.mode()
    mean, std = z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist()
    latents = tiny_model(latent_mean=mean, latent_std=std).encode(images())
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stats", [{}, PER_CHANNEL], ids=["one-factor", "by-channel"])
def test_decoding_undoes_the_normalisation(stats: dict) -> None:
    model = tiny_model(**stats)
    decoded = model.decode(model.encode(images()))
    with torch.no_grad():
        expected = model.autoencoder.decode(
            model.autoencoder.encode(images()).latent_dist.mode()
        ).sample
    assert decoded.shape == images().shape
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_autoencoder_stays_in_float32(dtype: torch.dtype) -> None:
    """Also under autocast. With activations beyond fp16's 65504, fp16 would give no picture."""
    model = tiny_model()
    with torch.no_grad():
        model.autoencoder.decoder.conv_in.weight *= 1e6
    latents = model.encode(images())
    expected = model.decode(latents)
    model.cast(dtype)
    assert model.unet.dtype == model.text_encoder.dtype == dtype
    with torch.autocast("cpu", dtype):
        assert torch.equal(model.encode(images()), latents)
        assert torch.equal(model.decode(latents), expected) and bool(expected.isfinite().all())
    with torch.no_grad():
        half = model.autoencoder.half().decode(latents.half() * model.latent_std.half()).sample
    assert not bool(half.isfinite().all())


def test_what_is_trained_is_not_cast() -> None:
    """The step of a trained ControlNet over a frozen U-Net in bf16, near that in float32."""
    model = controlled_model().train()
    (x_t, t), cond = inputs(), condition()
    model.apply_model(x_t, t, cond).square().mean().backward()
    name = "controlnet.conv_in.weight"
    exact = dict(model.named_parameters())[name].grad.clone()
    model.zero_grad()
    model.cast(torch.bfloat16)
    assert model.unet.dtype == torch.bfloat16
    assert next(model.controlnet.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        model.apply_model(x_t, t, cond).square().mean().backward()
    found = dict(model.named_parameters())[name].grad
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_large_images_are_encoded_and_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, so that a CPU's other kernels for other batches make no difference."""
    model = tiny_model()
    model.autoencoder.double()
    latents = model.encode(images(3))
    together = model.decode(latents)
    calls = calls_of(model.autoencoder.decoder, monkeypatch)
    encoded = calls_of(model.autoencoder.encoder, monkeypatch)
    monkeypatch.setattr("common.latent.model.LARGE", 128 * 128)
    torch.testing.assert_close(model.encode(images(3)), latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decode(latents), together, rtol=0, atol=1e-6)
    assert [len(z) for z, *_ in calls] == [len(x) for x, *_ in encoded] == [1, 1, 1]


def test_checkpointing_without_a_control_computes_the_same_gradient() -> None:
    """It then covers the whole U-Net, through which the gradient of a learned word runs."""
    found = []
    for enabled in (False, True):
        model = tiny_model()
        model.enable_gradient_checkpointing(enabled)
        (x_t, t), context = inputs(), condition().context.requires_grad_(True)
        model.apply_model(x_t, t, LatentCondition(context)).square().mean().backward()
        found.append(context.grad)
        blocks = [*model.unet.down_blocks, model.unet.mid_block, *model.unet.up_blocks]
        assert all(block.gradient_checkpointing == enabled for block in blocks)
    torch.testing.assert_close(found[0], found[1])


def test_a_drawn_latent_follows_the_posterior_and_its_own_seed(plain: LatentDiffusion) -> None:
    with torch.no_grad():
        posterior = plain.autoencoder.encode(images()).latent_dist
    drawn = plain.encode(images(), StackedRandomGenerator([7, 8]))
    noise = StackedRandomGenerator([7, 8]).randn(4, 16, 16)
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * SD_SCALE_FACTOR)
    assert torch.equal(drawn, plain.encode(images(), StackedRandomGenerator([7, 8])))
    assert not torch.equal(drawn, plain.encode(images(), StackedRandomGenerator([7, 9])))
    torch.testing.assert_close(plain.encode(images()[1:], StackedRandomGenerator([8])), drawn[1:])


# ----------------------------------------------------------------------------
# Text.


def test_the_context_is_the_last_hidden_state_at_all_77_positions(plain: LatentDiffusion) -> None:
    context = plain.encode_text(["ab", ""])
    start, end = 0, 1
    letters = plain.tokenizer.convert_tokens_to_ids(["a", "b</w>"])
    ids = torch.full((2, 77), end)
    ids[:, 0], ids[0, 1:3] = start, torch.tensor(letters)
    with torch.no_grad():
        assert torch.equal(context, plain.text_encoder(ids).last_hidden_state)
    assert context.shape == (2, 77, 16)


def test_a_long_prompt_is_cut(plain: LatentDiffusion) -> None:
    long = " ".join("abcdefghij" * 12)
    context = plain.encode_text([long, long + " z"])
    assert context.shape == (2, 77, 16) and torch.equal(context[0], context[1])


# ----------------------------------------------------------------------------
# Frozen networks.


def test_only_the_control_is_trained_and_switched(controlled: LatentDiffusion) -> None:
    frozen = (controlled.autoencoder, controlled.text_encoder, controlled.unet)
    for mode in (True, False):
        assert controlled.train(mode) is controlled
        assert controlled.controlnet.training == mode
        assert not any(module.training for part in frozen for module in part.modules())
    assert not any(param.requires_grad for part in frozen for param in part.parameters())


def test_the_hash_sees_every_change() -> None:
    layer = nn.Linear(3, 2)
    before = state_hash(layer)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    assert state_hash(twin) == before and len(before) == 32
    with torch.no_grad():
        twin.bias[1] = torch.nextafter(twin.bias[1], torch.tensor(10.0))
    changed = {
        before,
        state_hash(twin),
        state_hash(layer.bfloat16()),
        state_hash(nn.Sequential(layer)),
    }
    assert len(changed) == 4


# ----------------------------------------------------------------------------
# The network and where control acts.


@torch.no_grad()
def test_without_a_hint_it_is_the_bare_unet(controlled: LatentDiffusion) -> None:
    x_t, t = inputs()
    cond = condition(hint=False)
    expected = controlled.unet(x_t, t, cond.context).sample
    assert torch.equal(controlled.apply_model(x_t, t, cond), expected)
    assert torch.equal(controlled.apply_model(x_t, t, condition().without_control()), expected)


@torch.no_grad()
def test_attention_by_matrix_products_is_the_same_attention() -> None:
    """It is taken for bf16 on a CPU alone."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    model, (x_t, t), cond = controlled_model(), inputs(), condition()
    expected = model.apply_model(x_t, t, cond)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, Attention) and module.is_cross_attention
    ]
    for mixed_precision, taken in (("no", False), ("bf16", True)):
        model.choose_attention(mixed_precision)
        assert layers and all(
            isinstance(layer.processor, AttnProcessor) == taken for layer in layers
        )
        torch.testing.assert_close(model.apply_model(x_t, t, cond), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_residual_has_its_own_scale(controlled: LatentDiffusion) -> None:
    x_t, t = inputs()
    cond = condition(control_scales=tuple(0.1 * i for i in range(13)))
    residuals = controlled.controlnet(x_t, cond.hint, t, cond.context)
    *skips, middle = (r * s for r, s in zip(residuals, cond.control_scales, strict=True))
    expected = controlled.unet(
        x_t,
        t,
        cond.context,
        down_block_additional_residuals=skips,
        mid_block_additional_residual=middle,
    ).sample
    assert torch.equal(controlled.apply_model(x_t, t, cond), expected)
    ones, none = (
        dataclasses.replace(cond, control_scales=scales) for scales in ((1.0,) * 13, None)
    )
    assert torch.equal(controlled.apply_model(x_t, t, ones), controlled.apply_model(x_t, t, none))
    zeros = dataclasses.replace(cond, control_scales=(0.0,) * 13)
    assert torch.equal(
        controlled.apply_model(x_t, t, zeros), controlled.unet(x_t, t, cond.context).sample
    )


def test_what_cannot_be_controlled_is_refused(
    plain: LatentDiffusion, controlled: LatentDiffusion
) -> None:
    with pytest.raises(InputError, match="no ControlNet"):
        plain.apply_model(*inputs(), condition())
    with pytest.raises(InputError, match="takes 13 control scales, not 2"):
        controlled.apply_model(*inputs(), condition(control_scales=(1.0, 1.0)))


@torch.no_grad()
def test_a_frozen_base_in_half_precision_takes_a_control_in_full() -> None:
    model = controlled_model()
    x_t, t = inputs()
    full = model.apply_model(x_t, t, condition())
    model.unet.bfloat16()
    half = model.apply_model(x_t, t, condition())
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


# ----------------------------------------------------------------------------
# Guidance.


@pytest.mark.parametrize("guess", [False, True], ids=["control-on-both", "guess-mode"])
@torch.no_grad()
def test_guidance_is_one_call_and_equals_two(
    controlled: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, guess: bool
) -> None:
    """In guess mode the ControlNet computes the conditional half alone."""
    scales = guess_mode_scales(13) if guess else (0.7,) * 13
    cond, null = condition(control_scales=scales), condition(seed=4)
    null = null.without_control() if guess else dataclasses.replace(null, control_scales=scales)
    x_t, t = inputs()
    t[:] = 300
    halves = [controlled.apply_model(x_t, t, half) for half in (cond, null)]
    base, control = (
        calls_of(part, monkeypatch) for part in (controlled.unet, controlled.controlnet)
    )
    output = controlled.predictor(cond, null, 3.0)(x_t, 300)
    torch.testing.assert_close(output, guide(*halves, 3.0), rtol=1e-4, atol=1e-5)
    assert [len(call[0]) for call in base] == [4]
    assert [len(call[0]) for call in control] == [2 if guess else 4]


@torch.no_grad()
def test_perturbed_attention_is_that_of_diffusers() -> None:
    """Its processor perturbs the second half of a batch. The others come back afterwards, after an
    error too."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    model = tiny_model(pag_applied_layers=("down_blocks.1", "mid_block"))
    (x_t, t), cond = inputs(), condition(hint=False)
    perturbed = model.apply_model(x_t, t, cond.perturb())
    usual = model.apply_model(x_t, t, cond)
    layers = [
        layer
        for name, layer in model.unet.named_modules()
        if name.endswith("attn1") and name.startswith(("down_blocks.1", "mid_block"))
    ]
    assert len(layers) == 3 and not torch.allclose(perturbed, usual)
    processors = [layer.processor for layer in layers]
    with pytest.raises(RuntimeError):
        model.apply_model(x_t[:, :3], t, cond.perturb())
    assert [layer.processor for layer in layers] == processors
    for layer in layers:
        layer.set_processor(PAGIdentitySelfAttnProcessor2_0())
    theirs = model.unet(
        torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond.context, cond.context])
    ).sample
    torch.testing.assert_close(torch.cat([usual, perturbed]), theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_perturbed_attention_keeps_the_control(controlled: LatentDiffusion) -> None:
    """Where control acts and where it does not, the third output is under the same condition."""
    (x_t, _), cond, null = inputs(), condition(), condition(seed=4)
    predict = controlled.predictor(cond, null, 3.0, pag_scale=2.0, control=(500, 999))
    for t, halves in (
        (700, (cond, null)),
        (300, (cond.without_control(), null.without_control())),
    ):
        timesteps = torch.full((len(x_t),), t)
        with_text, without, weak = (
            controlled.apply_model(x_t, timesteps, each) for each in (*halves, halves[0].perturb())
        )
        expected = guide(with_text, without, 3.0) + 2.0 * (with_text - weak)
        torch.testing.assert_close(predict(x_t, t), expected, rtol=1e-4, atol=1e-5)


def test_guess_mode_falls_from_the_middle_outwards() -> None:
    scales = guess_mode_scales()
    assert len(scales) == 13 and scales[12] == 1.0 and scales[0] == pytest.approx(0.825**12)
    assert list(scales) == sorted(scales)
    assert guess_mode_scales(3, strength=0.5) == pytest.approx((0.5 * 0.825**2, 0.5 * 0.825, 0.5))


def test_halves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same control scales"):
        condition(hint=False).stack(condition())
    with pytest.raises(ValueError, match="same control scales"):
        condition(control_scales=(1.0,) * 13).stack(condition())
    texts = condition(hint=False).stack(condition(hint=False))
    assert texts.hint is None and texts.controlled is None and len(texts.context) == 4


# ----------------------------------------------------------------------------
# Control in a part of the trajectory.


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_controlled_steps_are_those_of_diffusers_pipeline(steps: int) -> None:
    """Which leaves out step i if i/S < start or (i + 1)/S > end."""
    pairs = trailing_pairs(1000, steps)
    for start in (0.0, 0.2, 0.25, 0.5, 1.0):
        for end in (0.0, 0.3, 0.5, 0.8, 1.0):
            if start > end:
                continue
            lowest, highest = control_interval(pairs, start, end)
            expected = [
                t
                for i, (t, _) in enumerate(pairs)
                if not (i / steps < start or (i + 1) / steps > end)
            ]
            assert [t for t, _ in pairs if lowest <= t <= highest] == expected
    assert control_interval(pairs) == (pairs[-1][0], pairs[0][0])


@pytest.mark.parametrize("window", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.5), (math.nan, 1.0)])
def test_a_window_outside_the_trajectory_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="fractions"):
        control_interval(trailing_pairs(1000, 4), *window)


@pytest.mark.parametrize(
    ("window", "controlled_steps"),
    [((0.0, 1.0), 4), ((0.0, 0.5), 2), ((0.75, 1.0), 1), ((0.4, 0.5), 0)],
)
@torch.no_grad()
def test_outside_its_window_the_control_network_rests(
    controlled: LatentDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    window: tuple[float, float],
    controlled_steps: int,
) -> None:
    """And what comes out there is the base's."""
    pairs = trailing_pairs(1000, 4)
    cond, null = condition(), condition(seed=4)
    predict = controlled.predictor(cond, null, 2.0, control=control_interval(pairs, *window))
    base, control = (
        calls_of(part, monkeypatch) for part in (controlled.unet, controlled.controlnet)
    )
    outputs = {t: predict(inputs()[0], t) for t, _ in pairs}
    first = round(window[0] * 4)
    assert [int(call[2][0]) for call in control] == [
        t for t, _ in pairs[first : first + controlled_steps]
    ]
    assert len(base) == 4
    always = controlled.predictor(cond, null, 2.0)
    never = controlled.predictor(cond.without_control(), null.without_control(), 2.0)
    seen = {int(call[2][0]) for call in control}
    for t, output in outputs.items():
        assert torch.equal(output, (always if t in seen else never)(inputs()[0], t))


# ----------------------------------------------------------------------------
# Sampling.


@torch.no_grad()
def test_sampling_equals_a_loop_of_separate_calls(controlled: LatentDiffusion) -> None:
    x_T, _ = inputs()
    pairs = trailing_pairs(1000, 3)
    cond, null = condition(), condition(seed=4)

    def two_calls(x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        timesteps = torch.full((len(x_t),), t)
        a, b = (controlled.apply_model(x_t, timesteps, half) for half in (cond, null))
        eps = b + 2.0 * (a - b)
        alpha_t, sigma_t = SCHEDULE.alpha_sigma(t)
        return (x_t - sigma_t * eps) / alpha_t, eps

    denoise = denoiser(controlled.predictor(cond, null, 2.0), SCHEDULE, "eps", clip_x0=False)
    expected = sample_ddim(two_calls, SCHEDULE, x_T, pairs)
    torch.testing.assert_close(
        sample_ddim(denoise, SCHEDULE, x_T, pairs), expected, rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(controlled: LatentDiffusion) -> None:
    x_t, t = inputs(3)
    cond = condition(3)
    together = controlled.apply_model(x_t, t, cond)
    alone = controlled.apply_model(
        x_t[1:2], t[1:2], LatentCondition(cond.context[1:2], cond.hint[1:2])
    )
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompts_and_hints_become_images(controlled: LatentDiffusion) -> None:
    """The lines at the top of the module."""
    hint = condition().hint
    prompts = ["red circle", "blue"]
    cond, null = (text_condition(controlled, texts, hint) for texts in (prompts, ["", ""]))
    predict = controlled.predictor(cond, null, 7.5)
    denoise = denoiser(predict, controlled.schedule, controlled.parameterization, clip_x0=False)
    x0 = sample(
        "dpmpp_2m",
        denoise,
        SCHEDULE,
        inputs()[0],
        trailing_pairs(1000, 2),
        noise=lambda: inputs()[0],
    )
    result = controlled.decode(x0)
    assert result.shape == (2, 3, 128, 128) and bool(result.isfinite().all())


# ----------------------------------------------------------------------------
# On device "cuda" without a GPU (see tests/common/test_fake_cuda.py).


def on_fake_cuda(check: Callable[[torch.device, LatentDiffusion], None], **options: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        with device:
            model = controlled_model(unet=tiny_unet(**TWO_LEVELS), **options)
        check(device, model)


def cuda_condition(device: torch.device) -> LatentCondition:
    return LatentCondition(
        torch.zeros(2, 77, 16, device=device), torch.zeros(2, 3, 128, 128, device=device)
    )


def test_loss_on_cuda() -> None:
    def check(device: torch.device, model: LatentDiffusion) -> None:
        generators = StackedRandomGenerator([1, 2], device)
        latents = model.encode(torch.zeros(2, 3, 128, 128, device=device), generators)
        cond = dataclasses.replace(cuda_condition(device), context=model.encode_text(["a", "b"]))
        loss = diffusion_loss(
            model.apply_model, SCHEDULE, latents, cond, generators, parameterization="v"
        )
        assert loss.device.type == "cuda" and loss.requires_grad

    on_fake_cuda(check, **PER_CHANNEL)


def test_sampling_on_cuda() -> None:
    """Guided, in guess mode, controlled in the first half alone, with fresh noise."""

    def check(device: torch.device, model: LatentDiffusion) -> None:
        generators = StackedRandomGenerator([1, 2], device)
        cond = dataclasses.replace(cuda_condition(device), control_scales=guess_mode_scales(5))
        pairs = trailing_pairs(1000, 2)
        window = control_interval(pairs, 0.0, 0.5)
        predict = model.predictor(cond, cond.without_control(), 3.0, control=window)
        denoise = denoiser(predict, SCHEDULE, "eps", clip_x0=False)
        with torch.no_grad():
            x_T = generators.randn(4, 16, 16)
            x0 = sample(
                "ddpm", denoise, SCHEDULE, x_T, pairs, noise=lambda: generators.randn(4, 16, 16)
            )
        decoded = model.decode(x0)
        assert decoded.device.type == "cuda" and decoded.shape == (2, 3, 128, 128)

    on_fake_cuda(check)
