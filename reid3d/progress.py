"""How long work shows that it goes on."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20.0  # when stderr is not a terminal


class Progress:
    """A bar when stderr is a terminal, a line now and then when it is not; to be used in a `with` statement.

    total: steps to come. what, unit: words for the line "WHAT: 3 of 8 UNITs". shown: False for nothing at all.
    """

    def __init__(self, total: int, what: str, unit: str, shown: bool = True) -> None:
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit=unit, disable=not shown or self._lines)
        self._text = f"{what}: {{}} of {total} {unit}s"
        self._done, self._reported = 0, time.monotonic()

    def add(self, count: int) -> None:
        """`count` more are done."""
        self._bar.update(count)
        self._done += count
        if self._lines and time.monotonic() - self._reported > SECONDS_BETWEEN_LINES:
            print(self._text.format(self._done), file=sys.stderr, flush=True)
            self._reported = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
