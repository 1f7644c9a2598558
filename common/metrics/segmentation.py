"""Segmentation of pictures of flat shapes by colour: objects, their colours, the central region."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from skimage.color import deltaE_ciede2000
from torch import Tensor
from torch.nn import functional as F

from common.colour import CSS_COLOURS, colour_difference, nearest_name, to_lab
from common.errors import InputError
from common.images import resize

SIZE = 512
BLOCK = 4
FLAT = 0.25  # fraction of the largest contrast up to which a block counts as flat (not on an edge)
REACH = 6  # blocks over which an edge may be blurred
DISTINCT = 0.5  # CIEDE2000; fill50k's closest pair, chartreuse on lawn green, differs by 0.65
SEPARATION = 5.0  # a ratio; splitting a smooth gradient or noise in two gives 4
ITERATIONS = 20  # of k-means
SAMPLE = 1000  # blocks from which the initial centres of k-means are chosen
MARGIN = 4  # pixels at the model's own resolution
NO_OBJECT_ERROR = 50.0  # CIEDE2000
Segmenter = Callable[[Tensor], Tensor]
"""uint8 [3, 512, 512] -> the region at the picture's centre, bool [512, 512]."""


def segment(image: Tensor, colours: int = 1) -> Tensor:
    """Labels of pixels, long [512, 512]: 0 for the background, from 1 on for the objects' colours.

    `image` is uint8 [3, H, W] and is first resized to 512x512; `colours` is the number of colours
    that objects have. The steps are

    - Flat blocks: mean colours of blocks of 4x4 pixels, in CIELAB, without the blocks on edges.
    - Clusters: k-means into `colours` + 1 groups. The first centre is the border's median colour;
      each further one is the block that minimises the sum of squared distances to the nearest
      centre.
    - Background: the group most frequent on the border, and every group that is not distinct from
      it. Two groups are distinct if their centres differ by at least DISTINCT in CIEDE2000 and by
      at least SEPARATION times the spread within the groups along the line between the centres.
      Noise and gradients split into groups that are not distinct, so a picture without an object is
      0 everywhere.
    - Edges: pixels on an edge get the nearest of the colours found within REACH blocks.
    """
    pixels = _resized(image)  # [512, 512, 3]
    blocks = _blocks(pixels)
    lab = to_lab(blocks)
    flat = _flat(lab)
    centres, members = _cluster(lab, flat, colours + 1)
    nearest = _nearest(lab.reshape(-1, 3), centres).reshape(flat.shape)
    border = np.concatenate([edge[[0, -1]].ravel() for edge in (nearest, nearest.T)])
    background = int(np.bincount(border, minlength=len(centres)).argmax())
    ground = _ground(background, centres, members)
    objects = [c for c in range(len(centres)) if c not in ground]
    if not objects:
        return torch.zeros(SIZE, SIZE, dtype=torch.long)
    groups = [background, *objects]
    # Flat blocks of groups that are not distinct from the background belong to the background.
    renamed = np.array([groups.index(c) if c in groups else 0 for c in range(len(centres))])
    return torch.from_numpy(_to_pixels(pixels, lab, renamed[nearest], flat, centres[groups]))


def object_mask(image: Tensor, colours: int = 1) -> Tensor:
    """The pixels of all objects, bool [512, 512]; all False if there is no object (see `segment`).

    Holes in objects are not filled.
    """
    return segment(image, colours) > 0


def separate(mask: Tensor, min_area: float = 0.001) -> list[Tensor]:
    """Connected components of a mask [H, W] that cover at least `min_area` of it, largest first.

    `min_area` is a fraction of all pixels; the components are bool [H, W].
    """
    parts, count = ndimage.label(mask.numpy())
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= min_area * mask.numel()]
    return [torch.from_numpy(parts == i + 1) for i in order]


