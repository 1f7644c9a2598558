"""Training data of personalisation: augmented views of photos, encoded once, with their prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.checkpoint import cached_tensors
from common.images import resize, to_model_range
from common.latent.model import LatentDiffusion
from common.training import Batch

Augmentation = Literal["none", "flip", "resize"]
SCALES = (0.4, 1.4)  # range of a resized photo's side, relative to the view's
# Prompts of photos scaled below FAR start with FAR_WORDS, of those scaled above CLOSE with
# CLOSE_WORDS.
FAR, CLOSE = 0.6, 1.0
FAR_WORDS, CLOSE_WORDS = ("far away ", "very small "), ("zoomed in ", "close up ")
CHUNK = 16  # views encoded at once


class View(NamedTuple):
    """An augmented photo, its mask and the prefixes of its prompts."""

    image: Tensor
    """float32 [3, S, S] in [-1, 1]; 0 outside the photo."""
    mask: Tensor
    """float32 [S, S]: 1 where the photo is."""
    words: tuple[str, ...] = ("",)
    """Prefixes of a prompt that describe the scale of the view, or "" for none."""


def make_views(
    photo: Tensor, side: int, augmentation: Augmentation, count: int, random: torch.Generator
) -> list[View]:
    """Returns the views [3, side, side] of a photo, uint8 [3, H, W], cut to its central square.

    No augmentation changes colours.

    - "none": the photo.
    - "flip": the photo and its mirror image, as in textual inversion (the authors' code for
      arXiv:2208.01618).
    - "resize": `count` random views, as in Custom Diffusion (arXiv:2212.04488, Section 4): mirrored
      or not, at 0.4 to 1.4 times the view's side, at a random place. The prompt says if the photo
      is much smaller, or larger, than the view; the loss counts only inside the photo.
    """
    photo = _square(photo)
    if augmentation == "none":
        return [_whole(photo, side)]
    if augmentation == "flip":
        return [_whole(photo, side), _whole(photo.flip(-1), side)]
    return [_resized(photo, side, random) for _ in range(count)]


def cut_mix_views(
    left: Tensor, right: Tensor, side: int, count: int, random: torch.Generator
) -> list[View]:
    """Returns `count` views of two photos side by side, uint8 [3, H, W] each (cut-mix).

    Section 3.3 of SVDiff (arXiv:2303.11305). Each photo is cut to its central square, resized to
    half the view's side and placed in its half of the view, mirrored or not, at a random height;
    its top and bottom rows are repeated up to the border. The loss counts only inside the photos.
    """
    return [_side_by_side([_square(left), _square(right)], side, random) for _ in range(count)]


def _side_by_side(photos: Sequence[Tensor], side: int, random: torch.Generator) -> View:
    half = side // 2
    images, masks = [], []
    for photo in photos:
        mirrored, place = torch.rand(2, generator=random).tolist()
        above = round(place * (side - half))
        margins = (0, 0, above, side - half - above)
        image = _whole(photo.flip(-1) if mirrored < 0.5 else photo, half).image
        images.append(F.pad(image[None], margins, mode="replicate")[0])
        masks.append(F.pad(torch.ones(half, half), margins))
    return View(torch.cat(images, 2), torch.cat(masks, 1))


def _square(photo: Tensor) -> Tensor:
    height, width = photo.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return photo[:, top : top + side, left : left + side]


def _whole(photo: Tensor, side: int) -> View:
    return View(to_model_range(resize(photo, side)), torch.ones(side, side))


def _resized(photo: Tensor, side: int, random: torch.Generator) -> View:
    low, high = SCALES
    mirrored, place, amount = torch.rand(3, generator=random).tolist()
    across = float(torch.rand((), generator=random))
    scale = low + (high - low) * amount
    own = max(round(scale * side), 1)
    image = _whole(photo.flip(-1) if mirrored < 0.5 else photo, own).image
    top, left = round(place * abs(own - side)), round(across * abs(own - side))
    if own >= side:
        cut = image[:, top : top + side, left : left + side]
        return View(cut, torch.ones(side, side), CLOSE_WORDS if scale > CLOSE else ("",))
    canvas, mask = torch.zeros(3, side, side), torch.zeros(side, side)
    canvas[:, top : top + own, left : left + own] = image
    mask[top : top + own, left : left + own] = 1.0
    return View(canvas, mask, FAR_WORDS if scale < FAR else ("",))


# ----------------------------------------------------------------------------
# Latents, and batches of them.


class Encoded(NamedTuple):
    """The latents of M views and their loss weights, on the CPU."""

    latents: Tensor
    """float16 [M, C, h, w]: posterior means, normalised."""
    weights: Tensor
    """Loss weights, float16 [M, 1, h, w]: 0 for latents that are not wholly inside the photo, equal
    for the others, with mean 1."""


def encode_views(
    model: LatentDiffusion, views: Sequence[View], path: Path, made_from: dict[str, Any]
) -> Encoded:
    """Encodes the views by the frozen autoencoder, or reads them from the file `path`.

    The first call writes the file. Raises InputError if it was made from other data than
    `made_from` describes.
    """

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        latents, weights = [], []
        for start in range(0, len(views), CHUNK):
            part = views[start : start + CHUNK]
            latents.append(
                model.encode(torch.stack([view.image for view in part]).to(model.unet.device))
                .half()
                .cpu()
            )
            weights.append(
                _latent_weights(torch.stack([view.mask for view in part]), model.downscale)
            )
        return {"latents": torch.cat(latents), "weights": torch.cat(weights)}

    return Encoded(**cached_tensors(path, made_from, make))


def _latent_weights(masks: Tensor, downscale: int) -> Tensor:
    """Returns the loss weights float16 [N, 1, h, w] of views with the masks [N, S, S].

    Only latents whose pixels are all inside the photo count or, if there are none, all latents.
    """
    inside = (F.avg_pool2d(masks[:, None], downscale) == 1.0).float()
    inside = torch.where(
        inside.flatten(1).any(1).view(-1, 1, 1, 1), inside, torch.ones_like(inside)
    )
    return (inside / inside.mean((1, 2, 3), keepdim=True)).half()


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
        """Draws a batch of `size` rows: "index", "latent", "weight" and "ids".

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
        latent, weight = self.encoded.latents[index], self.encoded.weights[index]
        return {"index": index, "latent": latent, "weight": weight, "ids": self.ids[prompt]}
