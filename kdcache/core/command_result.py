"""Result of a command."""

from __future__ import annotations

import typing
from typing import Any


class Report(typing.NamedTuple):
    """Result of a command: `data` for `--json`, `text` for the terminal and an exit code.

    Attributes:
        silent: Whether nothing is printed, because another process prints it.
    """

    data: dict[str, Any]
    text: str
    exit_code: int = 0
    silent: bool = False
