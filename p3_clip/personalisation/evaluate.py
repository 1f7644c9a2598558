"""Grades personalised images by the 2024 grader's rule."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

import pandas as pd
import tyro

from common.clip.features import extract_features
from common.clip.loading import ClipConfig, load_judge
from common.errors import InputError
from common.files import check_files, write_json
from common.images import image_files, read_rgb
from common.metrics.clip_scores import (
    FORMS,
    TEXT_WEIGHT,
    grade_personalised,
    image_cosines,
    text_cosines,
)
from common.page import Grade, Measure, Picture, write_grade
from p3_clip.personalisation.task import Task, read_tasks


@dataclasses.dataclass(frozen=True)
class Personalised:
    """Grades personalised images by the 2024 grader's rule.

    The best five of each prompt's 25 images must reach the prompt's baselines. The scores are of
    the grader's own CLIP, OpenAI's ViT-B/32, unless --model or --pretrained names another.
    """

    GRADES: ClassVar[bool] = True

    images: Path
    """Folder with CONCEPT/PROMPT_INDEX/*.png."""
    input: Path
    """The input.json that the images were generated from."""
    references: Path
    """Folder with CONCEPT/*.jpg, the photos that the concepts were learned from."""
    clip: Annotated[ClipConfig, tyro.conf.arg(name="")] = ClipConfig()
    count: int = 25
    """Images that each prompt must have."""
    result: Path | None = None
    """JSON file to write the scores to. Default: none is written."""
    html: Path | None = None
    """Page to write, with every image and its scores. Default: none is written."""


def grade(config: Personalised) -> None:
    """Grades every prompt of every concept, prints the scores and writes them to `config.result`.

    Exits with code 1 if a prompt misses a baseline. Raises InputError if the images, the references
    or the CLIP are not available.
    """
    check_files(config.result, config.html, inputs=[config.input])
    tasks = read_tasks(config.input)
    wrong = [
        f"{folder} holds {found} images"
        for folder in _folders(config, tasks)
        if (found := len(image_files(folder))) != config.count
    ]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; {config.count} are expected")
    for task in tasks:
        _references(config, task)
    clip, note = load_judge(config.clip.model, config.clip.pretrained, config.clip.device)
    if clip is None:
        raise InputError(note)
    print(note, flush=True)
    rows = []
    for task in tasks:
        references = extract_features(clip, _references(config, task), show_progress=False)
        for index, (text, baseline) in enumerate(zip(task.texts, task.baselines, strict=True)):
            files = image_files(config.images / task.key / str(index))
            images = extract_features(clip, files, show_progress=False)
            cosines = image_cosines(images, references), text_cosines(clip, images, text)
            verdict = grade_personalised(*cosines, baseline)
            rows.append(
                {
                    "concept": task.key,
                    "prompt": index,
                    "image": round(verdict.image, 2),
                    "text": round(verdict.text, 2),
                    "image_baseline": baseline[0],
                    "text_baseline": baseline[1],
                    "passed": verdict.passed,
                    "kept": [files[i].name for i in verdict.kept],
                    # common.metrics.clip_scores.FORMS turns the cosines into every form of score.
                    "cosines": {
                        file.name: {"image": image, "text": text}
                        for file, image, text in zip(
                            files, *(values.tolist() for values in cosines), strict=True
                        )
                    },
                }
            )
    print(pd.DataFrame(rows).drop(columns=["kept", "cosines"]).to_string(index=False))
    if config.result:
        write_json(
            config.result,
            {
                "model": clip.name,
                "pretrained": clip.pretrained,
                "identity": clip.identity,
                "rows": rows,
            },
        )
    if config.html:
        write_grade(config.html, page_content(config.images, tasks, rows))
    passed = sum(row["passed"] for row in rows)
    print(
        f"{'PASS' if passed == len(rows) else 'FAIL'}: {passed} of {len(rows)} prompts reach both"
        " baselines"
    )
    if passed < len(rows):
        raise SystemExit(1)


def page_content(folder: Path, tasks: Sequence[Task], rows: Sequence[dict[str, Any]]) -> Grade:
    """The grade of a folder: the scores of every prompt, and every image with its own."""
    prompts = {task.key: task.prompts for task in tasks}
    score = FORMS["dlcv2024"]
    measures, pictures = [], []
    for row in rows:
        name = f"{row['concept']}, {prompts[row['concept']][row['prompt']]}"
        bars = row["image_baseline"], row["text_baseline"]
        for kind, bar in zip(("image", "text"), bars, strict=True):
            value = score(fmean(row["cosines"][file][kind] for file in row["kept"]))
            what = f"{kind} score of the best {len(row['kept'])}: {name}"
            measures.append(Measure(what, f"{value:.2f}", f">= {bar:g}", value >= bar))
        for file, cosines in row["cosines"].items():
            image, text = (score(cosines[kind]) for kind in ("image", "text"))
            pictures.append(
                Picture(
                    name=f"{file}: {name}",
                    images={"image": read_rgb(folder / row["concept"] / str(row["prompt"]) / file)},
                    verdict=f"image {image:.2f} of {bars[0]:g}, text {text:.2f} of {bars[1]:g}"
                    + (", one of the best" if file in row["kept"] else ""),
                    passed=image >= bars[0] and text >= bars[1],
                    badness=bars[0] - image + TEXT_WEIGHT * (bars[1] - text),
                )
            )
    passed = all(row["passed"] for row in rows)
    note = "A picture counts as wrong where its own scores miss the baselines of its prompt."
    return Grade("Problem 3, 2024: concepts", folder, passed, measures, pictures, note=note)


def _folders(config: Personalised, tasks: Sequence[Task]) -> list[Path]:
    return [
        config.images / task.key / str(index)
        for task in tasks
        for index in range(len(task.prompts))
    ]


def _references(config: Personalised, task: Task) -> list[Path]:
    files = image_files(config.references / task.key)
    if not files:
        raise InputError(f"{config.references / task.key} holds no image")
    return files
