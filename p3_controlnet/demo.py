"""The tab ControlNet of the web demo: circles drawn with the mouse become a picture of a prompt.

The picture is that of `p3_controlnet.inference` for a prompt.json with the same control image and
prompt and the target FILE, within one grey level. It is measured as by `p3_controlnet.evaluate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.examples import circle_scenes
from common.data.fill50k import SIZE
from common.data.layouts import (
    make_layouts,
    render_control,
    render_target,
)
from common.data.shapes import Scene, Shape
from common.demo import (
    PICTURE,
    QUEUED,
    Steps,
    check_pixels,
    errors_in_the_page,
    shown,
    whole,
)
from common.errors import InputError
from common.files import make_folder
from common.images import write_png
from common.latent.generate import ControlledGenerationConfig, Request, with_default_guidance
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import draw
from common.metrics.circles import WHITE, Circle, circles_of_drawing, fit_circles
from p3_controlnet.evaluate import describe, measure
from p3_controlnet.hints import image_seed, read_hint, resize_hint

FILE = "0.png"
"""File name from which the seed of the picture is derived."""
SAME = 0.8  # IoU of a drawing's lines with those of perfect circles, above which it is not changed
Table = list[list[str]]


def tab(model: LatentDiffusion, folder: Path) -> None:
    """Adds the components and events of the tab to gradio's current `Blocks`.

    `folder` is for the control images of the examples.
    """
    default = with_default_guidance(ControlledGenerationConfig(), model)
    examples = write_examples(folder)
    blank = folder / "blank.png"
    write_png(blank, torch.zeros(3, SIZE, SIZE, dtype=torch.uint8))
    gr.Markdown(
        "**Draw circles** with the mouse or a finger, or pick an example below, and name their"
        " colours; the bin empties the canvas. Closed lines are straightened to the nearest"
        " circles, since the network has seen perfect ones only; what goes around no circle is"
        " refused."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            drawing = gr.ImageEditor(
                value=editor_value(examples[0][0]),
                label="Control image",
                show_label=False,  # it would lie over the tools on a phone
                type="filepath",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=8, colors=["#ffffff"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=24),
                canvas_size=(SIZE, SIZE),
                fixed_canvas=True,
                height=470,
                elem_id="drawing",
            )
            prompt = gr.Textbox(examples[0][1], label="Prompt", elem_id="controlnet_prompt")
            button = gr.Button("Draw the picture", variant="primary")
            with gr.Accordion("Strength of the control, sampler", open=False):
                scale = gr.Slider(0, 2, 1, step=0.05, label="Control scale")
                start, end = (
                    gr.Slider(0, 1, value, step=0.05, label=f"Control {what}s after this fraction")
                    for what, value in (
                        ("begin", default.control_start),
                        ("end", default.control_end),
                    )
                )
                guidance = gr.Slider(
                    0, 15, default.guidance_scale, step=0.5, label="Guidance scale"
                )
                steps = gr.Slider(1, 100, default.steps, step=1, label="Steps")
                seed = gr.Number(default.seed, label="Seed")
        with gr.Column(scale=1, min_width=300):
            with gr.Row():
                picture = gr.Image(label="Picture", scale=2, min_width=240, **PICTURE)
                hint = gr.Image(label="As used", scale=1, min_width=120, **PICTURE)
            table = gr.Dataframe(
                headers=["Measured in the picture", "Value"],
                column_widths=["45%", "55%"],
                interactive=False,
                wrap=True,
                show_label=False,
                buttons=[],
            )

    def controlled(
        drawing: dict[str, Any],
        prompt: str,
        control_scale: float,
        control_start: float,
        control_end: float,
        guidance_scale: float,
        steps: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio finds it by its default
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Table]:
        """A picture of the prompt under the control image (the drawing's "composite").

        Returns the picture, the control image as used, and what was measured in the picture.
        """
        with errors_in_the_page():
            config = ControlledGenerationConfig(
                control_scales=(control_scale,),
                control_start=control_start,
                control_end=control_end,
                guidance_scale=guidance_scale,
                steps=whole(steps, "steps"),
                seed=whole(seed, "the seed"),
                chunk_size=1,
            )
            config.check(model.schedule.num_timesteps)
            outline, circles = control_image(drawing)
            run = sampling(model, outline, prompt, config)
            for step in run:
                progress((step.i, config.steps), unit="steps")
            measured = measures(run.result, circles, prompt, model.side)
            return shown(run.result), shown(outline), measured

    # The editor's own empty canvas is white, as is the brush.
    drawing.clear(lambda: editor_value(blank), None, drawing, api_visibility="private", queue=False)
    button.click(
        controlled,
        [drawing, prompt, scale, start, end, guidance, steps, seed],
        [picture, hint, table],
        api_name="controlnet",
        **QUEUED,
    )
    gr.Examples(
        [[editor_value(path), caption] for path, caption in examples],
        [drawing, prompt],
        example_labels=[caption for _, caption in examples],
        label="Examples",
    )


def write_examples(folder: Path) -> list[tuple[Path, str]]:
    """Writes control images into a folder; returns their paths with a prompt for each."""
    scenes = [*make_layouts("two", 2), *circle_scenes(3, seed=2)]
    examples = [(make_folder(folder) / f"circles_{k}.png", scenes[k]) for k in range(len(scenes))]
    for path, scene in examples:
        write_png(path, render_control(scene))
    return [(path, scene.caption) for path, scene in examples]


def editor_value(path: Path) -> dict[str, Any]:
    """The value of `gr.ImageEditor` that shows this picture as its background."""
    return {"background": str(path), "layers": [], "composite": str(path)}


def control_image(drawing: dict[str, Any] | None) -> tuple[Tensor, list[Circle]]:
    """The control image of a drawing, uint8 [3, 512, 512], and its circles.

    Circles drawn by hand are replaced by the nearest perfect ones. Raises InputError if the drawing
    is not square, is empty, or holds a line that is no circle.
    """
    if not drawing or not drawing.get("composite"):
        raise InputError("the drawing is empty: draw a circle, or pick an example")
    check_pixels(Path(drawing["composite"]))
    outline = resize_hint(read_hint(Path(drawing["composite"])), SIZE)
    circles = circles_of_drawing(outline)
    if not circles:
        raise InputError("the drawing is empty: draw a circle, or pick an example")
    perfect = render_control(scene_of(circles, ["white"], "black"))
    drawn, expected = (picture[0] >= WHITE for picture in (outline, perfect))
    if (drawn & expected).sum() >= SAME * (drawn | expected).sum():
        return outline, fit_circles(outline) or circles  # an example, which is used as it is
    return perfect, circles


def scene_of(circles: Sequence[Circle], colours: Sequence[str], background: str) -> Scene:
    """Circles in pixels of a picture of 512x512 as a scene; one colour may serve for all."""
    colours = list(colours) * len(circles) if len(colours) == 1 else colours
    shapes = [
        Shape("circle", colour, circle.x / SIZE, circle.y / SIZE, circle.radius / SIZE)
        for circle, colour in zip(circles, colours, strict=True)
    ]
    return Scene(background, tuple(shapes))


def sampling(
    model: LatentDiffusion, outline: Tensor, prompt: str, config: ControlledGenerationConfig
) -> Steps[Tensor]:
    """The sampling of one picture; its result is uint8 [3, 512, 512]."""
    request = Request(prompt, image_seed(FILE, config.seed), resize_hint(outline, model.side))
    return Steps(
        lambda callback: next(
            draw(model, [request], config, SIZE, callback=callback, show_progress=False)
        )[1][0]
    )


def measures(picture: Tensor, circles: Sequence[Circle], prompt: str, resolution: int) -> Table:
    """IoU and colour errors of a picture for a model of this resolution, as rows (name, value).

    If the prompt does not describe the circles in fill50k's wording, a row says so instead.
    """
    try:
        described = describe(prompt, circles, "the drawing")
    except InputError as error:
        return [["Not measured", str(error)]]
    target = render_target(scene_of(circles, described.colours, described.background))
    line = measure(picture, target, circles, described, resolution)
    rows = [["IoU with the circles (1 is best)", f"{line['iou']:.3f}"]]
    for name, error, nearest in zip(
        line["circle_asked"], line["circle_errors"], line["circle_nearest"], strict=True
    ):
        rows.append([f"{name} circle: CIEDE2000", f"{error:.1f}, nearest name {nearest}"])
    background = f"{line['background_error']:.1f}, nearest name {line['background_nearest']}"
    return [*rows, [f"{described.background} background: CIEDE2000", background]]
