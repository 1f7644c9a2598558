"""The tab CLIP of the web demo: zero-shot classification of a picture among any class names.

The probabilities are those of `p3_clip.inference` with the same template, names and model.
"""

from pathlib import Path

import gradio as gr
import numpy as np

from common.clip.features import extract_features
from common.clip.model import Clip
from common.data.shapes import held_out_classes, held_out_scene, render
from common.demo import QUEUED, check_pixels, compute, errors_in_the_page
from common.errors import InputError
from common.files import make_folder
from common.images import write_png
from p3_clip.model import check_template, class_names, zero_shot_classifier

BARS = 10
MOST_NAMES = 1000
EXAMPLES, EXAMPLE_SIDE = 3, 256


def tab(clip: Clip, note: str, folder: Path) -> None:
    """Adds the components and events of the tab to gradio's current `Blocks`.

    `note` says which CLIP it is; `folder` is for the pictures of the examples.
    """
    examples = write_examples(folder)
    gr.Markdown(
        "No classifier is trained: CLIP compares the picture with a sentence for each class name,"
        f" and the softmax of the similarities is shown. {note}"
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            # No image mode: the file reaches the project's reader as it was uploaded.
            picture = gr.Image(
                str(examples[0]),
                label="Picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=260,
                elem_id="clip_picture",
            )
            names = gr.Textbox(
                "\n".join(example_names()),
                lines=7,
                max_lines=12,
                label="Class names, one a line",
                elem_id="clip_names",
            )
            template = gr.Textbox(
                "a photo of a {}", label="Template ({} stands for the class name)"
            )
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=1, min_width=280):
            probabilities = gr.Label(num_top_classes=BARS, label="Probabilities")

    def classify(picture: str | None, names: str, template: str) -> dict[str, float]:
        """The probability of each class name (one a line) for a picture."""
        with errors_in_the_page():
            return compute(classified, clip, picture, names, template)

    button.click(classify, [picture, names, template], probabilities, api_name="clip", **QUEUED)
    gr.Examples([[str(path)] for path in examples], [picture], label="Examples")


def write_examples(folder: Path) -> list[Path]:
    """Writes pictures of held-out classes into a folder; returns their paths."""
    paths = [make_folder(folder) / f"shape_{k}.png" for k in range(EXAMPLES)]
    for path, index in zip(paths, example_classes(), strict=True):
        write_png(path, render(held_out_scene(index, np.random.default_rng(index)), EXAMPLE_SIDE))
    return paths


def example_classes() -> range:
    """Indices of the held-out classes that the examples show, spread over their kinds."""
    count = len(held_out_classes())
    return range(0, count, -(-count // EXAMPLES))


def example_names() -> list[str]:
    """Names of the examples' classes and of those that follow each in the list."""
    classes = held_out_classes()
    return [" ".join(classes[i + k]) for i in example_classes() for k in range(2)]


def classified(clip: Clip, picture: str | None, names: str, template: str) -> dict[str, float]:
    """The probability of each class; raises InputError if an input is missing or not usable."""
    if not picture:
        raise InputError("there is no picture: upload one, or pick an example")
    check_pixels(Path(picture))
    lines = [line.strip() for line in names.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MOST_NAMES:
        raise InputError(f"give 1 to {MOST_NAMES} class names, one a line, not {len(lines)}")
    if len(set(lines)) < len(lines):
        raise InputError("a class name is given twice")
    words, _ = class_names({str(k): line for k, line in enumerate(lines)}, {})
    template = check_template(template, "the template")
    features = extract_features(clip, [Path(picture)], workers=1, show_progress=False)
    cosines = features @ zero_shot_classifier(clip, words, [template])
    probabilities = (clip.scale * cosines).softmax(dim=1)[0]
    return dict(zip(words, probabilities.tolist(), strict=True))
