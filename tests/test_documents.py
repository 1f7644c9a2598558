"""The documents: what they quote of the code is there, and what a newcomer is promised holds."""

import re

from common.files import ROOT


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
