"""Collages: objects cut out of photos, placed beside each other on another background.

Cut-mix (SVDiff, arXiv:2303.11305) puts whole photos side by side. A collage also shows one concept
on the background that another one learned, and objects at any size on any background, also beside
drawn shapes that the model knows. Objects are found by their colour, so the photos must have plain
backgrounds.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from common.colour import CSS_COLOURS
from common.data.concepts import Rgb
from common.data.examples import SMALLEST
from common.data.shapes import Shape, draw_scene, render_coverage
from common.images import resize, to_model_range
from common.metrics.segmentation import SIZE, inner_region, median_colour, object_mask
from p3_clip.personalisation.photos import View, central_square

RIM = 10  # pixels at SIZE along an object's edge, whose colours are mixed with the background's


class CutOut(NamedTuple):
    """An object cut out of a photo, in the square around its circumscribed circle."""

    image: Tensor
    """float32 [3, s, s] in 0..255; in the object's rim and outside it, the nearest colours of its
    interior."""
    mask: Tensor
    """float32 [s, s]: 1 on the object."""
    region: Tensor
    """float32 [s, s]: 1 on the object and in its holes."""
    colour: Rgb
    """Its median colour."""


def cut_out(photo: Tensor) -> CutOut | None:
    """Returns the object in the central square of a photo, uint8 [3, H, W]; None without one."""
    photo = resize(central_square(photo), SIZE)
    found = object_mask(photo)
    if not found.any():
        return None
    mask = found.numpy()
    inner = ndimage.binary_erosion(mask, iterations=RIM, border_value=1)
    inner = inner if inner.any() else mask
    nearest = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    image = photo[:, nearest[0], nearest[1]].float()
    rows, columns = np.nonzero(mask)
    y, x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    radius = int(np.ceil(np.hypot(rows + 0.5 - y, columns + 0.5 - x).max()))
    top, left, side = round(y) - radius, round(x) - radius, 2 * radius
    margins = (-left, left + side - SIZE, -top, top + side - SIZE)
    colour = median_colour(photo, inner_region(found))
    return CutOut(
        F.pad(image, margins),
        F.pad(found.float(), margins),
        F.pad(torch.from_numpy(ndimage.binary_fill_holes(mask)).float(), margins),
        tuple(round(channel) for channel in colour),
    )


def known_shape(shape: Shape) -> CutOut:
    """Returns a shape as if it were cut out of a photo; its place and radius are not used."""
    whole = dataclasses.replace(shape, x=0.5, y=0.5, radius=0.5)
    mask = render_coverage(whole, SIZE).float() / 255.0
    colour = CSS_COLOURS[shape.colour]
    image = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(3, SIZE, SIZE)
    return CutOut(image, mask, mask, colour)


def background_colour(photo: Tensor) -> Rgb:
    """Returns the median colour around the object in a photo, uint8 [3, H, W]."""
    photo = resize(central_square(photo), SIZE)
    colour = median_colour(photo, inner_region(~object_mask(photo)))
    return tuple(round(channel) for channel in colour)


def collage_view(
    things: Sequence[CutOut], background: Rgb, side: int, random: np.random.Generator
) -> View:
    """Returns a view [3, side, side] of objects from left to right on a background.

    Their places and sizes are those of the shapes that the small model was trained on
    (`common.data.shapes.draw_scene`); each is mirrored or not. The view's regions are those of the
    objects with their holes, then that of the background, in holes too.
    """
    scene = draw_scene(
        random,
        count=len(things),
        kinds=("circle",),
        cut_off=False,
        smallest=SMALLEST,
        left_to_right=True,
    )
    fine = max(side, SIZE)
    canvas = torch.tensor(background, dtype=torch.float32).view(3, 1, 1).expand(3, fine, fine)
    regions, ground = [], torch.ones(fine, fine)
    for thing, place in zip(things, scene.shapes, strict=True):
        layers = torch.cat([thing.image, thing.mask[None], thing.region[None]])
        own = max(round(2.0 * place.radius * fine), 1)
        layers = resize(layers.flip(-1) if random.random() < 0.5 else layers, own, "bilinear")
        left, top = (round((at - place.radius) * fine) for at in (place.x, place.y))
        layers = F.pad(layers, (left, fine - own - left, top, fine - own - top))
        regions.append(layers[4])
        ground = ground * (1.0 - layers[3])
        canvas = canvas * (1.0 - layers[3]) + layers[:3] * layers[3]
    regions.append(ground)
    image = resize(canvas, side, "area")
    return View(
        to_model_range(image.round().to(torch.uint8)),
        torch.ones(side, side),
        regions=resize(torch.stack(regions), side, "area"),
    )
