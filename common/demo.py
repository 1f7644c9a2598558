"""What the tabs of the web demo share: one job at a time, steps to watch, errors as sentences.

Each problem has a `demo.py` with a function `tab`, which `scripts/demo.py` calls inside gradio's
`Blocks`. Only these files and this one import gradio, which the extra `demo` installs.
"""

import contextlib
import html
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.diffusion.samplers import Callback
from common.errors import InputError
from common.images import open_image

Result = TypeVar("Result")

MOST_PIXELS = 25 * 10**6  # of an uploaded picture; larger ones would keep the queue waiting
FRAME_SECONDS = 0.3  # least time between two pictures of a sampling run
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network"}
"""Options of every event that uses a network: all of them wait in one queue."""
PICTURE: dict[str, Any] = {
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
}
"""Options of `gr.Image` for results, which are shown without loss."""
GRID: dict[str, Any] = {**PICTURE, "show_label": False}
"""The same for grids, which have labels of their own."""

# One thread for all networks: each thread would start OpenMP threads of its own.
_worker = ThreadPoolExecutor(1, "network")


class Step(NamedTuple):
    """A sampling step: what a sampler's callback is given (common/diffusion/samplers.py)."""

    i: int
    t: int
    x_t: Tensor
    x0: Tensor


class Steps(Generic[Result]):
    """Iterates over the steps of a sampling run while it goes on; then `result` is its result.

    `run(callback)` samples and passes `callback` to the sampler.
    """

    result: Result

    def __init__(self, run: Callable[[Callback], Result]) -> None:
        self._run = run

    def __iter__(self) -> Iterator[Step]:
        seen: SimpleQueue[Step | None] = SimpleQueue()

        def callback(i: int, t: int, x_t: Tensor, x0: Tensor) -> None:
            seen.put(Step(i, t, x_t.float().cpu(), x0.float().cpu()))

        job = _worker.submit(self._run, callback)
        job.add_done_callback(lambda _: seen.put(None))
        while step := seen.get():
            yield step
        self.result = job.result()


def compute(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """The result of a call in the thread of all networks."""
    return _worker.submit(function, *arguments, **options).result()


class Page(gr.Blocks):
    """gradio's page, in which a value that a field cannot hold is answered by one sentence.

    Without it such a value, which an endpoint or a damaged upload may bring, is answered by the
    word "Error", and its traceback goes to the terminal.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any
    ) -> list[Any]:
        """The values that `block_fn` is called with; raises gr.Error that names the field."""
        try:
            values = await super().preprocess_data(block_fn, inputs, *more, **options)
        except gr.Error as error:  # a value out of the field's range
            error.print_exception = False
            raise
        except Exception as error:
            index = re.search(r"component at index (\d+)", str(error))
            field = block_fn.inputs[int(index[1])].label if index else "one of the inputs"
            raise _refused(f"{field}: this value or file cannot be read") from None
        for block, value in zip(block_fn.inputs, values, strict=True):
            if isinstance(block, gr.Textbox) and value is None:
                raise _refused(f"{block.label} must be a text")
        return values


def _refused(sentence: str) -> gr.Error:
    return gr.Error(in_the_page(sentence), title="This cannot be done", print_exception=False)


@contextlib.contextmanager
def errors_in_the_page() -> Iterator[None]:
    """Shows bad input and failures of files in the page, as one sentence."""
    try:
        yield
    except (InputError, OSError) as error:
        raise _refused(str(error)) from None


def in_the_page(sentence: str) -> str:
    """A program's error sentence for a page: flags by their words, files by their names alone.

    Characters that HTML would read, such as those around <new1>, are escaped.
    """
    sentence = re.sub(r"--([a-z][a-z0-9-]*)", lambda flag: flag[1].replace("-", " "), sentence)
    sentence = " ".join(re.sub(r"/(?:[^/\s]+/)+(?=[^/\s])", "", sentence).split())
    if sentence.split(" ")[0].isalpha():
        sentence = sentence[0].upper() + sentence[1:]
    return f"{html.escape(sentence, quote=False)}."


def check_pixels(path: Path) -> None:
    """Raises InputError if a picture has more than MOST_PIXELS, or is none."""
    with open_image(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise InputError(
                f"the picture has {image.width} x {image.height} pixels: the demo reads at most"
                f" {MOST_PIXELS // 10**6} million"
            )


def shown(picture: Tensor) -> NDArray[np.uint8]:
    """uint8 [3, H, W] as the array [H, W, 3] that `gr.Image` takes."""
    return picture.permute(1, 2, 0).contiguous().numpy()


def paced(items: Iterable[Result]) -> Iterator[Result]:
    """The items that come at least FRAME_SECONDS after the one before, and always the last.

    To make and send a picture takes as long as a sampling step of a small network.
    """
    sent = -math.inf
    for item in items:
        last = False
        if time.monotonic() - sent >= FRAME_SECONDS:
            yield item
            last, sent = True, time.monotonic()
    if not last:
        yield item


def whole(value: float | None, name: str) -> int:
    """The value of a number field as an integer; InputError with its name if it holds none."""
    if not isinstance(value, (int, float)) or not float(value).is_integer():
        raise InputError(f"{name} must be a whole number")
    return int(value)
