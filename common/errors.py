"""`InputError`, raised for errors that the user can fix; programs print it and exit with code 2."""

import contextlib
import signal
from collections.abc import Iterator


class InputError(Exception):
    """Bad input, an unusable file or an impossible request; the message is one sentence.

    Programs print the message to the user.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, and what had to be saved is saved; the program exits with 143."""


@contextlib.contextmanager
def raises_terminated() -> Iterator[None]:
    """Inside the block SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
