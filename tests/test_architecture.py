"""Rules of the house, read from the source: every idea in one room, and no problem leaning on
another."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.files import ROOT

PROBLEMS = ("p1_diffusion", "p2_ddim", "p3_controlnet", "p3_clip")
PACKAGES = ("common", *PROBLEMS)
HEAVY = {"diffusers", "transformers", "open_clip"}  # P1 and P2 need none of them...
ADAPTERS = {
    "p2_ddim/model.py": {"diffusers"}
}  # ...but to read that library's own models, inside a function.
PROGRAM = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in (*PACKAGES, "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(path: str, source: str) -> Iterator[str]:
    """The full name of every module or member that the file at `path` imports, inside functions
    too."""
    yield from _imports(path, ast.parse(source), into_functions=True)


def eager_imports(path: str, source: str) -> Iterator[str]:
    """The same without those inside functions and under TYPE_CHECKING: what importing the file
    imports."""
    yield from _imports(path, ast.parse(source), into_functions=False)


def _imports(path: str, tree: ast.AST, into_functions: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = Path(path).parts[: -node.level] if node.level else ()
            module = ".".join([*folder, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif into_functions or not _runs_later(node):
            yield from _imports(path, node, into_functions)


def _runs_later(node: ast.AST) -> bool:
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def names(source: str) -> set[str]:
    """Every name and dotted name that the source uses or imports: `torch.load`, and `cumprod` of
    `x.cumprod`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} | {
                f"{node.module}.{alias.name}" for alias in node.names
            }
    return found


def outside_its_room(path: str, source: str) -> list[str]:
    """Ideas that the file uses though they live in another."""
    rooms = {
        "cumprod": "common/diffusion/schedule.py",
        "torch.cumprod": "common/diffusion/schedule.py",
        "torch.load": "common/checkpoint.py",
        "pickle.load": "common/checkpoint.py",
        "pickle.loads": "common/checkpoint.py",
        "torch.jit.load": "common/checkpoint.py",
        "Image.open": "common/images.py",
        "F.interpolate": "common/images.py",
    }
    return sorted(name for name in names(source) if rooms.get(name, path) != path)


def process_variables(source: str) -> set[str]:
    """The launcher's variables that the source names: common/devices.py reads them for all."""
    texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    return texts & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def forbidden_imports(path: str, source: str) -> list[str]:
    """Imports of argparse, of another problem, and of any problem from common."""
    own = path.split("/")[0]
    others = {*PROBLEMS} - {own} if own in PACKAGES else set()
    return sorted(
        name for name in imports(path, source) if name.split(".")[0] in {"argparse", *others}
    )


def reachable(start: str, program: dict[str, str]) -> set[str]:
    """The files of a problem's folder, and all that they lead to through imports."""
    waiting = [path for path in program if path.startswith(f"{start}/")]
    found: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imports(path, program[path]):
            parts = name.split(".")
            for i in range(1, len(parts) + 1):  # `import a.b.c` runs a, a.b and a.b.c
                stem = "/".join(parts[:i])
                waiting += [
                    file for file in (f"{stem}.py", f"{stem}/__init__.py") if file in program
                ]
    return found


def heavy_imports(start: str, program: dict[str, str]) -> dict[str, set[str]]:
    """The heavy libraries that a problem leads to, by the file that imports them."""
    heavy = {}
    for path in reachable(start, program):
        eager, anywhere = (
            {name.split(".")[0] for name in find(path, program[path])} & HEAVY
            for find in (eager_imports, imports)
        )
        heavy[path] = eager | (anywhere - ADAPTERS.get(path, set()))
    return {path: libraries for path, libraries in heavy.items() if libraries}


def test_only_two_files_unpickle_and_neither_runs_code() -> None:
    """The second reads OpenAI's archives, whose tensors it names itself."""
    unpickling = {path for path, source in PROGRAM.items() if "pickle.Unpickler" in names(source)}
    assert unpickling <= {"common/checkpoint.py", "common/clip/torchscript.py"}
    assert not any("allow_pickle=True" in source for source in PROGRAM.values())


def at_import(source: str) -> list[str]:
    """Calls that importing the file makes for their effect."""
    body = ast.parse(source).body
    return [
        ast.unparse(node)
        for node in body
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ]


def test_nothing_happens_at_import() -> None:
    """But for two settings of the process that concern the file's own."""
    allowed = {
        "common/files.py": ["os.register_at_fork(after_in_child=_close_all_locks)"],
        "common/images.py": ["warnings.filterwarnings('ignore', module='PIL\\\\.')"],
    }
    found = {path: calls for path, source in PROGRAM.items() if (calls := at_import(source))}
    assert found == allowed


@pytest.mark.parametrize("path", PROGRAM)
def test_every_idea_stays_in_its_room(path: str) -> None:
    assert outside_its_room(path, PROGRAM[path]) == []


def test_one_file_asks_which_process_this_is() -> None:
    asking = {path for path, source in PROGRAM.items() if process_variables(source)}
    assert asking == {"common/devices.py"}


