"""Progress of long stretches of work: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # in a log file
BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
)
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} passed, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm's bar on stderr, with what is being done (`desc`) and its `unit` in the plural.

    If stderr is not a terminal, as under nohup, it prints a whole line at the start, at the end and
    every SECONDS_BETWEEN_LINES.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, desc: str, unit: str, **options: Any
    ) -> None:
        self._plain, self._closing, self._printed_at = not sys.stderr.isatty(), False, -1e9
        super().__init__(
            iterable,
            desc=desc,
            unit=unit,
            bar_format=LINE if self._plain else BAR,
            dynamic_ncols=not self._plain,
            **options,
        )

    def doing(self, what: str) -> None:
        """Shows at once what happens at this point of the work, such as "validating"."""
        self._printed_at = -1e9
        self.set_postfix_str(what)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Shows the current state, or `msg`; a line in a log file only if it is time for one."""
        if not self._plain:
            return super().display(msg, pos)
        if self._closing or time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            line = str(self) if msg is None else msg
            # tqdm ends the line itself when it closes.
            self.fp.write(line if self._closing else f"{line}\n" if line else "")
            self.fp.flush()
        return True

    def clear(self, *args: Any, **options: Any) -> None:
        """Removes the bar from the terminal."""
        if not self._plain:
            super().clear(*args, **options)

    def close(self) -> None:
        """Shows the final state and ends the line."""
        self._closing = True
        super().close()


def close_all() -> None:
    """Ends the line of every bar that an error has left open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
