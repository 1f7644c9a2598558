"""What a picture shows, against discs of known place, area and colour, clean and spoiled in the
ways models spoil them."""

import io
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.colour import CSS_COLOURS, colour_difference
from common.data.fill50k import SIZE
from common.errors import InputError
from common.images import resize
from common.metrics.circles import Circle, circles_of_drawing, disc, fit_circles
from common.metrics.segmentation import (
    centre_mask,
    inner_region,
    iou,
    judge_colour,
    load_sam2,
    median_colour,
    object_mask,
    segment,
    separate,
)

MIDDLE = Circle(260.5, 240.0, 90.0)
AWAY = Circle(120.0, 130.5, 70.0)
CUT = Circle(490.0, 300.0, 110.0)


def picture(*discs: tuple[Circle, str], background: str = "old lace") -> Tensor:
    """Flat discs, hard edges, uint8 [3, 512, 512]."""
    image = (
        torch.tensor(CSS_COLOURS[background], dtype=torch.uint8)[:, None, None]
        .expand(3, SIZE, SIZE)
        .clone()
    )
    for circle, colour in discs:
        image[:, disc(circle)] = torch.tensor(CSS_COLOURS[colour], dtype=torch.uint8)[:, None]
    return image


def outline(*circles: Circle) -> Tensor:
    """Control pictures: 5 pixels wide, centred on the circle."""
    white = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for x, y, radius in circles:
        white |= disc(Circle(x, y, radius + 2.5)) & ~disc(Circle(x, y, radius - 2.5))
    return (white * 255).to(torch.uint8).expand(3, SIZE, SIZE)


def _as_image(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def clean(image: Tensor) -> Tensor:
    return image


def noisy(image: Tensor) -> Tensor:
    noise = 8.0 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + noise).round().clamp(0, 255).to(torch.uint8)


def jpeg(image: Tensor) -> Tensor:
    buffer = io.BytesIO()
    _as_image(image).save(buffer, "JPEG", quality=75)
    return _as_tensor(Image.open(buffer))


def blurred(image: Tensor) -> Tensor:
    return _as_tensor(_as_image(image).filter(ImageFilter.GaussianBlur(5)))