def test_one_file_knows_versions_of_libraries() -> None:
    told_apart = re.compile(
        r"(transformers|diffusers)"
        r" \d|__version__|importlib\.metadata|position_ids|StrictDataclassError"
    )
    assert {path for path, source in PROGRAM.items() if told_apart.search(source)} == {
        "common/versions.py"
    }


@pytest.mark.parametrize("path", PROGRAM)
def test_no_problem_imports_another_and_common_imports_none(path: str) -> None:
    """Command lines come from dataclasses through common/cli.py, so nothing imports argparse."""
    assert forbidden_imports(path, PROGRAM[path]) == []


@pytest.mark.parametrize("problem", ["p1_diffusion", "p2_ddim"])
def test_pixel_problems_need_no_heavy_library(problem: str) -> None:
    """Neither themselves nor through anything in common that they import."""
    assert heavy_imports(problem, PROGRAM) == {}


@pytest.mark.parametrize("path", [path for path in PROGRAM if path.startswith("common/")])
def test_common_imports_a_heavy_library_only_where_it_is_needed(path: str) -> None:
    """So that `--help` and a refusal take no seconds."""
    assert {name.split(".")[0] for name in eager_imports(path, PROGRAM[path])} & HEAVY == set()


def test_only_the_demo_imports_gradio() -> None:
    importing = {
        path
        for path, source in PROGRAM.items()
        if "gradio" in {name.split(".")[0] for name in imports(path, source)}
    }
    assert importing and all(path.endswith("/demo.py") for path in importing)
    assert "gradio" not in set(eager_imports("scripts/demo.py", PROGRAM["scripts/demo.py"]))


def test_the_program_was_found() -> None:
    """So that the tests above look at something."""
    assert {
        "common/diffusion/schedule.py",
        "common/checkpoint.py",
        "p1_diffusion/train.py",
    } <= PROGRAM.keys()
    assert outside_its_room("elsewhere.py", PROGRAM["common/diffusion/schedule.py"]) == [
        "cumprod",
        "torch.cumprod",
    ]
    assert outside_its_room("elsewhere.py", PROGRAM["common/checkpoint.py"]) == ["torch.load"]
    assert {"common/diffusion/schedule.py", "common/diffusion/process.py"} <= reachable(
        "p1_diffusion", PROGRAM
    )
    assert {"common/clip/loading.py", "common/clip/formats.py"} <= reachable("p3_clip", PROGRAM)
    assert heavy_imports("p3_clip", PROGRAM)["common/clip/loading.py"] == {"open_clip"}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cumprod(x, 0)",
        "y = (1 - betas).cumprod(0)",
        "from numpy import cumprod",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "import pickle\npickle.loads(data)",
        "from pickle import load",
        "from PIL import Image\nImage.open(path)",
        "import torch.nn.functional as F\nF.interpolate(x, (8, 8))",
    ],
)
def test_an_idea_outside_its_room_is_caught(source: str) -> None:
    assert outside_its_room("p1_diffusion/model.py", source) != []


@pytest.mark.parametrize(
    ("path", "source", "caught"),
    [
        ("common/images.py", "import p1_diffusion.model", True),
        ("common/images.py", "def f():\n    from p3_clip import model", True),
        ("p1_diffusion/train.py", "from p2_ddim.model import UNet", True),
        ("p1_diffusion/train.py", "from ..p2_ddim import model", True),
        ("scripts/make_report.py", "import argparse", True),
        ("p3_clip/personalisation/train.py", "from p3_clip.model import classify", False),
        ("p3_clip/personalisation/train.py", "from .model import words", False),
        ("scripts/make_report.py", "from p2_ddim.study import figures", False),
    ],
)
def test_a_forbidden_import_is_caught(path: str, source: str, caught: bool) -> None:
    assert bool(forbidden_imports(path, source)) == caught


def test_a_heavy_library_is_caught() -> None:
    """Behind common, inside a function, and in an adapter that imports it before it is needed."""
    program = {
        "p2_ddim/train.py": "from common.latent import text_encoder\nfrom p2_ddim.model import f",
        "p2_ddim/model.py": "def f():\n    import diffusers",
        "common/latent/text_encoder.py": "def f():\n    import transformers",
        "common/other.py": "import diffusers",
    }
    assert reachable("p2_ddim", program) == program.keys() - {"common/other.py"}
    assert heavy_imports("p2_ddim", program) == {"common/latent/text_encoder.py": {"transformers"}}
    program["common/latent/text_encoder.py"] = (
        "if TYPE_CHECKING:\n    import transformers\ndef f():\n    pass"
    )
    assert (
        list(
            eager_imports("common/latent/text_encoder.py", program["common/latent/text_encoder.py"])
        )
        == []
    )
    program |= {"p2_ddim/model.py": "import diffusers", "common/latent/text_encoder.py": ""}
    assert heavy_imports("p2_ddim", program) == {"p2_ddim/model.py": {"diffusers"}}
