"""`InputError`, raised for errors that the user can fix; programs print it and exit with code 2."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


class InputError(Exception):
    """Bad input, an unusable file or an impossible request; the message is one sentence.

    Programs print the message to the user.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, and what had to be saved is saved; the program exits with 143."""


class Interrupted(BaseException):
    """A signal, of this `number`, interrupts the current work of a training."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interruption_behind(error: BaseException) -> KeyboardInterrupt | Interrupted | None:
    """What Ctrl-C or SIGTERM raised, if `error` is it or was made from it; else None.

    Python 3.11 raises a RuntimeError from what it meets while it makes a class, as in an import.
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            return error
        error = error.__cause__
    return None


SECONDS_TO_TRY_AGAIN = 0.1


@contextlib.contextmanager
def raises_terminated() -> Iterator[None]:
    """Inside the block SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt.

    Python drops an exception that is raised inside a destructor, as of a DataLoader. If it drops
    one of these, or `Interrupted`, the signal is sent again.
    """
    again: list[threading.Timer] = []

    def terminate(*_: object) -> None:
        raise Terminated

    def on_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        error = dropped.exc_value
        if isinstance(error, Interrupted):
            number = error.number
        elif isinstance(error, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        else:
            hook(dropped)
            return
        again.append(threading.Timer(SECONDS_TO_TRY_AGAIN, os.kill, (os.getpid(), number)))
        again[-1].daemon = True
        again[-1].start()

    before, hook = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook
    sys.unraisablehook = on_dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in again:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)
