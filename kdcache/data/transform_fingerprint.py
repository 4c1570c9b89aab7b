"""What an object is made of, as text: what tells one augmentation from another."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import PurePath
from types import CellType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.core.json_records import canonical_json

_PLAIN = (bool, int, float, complex, str, bytes, range, slice, PurePath, type(None))
# Enough for any transform; less than an object that drags half the program along.
_ENTRIES, _DEPTH = 2000, 16
_OF_TORCH = frozenset(nn.Module().__dict__)


def describe_object(name: str, value: Any) -> dict[str, str]:
    """An object as text by dotted name: its type, its settings, and those of all that it holds.

    The same in every process. Of functions the name, the defaults and what they close over are told, not the code.
    """
    return dict(islice(_described(name, value, ()), _ENTRIES))


def _described(name: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, enum.Enum):
        yield name, f"{type(value).__name__}.{value.name}"
    elif isinstance(value, _PLAIN):
        yield name, repr(value)
    elif isinstance(value, torch.dtype | torch.device | np.dtype):
        yield name, str(value)
    elif isinstance(value, type | ModuleType | logging.Logger):
        yield name, _dotted(value)
    elif isinstance(value, Tensor | np.ndarray | np.generic) and getattr(value, "dtype", None) != np.dtype(object):
        yield name, _digest(value)
    elif id(value) in above:
        yield name, "itself"
    elif len(above) == _DEPTH:
        yield name, _dotted(type(value))
    else:
        yield from _parts(name, value, (*above, id(value)))


def _parts(name: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """What an object is made of, itself being among those above."""
    if isinstance(value, set | frozenset):
        described = [dict(_described("", item, above)) for item in value]
        # In the order of what they say: a set's own order changes from process to process.
        yield name, " ".join(sorted(canonical_json(item).decode() for item in described)) or "set()"
        return
    if isinstance(value, list | tuple | np.ndarray):
        items = list(value)
        if all(isinstance(item, _PLAIN) for item in items):
            yield name, repr(items)
        else:
            for at, item in enumerate(items):
                yield from _described(f"{name}[{at}]", item, above)
        return
    if isinstance(value, Mapping):
        yield name, f"{len(value)} items"
        held = {_dotted(key) if isinstance(key, type) else str(key): item for key, item in value.items()}
    elif isinstance(value, functools.partial):
        yield name, "functools.partial"
        held = {"func": value.func, "args": value.args, "keywords": value.keywords}
    elif inspect.isroutine(value):
        yield name, _dotted(value)
        held = _of_routine(value)
    else:
        yield name, _dotted(type(value))
        held = settings_of(value)
    for key, item in held.items():
        yield from _described(f"{name}.{key}", item, above)


def settings_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that are its settings; of a module what it holds, and not torch's own ones."""
    own = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                own[slot] = getattr(value, slot)
    if isinstance(value, nn.Module):
        own = {key: item for key, item in own.items() if key not in _OF_TORCH}
        own |= {**value._buffers, **value._parameters, **value._modules}
    return own


def _of_routine(value: Any) -> dict[str, Any]:
    cells: tuple[CellType, ...] = getattr(value, "__closure__", None) or ()
    contents = []
    for cell in cells:
        with contextlib.suppress(ValueError):  # a cell that is still empty
            contents.append(cell.cell_contents)
    held = {
        "self": getattr(value, "__self__", None),
        "defaults": getattr(value, "__defaults__", None),
        "keyword defaults": getattr(value, "__kwdefaults__", None),
        "closure": contents or None,
    }
    return {key: item for key, item in held.items() if item is not None and not isinstance(item, ModuleType)}


def _dotted(value: Any) -> str:
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or getattr(value, "name", "")
    return f"{module}.{name}" if module and not isinstance(value, ModuleType | logging.Logger) else str(name)


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        # Seen as bytes by torch, because numpy knows no bfloat16.
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} sha256 {hashlib.sha256(raw).hexdigest()[:16]}"
    array = np.asarray(value)
    return f"{array.dtype.str} {array.shape} sha256 {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
