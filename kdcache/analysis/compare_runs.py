"""Finished runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.core.command_result import Report
from kdcache.core.run_dir import read_result


def compare_runs(paths: Sequence[str]) -> Report:
    """Finished runs side by side: as data and as a table.

    Raises:
        UsageError: a folder holds no finished run.
    """
    rows = [{"run": path, **read_result(Path(path))} for path in paths]
    header = ["run", "role", "model", "accuracy", "parameters", "s/epoch"]
    cells = [header, *([_cell(row, column) for column in header] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return Report({"runs": rows}, "\n".join(line.rstrip() for line in lines))


def _cell(row: dict[str, Any], column: str) -> str:
    if column == "accuracy":
        return "-" if row["test_accuracy"] is None else f"{row['test_accuracy']:.2%}"
    if column == "parameters":
        return f"{row['parameters']:,}"
    if column == "s/epoch":
        return f"{sum(row['epoch_seconds']) / len(row['epoch_seconds']):.2f}"
    return str(row[column])


def _align(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column < 3 else f"{cell:>{width}}"
