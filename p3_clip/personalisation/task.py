"""Reads the homework's input.json of 2024: concepts, prompts, and the grader's baselines."""

from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import read_json
from p3_clip.personalisation.concepts import is_placeholder


class Task(NamedTuple):
    """One concept of input.json."""

    key: str
    """Its key, which names the folder of its photos and its output folder."""
    source: str
    """The concept in known words, for example "dog"; the key if the file names none."""
    token: str
    """Its placeholder, for example <new1>."""
    prompts: list[str]
    """Prompts that contain the placeholder."""
    texts: list[str]
    """For each prompt, the text that the grader compares the images with."""
    baselines: list[tuple[float, float]]
    """For each prompt, the image and text scores (100 times the cosine) that its images must
    reach."""


def read_tasks(path: Path, *, to_grade: bool = True) -> list[Task]:
    """Reads the concepts of an input.json, in the order of the file.

    What only a grade needs may be missing if `to_grade` is off: src_image, prompt_4_clip_eval and
    baseline; texts and baselines are then empty.

    Raises InputError, which names the concept, if an entry is missing or of another type, the key
    cannot be the name of a folder, the token is not <name> or occurs twice, the lists have unequal
    lengths, or a prompt does not contain the token.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} must be a JSON object that maps keys to concepts")
    tasks = [_read_task(path, key, value, to_grade) for key, value in content.items()]
    tokens = [task.token for task in tasks]
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            raise InputError(f"{path}: two concepts have the token {token}")
    return tasks


def _read_task(path: Path, key: str, value: Any, to_grade: bool) -> Task:
    where = f"{path}: the concept {key!r}"
    if key in ("", ".", "..") or "/" in key or "\\" in key:
        raise InputError(f"{where} cannot be the name of a folder")
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a JSON object")
    graded = to_grade or any(name in value for name in ("prompt_4_clip_eval", "baseline"))
    if not graded:
        value = {**value, "prompt_4_clip_eval": [], "baseline": []}
    if not to_grade:
        value = {"src_image": key, **value}
    for name, kind in (
        ("src_image", str),
        ("token_name", str),
        ("prompt", list),
        ("prompt_4_clip_eval", list),
        ("baseline", list),
    ):
        if not isinstance(value.get(name), kind):
            raise InputError(f"{where} needs {name}, a {'string' if kind is str else 'list'}")
    prompts, texts, baselines = (
        value[name] for name in ("prompt", "prompt_4_clip_eval", "baseline")
    )
    if not prompts or (graded and not len(prompts) == len(texts) == len(baselines)):
        raise InputError(
            f"{where} has {len(prompts)} prompts, {len(texts)} texts in prompt_4_clip_eval and"
            f" {len(baselines)} baselines, but needs equally many of each, and at least one"
        )
    if not all(isinstance(text, str) for text in (*prompts, *texts)):
        raise InputError(f"{where} has a prompt or text that is not a string")
    if not all(_is_pair(pair) for pair in baselines):
        raise InputError(f"{where} needs baselines of two numbers, for image and text")
    token = value["token_name"]
    if not is_placeholder(token):
        raise InputError(f"{where}: the token {token!r} must have the form <name>, such as <new1>")
    for prompt in prompts:
        if token not in prompt:
            raise InputError(f"{where}: the prompt {prompt!r} does not hold its token {token}")
    return Task(
        key,
        value["src_image"],
        token,
        prompts,
        texts,
        [tuple(map(float, pair)) for pair in baselines],
    )


def _is_pair(value: Any) -> bool:
    number = (int, float)
    return (
        isinstance(value, list) and len(value) == 2 and all(type(part) in number for part in value)
    )
