"""The homework's input.json of 2024: which concepts, which prompts, and what the grader compares
with."""

from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import read_json
from p3_clip.personalisation.concepts import PLACEHOLDER, placeholders


class Task(NamedTuple):
    """One concept of input.json."""

    key: str
    """Its key: the name of its folder of photos and of its output folder."""
    source: str
    """What it is, in known words, for example "dog"."""
    token: str
    """Its placeholder, for example <new1>."""
    prompts: list[str]
    """Prompts with the placeholder."""
    texts: list[str]
    """What the grader compares the pictures of each prompt with."""
    baselines: list[tuple[float, float]]
    """The image and text scores that the pictures of each prompt must reach."""


def read_tasks(path: Path) -> list[Task]:
    """The concepts of an input.json, in its order.

    Raises InputError that names what is wrong with which concept: a key that is missing or no name
    of a folder, a token without the form <name> or that comes twice, lists of unequal lengths, a
    prompt without its token.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} must map the keys of concepts to concepts")
    tasks = [_read_task(path, key, value) for key, value in content.items()]
    tokens = [task.token for task in tasks]
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            raise InputError(f"{path}: two concepts have the token {token}")
    return tasks


def _read_task(path: Path, key: str, value: Any) -> Task:
    where = f"{path}: the concept {key!r}"
    if key in ("", ".", "..") or "/" in key or "\\" in key:
        raise InputError(f"{where} cannot be the name of a folder")
    if not isinstance(value, dict):
        raise InputError(f"{where} must map names to values")
    for name, kind in (
        ("src_image", str),
        ("token_name", str),
        ("prompt", list),
        ("prompt_4_clip_eval", list),
        ("baseline", list),
    ):
        if not isinstance(value.get(name), kind):
            raise InputError(f"{where} needs {name}, a {'text' if kind is str else 'list'}")
    prompts, texts, baselines = (
        value[name] for name in ("prompt", "prompt_4_clip_eval", "baseline")
    )
    if not prompts or not len(prompts) == len(texts) == len(baselines):
        raise InputError(
            f"{where} has {len(prompts)} prompts, {len(texts)} texts in prompt_4_clip_eval and"
            f" {len(baselines)} baselines, but equally many are expected, and at least one"
        )
    if not all(isinstance(text, str) for text in (*prompts, *texts)):
        raise InputError(f"{where} has a prompt that is no text")
    if not all(_is_pair(pair) for pair in baselines):
        raise InputError(f"{where} needs baselines of two numbers, image and text")
    token = value["token_name"]
    if not PLACEHOLDER.fullmatch(token):
        raise InputError(f"{where}: the token {token!r} must have the form <name>, such as <new1>")
    for prompt in prompts:
        if token not in placeholders(prompt):
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
