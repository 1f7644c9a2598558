"""Makes the figures of the zero-shot report, from a folder written by `p3_clip.inference`.

    python3 -m p3_clip.study.figures --run OUT --images hw2_data/clip_zeroshot/val \
        --output-dir results/figures/p3_clip

examples.png shows five correct and five wrong predictions, confusion.png the confusion matrix,
reliability.png the reliability diagrams.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common import cli
from common.config import Seed
from common.errors import InputError
from common.files import make_folder
from common.images import read_rgb, to_pil, write_png
from p3_clip.evaluate import calibration, confusion_matrix, halves, reliability
from p3_clip.inference import Run

EACH = 5  # examples in a row
SIDE = 128  # of an example, in pixels
COLUMN = 224  # width in pixels


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the figures of a zero-shot run: examples, confusion matrix, reliability diagrams."""

    run: Path
    """Folder written by p3_clip.inference."""
    images: Path
    """Folder of the images that it classified."""
    output_dir: Path
    """Folder for the figures."""
    prompts: Literal["single", "ensemble"] = "single"
    """Show the single prompt or the ensemble."""
    seed: Seed = 0
    """Seed of the choice of examples."""


def main(config: Config) -> None:
    """Writes the three figures."""
    run = Run.load(config.run)
    picture = examples(run, config.images, config.prompts, config.seed)
    folder = make_folder(config.output_dir)
    write_png(folder / "examples.png", picture)
    plot_confusion(run, config.prompts, folder / "confusion.png")
    plot_reliability(run, config.prompts, folder / "reliability.png")
    print(
        "\n".join(
            str(folder / name) for name in ("examples.png", "confusion.png", "reliability.png")
        )
    )


def examples(run: Run, images: Path, prompts: str, seed: int = 0) -> Tensor:
    """Returns an image of five successes above five failures, uint8 [3, H, W].

    The examples are of different classes where possible. Below each are the true class, the
    prediction and the runner-up with their probabilities, and the name of the file.
    """
    probabilities = run.probabilities(prompts)
    right = probabilities.argmax(1) == run.labels
    rows = {
        "successes": _choose(run.labels, right, seed),
        "failures": _choose(run.labels, ~right, seed),
    }
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    line, text_lines = 16, 4
    height = SIDE + line * text_lines + 12
    canvas = Image.new("RGB", (EACH * COLUMN + 12, 2 * (height + 24) + 6), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (title, chosen) in enumerate(rows.items()):
        top = 6 + r * (height + 24)
        total = int(right.sum()) if title == "successes" else int((~right).sum())
        pen.text((8, top), f"{title}: {len(chosen)} of {total}", fill="black", font=font)
        for c, index in enumerate(chosen):
            left = 8 + c * COLUMN
            picture = _square(read_rgb(Path(images) / run.files[index]))
            canvas.paste(picture, (left, top + 22))
            pen.rectangle((left, top + 22, left + SIDE - 1, top + 21 + SIDE), outline="gray")
            best = probabilities[index].topk(min(2, len(run.ids)))
            guesses = [
                f"{p:.1%} {run.names[i]}"
                for p, i in zip(*(part.tolist() for part in best), strict=True)
            ]
            lines = [
                f"truth: {run.names[run.labels[index]]}",
                f"said {guesses[0]}",
                f"next {guesses[-1]}",
            ]
            for n, text in enumerate([*lines, run.files[index]]):
                colour = "gray" if n == 3 else "black"
                pen.text(
                    (left, top + 26 + SIDE + n * line), _fit(text, small), fill=colour, font=small
                )
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _choose(labels: Tensor, keep: Tensor, seed: int) -> list[int]:
    """Returns up to EACH random indices where `keep` holds; each class once, then any."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    candidates = [i for i in order if keep[i]]
    seen: set[int] = set()
    first = [i for i in candidates if not (int(labels[i]) in seen or seen.add(int(labels[i])))]
    return (first + [i for i in candidates if i not in set(first)])[:EACH]


def _square(image: Tensor) -> Image.Image:
    """The image fitted into a white square of SIDE pixels; a small one is enlarged."""
    picture = to_pil(image)
    small = max(picture.size) <= SIDE // 2
    picture.thumbnail((SIDE, SIDE))
    if small:  # enlarged by repeating pixels
        scale = SIDE // max(picture.size)
        picture = picture.resize(
            (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
        )
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return canvas


def _fit(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut to the width of a column."""
    while font.getlength(text) > COLUMN - 8:
        text = text[:-2].rstrip(".") + "."
    return text


def plot_confusion(run: Run, prompts: str, path: Path) -> None:
    """Plots the confusion matrix, each row divided by its class's number of images."""
    pyplot = _pyplot()
    matrix = confusion_matrix(run, prompts).double()
    matrix = (matrix / matrix.sum(1, keepdim=True).clamp(min=1.0)).numpy()
    count = len(run.ids)
    side = min(4.0 + 0.16 * count, 14.0)
    figure, axis = pyplot.subplots(figsize=(side, side * 0.92), layout="constrained")
    shown = axis.imshow(matrix, vmin=0.0, vmax=1.0, cmap="viridis")
    axis.set(
        xlabel="prediction",
        ylabel="truth",
        title=f"Confusions, {prompts} prompt: part of each class",
    )
    size = max(4.5, min(9.0, 330.0 / count))
    axis.set_xticks(range(count), run.names, rotation=90, fontsize=size)
    axis.set_yticks(range(count), run.names, fontsize=size)
    figure.colorbar(shown, fraction=0.04)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_reliability(run: Run, prompts: str, path: Path) -> None:
    """Plots reliability diagrams at the model's logit scale and at a fitted one.

    The scale is fitted to every second image; its diagram is of the others. Raises InputError if
    the run has no images.
    """
    if not len(run.labels):
        raise InputError("the run has no images")
    pyplot = _pyplot()
    cosines = run.cosines[prompts]
    numbers = calibration(cosines, run.labels, run.scale)
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 4.0), layout="constrained", sharey=True)
    measured = halves(len(run.labels))[1]
    parts = (("model's", run.scale, slice(None)), ("fitted", numbers["fitted_scale"], measured))
    for axis, (name, scale, part) in zip(axes, parts, strict=True):
        found = reliability((scale * cosines[part]).softmax(1), run.labels[part])
        counts, confidence, right = (values.numpy() for values in found)
        filled = counts > 0
        width = 1.0 / len(counts)
        centres = (np.arange(len(counts)) + 0.5) * width
        axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
        axis.bar(
            centres[filled], right[filled], width=width * 0.92, color="tab:blue", label="accuracy"
        )
        axis.plot(
            confidence[filled], right[filled], "o", color="tab:orange", label="mean confidence"
        )
        title = f"{name} scale {scale:.1f}: calibration error {found.error:.3f}"
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("part right")
    axes[0].legend(loc="upper left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot():  # noqa: ANN202
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    cli.run(main, Config)
