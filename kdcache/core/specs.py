"""Parser of specs: `NAME`, `NAME:VALUE`, `NAME:key=value,key=value`, numbers, lists of numbers, sizes in bytes."""

from __future__ import annotations

import math
import re
from typing import overload

from kdcache.core.errors import UsageError

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def split_spec(spec: str) -> tuple[str, str | None]:
    """Name and value of `NAME:VALUE`; the value is None where there is no colon."""
    name, colon, value = spec.partition(":")
    return name, value if colon else None


def split_options(text: str | None) -> dict[str, str]:
    """The options in `key=value,key=value`, in their order, with `_` for `-` in keys."""
    options = {}
    for part in filter(None, (text or "").split(",")):
        key, _, value = part.partition("=")
        options[key.strip().replace("-", "_")] = value.strip()
    return options


@overload
def number(text: str | None, kind: type[int], low: float, high: float = ..., *, above: bool = ...) -> int: ...
@overload
def number(text: str | None, kind: type[float], low: float, high: float = ..., *, above: bool = ...) -> float: ...
def number(
    text: str | None, kind: type[int] | type[float], low: float, high: float = math.inf, *, above: bool = False
) -> int | float:
    """A finite number from `low` to `high`.

    Args:
        above: Whether `low` itself is excluded.

    Raises:
        ValueError: the text is not such a number; the message says what is needed.
    """
    what = "a whole number" if kind is int else "a number"
    bounds = f"{'above' if above else 'from'} {low:g}" + ("" if high == math.inf else f" to {high:g}")
    try:
        value = kind(text or "")
    except ValueError as problem:
        raise ValueError(f"{what} {bounds}") from problem
    if not low <= value <= high or not math.isfinite(value) or (above and value == low):
        raise ValueError(f"{what} {bounds}")
    return value


def split_numbers(text: str, kind: type[int] | type[float]) -> list[int] | list[float]:
    """The numbers in `0.5,0.9`.

    Raises:
        ValueError: one of them is not a number of this kind; the message says what is needed.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as problem:
        needed = "whole numbers separated by commas, as 0,1,2"
        raise ValueError(needed if kind is int else "numbers separated by commas, as 0.5,0.9") from problem


def parse_bytes(text: str) -> int:
    """Bytes in `4GiB`, `500MB` or `1048576`.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text.strip())
    if match is None:
        raise UsageError(f"the size is {text!r}", f"a number with one of {', '.join(filter(None, _UNITS))}, as 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])
