"""Training data of personalisation: augmented views of photos, encoded once, with their prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from common.checkpoint import cached_tensors
from common.images import resize, to_model_range
from common.latent.model import LatentDiffusion
from common.metrics.segmentation import object_mask
from common.training import Batch

Augmentation = Literal["none", "flip", "resize", "shrink"]
SCALES = (0.4, 1.4)  # range of a resized photo's side, relative to the view's
# Prompts of photos scaled below FAR start with FAR_WORDS, of those scaled above CLOSE with
# CLOSE_WORDS.
FAR, CLOSE = 0.6, 1.0
FAR_WORDS, CLOSE_WORDS = ("far away ", "very small "), ("zoomed in ", "close up ")
CHUNK = 16  # views encoded at once


class View(NamedTuple):
    """An augmented photo, its mask, what it shows where, and the prefixes of its prompts."""

    image: Tensor
    """float32 [3, S, S] in [-1, 1]; 0 outside the photo."""
    mask: Tensor
    """float32 [S, S]: 1 where the loss counts."""
    words: tuple[str, ...] = ("",)
    """Prefixes of a prompt that describe the scale of the view, or "" for none."""
    regions: Tensor | None = None
    """How much of each pixel each concept covers, [R, S, S] in [0, 1]; None if that is unknown."""


def with_region(photo: Tensor, *, of_background: bool = False) -> Tensor:
    """The photo, uint8 [3, H, W], with its concept's region as a fourth channel, 0 to 255.

    The region is the object (`common.metrics.segmentation.object_mask`) with its holes, which are a
    part of its form, or the background. The object is found by its colour, so the background must
    be plain; without an object the region is empty.
    """
    square = central_square(photo)
    mask = object_mask(square)
    if of_background:
        mask = ~mask if mask.any() else mask
    else:
        mask = torch.from_numpy(ndimage.binary_fill_holes(mask.numpy()))
    region = resize(mask[None].to(torch.uint8) * 255, square.shape[-1], "area")
    return torch.cat([square, region])


def make_views(
    photo: Tensor, side: int, augmentation: Augmentation, count: int, random: torch.Generator
) -> list[View]:
    """Returns the views [3, side, side] of a photo, uint8 [3, H, W], cut to its central square.

    A fourth channel is the region of the photo's concept, see `with_region`, and becomes that of
    the views. No augmentation changes colours.

    - "none": the photo.
    - "flip": the photo and its mirror image, as in textual inversion (the authors' code for
      arXiv:2208.01618).
    - "resize": `count` random views, as in Custom Diffusion (arXiv:2212.04488, Section 4): mirrored
      or not, at 0.4 to 1.4 times the view's side, at a random place. The prompt says if the photo
      is much smaller, or larger, than the view; the loss counts only inside the photo.
    - "shrink": `count` random views, mirrored or not. Every second one is the whole photo, the
      others are 0.4 to 1 times as large, at a random place; the photo's border is repeated around
      them, and the loss counts there too. This is for photos with a plain background, and for base
      models that know no words for the scale.
    """
    photo = central_square(photo)
    if augmentation == "none":
        return [_whole(photo, side)]
    if augmentation == "flip":
        return [_whole(photo, side), _whole(photo.flip(-1), side)]
    if augmentation == "shrink":
        return [
            _shrunk(photo, side, 1.0 if i % 2 == 0 else SCALES[0], random) for i in range(count)
        ]
    return [_resized(photo, side, random) for _ in range(count)]


def cut_mix_views(
    left: Tensor, right: Tensor, side: int, count: int, random: torch.Generator
) -> list[View]:
    """Returns `count` views of two photos side by side, uint8 [3, H, W] each (cut-mix).

    Section 3.3 of SVDiff (arXiv:2303.11305). Each photo is cut to its central square, resized to
    half the view's side and placed in its half of the view, mirrored or not, at a random height;
    its top and bottom rows are repeated up to the border. The loss counts only inside the photos.
    """
    return [
        _side_by_side([central_square(left), central_square(right)], side, random)
        for _ in range(count)
    ]


def _side_by_side(photos: Sequence[Tensor], side: int, random: torch.Generator) -> View:
    half = side // 2
    images, masks, regions = [], [], []
    for k, photo in enumerate(photos):
        mirrored, place = torch.rand(2, generator=random).tolist()
        above = round(place * (side - half))
        margins = (0, 0, above, side - half - above)
        view = _whole(photo.flip(-1) if mirrored < 0.5 else photo, half)
        images.append(F.pad(view.image[None], margins, mode="replicate")[0])
        masks.append(F.pad(view.mask, margins))
        if view.regions is not None:
            regions.append(F.pad(view.regions, (k * half, side - (k + 1) * half, *margins[2:])))
    return View(
        torch.cat(images, 2),
        torch.cat(masks, 1),
        regions=torch.cat(regions) if len(regions) == len(photos) else None,
    )


def central_square(photo: Tensor) -> Tensor:
    """Returns the central square of a photo, [C, H, W]."""
    height, width = photo.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return photo[:, top : top + side, left : left + side]


def _whole(photo: Tensor, side: int) -> View:
    photo = resize(photo, side)
    regions = photo[3:].float() / 255.0 if len(photo) > 3 else None
    return View(to_model_range(photo[:3]), torch.ones(side, side), regions=regions)


def _resized(photo: Tensor, side: int, random: torch.Generator) -> View:
    low, high = SCALES
    mirrored, place, amount = torch.rand(3, generator=random).tolist()
    across = float(torch.rand((), generator=random))
    scale = low + (high - low) * amount
    own = max(round(scale * side), 1)
    view = _whole(photo.flip(-1) if mirrored < 0.5 else photo, own)
    top, left = round(place * abs(own - side)), round(across * abs(own - side))
    if own >= side:
        inside = (..., slice(top, top + side), slice(left, left + side))
        words = CLOSE_WORDS if scale > CLOSE else ("",)
        return _mapped(view, lambda pixels: pixels[inside])._replace(words=words)
    margins = (left, side - own - left, top, side - own - top)
    words = FAR_WORDS if scale < FAR else ("",)
    return _mapped(view, lambda pixels: F.pad(pixels, margins))._replace(words=words)


def _shrunk(photo: Tensor, side: int, smallest: float, random: torch.Generator) -> View:
    mirrored, amount, place, across = torch.rand(4, generator=random).tolist()
    own = max(round((smallest + (1.0 - smallest) * amount) * side), 1)
    top, left = round(place * (side - own)), round(across * (side - own))
    margins = (left, side - own - left, top, side - own - top)
    view = _whole(photo.flip(-1) if mirrored < 0.5 else photo, own)
    return _mapped(view, lambda pixels: F.pad(pixels[None], margins, mode="replicate")[0])


def _mapped(view: View, change: Callable[[Tensor], Tensor]) -> View:
    """The view with its image, mask and regions, [C, S, S] each, changed alike."""
    regions = None if view.regions is None else change(view.regions)
    return View(change(view.image), change(view.mask[None])[0], view.words, regions)


# ----------------------------------------------------------------------------
# Latents, and batches of them.


class Encoded(NamedTuple):
    """The latents of M views and their loss weights, on the CPU."""

    latents: Tensor
    """float16 [M, C, h, w]: posterior means, normalised."""
    weights: Tensor
    """Loss weights, float16 [M, 1, h, w], of mean 1 over an image: 0 for latents that are not
    wholly inside the photo, and larger on objects if so asked for."""
    regions: Tensor
    """How much of each latent each concept covers, float16 [M, K, h, w]; 0 where unknown."""


def encode_views(
    model: LatentDiffusion,
    views: Sequence[View],
    path: Path,
    made_from: dict[str, Any],
    *,
    shown: Sequence[Sequence[int]] | None = None,
    things: Sequence[bool] = (),
    object_weight: float = 1.0,
) -> Encoded:
    """Encodes the views by the frozen autoencoder, or reads them from the file `path`.

    `shown` holds the concept of each region of each view, and `things` tells which concepts are
    things; latents that these cover weigh `object_weight` times as much as others in the loss. The
    first call writes the file. Raises InputError if it was made from other data than `made_from`
    describes.
    """
    shown = shown or [()] * len(views)

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {"latents": [], "weights": [], "regions": []}
        for start in range(0, len(views), CHUNK):
            part = views[start : start + CHUNK]
            images = torch.stack([view.image for view in part]).to(model.unet.device)
            masks = torch.stack([view.mask for view in part])
            regions = torch.stack(
                [
                    _by_concept(view, concepts, len(things))
                    for view, concepts in zip(part, shown[start : start + CHUNK], strict=True)
                ]
            )
            covered = F.avg_pool2d(regions, model.downscale)
            objects = covered[:, list(things)].sum(1, keepdim=True).clamp(max=1.0)
            parts["latents"].append(model.encode(images).half().cpu())
            parts["weights"].append(
                _latent_weights(masks, model.downscale, 1.0 + (object_weight - 1.0) * objects)
            )
            parts["regions"].append(covered.half())
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    return Encoded(**cached_tensors(path, made_from, make))


def _by_concept(view: View, concepts: Sequence[int], count: int) -> Tensor:
    """The region of each of `count` concepts, [count, S, S]; 0 for those that a view lacks."""
    regions = torch.zeros(count, *view.mask.shape)
    if view.regions is not None:
        for k, region in zip(concepts, view.regions, strict=True):
            regions[k] = region
    return regions


def _latent_weights(masks: Tensor, downscale: int, weights: Tensor | float = 1.0) -> Tensor:
    """Returns the loss weights float16 [N, 1, h, w] of views with the masks [N, S, S].

    They are `weights` [N, 1, h, w], scaled to a mean of 1 over an image. Only latents whose pixels
    are all inside the photo count or, if there are none, all latents.
    """
    inside = (F.avg_pool2d(masks[:, None], downscale) == 1.0).float()
    inside = torch.where(
        inside.flatten(1).any(1).view(-1, 1, 1, 1), inside, torch.ones_like(inside)
    )
    weights = inside * weights
    return (weights / weights.mean((1, 2, 3), keepdim=True)).half()


@dataclasses.dataclass(frozen=True)
class Pool:
    """The training data: N views of concepts and regularisation images, with P prompts."""

    encoded: Encoded
    """Latents and loss weights of the N views."""
    group: Tensor
    """long [N]: index of the concept or cut-mix pair; -1 for a regularisation image."""
    ids: Tensor
    """long [P, L]: token ids of the prompts."""
    first: Tensor
    """long [N]: row of a view's first prompt in `ids`."""
    count: Tensor
    """long [N]: number of a view's prompts, which are consecutive rows of `ids`."""

    @classmethod
    def make(
        cls,
        model: LatentDiffusion,
        encoded: Encoded,
        groups: Sequence[int],
        prompts: Sequence[Sequence[str]],
    ) -> "Pool":
        """Makes the pool from each view's group and its prompts with expanded placeholders."""
        sets = {texts: None for texts in map(tuple, prompts)}
        starts, rows = {}, []
        for texts in sets:
            starts[texts] = len(rows)
            rows += texts
        first = torch.tensor([starts[tuple(texts)] for texts in prompts])
        count = torch.tensor([len(texts) for texts in prompts])
        return cls(encoded, torch.tensor(list(groups)), model.tokenize(rows), first, count)

    def draw(self, size: int, random: torch.Generator) -> Batch:
        """Draws a batch of `size` rows: "index", "latent", "weight", "regions" and "ids".

        Concepts are drawn with equal probability, whatever their numbers of photos. Every second
        row is a regularisation image, if there are any.
        """
        concepts = [torch.nonzero(self.group == k)[:, 0] for k in range(int(self.group.max()) + 1)]
        regularization = torch.nonzero(self.group < 0)[:, 0]
        # A random start, so that batches of one row alternate at random between the two kinds.
        first = int(torch.randint(2, (), generator=random))
        rows = []
        for i in range(first, first + size):
            which = int(torch.randint(len(concepts), (), generator=random))
            members = regularization if len(regularization) and i % 2 else concepts[which]
            rows.append(members[torch.randint(len(members), (), generator=random)])
        index = torch.stack(rows)
        prompt = self.first[index] + (torch.rand(size, generator=random) * self.count[index]).long()
        return {
            "index": index,
            "latent": self.encoded.latents[index],
            "weight": self.encoded.weights[index],
            "regions": self.encoded.regions[index],
            "ids": self.ids[prompt],
        }
