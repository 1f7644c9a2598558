"""fill50k in the homework's layout: both forms of names, and every broken line named."""

import json
from pathlib import Path

import pytest
import torch

from common.data.fill50k import load_fill50k, read_prompts
from common.errors import InputError
from common.images import write_png


def fill50k(root: Path, bare: bool, count: int = 3) -> Path:
    """A tiny set: one colour each, names with or without their folders."""
    folder = root / "training"
    for kind in ("source", "target"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        for kind in ("source", "target"):
            write_png(
                folder / kind / f"{i}.png", torch.full((3, 512, 512), 40 * i, dtype=torch.uint8)
            )
        names = {kind: f"{i}.png" if bare else f"{kind}/{i}.png" for kind in ("source", "target")}
        lines.append(
            json.dumps({**names, "prompt": "pale golden rod circle with old lace background"})
        )
    (folder / "prompt.json").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("bare", [True, False])
def test_names_with_and_without_folder(bare: bool, tmp_path: Path) -> None:
    pairs = load_fill50k(fill50k(tmp_path, bare))
    assert [pair.target.name for pair in pairs] == ["0.png", "1.png", "2.png"]
    assert pairs[1].source.parent.name == "source" and pairs[1].target.parent.name == "target"
    assert pairs[2].read_target().shape == (3, 512, 512) and int(pairs[2].read_source().max()) == 80
    assert pairs[0].colours == ("pale golden rod", "old lace")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "prompt.json, line 2 is not valid JSON"),
        ("[1]", "line 2 must be an object with source, target, prompt"),
        ('{"source": "1.png", "target": "1.png"}', "line 2: 'prompt' is missing or is not text"),
        (
            '{"source": "1.png", "target": "1.png", "prompt": " "}',
            "line 2: 'prompt' is missing or is not text",
        ),
        (
            '{"source": 1, "target": "1.png", "prompt": "x"}',
            "line 2: 'source' is missing or is not text",
        ),
        (
            '{"source": "9.png", "target": "1.png", "prompt": "x"}',
            "line 2: .*source/9.png does not exist",
        ),
        (
            '{"source": "1.png", "target": "9.png", "prompt": "x"}',
            "line 2: .*target/9.png does not exist",
        ),
        (
            '{"source": "1.png", "target": "../1.png", "prompt": "x"}',
            "line 2: .* leads out of its folder",
        ),
        (
            '{"source": "1.png", "target": "0.png", "prompt": "x"}',
            "line 2: the target '0.png' is that of line 1 as well",
        ),
    ],
)
def test_a_broken_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = fill50k(tmp_path, bare=False) / "training" / "prompt.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(InputError, match=sentence):
        load_fill50k(tmp_path)


def test_missing_and_empty_sets(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="the pairs of fill50k are not there: .*get_dataset.sh 2025"
    ):
        load_fill50k(tmp_path)
    root = fill50k(tmp_path, bare=True)
    (root / "training" / "prompt.json").write_text("\n")
    with pytest.raises(InputError, match="prompt.json is empty"):
        load_fill50k(root)
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.json", tmp_path, tmp_path)


def test_targets_may_still_be_to_write(tmp_path: Path) -> None:
    folder = fill50k(tmp_path, bare=False) / "training"
    for file in (folder / "target").iterdir():
        file.unlink()
    pairs = read_prompts(
        folder / "prompt.json", folder / "source", tmp_path / "out", targets_exist=False
    )
    assert pairs[0].target == tmp_path / "out" / "target" / "0.png"  # literally as the line says


def test_prompts_are_read_as_one_array_too(tmp_path: Path) -> None:
    root = fill50k(tmp_path, bare=True)
    path = root / "training" / "prompt.json"
    pairs = load_fill50k(root)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=4).replace("\n", "\r\n").encode())
    assert load_fill50k(root) == pairs
    path.write_text(json.dumps([*rows, 3]))
    with pytest.raises(InputError, match=r"prompt\.json, line 1 must be an object with source"):
        load_fill50k(root)


def test_colours_have_all_spellings(tmp_path: Path) -> None:
    path = fill50k(tmp_path, bare=True) / "training" / "prompt.json"
    path.write_text(
        path.read_text().replace("old lace", "OldLace").replace("golden rod", "GoldenRod")
    )
    assert load_fill50k(tmp_path)[0].colours == ("pale golden rod", "old lace")


def test_a_prompt_of_another_form_has_no_colours(tmp_path: Path) -> None:
    path = fill50k(tmp_path, bare=True) / "training" / "prompt.json"
    path.write_text(path.read_text().replace("old lace", "lace"))
    with pytest.raises(InputError, match="not of the form COLOUR circle with COLOUR background"):
        _ = load_fill50k(tmp_path)[0].colours
