"""Frozen dataclasses to JSON and back, strictly: the one mechanism behind manifests, run configs and checkpoints.

A record is a frozen dataclass whose fields are `str`, `int`, `float`, `bool`, `None`, other records, homogeneous
tuples and string-keyed dicts of those. Reading refuses fields it does not know, so that a file from a newer version is
never half understood.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from kdcache.core.errors import KdcacheError

T = TypeVar("T")

# Metadata of a field that was added after records had been written and hashed: at its default it is left out of the
# JSON, so that a record without it keeps its digest.
ADDED = {"added": True}


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that is hashed: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def to_json(record: Any) -> Any:
    """A record as plain JSON values (tuples become lists), without `ADDED` fields that have their default."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {
            field.name: to_json(getattr(record, field.name))
            for field in dataclasses.fields(record)
            if not ("added" in field.metadata and getattr(record, field.name) == _default(field))
        }
    if isinstance(record, tuple | list):
        return [to_json(item) for item in record]
    if isinstance(record, dict):
        return {key: to_json(item) for key, item in record.items()}
    return record


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_json(cls: type[T], data: Any, *, where: str, error: type[KdcacheError]) -> T:
    """Read a record of type `cls` from plain JSON values.

    Args:
        data: Plain values from `to_json`.
        where: Name of the source for messages, such as a file's path.
        error: the error raised for a field that is unknown, missing, of the wrong type or refused by the record.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} holds {brief(data)}", "a JSON object")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise error(
            f"{where} has a field that this version does not know: {', '.join(map(str, unknown))}",
            f"only {', '.join(sorted(hints))}",
            "correct the name, or read it with the kdcache version that wrote it",
        )
    fields = {key: _read(hints[key], value, where=f"{where}: {key}", error=error) for key, value in data.items()}
    try:
        return cls(**fields)
    except TypeError as problem:
        raise error(f"{where}: {problem}", f"every field that {cls.__name__} requires") from problem
    except KdcacheError:
        raise
    except ValueError as problem:
        raise error(f"{where}: {problem}") from problem


def _read(hint: Any, value: Any, *, where: str, error: type[KdcacheError]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _read(hint, value, where=where, error=error)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_read(arguments[0], item, where=f"{where}[{i}]", error=error) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _read(arguments[1], item, where=f"{where}.{key}", error=error) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where=where, error=error)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise error(f"{where} is {brief(value)}", f"a value of type {getattr(hint, '__name__', hint)}")


def differences(old: Any, new: Any, *, ignore: frozenset[str] = frozenset()) -> list[tuple[str, Any, Any]]:
    """Where two records of one type differ: (dotted field, old value, new value), in field order.

    Args:
        ignore: Dotted names of fields to skip, with everything below them.
    """
    return list(_differences(to_json(old), to_json(new), "", ignore))


def _differences(old: Any, new: Any, prefix: str, ignore: frozenset[str]) -> typing.Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            dotted = f"{prefix}.{key}" if prefix else key
            if dotted not in ignore:
                yield from _differences(old.get(key), new.get(key), dotted, ignore)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{prefix}[{at}]", ignore)
    elif old != new:
        yield prefix, old, new


def counted(count: int, singular: str, plural: str = "") -> str:
    """A number with its noun: `1 shard`, `2 shards`, `1,000 rows`.

    Args:
        plural: Plural of an irregular noun.
    """
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def brief(value: Any) -> str:
    """A value for a message, on one line and truncated; of a tensor or an array its type and shape."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape and dtype is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)} and dtype {dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
