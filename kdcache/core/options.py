"""Settings as such: what a field may be, where values come from, and how several sources become one."""

from __future__ import annotations

import json
import math
import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from kdcache.core.errors import UsageError
from kdcache.core.json_records import from_json, to_json

T = TypeVar("T", bound="Settings")


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    argument: bool = False,
    required: bool = False,
) -> Any:
    """A setting: its default, its help text and what it may be.

    Args:
        above: exclusive lower bound, where `minimum` is inclusive.
        argument: given on the command line by position instead of by name.
        required: on the command line; a missing value is a usage error there.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "choices": choices,
        "argument": argument,
        "required": required,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks every value against its bounds.

    Raises:
        UsageError: a value is out of bounds or not among the choices.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            value, rule = getattr(self, each.name), each.metadata
            flag = "--" + each.name.replace("_", "-")
            if value is None or not rule:
                continue
            if rule["choices"] and value not in rule["choices"]:
                raise UsageError(f"{flag} is {value!r}", f"one of {', '.join(rule['choices'])}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"{flag} is {number}", "a finite number")
                if rule["minimum"] is not None and not number >= rule["minimum"]:
                    raise UsageError(f"{flag} is {number}", f"at least {rule['minimum']:g}")
                if rule["above"] is not None and not number > rule["above"]:
                    raise UsageError(f"{flag} is {number}", f"more than {rule['above']:g}")
                if rule["maximum"] is not None and not number <= rule["maximum"]:
                    raise UsageError(f"{flag} is {number}", f"at most {rule['maximum']:g}")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file or in a run's config.json, as plain values.

    Raises:
        UsageError: the file is missing or is neither.
    """
    path = Path(path)
    try:
        text = path.read_text()
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as problem:
        raise UsageError(
            f"cannot read settings from {path}: {problem.strerror}", "a TOML file or a config.json"
        ) from problem
    except ValueError as problem:
        raise UsageError(
            f"{path} is neither TOML (.toml) nor JSON: {problem}", "a TOML file or a config.json"
        ) from problem
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a {type(data).__name__}", "a table of settings")
    return {key.replace("-", "_"): value for key, value in data.items()}


def merge(config_class: type[T], *layers: dict[str, Any], where: str = "settings") -> T:
    """Settings from several layers of plain values, the last one on top.

    Raises:
        UsageError: a name that is not a setting, or a value out of bounds.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    for each in fields(config_class):
        if "tuple" in str(each.type) and isinstance(merged.get(each.name), str):
            merged[each.name] = [merged[each.name]]  # one value where several may stand
    return from_json(config_class, merged, where=where, error=UsageError)


def narrow(config_class: type[T], settings: Settings) -> T:
    """The part of some settings that `config_class` names."""
    data = to_json(settings)
    return from_json(
        config_class, {each.name: data[each.name] for each in fields(config_class)}, where="settings", error=UsageError
    )
