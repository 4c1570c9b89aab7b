"""Comparison of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.core.command_result import Report
from kdcache.core.run_dir import main_score, read_result
from kdcache.core.text_table import text_table


def compare_runs(paths: Sequence[str]) -> Report:
    """Compare the results of finished runs, one row per run.

    Raises:
        UsageError: a folder holds no finished run.
    """
    rows = [{"run": path, **read_result(Path(path))} for path in paths]
    header = ["run", "role", "model", "accuracy", "parameters", "s/epoch"]
    lines = text_table(header, [[_cell(row, column) for column in header] for row in rows], numbers=header[3:])
    return Report({"runs": rows}, "\n".join(lines))


def _cell(row: dict[str, Any], column: str) -> str:
    if column == "accuracy":
        score = main_score(row, "test")
        kind = "cosine " if "test_cosine" in row else "mAP " if "test_map" in row else ""
        return "-" if score is None else f"{kind}{score:.2%}"
    if column == "parameters":
        return f"{row['parameters']:,}"
    if column == "s/epoch":
        return f"{sum(row['epoch_seconds']) / len(row['epoch_seconds']):.2f}"
    return str(row[column])
