"""The documents: what they quote of the code is there, and what a newcomer is promised holds."""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from common.files import ROOT

PAGES = ("controlnet_sd14.md", "personalisation_sd14.md")
OF_THE_PARSER = {"--preset", "--memory", "--guide-w"}


def test_the_five_lines_of_guidance_are_quoted_from_the_code() -> None:
    code = [
        line.strip() for line in (ROOT / "common/diffusion/guidance.py").read_text().split("\n")
    ]
    quoted = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cfg.md").read_text(), flags=re.DOTALL)
    lines = [line.strip() for block in quoted for line in block.strip().split("\n")]
    assert len(lines) == 5 and all(line in code for line in lines)


def test_the_readme_is_short_and_its_commands_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    scripts = set(re.findall(r"(?:scripts/\w+\.(?:sh|py)|hw2_\w+\.sh)", text))
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def commands(text: str) -> Iterator[str]:
    """The command lines in a page's blocks of bash, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.split(" # ")[0].strip():
                yield command


def programs(command: str) -> list[str]:
    """The modules that a command runs, itself or by its script; those of this project alone."""
    if script := re.match(r"bash (\S+\.sh)", command):
        command = (ROOT / script[1]).read_text()
    return [name for name in re.findall(r"-m ([\w.]+)", command) if "_" in name or "." in name]


def flags(config: Any) -> Iterator[str]:
    """The flags of a program, from its settings, nested ones included."""
    for variant in get_args(config) or (config,):
        if not dataclasses.is_dataclass(variant):
            yield from flags(variant) if get_args(variant) else ()
            continue
        for field in dataclasses.fields(variant):
            if dataclasses.is_dataclass(field.default):
                yield from flags(type(field.default))
            yield from (f"--{no}{field.name.replace('_', '-')}" for no in ("", "no-"))


WITH_COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*/*.md"))
    if any(map(programs, commands(path.read_text())))
)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_run_programs_with_flags_that_exist(page: str) -> None:
    checked = 0
    for command in commands((ROOT / page).read_text()):
        modules = [importlib.import_module(name) for name in programs(command)]
        if not modules or "scripts/test.sh" in command:
            continue
        own = command.split(" -m ")[-1]  # a launcher's flags come before
        known = {flag for module in modules for flag in flags(module.Config)} | OF_THE_PARSER
        given = set(re.findall(r"(?<!\S)--[\w-]+", own))
        assert given <= known, f"{command}: {given - known}"
        checked += 1
    assert checked or page == "CONTRIBUTING.md", page


@pytest.mark.parametrize("page", PAGES)
def test_the_scripts_and_pages_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    scripts = set(re.findall(r"(?:scripts/\w+\.sh|hw2_\w+\.sh)", text))
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text))
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    assert links and all((ROOT / "docs" / link).is_file() for link in links)
    assert page in (ROOT / "README.md").read_text()