def from_64(image: Tensor) -> Tensor:
    """As a model of 64x64 leaves it."""
    small = _as_image(image).resize((64, 64), Image.Resampling.BOX)
    return _as_tensor(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


SPOILERS = [clean, noisy, jpeg, blurred, from_64]


# ----------------------------------------------------------------------------
# Objects.


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("circle", [MIDDLE, AWAY, CUT])
@pytest.mark.parametrize(
    ("colour", "background"), [("crimson", "old lace"), ("navy", "black"), ("moccasin", "bisque")]
)
def test_a_disc_is_found(
    circle: Circle, colour: str, background: str, spoil: Callable[[Tensor], Tensor]
) -> None:
    """The last pair is CIEDE2000 4.5 apart."""
    found = object_mask(spoil(picture((circle, colour), background=background)))
    assert found.shape == (SIZE, SIZE) and found.dtype == torch.bool
    assert iou(found, disc(circle)) > (0.998 if spoil is clean else 0.97)


def test_the_area_is_that_of_the_circle() -> None:
    mask = object_mask(picture((MIDDLE, "teal")))
    assert mask.sum().item() == pytest.approx(math.pi * MIDDLE.radius**2, rel=2e-3)
    half = Circle(512.0, 256.0, 100.0)
    assert object_mask(picture((half, "teal"))).sum().item() == pytest.approx(
        math.pi * 100.0**2 / 2, rel=4e-3
    )


def test_the_nearest_pair_of_fill50k_is_told_apart() -> None:
    assert colour_difference(CSS_COLOURS["chartreuse"], CSS_COLOURS["lawn green"]) < 0.7
    found = object_mask(picture((MIDDLE, "chartreuse"), background="lawn green"))
    assert iou(found, disc(MIDDLE)) > 0.998


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("colours", [1, 2, 3])
def test_a_flat_picture_has_no_object(colours: int, spoil: Callable[[Tensor], Tensor]) -> None:
    assert not object_mask(spoil(picture(background="peru")), colours).any()


@pytest.mark.parametrize("colours", [1, 2, 3])
def test_noise_and_gradients_are_no_objects(colours: int) -> None:
    """However many pieces they fall into."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    slope = torch.linspace(100, 140, SIZE).round().to(torch.uint8).expand(3, SIZE, SIZE)
    for image in (noise, slope):
        assert not object_mask(image, colours).any()
    assert iou(object_mask(picture()), disc(MIDDLE)) == 0.0


@pytest.mark.parametrize("spoil", SPOILERS)
def test_two_colours_on_a_third(spoil: Callable[[Tensor], Tensor]) -> None:
    """Grey lies between black and white, as the blurred edge of the white disc does."""
    scene = [(Circle(150.0, 250.0, 90.0), "white"), (Circle(370.0, 260.0, 80.0), "dim gray")]
    labels = segment(spoil(picture(*scene, background="black")), colours=2)
    for circle, _ in scene:
        label = labels[int(circle.y), int(circle.x)].item()
        assert label > 0 and iou(labels == label, disc(circle)) > (0.99 if spoil is clean else 0.95)
    assert iou(labels > 0, disc(scene[0][0]) | disc(scene[1][0])) > 0.95


def test_a_faint_object_is_found_beside_strong_ones() -> None:
    """The soft edges of the pink disc are farther from the background's colour than the snow is."""
    circles = [Circle(90.0, 250.0, 70.0), Circle(250.0, 250.0, 70.0), Circle(410.0, 250.0, 70.0)]
    scene = zip(circles, ("snow", "navajo white", "hot pink"), strict=True)
    labels = segment(from_64(picture(*scene, background="honey dew")), colours=3)
    for circle in circles:
        assert iou(labels == labels[int(circle.y), int(circle.x)], disc(circle)) > 0.95


@pytest.mark.parametrize(
    ("colour", "background", "strength"),
    [
        ("medium slate blue", "slate blue", 6.0),
        ("moccasin", "tan", 10.0),
        ("dim gray", "dark gray", 18.0),
    ],
)
def test_a_faint_object_is_found_in_noise(colour: str, background: str, strength: float) -> None:
    """Noise in the pixels of a model of 64x64, independent in the three channels: most of it is not
    between the two colours."""
    noise = strength * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))

    def found(image: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(image.float(), 8) + noise
        return object_mask(resize(small.round().clamp(0, 255).to(torch.uint8), SIZE))

    assert iou(found(picture((MIDDLE, colour), background=background)), disc(MIDDLE)) > 0.9
    assert not found(picture(background=background)).any()


def test_a_second_colour_that_is_not_there_adds_no_object() -> None:
    """The background's noise is not taken for the missing colour."""
    circles = [Circle(150.0, 250.0, 90.0), Circle(370.0, 260.0, 80.0)]
    image = noisy(picture(*((circle, "indigo") for circle in circles)))
    assert iou(object_mask(image, colours=2), disc(circles[0]) | disc(circles[1])) > 0.97


def test_parts_come_apart_by_size() -> None:
    mask = disc(MIDDLE) | disc(Circle(60.0, 60.0, 30.0)) | disc(Circle(450.0, 450.0, 4.0))
    parts = separate(mask)
    assert [part.sum().item() for part in parts] == [
        disc(MIDDLE).sum(),
        disc(Circle(60.0, 60.0, 30.0)).sum(),
    ]
    assert (
        len(separate(mask, min_area=0.0)) == 3
        and separate(torch.zeros(8, 8, dtype=torch.bool)) == []
    )


def test_a_picture_of_another_size_is_brought_to_512() -> None:
    small = _as_tensor(
        _as_image(picture((MIDDLE, "crimson"))).resize((64, 64), Image.Resampling.BOX)
    )
    assert iou(object_mask(small), disc(MIDDLE)) > 0.97


def test_it_is_fast() -> None:
    """Well under 0.1 s; the bound leaves room for a busy machine."""
    image = picture((MIDDLE, "crimson"))
    object_mask(image)
    start = time.process_time()
    for _ in range(5):
        object_mask(image)
    assert (time.process_time() - start) / 5 < 0.3


# ----------------------------------------------------------------------------
# The grader's mask.


def test_the_mask_at_the_centre_is_the_disc_or_the_background() -> None:
    assert iou(centre_mask(picture((MIDDLE, "crimson"))), disc(MIDDLE)) > 0.998
    assert iou(centre_mask(picture((AWAY, "crimson"))), ~disc(AWAY)) > 0.998
    assert centre_mask(picture()).all()
    two = picture((MIDDLE, "crimson"), (Circle(80.0, 80.0, 50.0), "crimson"))
    assert iou(centre_mask(two), disc(MIDDLE)) > 0.998  # the connected part alone


def test_iou_by_hand() -> None:
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    assert iou(a, b) == pytest.approx(1 / 3) and iou(a, a) == 1.0
    assert iou(a & ~a, a) == iou(a & ~a, a & ~a) == 0.0


def test_sam2_answers_in_the_same_form(tmp_path: Path) -> None:
    """A tiny one with random weights, from a folder, without network."""
    transformers = pytest.importorskip("transformers")
    backbone = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "global_attention_blocks": [3],
        "image_size": [128, 128],
        "window_positional_embedding_background_size": [4, 4],
        "model_type": "sam2_hiera_det_model",
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "iou_head_hidden_dim": 32,
            "num_attention_heads": 2,
        },
    )
    transformers.Sam2Model(config).save_pretrained(tmp_path)
    size = {"height": 128, "width": 128}
    images = transformers.Sam2ImageProcessor(size=size, mask_size={"height": 32, "width": 32})
    transformers.Sam2Processor(images, target_size=128).save_pretrained(tmp_path)
    mask = load_sam2(tmp_path)(picture((MIDDLE, "crimson")))
    assert mask.shape == (SIZE, SIZE) and mask.dtype == torch.bool
    with pytest.raises(InputError, match="does not hold SAM2"):
        load_sam2(tmp_path / "none")
    state = load_file(tmp_path / "model.safetensors")
    del state["mask_decoder.iou_token.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors, such as mask_decoder.iou_token.weight"):
        load_sam2(tmp_path)