def centre_mask(image: Tensor) -> Tensor:
    """The connected region of one colour at the picture's centre, bool [512, 512].

    The picture is segmented into two colours. The 2025 grader asks SAM2 for this region; on two
    flat colours they agree. The region is the background if no object covers the centre, and the
    whole picture if there is no object.
    """
    mask = object_mask(image)
    parts, _ = ndimage.label((mask == mask[SIZE // 2, SIZE // 2]).numpy())
    return torch.from_numpy(parts == parts[SIZE // 2, SIZE // 2])


def load_sam2(folder: Path, device: torch.device | str = "cpu") -> Segmenter:
    """`centre_mask` computed by SAM2, loaded from a transformers folder with its weights.

    An example is facebook/sam2.1-hiera-large. SAM2 proposes several masks for one click at the
    centre; the one with the highest predicted IoU is taken. Raises InputError if the folder holds
    no SAM2.
    """
    from transformers import Sam2Model, Sam2Processor  # a slow import that only this function needs

    try:
        processor = Sam2Processor.from_pretrained(folder, local_files_only=True)
        network, loaded = Sam2Model.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} does not hold SAM2 in transformers' form ({error})") from None
    if absent := sorted(loaded["missing_keys"]):  # transformers fills them with random numbers
        raise InputError(f"the weights in {folder} lack {len(absent)} tensors, such as {absent[0]}")
    network = network.eval().to(device)

    @torch.no_grad()
    def centre_mask_by_sam2(image: Tensor) -> Tensor:
        click = {"input_points": [[[[SIZE // 2, SIZE // 2]]]], "input_labels": [[[1]]]}
        inputs = processor(
            images=_resized(image).round().astype(np.uint8), **click, return_tensors="pt"
        ).to(device)
        output = network(**inputs)
        masks = processor.post_process_masks(
            output.pred_masks.cpu(), inputs["original_sizes"].cpu()
        )[0]
        return masks[0, output.iou_scores[0, 0].argmax()].bool()

    return centre_mask_by_sam2


def iou(mask: Tensor, other: Tensor) -> float:
    """Intersection over union of two bool masks of one shape, in [0, 1]; 0 if both are empty.

    Two empty masks score 0 because a picture without an object is a failure.
    """
    union = (mask | other).sum().item()
    return (mask & other).sum().item() / union if union else 0.0


# ----------------------------------------------------------------------------
# Colours of regions.


class ColourScore(NamedTuple):
    """How far a region's colour is from the named one, and which name is nearest to it."""

    error: float
    """CIEDE2000; 50 (NO_OBJECT_ERROR) for a missing region."""
    nearest: str | None
    """The nearest CSS name (of names for one colour, one is kept); None for a missing region."""
    right: bool
    """Whether `nearest` is the requested name."""


def inner_region(region: Tensor, resolution: int = SIZE) -> Tensor:
    """The pixels of a region, bool [512, 512], at least MARGIN model pixels away from its edge.

    A model pixel is a pixel at `resolution`, the model's own. The picture's border does not count
    as an edge. If no pixel is that far from the edge, the pixels at least half as far as the
    farthest are taken. Distances are measured on blocks of 2x2 pixels and rounded down.
    """
    halved = F.max_pool2d((~region)[None].float(), 2)[0] == 0
    if halved.all():
        return region
    depth = 2.0 * ndimage.distance_transform_edt(halved.numpy()) - 2.0 * np.sqrt(2.0)
    deep = depth >= min(MARGIN * SIZE / resolution, depth.max() / 2.0)
    return torch.from_numpy(deep & halved.numpy()).repeat_interleave(2, 0).repeat_interleave(2, 1)


def median_colour(image: Tensor, region: Tensor) -> tuple[float, float, float] | None:
    """The median of each channel over a region, in 0..255; None for an empty region.

    `image` is uint8 [3, H, W], `region` bool [H, W].
    """
    if not region.any():
        return None
    red, green, blue = np.median(image[:, region].numpy(), axis=1).tolist()
    return red, green, blue


def judge_colour(rgb: tuple[float, float, float] | None, name: str) -> ColourScore:
    """Compares a measured colour with the CSS colour `name`.

    `rgb` is (red, green, blue) in 0..255; None stands for a missing region.
    """
    if rgb is None:
        return ColourScore(NO_OBJECT_ERROR, None, False)
    nearest = nearest_name(rgb)
    return ColourScore(float(colour_difference(rgb, CSS_COLOURS[name])), nearest, nearest == name)


# ----------------------------------------------------------------------------
# The parts of `segment`.


def _resized(image: Tensor) -> NDArray[np.float32]:
    return resize(image.float(), SIZE, "bilinear").permute(1, 2, 0).contiguous().numpy()


def _blocks(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median-filtered mean colours of blocks, [128, 128, 3].

    The 3x3 median filter reduces noise and leaves edges where they are.
    """
    means = F.avg_pool2d(torch.from_numpy(pixels).permute(2, 0, 1), BLOCK).numpy()
    return np.stack([ndimage.median_filter(channel, 3) for channel in means], axis=-1)


def _flat(lab: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The blocks whose neighbourhood has little contrast, bool [128, 128]; at least half of all."""
    contrast = np.linalg.norm(
        [
            ndimage.maximum_filter(lab[..., i], 3) - ndimage.minimum_filter(lab[..., i], 3)
            for i in range(3)
        ],
        axis=0,
    )
    return contrast <= max(FLAT * contrast.max(), float(np.median(contrast)))


def _cluster(
    lab: NDArray[np.float64], flat: NDArray[np.bool_], count: int
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Centres [K, 3] of up to `count` groups of flat blocks, and the colours [N_k, 3] in each."""
    rows = lab[flat]
    some = rows[:: len(rows) // SAMPLE | 1]
    squared = cdist(some, some, "sqeuclidean")
    centres = [
        np.median(
            np.concatenate([lab[[0, -1]].reshape(-1, 3), lab[:, [0, -1]].reshape(-1, 3)]), axis=0
        )
    ]
    left = cdist(centres, some, "sqeuclidean")[0]
    while len(centres) < count:
        # The farthest colour is a bad choice: the blurred edge of a strong colour may be farther
        # away than a faint object.
        best = np.minimum(left, squared).sum(1).argmin()
        centres.append(some[best])
        left = np.minimum(left, squared[best])
    with warnings.catch_warnings():
        # There may be fewer colours than groups; empty groups are dropped below.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        found, labels = kmeans2(rows, np.array(centres), iter=ITERATIONS, minit="matrix")
    members = [rows[labels == c] for c in range(count)]
    kept = [c for c in range(count) if len(members[c])]
    return found[kept], [members[c] for c in kept]


def _nearest(rows: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index [N] of the centre [K, 3] nearest to each row [N, 3]."""
    return np.stack([((rows - centre) ** 2).sum(1) for centre in centres]).argmin(0)


def _ground(
    background: int, centres: NDArray[np.float64], members: Sequence[NDArray[np.float64]]
) -> set[int]:
    """The groups that are not distinct from the background, or from another group of this set.

    Noise and gradients split into many such groups.
    """
    ground, rest = {background}, set(range(len(centres))) - {background}
    while more := {
        c for c in rest if not all(_distinct(c, other, centres, members) for other in ground)
    }:
        ground, rest = ground | more, rest - more
    return ground


def _distinct(
    c: int, other: int, centres: NDArray[np.float64], members: Sequence[NDArray[np.float64]]
) -> bool:
    """Whether groups `c` and `other` are distinct in CIEDE2000 and relative to their spread.

    Only the spread along the line between the centres counts: spread across it, such as noise in
    the other channels, does not make two groups less distinct.
    """
    line = centres[c] - centres[other]
    # `spread` and the squared distance below both contain the line's length, which may be 0.
    spread = max(float(np.median(np.abs((members[k] - centres[k]) @ line))) for k in (c, other))
    return (
        float(deltaE_ciede2000(centres[c], centres[other])) >= DISTINCT
        and float(line @ line) >= SEPARATION * spread
    )


def _to_pixels(
    pixels: NDArray[np.float32],
    lab: NDArray[np.float64],
    labels: NDArray[np.int64],
    flat: NDArray[np.bool_],
    centres: NDArray[np.float64],
) -> NDArray[np.int64]:
    """The labels of blocks [128, 128] refined to pixels [512, 512].

    Inside a region pixels take their block's label; where blocks of several labels meet, each pixel
    is labelled by its own colour.
    """
    # A blurred edge between two colours passes through other colours, so a pixel may only get a
    # colour that was found nearby.
    near = np.stack(
        [ndimage.maximum_filter(flat & (labels == c), 2 * REACH + 1) for c in range(len(centres))]
    )
    near |= ~near.any(0)
    distance = ((lab - centres[:, None, None]) ** 2).sum(-1)
    labels = np.where(near, distance, np.inf).argmin(0)
    mixed = ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3)
    result = labels.repeat(BLOCK, 0).repeat(BLOCK, 1)
    y, x = np.nonzero(mixed.repeat(BLOCK, 0).repeat(BLOCK, 1))
    own = to_lab(pixels[y, x])
    distance = np.stack([((own - centre) ** 2).sum(1) for centre in centres])
    result[y, x] = np.where(near[:, y // BLOCK, x // BLOCK], distance, np.inf).argmin(0)
    result[y, x] = _voted(result, y, x, len(centres))
    return result


def _voted(
    labels: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """The most frequent label [N] among the 3x3 pixels around each place.

    The vote reduces noise and leaves straight edges where they are.
    """
    votes = np.zeros((count, len(y)), dtype=np.int64)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            votes[
                labels[(y + dy).clip(0, SIZE - 1), (x + dx).clip(0, SIZE - 1)], np.arange(len(y))
            ] += 1
    return votes.argmax(0)
