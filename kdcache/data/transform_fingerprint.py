"""Parameters of a transform as text, so that a changed one is refused before any input is read.

The checksums of the inputs prove that two transforms are the same; a description only names what was changed.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, bytes, type(None))
# Enough for any transform, and a bound for one that refers to half of the program.
_ENTRIES, _DEPTH = 2000, 16


def describe_object(name: str, value: Any) -> dict[str, str]:
    """The type of an object and its parameters by dotted name, the same in every process.

    Functions are described by name, defaults and closure, not by their code; other objects that cannot be called by
    their `repr`.
    """
    return dict(islice(_described(name, value, ()), _ENTRIES))


def _described(name: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, enum.Enum):
        yield name, f"{type(value).__name__}.{value.name}"
    elif isinstance(value, type | ModuleType):
        yield name, _dotted(value)
    elif isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object):
        yield name, _digest(value)
    elif id(value) in above:
        yield name, "itself"
    elif len(above) == _DEPTH:
        yield name, _dotted(type(value))
    elif isinstance(value, list | tuple | Mapping) or callable(value):
        yield from _parts(name, value, (*above, id(value)))
    else:
        text = repr(value)
        # A set's order and an object's address differ from process to process.
        varies = isinstance(value, set | frozenset) or " at 0x" in text
        yield name, _dotted(type(value)) if varies else text


def _parts(name: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Entries of a container or of an object that can be called; `above` ends with its own id."""
    if isinstance(value, list | tuple):
        if all(isinstance(item, _PLAIN) for item in value):
            yield name, repr(list(value))
            return
        held: dict[str, Any] = {f"[{at}]": item for at, item in enumerate(value)}
    elif isinstance(value, Mapping):
        yield name, f"{len(value)} items"
        held = {f".{_dotted(key) if isinstance(key, type) else key}": item for key, item in value.items()}
    else:
        yield name, "functools.partial" if isinstance(value, functools.partial) else _dotted(_named(value))
        held = {f".{key}": item for key, item in settings_of(value).items()}
    for key, item in held.items():
        yield from _described(f"{name}{key}", item, above)


def settings_of(value: Any) -> dict[str, Any]:
    """The parameters of a callable object by name; of a module with its tensors and its submodules."""
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if inspect.isroutine(value):
        return _settings_of_function(value)
    settings = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        settings = {name: item for name, item in settings.items() if name not in vars(nn.Module())}
        settings |= dict(value.named_buffers(recurse=False)) | dict(value.named_parameters(recurse=False))
        modules = value.named_modules(remove_duplicate=False)
        settings |= {name: module for name, module in modules if name and "." not in name}
    return settings


def _settings_of_function(function: Any) -> dict[str, Any]:
    contents = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            contents.append(cell.cell_contents)
    settings = {
        "self": getattr(function, "__self__", None),
        "defaults": getattr(function, "__defaults__", None),
        "keyword defaults": getattr(function, "__kwdefaults__", None),
        "closure": contents or None,
    }
    return {name: item for name, item in settings.items() if item is not None and not isinstance(item, ModuleType)}


def _named(value: Any) -> Any:
    return value if inspect.isroutine(value) else type(value)


def _dotted(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", None)
    return f"{module}.{value.__qualname__}" if module else str(value.__qualname__)


def _digest(value: Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(value, Tensor):
        # Viewed as bytes by torch, because numpy has no bfloat16.
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype)
    else:
        data, dtype = value.tobytes(), value.dtype.str
    return f"{dtype} {tuple(value.shape)} sha256 {hashlib.sha256(data).hexdigest()[:16]}"
