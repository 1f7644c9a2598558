"""Code that all problems share: diffusion, training loop, data, images and metrics.

Imports no problem folder.
"""

import signal
import sys
from types import TracebackType

from common.errors import interruption_behind


def _without_interrupts(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught exception as Python does, but nothing on Ctrl-C.

    Python then ends by the signal itself, if the exception is no other that was made from it.
    """
    if interruption_behind(error) is None:
        sys.__excepthook__(kind, error, trace)
    elif not issubclass(kind, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


if sys.argv[:1] == ["-m"]:  # `python -m` is importing a program, which takes seconds
    sys.excepthook = _without_interrupts
