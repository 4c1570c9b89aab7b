"""Base of all settings: bounds of options, dependencies between them, and settings merged from several sources."""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from kdcache.core.errors import UsageError
from kdcache.core.json_records import from_json, to_json
from kdcache.core.paths import cache_location, local_path, local_spec

T = TypeVar("T", bound="Settings")

# A value that is found out.
AUTO = "auto"

# Options whose values are paths in every command, and options whose values may contain one.
PATHS = frozenset(
    {
        *("out", "cache", "cache_dir", "archive", "run", "runs", "data_root", "checkpoint", "tokenizer", "inputs"),
        *("classes",),
        "path",
    }
)
SPECS = frozenset({"dataset", "model", "teacher", "student"})


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
    only_with: tuple[str, ...] = (),
    not_with: tuple[str, ...] = (),
    unless: str = "",
    url: bool = False,
    auto: bool = False,
) -> Any:
    """Field of a settings class, with its help text and its bounds.

    Args:
        minimum: Inclusive lower bound.
        above: Exclusive lower bound.
        maximum: Inclusive upper bound.
        choices: Allowed values; empty allows all.
        argument: Positional on the command line.
        required: A missing value is a usage error on the command line.
        only_with: Other settings, at least one of which this setting needs to have an effect: `NAME=VALUE`, also for
            `VALUE:…`, or `NAME` for any value but its default.
        not_with: Other settings that leave this one without effect, in the same form.
        unless: Flag that makes a required value optional.
        url: The place of a cache, which may be a URL.
        auto: A value of None, which is found out, is called `auto` on the command line and in files.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "choices": choices,
        "argument": argument,
        "required": required,
        "only_with": only_with,
        "not_with": not_with,
        "unless": unless,
        "url": url,
        "auto": auto,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks every value against its bounds and expands `~` in paths.

    Attributes:
        inherited_only_with: The `only_with` of every inherited setting that has none of its own.

    Raises:
        UsageError: a value is out of bounds, not among the choices, or not a path on this machine.
    """

    inherited_only_with: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            rule = each.metadata
            flag = each.name.upper() if rule.get("argument") else flag_of(each.name)
            if each.name in PATHS | SPECS:
                expand = cache_location if rule.get("url") else local_path if each.name in PATHS else local_spec
                object.__setattr__(self, each.name, _expanded(getattr(self, each.name), expand, flag))
            value = getattr(self, each.name)
            if value is None or not rule:
                continue
            if isinstance(value, str) and isinstance(each.default, tuple):
                raise UsageError(f"{flag} is the text {value!r}", f"a tuple of texts, such as ({value!r},)")
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


class ValueType(NamedTuple):
    """Type of a setting's value: a single `kind`, or a tuple of them."""

    kind: type
    several: bool


def value_types(settings_class: type[Settings]) -> dict[str, ValueType]:
    """Types of all settings of a class, by name, read from its annotations."""
    hints = typing.get_type_hints(settings_class)
    return {each.name: _value_type(hints[each.name]) for each in fields(settings_class)}


def _value_type(hint: Any) -> ValueType:
    if typing.get_origin(hint) is tuple:
        return ValueType(typing.get_args(hint)[0], several=True)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return _value_type(kinds[0]) if kinds else ValueType(hint, several=False)


def flag_of(name: str, *, off: bool = False) -> str:
    """Name of a setting's option on the command line; the one that turns a flag off for `off`."""
    return ("--no-" if off else "--") + name.replace("_", "-")


def check_effective(settings: Settings, given: Iterable[str]) -> None:
    """Refuse given settings that have no effect in combination with the others.

    Args:
        given: Names of the settings that the user gave.

    Raises:
        UsageError: one of them has no effect; the message names the other setting.
    """
    rules = {each.name: each for each in fields(settings)}
    own = vars(type(settings)).get("__annotations__", {})
    for name in given:
        only_with, not_with = rules[name].metadata["only_with"], rules[name].metadata["not_with"]
        if name not in own:
            only_with = only_with or settings.inherited_only_with
        flag = flag_of(name, off=rules[name].default is True)
        if only_with and not any(_holds(settings, rules, condition) for condition in only_with):
            needed = [_spelled(rules, condition) for condition in only_with]
            raise UsageError(f"{flag} is given without {' or '.join(needed)}", needed[0], f"leave {flag} out")
        for condition in not_with:
            if _holds(settings, rules, condition):
                other = _spelled(rules, condition)
                raise UsageError(f"{flag} has no effect with {other}", f"{flag} or {other}", f"leave {flag} out")


