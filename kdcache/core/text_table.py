"""Tables in plain text, for what commands print."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> list[str]:
    """Lines of a table: the header, a rule and the rows.

    Args:
        header: Names of the columns.
        rows: Cells, as many per row as there are columns.
        numbers: Names of the columns whose cells are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            f"{cell:>{width}}" if name in numbers else f"{cell:<{width}}"
            for cell, width, name in zip(cells, widths, header, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return [line(header), line(["-" * width for width in widths]), *map(line, rows)]
