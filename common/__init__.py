"""Code that all problems share: diffusion, training loop, data, images and metrics.

Imports no problem folder.
"""

import sys
from types import TracebackType


def _without_interrupts(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught exception as Python does, but nothing on Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # `python -m` is importing a program, which takes seconds
    sys.excepthook = _without_interrupts