def _holds(settings: Settings, rules: Mapping[str, Field[Any]], condition: str) -> bool:
    name, _, value = condition.partition("=")
    if name not in rules:  # a command without the other setting
        return False
    found = getattr(settings, name)
    return value in (str(found), str(found).partition(":")[0]) if value else found != rules[name].default


def _spelled(rules: Mapping[str, Field[Any]], condition: str) -> str:
    name, _, value = condition.partition("=")
    return f"{flag_of(name, off=name in rules and rules[name].default is True)} {value}".rstrip()


def _expanded(value: Any, expand: Callable[[str, str], str], flag: str) -> Any:
    if isinstance(value, tuple):
        return tuple(expand(each, flag) for each in value)
    return expand(value, flag) if isinstance(value, str) else value


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings from a TOML file or a run's config.json, as plain values.

    Raises:
        UsageError: the file cannot be read, or is neither.
    """
    path = Path(local_path(os.fspath(path), "--config"))
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
    """Settings from several layers of plain values; later layers win.

    Raises:
        UsageError: an unknown name, or a value of the wrong type or out of bounds.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    for name in merged.keys() - {each.name for each in fields(config_class)}:
        if advice := suggestion(name, config_class):
            raise UsageError(f"{where} has no setting {name!r}", "the name of a setting", advice)
    for name, value_type in value_types(config_class).items():
        if value_type.several and isinstance(merged.get(name), str):
            merged[name] = [merged[name]]  # a single value of several allowed ones
    for each in fields(config_class):
        if each.metadata.get("auto") and merged.get(each.name) == AUTO:
            merged[each.name] = None
    return from_json(config_class, merged, where=where, error=UsageError)


# Names of settings in other tools, for advice only.
ALIASES = {
    "arch": "model",
    "aug": "augment",
    "batch": "batch_size",
    "bs": "batch_size",
    "ckpt": "checkpoint",
    "clip_grad": "clip_norm",
    "clip_grad_norm": "clip_norm",
    "data": "dataset",
    "data_dir": "data_root",
    "data_path": "data_root",
    "dtype": "encoding",
    "ema_decay": "ema",
    "fp16": "amp",
    "grad_clip": "clip_norm",
    "gpu": "device",
    "image_size": "size",
    "img_size": "size",
    "layers": "features",
    "lr": "learning_rate",
    "lr_schedule": "schedule",
    "lr_scheduler": "schedule",
    "max_grad_norm": "clip_norm",
    "max_length": "max_tokens",
    "num_epochs": "epochs",
    "num_views": "views",
    "num_workers": "workers",
    "opt": "optimizer",
    "optim": "optimizer",
    "output": "out",
    "output_dir": "out",
    "precision": "amp",
    "sched": "schedule",
    "smoothing": "label_smoothing",
    "tau": "temperature",
    "val_split": "val_fraction",
    "vocab_size": "vocabulary_size",
    "warmup": "warmup_epochs",
    "wd": "weight_decay",
    "weights": "checkpoint",
}


def suggestion(name: str, config_class: type[Settings]) -> str:
    """Advice for an unknown name of a setting; empty where no name is close."""
    names = [each.name for each in fields(config_class)]
    name = name.replace("-", "_")
    # Networks are named by their role: --model of train-teacher is --student of train-student.
    roles = [each for each in ("model", "student", "teacher") if each in names] if name in ("arch", "model") else []
    close = [ALIASES[name]] if ALIASES.get(name) in names else roles[:1] or difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(map(flag_of, close))}?" if close else ""


def default_values(settings_class: type[Settings]) -> dict[str, Any]:
    """Defaults of all settings, as plain values: what a run of a version without a setting was made with."""
    return {each.name: to_json(each.default) for each in fields(settings_class)}


def narrow(config_class: type[T], settings: Settings) -> T:
    """The settings that `config_class` has, out of those of a larger class."""
    return config_class(**{each.name: getattr(settings, each.name) for each in fields(config_class)})
