"""The readers of what people have, on inputs that hypothesis makes: each gives a value or an
InputError, and what was written is read back."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.colour import CSS_COLOURS, NAMES, colour_name
from common.data.fill50k import read_prompts
from common.data.layouts import parse_caption
from common.errors import InputError
from common.images import read_rgb
from common.text_files import parse_json, read_records
from common.weights import read_weights, unwrapped

quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(-1e300, 1e300) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """The value, or None after an InputError."""
    try:
        return read(*arguments)
    except InputError as error:
        assert str(error)
        return None


# ----------------------------------------------------------------------------
# JSON.


@quick
@given(JSON)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value), "file") == value
    assert parse_json(json.dumps(value, ensure_ascii=False, indent=1), "file") == value


@quick
@given(st.text('{}[]:,"\\u0dn8E+-. \r\n\tatrueNaIfily', max_size=60))
def test_no_text_breaks_the_json_reader(text: str) -> None:
    """What is taken, Python's reader takes too."""
    value = attempt(parse_json, text, "file")
    if value is not None:
        assert json.loads(text) == value


@quick
@given(st.lists(JSON.filter(lambda value: not isinstance(value, list)), max_size=5), st.booleans())
def test_lines_and_arrays_are_the_same_records(
    tmp_path: Path, values: list[Any], marked: bool
) -> None:
    encoding = "utf-8-sig" if marked else "utf-8"
    path = tmp_path / "list.json"
    ends = "\r\n" if marked else "\n"
    path.write_bytes("".join(json.dumps(v) + ends for v in values).encode(encoding))
    assert [value for _, value in read_records(path)] == values
    path.write_bytes(json.dumps(values, ensure_ascii=False, indent=2).encode(encoding))
    assert [value for _, value in read_records(path)] == values


@quick
@given(st.binary(max_size=80))
def test_no_bytes_break_the_reader_of_prompts(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "prompt.json"
    path.write_bytes(data)
    attempt(lambda: list(read_records(path)))
    attempt(read_prompts, path, tmp_path, tmp_path)


# ----------------------------------------------------------------------------
# Colours and sentences.


@quick
@given(st.sampled_from(NAMES), st.sampled_from(["", " ", "-", "_"]), st.booleans())
def test_a_colour_has_many_spellings(name: str, between: str, upper: bool) -> None:
    spelled = name.replace(" ", between)
    assert colour_name(spelled.upper() if upper else spelled) == name


@quick
@given(TEXT)
def test_no_text_breaks_the_reader_of_colours(text: str) -> None:
    assert colour_name(text) is None or colour_name(text) in CSS_COLOURS


@quick
@given(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.text("abcdefghijklmnopqrstuvwxyz -", max_size=20),
)
def test_sentences_are_parsed_or_refused(circle: str, background: str, noise: str) -> None:
    if circle != background:
        assert attempt(parse_caption, f"{circle} circle with {background} background") is not None
    attempt(parse_caption, f"{circle} {noise} circle with {noise} background")
    attempt(parse_caption, noise)


# ----------------------------------------------------------------------------
# Weights.

STATES = st.dictionaries(
    st.from_regex(r"(conv|norm|out)\.[0-9]\.(weight|bias)", fullmatch=True),
    st.just(torch.ones(2)),
    min_size=1,
    max_size=4,
)
WRAPPERS = st.lists(st.sampled_from(["module.", "_orig_mod.", "model."]), max_size=3)
OUTER = st.lists(st.sampled_from(["state_dict", "model_state_dict", "model", "ema"]), max_size=2)


@quick
@given(STATES, WRAPPERS, OUTER)
def test_wrappers_come_off(state: dict[str, Any], words: list[str], outer: list[str]) -> None:
    content: Any = {"".join(words) + name: value for name, value in state.items()}
    for name in outer:
        content = {name: content, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
    found, taken_off = unwrapped(content)
    assert found == state
    assert bool(taken_off) == bool(words or outer)


@quick
@given(
    st.recursive(
        st.none() | st.integers() | TEXT | st.just(torch.ones(1)),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_unwrapping_takes_any_content(content: Any) -> None:
    found, _ = unwrapped(content)
    assert all(value is None or isinstance(value, torch.Tensor) for value in found.values())


@quick
@given(st.binary(max_size=60), st.sampled_from(["a.pt", "a.ckpt", "a.bin", "a.safetensors"]))
def test_no_bytes_break_the_reader_of_weights(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert attempt(read_weights, tmp_path / name) is None


# ----------------------------------------------------------------------------
# Pictures.


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it skips
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@quick
@given(st.data())
def test_damaged_pictures_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, data: Any
) -> None:
    """A byte is changed and the end cut off; uint8 [3, H, W] or one sentence."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a changed size may be huge
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(stream, form)
    whole = bytearray(stream.getvalue())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / f"picture.{form.lower()}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    pixels = attempt(read_rgb, path)
    assert pixels is None or (pixels.dtype == torch.uint8 and pixels.shape[0] == 3)


@quick
@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]))
def test_all_modes_are_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (5, 4)).save(path)
    pixels = read_rgb(path)
    assert pixels.shape == (3, 4, 5) and math.isfinite(float(pixels.float().mean()))
