"""Makes the figures of Problem 3, 2025: images drawn by the small model with its ControlNet.

    python3 -m p3_controlnet.study.figures --output-dir results/figures/p3_controlnet \
        --fill50k hw2_data/fill50k
    python3 -m p3_controlnet.study.figures --output-dir OUT --only circles --data DATA \
        --images IMAGES

The pairs are the testing pairs of --fill50k, those of --data, or else drawn ones.

- circles: control image, target and result of the first pairs.
- failures: the worst and the best results of all pairs, by IoU and colour error.
- two_circles: ten layouts of two circles, with one colour for both and with one for each.
- more_circles: layouts of three circles, of touching circles and of circles cut by the border.
- base: images from prompts only, without ControlNet.
- control_scale: the same prompts and noise with increasing control scales.
- canvas: many circles on a canvas of 4 x 4 model images, in overlapping patches and at once.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from torch import Tensor

from common import cli
from common.config import Side
from common.data.examples import circle_scenes
from common.data.fill50k import read_prompts
from common.devices import pick_device
from common.errors import InputError
from common.files import make_folder
from common.grid import labelled_grid, side_by_side
from common.images import resize, write_png
from common.latent.generate import ControlledGenerationConfig, GenerationConfig
from common.latent.model import LatentDiffusion
from common.metrics.segmentation import SIZE
from p3_controlnet.evaluate import badness, read_output
from p3_controlnet.hints import resize_hint
from p3_controlnet.loading import ModelConfig, load_model
from p3_controlnet.study.canvas import canvas_task, draw_canvas
from p3_controlnet.study.failures import failures
from p3_controlnet.study.prompts import draw_prompts, prompt_scenes
from p3_controlnet.study.tasks import (
    Task,
    draw_tasks,
    layout_tasks,
    measure_tasks,
    read_task,
    real_tasks,
    scene_tasks,
)

Figure = Literal[
    "circles", "failures", "two_circles", "more_circles", "base", "control_scale", "canvas"
]
FIGURES: tuple[Figure, ...] = get_args(Figure)
ROWS = 5  # of a table above each other
SHOWN = 128  # side of an image in the figures, in pixels
WIDTH = 26  # characters in a line of a label
FIRST = 10  # pairs in the figure of circles
WORST = 5  # images in each half of the figure of failures
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
SCALE_ROWS, BASE_ROWS, BASE_COLUMNS = 4, 10, 4
DRAWN_COUNT, DRAWN_SEED = 25, 2025  # the training's seed is 0, its validation's 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the figures of Problem 3, 2025."""

    output_dir: Path
    """Folder for the figures."""
    fill50k: Path | None = None
    """Folder of fill50k, in the homework's layout, whose testing pairs are shown."""
    data: Path | None = None
    """Folder of other pairs to show, with prompt.json, source/ and target/."""
    images: Path | None = None
    """Folder of images that `p3_controlnet.inference` drew for these pairs; by default the pairs
    are drawn here."""
    resolution: Side | None = None
    """Side, in pixels, of the images before they were enlarged to 512; it decides where the figure
    of failures measures colours (see `p3_controlnet.evaluate`). By default that of the model, and
    512 for pictures in --images."""
    rows: int = FIRST
    """Number of pairs in the figure of circles."""
    only: tuple[Figure, ...] = FIGURES
    """Names of the figures to make; all by default."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = ModelConfig()
    generation: Annotated[ControlledGenerationConfig, tyro.conf.arg(name="")] = (
        ControlledGenerationConfig()
    )


def main(config: Config) -> None:
    """Writes the figures and prints their paths."""
    config.generation.check()
    if config.fill50k and config.data or config.images and not (config.fill50k or config.data):
        raise InputError(
            "--fill50k and --data exclude each other, and --images needs one of them, whose pairs"
            " its images are of"
        )
    if config.rows < 1:
        raise InputError(f"--rows must be at least 1, not {config.rows}")
    needs_pairs = bool({"circles", "failures", "control_scale"} & {*config.only})
    tasks = load_tasks(config) if needs_pairs else []
    inputs = FigureInputs(config, tasks)
    folder = make_folder(config.output_dir)
    for name in dict.fromkeys(config.only):
        write_png(folder / f"{name}.png", DRAW[name](inputs))
        print(folder / f"{name}.png")


def load_tasks(config: Config) -> list[Task]:
    """The pairs to show: those of --fill50k or of --data, or else drawn ones."""
    if config.fill50k:
        return real_tasks(config.fill50k)
    if config.data:
        folders = config.data / "source", config.data / "target"
        return [read_task(pair) for pair in read_prompts(config.data / "prompt.json", *folders)]
    return scene_tasks(circle_scenes(DRAWN_COUNT, DRAWN_SEED), "drawn")


class FigureInputs:
    """The pairs, the model and the pairs' images, which the figures share.

    The model and the images are loaded or drawn when they are first used.
    """

    def __init__(self, config: Config, tasks: list[Task]) -> None:
        self.config, self.tasks, self.generation = config, tasks, config.generation
        self._model: LatentDiffusion | None = None
        self._pictures: Tensor | None = None

    @property
    def model(self) -> LatentDiffusion:
        """The base model with its ControlNet, on the device."""
        if self._model is None:
            self._model = (
                load_model(self.config.model).to(pick_device(self.config.model.device)).eval()
            )
        return self._model

    @property
    def pictures(self) -> Tensor:
        """Images of the pairs, uint8 [N, 3, 512, 512], read from --images or drawn.

        Raises InputError if --images lacks one.
        """
        if self._pictures is None:
            if self.config.images:
                found = [read_output(self.config.images, Path(task.name)) for task in self.tasks]
                self._pictures = torch.stack(found)
            else:
                self._pictures = draw_tasks(self.model, self.tasks, self.generation)
        return self._pictures

    def draw(self, tasks: Sequence[Task], **changes: Any) -> Tensor:
        """Draws tasks, uint8 [N, 3, 512, 512], with these changes to the generation settings."""
        return draw_tasks(self.model, tasks, dataclasses.replace(self.generation, **changes))


# ----------------------------------------------------------------------------
# One function for each figure.


def circles(inputs: FigureInputs) -> Tensor:
    """Control image, target and result of the first pairs, not a selection."""
    shown = slice(inputs.config.rows)
    return strips(
        inputs.tasks[shown], inputs.pictures[shown], [task.prompt for task in inputs.tasks[shown]]
    )


def failures_figure(inputs: FigureInputs) -> Tensor:
    """The images with the highest `badness`, then those with the lowest, with verdicts."""
    resolution = inputs.config.resolution or (SIZE if inputs.config.images else inputs.model.side)
    lines = measure_tasks(inputs.tasks, inputs.pictures, resolution)
    order = sorted(range(len(lines)), key=lambda k: badness(lines[k]))
    shown = max(1, min(WORST, len(order) // 2))
    chosen = [*reversed(order[-shown:]), *order[:shown]]
    labels = [f"{lines[k]['prompt']}: {verdict(lines[k])}" for k in chosen]
    return strips([inputs.tasks[k] for k in chosen], inputs.pictures[chosen], labels)


def two_circles(inputs: FigureInputs) -> Tensor:
    """Ten layouts of two circles, with one colour for both circles and with one for each."""
    sets = [layout_tasks("two_shared"), layout_tasks("two")]
    drawn = [inputs.draw(tasks) for tasks in sets]
    columns = [[task.source for task in sets[0]]]
    for tasks, pictures in zip(sets, drawn, strict=True):
        columns += [[task.target for task in tasks], list(pictures)]
    labels = ["control", "one colour", "result", "two colours", "result"]
    return table(columns, labels, [task.prompt for task in sets[1]])


def more_circles(inputs: FigureInputs) -> Tensor:
    """Layouts of three circles, of two that touch, and of two of which the border cuts one."""
    tasks = [
        task for kind in ("three", "touching", "cut") for task in layout_tasks(kind, count=WORST)
    ]
    return strips(tasks, inputs.draw(tasks), [task.prompt for task in tasks])


def base(inputs: FigureInputs) -> Tensor:
    """The first prompts of the study of the base model, each with four different noises."""
    prompts = [scene.caption for scene in prompt_scenes(BASE_ROWS)]
    usual = GenerationConfig(steps=inputs.generation.steps, seed=inputs.generation.seed)
    pictures = draw_prompts(
        inputs.model, [prompt for prompt in prompts for _ in range(BASE_COLUMNS)], usual
    )
    return table([list(pictures[k::BASE_COLUMNS]) for k in range(BASE_COLUMNS)], [], prompts)


def control_scale(inputs: FigureInputs) -> Tensor:
    """The first pairs with the same noise and increasing control scales."""
    tasks = inputs.tasks[:SCALE_ROWS]
    drawn = [list(inputs.draw(tasks, control_scales=(scale,))) for scale in SCALES]
    labels = ["control", *(f"scale {scale:g}" for scale in SCALES)]
    return table([[task.source for task in tasks], *drawn], labels, [task.prompt for task in tasks])


def canvas(inputs: FigureInputs) -> Tensor:
    """A canvas's control image, and the canvas drawn in overlapping patches and at once."""
    task, hint = canvas_task(inputs.model, 0)
    stride = inputs.model.latent_side // 2
    drawn = [
        draw_canvas(inputs.model, task, hint, choice, inputs.generation)
        for choice in (stride, None)
    ]
    labels = ["control", "overlapping patches", "at once"]
    return labelled_grid(
        torch.stack([resize(hint, drawn[0].shape[-1]), *drawn]),
        3,
        column_labels=labels,
        title=task.prompt,
    )


