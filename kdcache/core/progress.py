"""Progress on everything long: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]

LINE_INTERVAL_S = 10.0


# Set while the lines of work within work would only hide those of the outer one.
_MUTED: ContextVar[bool] = ContextVar("muted", default=False)


@contextmanager
def muted() -> Iterator[None]:
    """No lines and no bars for a while."""
    token = _MUTED.set(True)
    try:
        yield
    finally:
        _MUTED.reset(token)


def log(message: str) -> None:
    """A line on stderr that does not tear a progress bar."""
    if _MUTED.get():
        return
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Counts units of work up to a total, with their rate and the time left.

    Args:
        what: Name of the work, such as `dump train`.
        unit: Plural of the counted unit, such as `rows`.
        done: Number of units finished earlier.
        lines: Whether there are lines on a terminal too: the bars of several processes would overwrite each other.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, *, lines: bool = False) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._count, self._first = done, done
        self._began = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc=what, unit=f" {unit}", unit_scale=True)
            if _terminal() and not lines
            else None
        )

    def extend(self, count: int) -> None:
        """Raise the total."""
        self._total += count
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def advance(self, count: int) -> None:
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            rate = (self._count - self._first) / (self._last_line - self._began)
            left = (self._total - self._count) / rate if rate else 0.0
            pace = f"{1 / rate:.1f} s each" if 0 < rate < 1 else f"{rate:,.0f}/s"
            log(f"{self._what}: {self._count:,} of {self._total:,} {self._unit}, {pace}, {left:.0f} s left")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _terminal() -> bool:
    return sys.stderr.isatty() and not _MUTED.get()
