"""scripts/environment.sh: what it installs, when it installs again, and the versions in
constraints.txt."""

import itertools
import os
import re
import shutil
import tomllib
from pathlib import Path

from tiny import environment, run_process

from common.files import ROOT

PINNED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)==(?P<version>[0-9A-Za-z.]+)")


def lines(path: Path) -> list[str]:
    """The lines of a requirements file without comments."""
    bare = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in bare if line]


def test_the_environment_is_made_again_when_either_file_changes(tmp_path: Path) -> None:
    """With stand-ins for python3, which makes no .venv, and for the Python in it, which notes its
    arguments."""
    root, log, stand_in = tmp_path / "a clone", tmp_path / "log", tmp_path / "bin" / "python3"
    (root / "scripts").mkdir(parents=True)
    for name in (
        "scripts/environment.sh",
        "scripts/python.sh",
        "requirements.txt",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, root / name)
    for path, body in ((stand_in, "exit 0"), (root / ".venv/bin/python", f'echo "$@" >> "{log}"')):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def installed() -> list[str]:
        """What pip was called with when the script was sourced once more."""
        log.write_text("")
        variables = environment(PATH=f"{stand_in.parent}:{os.environ['PATH']}")
        result = run_process(
            ["bash", "-euo", "pipefail", root / "scripts" / "environment.sh"], env=variables
        )
        assert result.returncode == 0, result.stderr
        return log.read_text().splitlines()

    packages, own = installed()
    assert (
        f"-r {root}/requirements.txt -c {root}/constraints.txt" in packages and "--editable" in own
    )
    assert installed() == []
    for name in ("requirements.txt", "constraints.txt"):
        with open(root / name, "a") as file:
            file.write("# a line more\n")
        assert len(installed()) == 2
        assert installed() == []


def test_an_extra_is_installed_on_first_use(tmp_path: Path) -> None:
    """With a stand-in for the Python of .venv, which notes its arguments."""
    root, log = tmp_path / "a clone", tmp_path / "log"
    (root / "scripts").mkdir(parents=True)
    names = ("scripts/environment.sh", "scripts/python.sh", "scripts/demo.sh")
    for name in (*names, "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    python.chmod(0o755)
    (root / ".venv" / "installed").write_bytes(
        (root / "requirements.txt").read_bytes() + (root / "constraints.txt").read_bytes()
    )
    for installs in (1, 0):
        log.write_text("")
        result = run_process(["bash", root / "scripts" / "demo.sh", "--port", "7000"])
        assert result.returncode == 0, result.stderr
        *pip, program = log.read_text().splitlines()
        assert program == "-m scripts.demo --port 7000"
        assert len(pip) == installs
    assert (root / ".venv" / "installed_demo").is_file()


def test_constraints_pin_every_requirement_to_a_public_version() -> None:
    """No local version such as +cpu, and none of the packages that belong to one build of
    PyTorch."""
    pins = [PINNED.fullmatch(line) for line in lines(ROOT / "constraints.txt")]
    assert all(pins)
    names = [pin["name"] for pin in pins]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    required = [*lines(ROOT / "requirements.txt"), *itertools.chain(*extras.values())]
    assert {re.split("[<>=]", line)[0] for line in required} <= set(names)
