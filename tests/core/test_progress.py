"""What is told of long work where there is no terminal."""

from __future__ import annotations

import pytest

from kdcache.core import progress


@pytest.mark.parametrize(
    ("seconds", "line"),
    [(20.0, "dump: 100 of 400 rows, 5/s, 60 s left"), (250.0, "dump: 100 of 400 rows, 2.5 s each, 750 s left")],
)
def test_a_line_tells_pace_and_time_left(monkeypatch, capsys, seconds, line):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("dump", 400, "rows") as told:
        now[0] += 1
        told.advance(40)  # too soon for a line
        now[0] += seconds - 1
        told.advance(60)
    assert capsys.readouterr().err.splitlines() == [line]


def test_work_within_work_is_muted(capsys):
    with progress.muted():
        progress.log("inner")
    progress.log("outer")
    assert capsys.readouterr().err == "outer\n"
