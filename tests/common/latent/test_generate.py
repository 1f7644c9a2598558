"""From prompts to pictures: what a picture depends on, how control acts, what happens without
memory, and patches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_latent import WIDTH, condition, controlled_model, text_condition, tiny_model
from torch import Tensor

from common.errors import InputError
from common.latent import generate as generate_module
from common.latent.control import guess_mode_scales, residual_scales
from common.latent.generate import (
    ControlledGenerationConfig,
    GenerationConfig,
    Request,
    generate,
    with_default_guidance,
)
from common.latent.model import Guidance, LatentCondition, LatentDiffusion
from common.latent.save_pictures import Mapped, too_long
from p3_controlnet.patches import patched, pyramid, starts

QUICK = ControlledGenerationConfig(steps=3, chunk_size=2, guidance_scale=2.0)
SIDE = 16  # of the tiny model's latents


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """With a ControlNet that has an effect."""
    return controlled_model().eval()


def requests(count: int = 3, hint: bool = True) -> list[Request]:
    generator = torch.Generator().manual_seed(9)
    hints = torch.randint(0, 256, (count, 3, 128, 128), generator=generator, dtype=torch.uint8)
    prompts = ["red circle", "blue star", "old lace square", "a", "b"]
    return [Request(prompts[k], 100 + k, hints[k] if hint else None) for k in range(count)]


def pictures(
    model: LatentDiffusion,
    wanted: Sequence[Request],
    config: ControlledGenerationConfig = QUICK,
    **more: Any,
) -> Tensor:
    found = list(generate(model, wanted, config, show_progress=False, **more))
    assert [i for indices, _ in found for i in indices] == list(range(len(wanted)))
    return torch.cat([images for _, images in found])


def with_(**more: Any) -> ControlledGenerationConfig:
    return dataclasses.replace(QUICK, **more)


# ----------------------------------------------------------------------------
# What a picture depends on.


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_a_picture_depends_on_its_own_request_bit_for_bit(
    model: LatentDiffusion, sampler: Any
) -> None:
    """Wherever it stands, whatever stands beside it: for samplers that draw at every step too."""
    config, wanted = with_(sampler=sampler, steps=2), requests(3)
    together = pictures(model, wanted, config)
    assert together.shape == (3, 3, 128, 128) and together.dtype == torch.float32
    for order in ([2, 1, 0], [1]):
        assert torch.equal(pictures(model, [wanted[k] for k in order], config), together[order])


def test_a_hint_is_read_when_its_turn_comes(model: LatentDiffusion) -> None:
    """And the picture is that of the hint itself."""
    wanted, read = requests(3), []

    def reading(k: int) -> Tensor:
        read.append(k)
        return wanted[k].hint

    lazy = Mapped(
        lambda k: dataclasses.replace(wanted[k], hint=lambda: reading(k)), range(len(wanted))
    )
    chunks = generate(model, lazy, QUICK, show_progress=False)
    first = next(chunks)
    assert read == [0, 1]  # the first chunk
    rest = next(chunks)
    assert set(read) == {0, 1, 2}
    together = torch.cat([first[1], rest[1]])
    assert torch.equal(together, pictures(model, wanted))
    assert len(lazy[1:]) == 2 and lazy[1:][0].prompt == wanted[1].prompt


def test_chunk_sizes_agree_but_for_rounding(model: LatentDiffusion) -> None:
    wanted = requests(3)
    one, three = (pictures(model, wanted, with_(chunk_size=size)) for size in (1, 3))
    assert torch.allclose(one, three, atol=1e-3)


def test_seed_prompt_and_hint_each_give_another_picture(model: LatentDiffusion) -> None:
    first = requests(1)[0]
    changes = [{}, {"seed": 7}, {"prompt": "green"}, {"hint": 255 - first.hint}]
    images = pictures(model, [dataclasses.replace(first, **change) for change in changes])
    for i, a in enumerate(images):
        for b in images[:i]:
            assert not torch.equal(a, b)


def test_pictures_are_those_of_the_model_called_by_hand(model: LatentDiffusion) -> None:
    """DDIM in its formula, guidance in its formula, hints in [0, 1]."""
    request = requests(1)[0]
    ours = pictures(
        model, [request], with_(sampler="ddim", steps=2, chunk_size=1, spacing="leading")
    )
    hint = request.hint[None].float() / 255.0
    x = torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(request.seed))[None]
    abar = [model.schedule.abar(t) for t in (500, 0)] + [1.0]
    for t, now, after in zip((500, 0), abar, abar[1:], strict=False):
        with torch.no_grad():
            cond, null = (
                model.apply_model(x, torch.tensor([t]), text_condition(model, [prompt], hint))
                for prompt in (request.prompt, "")
            )
        eps = null + 2.0 * (cond - null)
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    assert torch.allclose(ours, model.decode(x), atol=1e-4)


def test_the_callback_sees_each_step_of_each_chunk(model: LatentDiffusion) -> None:
    seen = []
    pictures(
        model,
        requests(3),
        callback=lambda i, t, x_t, x0: seen.append((i, tuple(x_t.shape), tuple(x0.shape))),
    )
    latents = (QUICK.chunk_size, 4, SIDE, SIDE)
    assert seen == [(i, latents, latents) for i in range(QUICK.steps)] * 2


def test_a_hint_is_encoded_once_for_all_steps(model: LatentDiffusion) -> None:
    encoded: list[int] = []
    encoder = model.controlnet.controlnet_cond_embedding
    hook = encoder.register_forward_hook(lambda *_: encoded.append(1))
    pictures(model, requests(2))
    hook.remove()
    assert len(encoded) == 1


def test_without_hints_no_control_network_is_needed() -> None:
    plain = pictures(tiny_model().eval(), requests(2, hint=False))
    controlled = controlled_model().eval()
    assert torch.equal(pictures(controlled, requests(2, hint=False)), plain)
    assert not torch.allclose(pictures(controlled, requests(2)), plain, atol=1e-3)


def test_larger_latents_give_larger_pictures() -> None:
    assert pictures(tiny_model().eval(), requests(1, hint=False), latent_side=24).shape == (
        1,
        3,
        192,
        192,
    )


# ----------------------------------------------------------------------------
# How control acts.


def test_control_scales_of_zero_are_no_control(model: LatentDiffusion) -> None:
    free = pictures(model, requests(1, hint=False))
    whole = pictures(model, requests(1))
    assert torch.allclose(
        pictures(model, requests(1), with_(control_scales=(0.0,))), free, atol=1e-5
    )
    assert torch.equal(pictures(model, requests(1), with_(control_scales=(1.0,) * 13)), whole)
    middle_alone = pictures(model, requests(1), with_(control_scales=(0.0,) * 12 + (1.0,)))
    for other in (free, whole):
        assert (middle_alone - other).abs().max() > 1e-4


def test_control_starts_and_ends(model: LatentDiffusion) -> None:
    """Nowhere is no control; everywhere is the default; the parts differ, from both and from each
    other."""
    free, whole = pictures(model, requests(1, hint=False)), pictures(model, requests(1))
    assert torch.allclose(pictures(model, requests(1), with_(control_end=0.0)), free, atol=1e-5)
    assert torch.equal(
        pictures(model, requests(1), with_(control_start=0.0, control_end=1.0)), whole
    )
    early = pictures(model, requests(1), with_(control_end=0.4))
    late = pictures(model, requests(1), with_(control_start=0.4))
    for a, b in ((early, free), (early, whole), (late, free), (late, whole), (early, late)):
        assert (a - b).abs().max() > 1e-4
    calls: list[int] = []
    hook = model.controlnet.register_forward_pre_hook(
        lambda _, inputs: calls.append(len(inputs[0]))
    )
    try:
        pictures(model, requests(1), with_(control_end=0.4))
    finally:
        hook.remove()
    assert calls == [4]  # one of three steps, both halves of a padded chunk of 2


def test_guess_mode_controls_the_conditional_half_alone_and_weaker(model: LatentDiffusion) -> None:
    calls: list[int] = []
    hook = model.controlnet.register_forward_pre_hook(
        lambda _, inputs: calls.append(len(inputs[0]))
    )
    try:
        guessed = pictures(model, requests(1), with_(guess_mode=True))
    finally:
        hook.remove()
    assert calls == [2] * 3
    assert (guessed - pictures(model, requests(1))).abs().max() > 1e-4
    assert residual_scales(with_(guess_mode=True, control_scales=(2.0,)), 13) == guess_mode_scales(
        13, 2.0
    )


def test_control_scales_must_be_as_many_as_residuals(model: LatentDiffusion) -> None:
    for guess in (False, True):
        config = with_(control_scales=(1.0, 0.5), guess_mode=guess)
        with pytest.raises(
            InputError,
            match="--control-scales needs 1 number, or 13 for this model's residuals, not 2",
        ):
            pictures(model, requests(1), config)


def test_guidance_acts_inside_its_interval_alone(model: LatentDiffusion) -> None:
    conditional = pictures(model, requests(1), with_(guidance_scale=1.0))
    assert torch.equal(
        pictures(model, requests(1), with_(guidance_scale=9.0, guidance_interval=(0, 10))),
        conditional,
    )
    assert not torch.equal(
        pictures(model, requests(1), with_(guidance_interval=(900, 999))), conditional
    )


def test_the_default_guidance_is_the_models(model: LatentDiffusion) -> None:
    assert model.default_guidance == model.default_controlled_guidance == (7.5, 0.0)  # as in SD
    usual, asked = with_(guidance_scale=None), with_(guidance_scale=7.5, pag_scale=0.0)
    assert with_default_guidance(usual, model) == asked
    assert with_default_guidance(asked, model) == asked
    assert torch.equal(pictures(model, requests(1), usual), pictures(model, requests(1), asked))
    more = with_(guidance_scale=7.5, pag_scale=3.0)
    assert not torch.equal(pictures(model, requests(1), more), pictures(model, requests(1), asked))


def test_a_controlnet_has_a_default_of_its_own() -> None:
    own = {"default_guidance": Guidance(1.0, 3.0), "default_controlled_guidance": Guidance(2.0, 0)}
    model = tiny_model(**own)
    alone = with_default_guidance(GenerationConfig(), model)
    controlled = with_default_guidance(ControlledGenerationConfig(), model)
    assert (alone.guidance_scale, alone.pag_scale) == (1.0, 3.0)
    assert (controlled.guidance_scale, controlled.pag_scale) == (2.0, 0.0)


def test_a_prompt_that_is_cut_is_named(model: LatentDiffusion) -> None:
    fits, cut = "a " * 75, "a " * 76
    assert torch.equal(model.tokenize([fits]), model.tokenize([cut]))
    assert too_long(model, [fits, cut, "b"]) == [cut]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "--steps must be between 1 and 1000, not 0"),
        ({"chunk_size": 0}, "--chunk-size must be between 1 and 4096"),
        ({"guidance_scale": float("nan")}, "--guidance-scale must be a finite number"),
        ({"control_scales": ()}, "--control-scales must be finite"),
        ({"control_scales": (1.0, float("inf"))}, "--control-scales must be a list of which each"),
        ({"eta": 2.0}, "--eta must be between 0 and 1"),
        ({"guidance_rescale": -0.5}, "--guidance-rescale must be between 0 and 1"),
        (
            {"guidance_interval": (900, 100)},
            "--guidance-interval must give the lowest t and then the highest",
        ),
        ({"control_start": 0.6, "control_end": 0.5}, "--control-start 0.6 is above --control-end"),
        ({"control_end": 1.5}, "--control-end must be between 0 and 1, not 1.5"),
        ({"seed": -1}, "--seed must be between 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ControlledGenerationConfig(**values).check()


# ----------------------------------------------------------------------------
# Too little memory.


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: int) -> list[int]:
    """The device holds `fits` pictures at once; returns the sizes that were tried."""
    tried: list[int] = []
    original = generate_module._generate_chunk

    def fragile(model: LatentDiffusion, part: list[Request], *rest: Any) -> Tensor:
        tried.append(len(part))
        if len(part) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, part, *rest)

    monkeypatch.setattr(generate_module, "_generate_chunk", fragile)
    return tried


def test_a_smaller_batch_is_tried_and_said_once(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, config = requests(5), with_(chunk_size=4, steps=1)
    expected = pictures(model, wanted, config)
    tried = short_of_memory(monkeypatch, fits=1)
    images = pictures(model, wanted, config)
    assert tried == [
        4,
        2,
        1,
        1,
        1,
        1,
        1,
    ]  # what fits is remembered; the last chunk's padding is left out
    assert torch.allclose(images, expected, atol=1e-3)
    assert capsys.readouterr().out.splitlines() == [
        "4 images at once do not fit into the device's memory: trying 2",
        "2 images at once do not fit into the device's memory: trying 1",
    ]


def test_not_even_one_picture_fits(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = short_of_memory(monkeypatch, fits=0)
    with pytest.raises(
        InputError, match="the device's memory does not hold one image: use a smaller model"
    ):
        pictures(model, requests(2))
    assert tried == [2, 1]


# ----------------------------------------------------------------------------
# Patches.


def test_where_one_patch_covers_everything_it_is_the_whole(model: LatentDiffusion) -> None:
    network = patched(model.apply_model, SIDE, 8, 8)
    assert torch.equal(pictures(model, requests(2), network=network), pictures(model, requests(2)))


def test_a_constant_network_gives_a_constant() -> None:
    """So do weights sum to one everywhere, where patches do not divide the canvas too."""
    for height, width, stride in ((16, 24, 8), (23, 17, 5), (40, 16, 16), (33, 33, 15)):
        network = patched(lambda x_t, t, cond: torch.full_like(x_t, 0.7), 16, stride, 4)
        x_t = torch.randn(2, 4, height, width)
        output = network(x_t, torch.tensor([5, 5]), LatentCondition(torch.zeros(2, 3, WIDTH)))
        assert torch.allclose(output, torch.full_like(x_t, 0.7), atol=1e-6)


def test_a_network_of_single_pixels_is_the_same_in_patches() -> None:
    """Each patch gets its own piece of the latents, at its own place."""
    x_t = torch.randn(2, 4, 23, 31, generator=torch.Generator().manual_seed(0))
    output = patched(lambda x, t, cond: 2.0 * x, 16, 7, 4)(
        x_t, torch.tensor([5, 5]), condition(2, hint=False)
    )
    assert torch.allclose(output, 2.0 * x_t, atol=1e-5)


def test_the_hint_is_cut_at_the_same_places() -> None:
    """A network that says what its hint shows gives back the hint, averaged to the latents'
    size."""
    hint = torch.rand(1, 3, 4 * 24, 4 * 20, generator=torch.Generator().manual_seed(0))
    shown = torch.nn.functional.avg_pool2d(hint, 4)[:, :1]

    def show(x_t: Tensor, t: Tensor, cond: LatentCondition) -> Tensor:
        return torch.nn.functional.avg_pool2d(cond.hint, 4)[:, :1]

    network = patched(show, 16, 6, 4)
    output = network(
        torch.zeros(1, 1, 24, 20),
        torch.tensor([5]),
        LatentCondition(torch.zeros(1, 3, WIDTH), hint),
    )
    assert torch.allclose(output, shown, atol=1e-6)


def test_no_seam_shows_where_patches_disagree() -> None:
    """Two patches that say 0 and 1: from one to the other it goes in small steps."""
    answers = iter((0.0, 1.0))
    network = patched(lambda x_t, t, cond: torch.full_like(x_t, next(answers)), 16, 8, 4)
    output = network(
        torch.zeros(1, 1, 16, 24), torch.tensor([5]), LatentCondition(torch.zeros(1, 3, WIDTH))
    )
    row = output[0, 0, 8]
    assert torch.all(row[:8] == 0.0) and torch.all(row[16:] == 1.0)
    assert torch.all(row.diff() >= 0.0) and row.diff().max() < 0.15


def test_patches_reach_every_side() -> None:
    assert (
        starts(16, 16, 8) == [0] and starts(24, 16, 8) == [0, 8] and starts(25, 16, 8) == [0, 8, 9]
    )
    assert starts(64, 16, 16) == [0, 16, 32, 48]
    window = pyramid(16)
    assert window.min() > 0.0 and window.max() == 1.0 and torch.equal(window, window.T)
    assert torch.equal(window, window.flip(0))


def test_a_stride_that_leaves_gaps_and_too_small_a_canvas_are_refused() -> None:
    for stride in (0, 17):
        with pytest.raises(
            InputError, match=f"--patch-stride must be between 1 and 16 latents.*, not {stride}"
        ):
            patched(lambda x_t, t, cond: x_t, 16, stride, 4)
    network = patched(lambda x_t, t, cond: x_t, 16, 8, 4)
    with pytest.raises(InputError, match="latents of 16x12 are smaller than one patch of 16x16"):
        network(
            torch.zeros(1, 4, 16, 12), torch.tensor([5]), LatentCondition(torch.zeros(1, 3, WIDTH))
        )


def test_a_larger_canvas_with_control_in_patches(model: LatentDiffusion) -> None:
    """Every patch goes through the U-Net and ControlNet at the model's own size."""
    hint = torch.randint(0, 256, (3, 256, 128), dtype=torch.uint8)
    sizes: list[tuple[int, ...]] = []
    hook = model.controlnet.register_forward_pre_hook(
        lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:]))
    )
    try:
        network = patched(model.apply_model, SIDE, 8, 8)
        cond = text_condition(model, ["red circle"], hint[None].float() / 255.0)
        with torch.no_grad():
            output = network(torch.zeros(1, 4, 32, 16), torch.tensor([500]), cond)
    finally:
        hook.remove()
    assert output.shape == (1, 4, 32, 16) and sizes == [(16, 16)] * 3