# ----------------------------------------------------------------------------
# Colours.


@pytest.mark.parametrize(("resolution", "margin"), [(512, 4.0), (64, 32.0)])
def test_colours_are_measured_inside(resolution: int, margin: float) -> None:
    inner = inner_region(disc(MIDDLE), resolution)
    assert (
        inner.any()
        and not (inner & ~disc(Circle(MIDDLE.x, MIDDLE.y, MIDDLE.radius - margin + 0.5))).any()
    )
    assert iou(inner, disc(Circle(MIDDLE.x, MIDDLE.y, MIDDLE.radius - margin))) > 0.85
    outside = inner_region(~disc(MIDDLE), resolution)
    assert (
        outside[0].all()
        and not (outside & disc(Circle(MIDDLE.x, MIDDLE.y, MIDDLE.radius + margin - 0.5))).any()
    )


def test_a_small_region_is_measured_at_its_deepest() -> None:
    small = Circle(100.0, 100.0, 20.0)
    inner = inner_region(disc(small), resolution=64)
    assert inner.any() and not (inner & ~disc(Circle(100.0, 100.0, 14.0))).any()
    assert not inner_region(torch.zeros(SIZE, SIZE, dtype=torch.bool)).any()
    assert inner_region(torch.ones(SIZE, SIZE, dtype=torch.bool)).all()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_the_median_is_the_colour(spoil: Callable[[Tensor], Tensor]) -> None:
    image = spoil(picture((MIDDLE, "peru"), background="light sky blue"))
    for region, name in ((disc(MIDDLE), "peru"), (~disc(MIDDLE), "light sky blue")):
        score = judge_colour(median_colour(image, inner_region(region, 64)), name)
        assert score.error < 1.0 and score.right and score.nearest == name


def test_colours_are_judged() -> None:
    score = judge_colour((255, 0, 0), "lime")
    assert score.error == pytest.approx(float(colour_difference((255, 0, 0), (0, 255, 0))))
    assert score.nearest == "red" and not score.right
    assert judge_colour(None, "lime") == (50.0, None, False)
    assert median_colour(picture(), torch.zeros(SIZE, SIZE, dtype=torch.bool)) is None


# ----------------------------------------------------------------------------
# Circles of control pictures.