DRAW: dict[Figure, Callable[[FigureInputs], Tensor]] = {
    "circles": circles,
    "failures": failures_figure,
    "two_circles": two_circles,
    "more_circles": more_circles,
    "base": base,
    "control_scale": control_scale,
    "canvas": canvas,
}


# ----------------------------------------------------------------------------
# Layout of a figure.


def strips(tasks: Sequence[Task], pictures: Tensor, labels: Sequence[str]) -> Tensor:
    """A grid with the columns control image, target and result, and a row for each task."""
    columns = [[task.source for task in tasks], [task.target for task in tasks], list(pictures)]
    return table(columns, ["control", "target", "result"], labels)


def table(
    columns: Sequence[Sequence[Tensor]], column_labels: Sequence[str], row_labels: Sequence[str]
) -> Tensor:
    """A labelled grid of columns of images uint8 [3, 512, 512], each resized to SHOWN pixels.

    After ROWS rows it goes on at the side, so that a screen shows all of it.
    """
    rows, labels = list(zip(*columns, strict=True)), wrapped(row_labels)
    return side_by_side(
        [
            labelled_grid(
                small(
                    torch.stack([picture for row in rows[first : first + ROWS] for picture in row])
                ),
                len(columns),
                row_labels=labels[first : first + ROWS],
                column_labels=column_labels,
            )
            for first in range(0, len(rows), ROWS)
        ]
    )


def wrapped(labels: Sequence[str]) -> list[str]:
    """The labels, broken into lines of at most WIDTH characters."""
    return ["\n".join(textwrap.wrap(label, WIDTH)) for label in labels]


def small(pictures: Tensor) -> Tensor:
    """Images uint8 [N, 3, S, S], resized to SHOWN x SHOWN pixels."""
    return torch.stack([resize_hint(picture, SHOWN) for picture in pictures])


def verdict(line: dict[str, Any]) -> str:
    """The IoU, the two colour errors and the failures of a measured image, in words."""
    numbers = (
        f"IoU {line['iou']:.2f}, colours {line['circle_error']:.0f} and"
        f" {line['background_error']:.0f}"
    )
    wrong = failures(line)
    return f"{numbers} ({', '.join(wrong)})" if wrong else numbers


if __name__ == "__main__":
    cli.run(main, Config)
