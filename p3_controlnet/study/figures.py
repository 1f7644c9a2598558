"""The figures of Problem 3, 2025: what the small model draws from control pictures, where it fails,
and what steers it.

    python3 -m p3_controlnet.study.figures --output-dir results/figures/p3_controlnet \
        --fill50k hw2_data/fill50k
    python3 -m p3_controlnet.study.figures --output-dir OUT --only circles --data DATA \
        --images PICTURES

- circles: control picture, target and result of the first pairs; with --fill50k of its testing
  pairs, else of `--data` or drawn.
- failures: the worst of all pairs beside the best, by IoU and colours.
- two_circles: ten layouts in two sets of colours, one for both circles and one for each;
  more_circles: three, touching, cut.
- base: pictures of prompts alone; control_scale: the same noise under more and more control.
- canvas: many circles on a canvas of 4 x 4 pictures, drawn in overlapping patches.
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
from common.data.examples import circle_scenes
from common.data.fill50k import read_prompts
from common.devices import pick_device
from common.errors import InputError
from common.files import make_folder
from common.grid import labelled_grid
from common.images import resize, write_png
from common.latent.generate import ControlledGenerationConfig
from common.latent.model import LatentDiffusion
from common.latent.small import SIDE
from common.metrics.segmentation import NO_OBJECT_ERROR
from p3_controlnet.evaluate import read_output
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
SHOWN = 128  # side of a picture in the figures
WIDTH = 26  # letters in a line of a label
FIRST, WORST = 10, 5
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
SCALE_ROWS, BASE_ROWS, BASE_COLUMNS = 4, 10, 4
DRAWN_COUNT, DRAWN_SEED = 25, 2025  # seeds 0 and 1 are those of the training and of its validation


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the figures of Problem 3, 2025."""

    output_dir: Path
    """Folder of the figures."""
    fill50k: Path | None = None
    """The real pairs in the homework's layout, whose testing part is shown."""
    data: Path | None = None
    """Other pairs to show: a folder of prompt.json, source and target."""
    images: Path | None = None
    """Folder of their pictures, drawn by `p3_controlnet.inference`; the default is to draw them."""
    resolution: int = SIDE
    """Side of the pictures that the model works on, for what failed; see
    `p3_controlnet.evaluate`."""
    rows: int = FIRST
    """Pairs in the figure of circles."""
    only: tuple[Figure, ...] = FIGURES
    """Which figures."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = ModelConfig()
    generation: Annotated[ControlledGenerationConfig, tyro.conf.arg(name="")] = (
        ControlledGenerationConfig()
    )


def main(config: Config) -> None:
    """Writes the figures and names them."""
    config.generation.check()
    if config.fill50k and config.data or config.images and not (config.fill50k or config.data):
        raise InputError(
            "--fill50k and --data are two choices of the pairs, and --images holds the pictures of"
            " one of them"
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
    """The pairs to show: real ones, those of a folder, or drawn ones."""
    if config.fill50k:
        return real_tasks(config.fill50k)
    if config.data:
        folders = config.data / "source", config.data / "target"
        return [read_task(pair) for pair in read_prompts(config.data / "prompt.json", *folders)]
    return scene_tasks(circle_scenes(DRAWN_COUNT, DRAWN_SEED), "drawn")


class FigureInputs:
    """What the figures share: the pairs, the model, and the pictures of the pairs, each made when
    it is first needed."""

    def __init__(self, config: Config, tasks: list[Task]) -> None:
        self.config, self.tasks, self.generation = config, tasks, config.generation
        self._model: LatentDiffusion | None = None
        self._pictures: Tensor | None = None

    @property
    def model(self) -> LatentDiffusion:
        """The base and its ControlNet."""
        if self._model is None:
            self._model = (
                load_model(self.config.model).to(pick_device(self.config.model.device)).eval()
            )
        return self._model

    @property
    def pictures(self) -> Tensor:
        """uint8 [N, 3, 512, 512]. Raises InputError if one is missing in the folder that should
        hold them."""
        if self._pictures is None:
            if self.config.images:
                found, dropped = read_output(
                    self.config.images, [Path(task.name) for task in self.tasks]
                )
                if dropped:
                    raise InputError(
                        f"{self.config.images} lacks a picture: {next(iter(dropped.values()))}"
                    )
                self._pictures = torch.stack(found)
            else:
                self._pictures = draw_tasks(self.model, self.tasks, self.generation)
        return self._pictures

    def draw(self, tasks: Sequence[Task], **changes: Any) -> Tensor:
        """Pictures of other tasks, or with other settings."""
        return draw_tasks(self.model, tasks, dataclasses.replace(self.generation, **changes))


# ----------------------------------------------------------------------------
# One function for each figure.


def circles(inputs: FigureInputs) -> Tensor:
    """The first pairs: nothing is picked."""
    shown = slice(inputs.config.rows)
    return strips(
        inputs.tasks[shown], inputs.pictures[shown], [task.prompt for task in inputs.tasks[shown]]
    )


def failures_figure(inputs: FigureInputs) -> Tensor:
    """The worst pictures, with what is wrong, and below them the best."""
    lines = measure_tasks(inputs.tasks, inputs.pictures, inputs.config.resolution)
    order = sorted(range(len(lines)), key=lambda k: badness(lines[k]))
    shown = max(1, min(WORST, len(order) // 2))
    chosen = [*reversed(order[-shown:]), *order[:shown]]
    labels = [f"{lines[k]['prompt']}: {verdict(lines[k])}" for k in chosen]
    return strips([inputs.tasks[k] for k in chosen], inputs.pictures[chosen], labels)


def two_circles(inputs: FigureInputs) -> Tensor:
    """The same places in two sets of colours: one for both circles, and one for each."""
    sets = [layout_tasks("two_shared"), layout_tasks("two")]
    drawn = [inputs.draw(tasks) for tasks in sets]
    columns = [[task.source for task in sets[0]]]
    for tasks, pictures in zip(sets, drawn, strict=True):
        columns += [[task.target for task in tasks], list(pictures)]
    labels = ["control", "one colour", "result", "two colours", "result"]
    return table(columns, labels, [task.prompt for task in sets[1]])


def more_circles(inputs: FigureInputs) -> Tensor:
    """Three circles, two that touch, and one cut by the border."""
    tasks = [
        task for kind in ("three", "touching", "cut") for task in layout_tasks(kind, count=WORST)
    ]
    return strips(tasks, inputs.draw(tasks), [task.prompt for task in tasks])


def base(inputs: FigureInputs) -> Tensor:
    """The first prompts of the study, in four noises each."""
    prompts = [scene.caption for scene in prompt_scenes(BASE_ROWS)]
    pictures = draw_prompts(
        inputs.model, [prompt for prompt in prompts for _ in range(BASE_COLUMNS)], inputs.generation
    )
    return labelled_grid(small(pictures), BASE_COLUMNS, row_labels=wrapped(prompts))


def control_scale(inputs: FigureInputs) -> Tensor:
    """The same prompts and noises under more and more control."""
    tasks = inputs.tasks[:SCALE_ROWS]
    drawn = [list(inputs.draw(tasks, control_scales=(scale,))) for scale in SCALES]
    labels = ["control", *(f"scale {scale:g}" for scale in SCALES)]
    return table([[task.source for task in tasks], *drawn], labels, [task.prompt for task in tasks])


def canvas(inputs: FigureInputs) -> Tensor:
    """The control picture of a canvas, the canvas in overlapping patches, and at once."""
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
# Laying out.


def strips(tasks: Sequence[Task], pictures: Tensor, labels: Sequence[str]) -> Tensor:
    """Rows of control picture, target and result."""
    columns = [[task.source for task in tasks], [task.target for task in tasks], list(pictures)]
    return table(columns, ["control", "target", "result"], labels)


def table(
    columns: Sequence[Sequence[Tensor]], column_labels: Sequence[str], row_labels: Sequence[str]
) -> Tensor:
    """Columns of pictures uint8 [3, 512, 512] side by side, made small."""
    pictures = torch.stack([picture for row in zip(*columns, strict=True) for picture in row])
    return labelled_grid(
        small(pictures), len(columns), row_labels=wrapped(row_labels), column_labels=column_labels
    )


def wrapped(labels: Sequence[str]) -> list[str]:
    """The labels in lines of a width that leaves room for pictures."""
    return ["\n".join(textwrap.wrap(label, WIDTH)) for label in labels]


def small(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] at the figures' size."""
    return torch.stack([resize_hint(picture, SHOWN) for picture in pictures])


def badness(line: dict[str, Any]) -> float:
    """What a measured line lacks in IoU and, of the error of a picture without an object, in
    colours."""
    return 1.0 - line["iou"] + max(line["circle_error"], line["background_error"]) / NO_OBJECT_ERROR


def verdict(line: dict[str, Any]) -> str:
    """The numbers of a measured line, and what is wrong with it."""
    numbers = (
        f"IoU {line['iou']:.2f}, colours {line['circle_error']:.0f} and"
        f" {line['background_error']:.0f}"
    )
    wrong = failures(line)
    return f"{numbers} ({', '.join(wrong)})" if wrong else numbers


if __name__ == "__main__":
    cli.run(main, Config)
