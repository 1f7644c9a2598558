"""Labelled grids of images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from common.images import to_pil

MARGIN = 6
GAP = 2
TEXT_SIZE = 13


def labelled_grid(
    images: Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    scale: int = 1,
) -> Tensor:
    """A grid of images on white with labels at the left and on top, uint8 [3, H', W'].

    `images` is uint8 [N, 3, H, W], placed row by row. `scale` enlarges each image by repeating
    pixels. A row label may have several lines. Raises ValueError if the number of labels does not
    fit the grid.
    """
    rows = -(-len(images) // columns)
    if row_labels and len(row_labels) != rows or column_labels and len(column_labels) != columns:
        raise ValueError(
            f"{len(row_labels)} row and {len(column_labels)} column labels for a grid of"
            f" {rows}x{columns}"
        )
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = images.shape[-2:]
    font = ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + 5

    widths = [int(font.getlength(part)) for label in row_labels for part in label.split("\n")]
    left = MARGIN + (max(widths) + MARGIN if widths else 0)
    top = MARGIN + (line if title else 0) + (line if column_labels else 0)
    canvas_width = left + columns * (width + GAP) - GAP + MARGIN
    if title:
        canvas_width = max(canvas_width, int(font.getlength(title)) + 2 * MARGIN)
    canvas = Image.new("RGB", (canvas_width, top + rows * (height + GAP) - GAP + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((MARGIN, MARGIN - 2), title, fill="black", font=font)
    for c, label in enumerate(column_labels):
        pen.text(
            (left + c * (width + GAP) + width / 2, top - line),
            label,
            fill="black",
            font=font,
            anchor="ma",
        )
    for r, label in enumerate(row_labels):
        at = (left - MARGIN, top + r * (height + GAP) + height / 2)
        pen.text(at, label, fill="black", font=font, anchor="rm", align="right")
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        canvas.paste(to_pil(image), (left + c * (width + GAP), top + r * (height + GAP)))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def side_by_side(figures: Sequence[Tensor]) -> Tensor:
    """Figures uint8 [3, H, W] of any sizes beside each other on white, their upper edges level."""
    height = max(figure.shape[1] for figure in figures)
    return torch.cat(
        [pad(figure, (0, 0, 0, height - figure.shape[1]), value=255) for figure in figures], 2
    )
