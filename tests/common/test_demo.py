"""What the tabs of the web demo share."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import InputError

pytest.importorskip("gradio", reason="gradio is missing: pip install -e '.[demo]'")

import gradio as gr  # noqa: E402

from common.demo import (  # noqa: E402
    Steps,
    check_pixels,
    compute,
    errors_in_the_page,
    in_the_page,
    whole,
)
from common.diffusion.samplers import Callback  # noqa: E402


def test_steps_are_seen_in_order_and_the_result_comes_last() -> None:
    def run(callback: Callback) -> str:
        for i in range(3):
            callback(i, 10 - i, torch.full((1,), float(i)), torch.zeros(1))
        return "done"

    steps = Steps(run)
    assert [(step.i, step.t, step.x_t.item()) for step in steps] == [
        (0, 10, 0),
        (1, 9, 1),
        (2, 8, 2),
    ]
    assert steps.result == "done"


def test_an_error_of_the_run_comes_after_its_steps() -> None:
    def run(callback: Callback) -> Tensor:
        callback(0, 1, torch.zeros(1), torch.zeros(1))
        raise InputError("the second step failed")

    seen = []
    with pytest.raises(InputError, match="the second step failed"):
        for step in Steps(run):
            seen.append(step.i)
    assert seen == [0]


def test_bad_input_is_a_sentence_in_the_page() -> None:
    with pytest.raises(gr.Error) as shown, errors_in_the_page():
        raise InputError("--guidance-scale must be finite, not nan")
    assert shown.value.message == "Guidance scale must be finite, not nan."


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), errors_in_the_page():
        compute(lambda: 1 / 0)


def test_paths_of_the_server_are_not_shown() -> None:
    sentence = "/tmp/demo_x/ab12/evil.pt was refused: see docs/demo.md"
    assert in_the_page(sentence) == "evil.pt was refused: see docs/demo.md."


def test_a_word_in_angle_brackets_is_shown() -> None:
    assert in_the_page("no <new9> & <b>") == "No &lt;new9&gt; &amp; &lt;b&gt;."


def test_huge_pictures_are_refused(tmp_path: Path) -> None:
    Image.new("1", (6000, 5000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="has 6000 x 5000 pixels: the demo reads at most 25"):
        check_pixels(tmp_path / "a.png")
    Image.new("1", (5000, 5000)).save(tmp_path / "a.png")
    check_pixels(tmp_path / "a.png")


@pytest.mark.parametrize("value", [None, [0], "0", 0.5, float("nan"), float("inf")])
def test_a_number_field_must_hold_an_integer(value: float | None) -> None:
    assert whole(3.0, "the seed") == 3
    with pytest.raises(InputError, match="the seed must be a whole number"):
        whole(value, "the seed")
