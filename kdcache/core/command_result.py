"""What a command returns: data for a program, text for a person, an exit code for the shell."""

from __future__ import annotations

import typing
from typing import Any


class Report(typing.NamedTuple):
    """What a command has to say: to a program, to a person, and to the shell."""

    data: dict[str, Any]
    text: str
    exit_code: int = 0