@pytest.mark.parametrize(
    "circles",
    [
        [MIDDLE],
        [CUT],
        [Circle(40.0, 30.0, 120.0)],  # two borders cut it
        [Circle(256.0, 256.0, 280.0)],  # all four
        [Circle(130.0, 250.0, 80.0), Circle(350.0, 250.0, 110.0)],
        [Circle(130.0, 250.0, 80.0), Circle(290.0, 250.0, 80.0)],  # touching
        [Circle(100.0, 100.0, 60.0), Circle(250.0, 380.0, 70.0), Circle(400.0, 150.0, 80.0)],
        [Circle(200.0, 250.0, 100.0), Circle(300.0, 250.0, 100.0)],  # crossing
    ],
)
def test_circles_are_fitted_to_their_outlines(circles: list[Circle]) -> None:
    found = fit_circles(outline(*circles))
    assert len(found) == len(circles) and found == fit_circles(outline(*circles))
    for circle, true in zip(found, circles, strict=True):
        assert np.allclose(circle, true, atol=0.8) and iou(disc(circle), disc(true)) > 0.99


def test_what_is_no_circle_is_not_fitted() -> None:
    assert fit_circles(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)) == []
    square = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    square[:, 100:300, 100:300] = 255
    square[:, 105:295, 105:295] = 0
    assert fit_circles(square) == []
    line = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    line[:, 250] = 255
    assert fit_circles(line) == []
    assert fit_circles(torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8)) == []


def test_the_disc_has_the_area_of_the_circle() -> None:
    assert disc(MIDDLE).sum().item() == pytest.approx(math.pi * MIDDLE.radius**2, rel=2e-3)
    quarter = disc(Circle(0.0, 0.0, 128.0), size=256)
    assert quarter.shape == (256, 256) and quarter.sum().item() == pytest.approx(
        math.pi * 128.0**2 / 4, rel=2e-3
    )


def by_hand(*circles: Circle, width: int, wobble: float, turn: float = 1.0) -> torch.Tensor:
    """Lines of this width whose radius swings by the part `wobble`, around the part `turn`."""
    drawing = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    angle = torch.linspace(0.0, 2.0 * math.pi * turn, 4000, dtype=torch.float64)
    for circle in circles:
        radius = circle.radius * (1.0 + wobble * torch.sin(3.0 * angle))
        for shift in torch.linspace(-width / 2, width / 2, 2 * width + 1, dtype=torch.float64):
            x, y = ((radius + shift) * part for part in (torch.cos(angle), torch.sin(angle)))
            drawing[:, (circle.y + y).long(), (circle.x + x).long()] = 255
    return drawing


@pytest.mark.parametrize("width", [4, 8, 12, 16, 24])
@pytest.mark.parametrize("wobble", [0.0, 0.02, 0.08])
@pytest.mark.parametrize("apart", [True, False])
def test_lines_drawn_by_hand_become_the_nearest_circles(
    width: int, wobble: float, apart: bool
) -> None:
    other = AWAY if apart else Circle(MIDDLE.x + MIDDLE.radius, MIDDLE.y, 0.8 * MIDDLE.radius)
    drawing = by_hand(other, MIDDLE, width=width, wobble=wobble)
    drawing[:, 500:505, 500:505] = 255  # a speck
    found = circles_of_drawing(drawing)
    assert len(found) == 2
    for circle, expected in zip(found, sorted((other, MIDDLE)), strict=True):
        assert circle == pytest.approx(expected, abs=4.0)


def test_odd_drawings() -> None:
    assert circles_of_drawing(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)) == []
    filled = disc(MIDDLE).expand(3, -1, -1).to(torch.uint8) * 255
    assert circles_of_drawing(filled)[0] == pytest.approx(MIDDLE, abs=1.0)
    nearly_closed = by_hand(MIDDLE, width=12, wobble=0.03, turn=0.9)
    assert circles_of_drawing(nearly_closed)[0] == pytest.approx(MIDDLE, abs=4.0)
    cut = by_hand(Circle(200.0, 200.0, 90.0), width=12, wobble=0.0)[:, 180:, :]
    cut = torch.nn.functional.pad(cut, (0, 0, 0, 180))
    assert circles_of_drawing(cut)[0] == pytest.approx(Circle(200.0, 20.0, 90.0), abs=2.0)
    line = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    line[:, 250:262, 100:300] = 255
    cross = torch.maximum(line, line.transpose(1, 2).roll((-50, 50), (1, 2)))
    for no_circle in (
        line,
        cross,
        by_hand(MIDDLE, width=12, wobble=0.0, turn=0.6),
        torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8),
    ):
        with pytest.raises(InputError, match="goes around no circle"):
            circles_of_drawing(no_circle)
