"""Code from outside: `py:package.module:function` specs and optional dependencies."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from kdcache.core.errors import KdcacheError, MissingExtra

PREFIX = "py:"


def resolve(spec: str, *, error: type[KdcacheError]) -> Callable[..., Any]:
    """The function that `py:package.module:function` names, looked for in the current folder first.

    Raises:
        error: the spec is malformed, there is no such module, its import fails, or it has no such function.
    """
    module_name, _, name = spec.removeprefix(PREFIX).partition(":")
    dotted = module_name.split(".")
    if not spec.startswith(PREFIX) or not name.isidentifier() or not all(part.isidentifier() for part in dotted):
        raise error(f"{spec!r} does not name a function", "py:package.module:function", "write it as py:my_code:build")
    try:
        with current_folder_first():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        # The name tells the module that was asked for from one that it imports itself.
        if problem.name is None or not f"{module_name}.".startswith(f"{problem.name}."):
            raise error(f"{spec}: importing {module_name} fails with {describe(problem)}") from problem
        raise error(
            f"{spec}: there is no module {problem.name!r}",
            f"{module_name} in {os.getcwd()} or among the installed packages",
            "run from the folder that holds it, or install it",
        ) from problem
    except KdcacheError:
        raise
    except Exception as problem:
        raise error(
            f"{spec}: importing {module_name} fails with {describe(problem)}",
            "a module that can be imported",
            f'see what `python -c "import {module_name}"` says',
        ) from problem
    function = getattr(module, name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "has no function" if function is None else f"holds a {type(function).__name__}, not a function, named"
        raise error(f"{spec}: {module_name} {what} {name!r}", "a function", did_you_mean(name, callables))
    found: Callable[..., Any] = function
    return found


@contextlib.contextmanager
def current_folder_first() -> Iterator[None]:
    """Look for modules in the current folder too, as `py:` specs do; spawned processes inherit the path."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # The module may have changed the path too: only our own entry goes.
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def call_with_accepted(function: Callable[..., Any], **offered: Any) -> Any:
    """Call a function with those of the offered keywords that its signature takes (all, if it has `**kwargs`)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return function()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function(**offered)
    named = {item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    return function(**{key: value for key, value in offered.items() if key in named})


def require_extra(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name of the module.
        extra: Name of the extra of `kdcache` that installs it.
        why: Purpose, as the start of a sentence.

    Raises:
        MissingExtra: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise MissingExtra(
            f"{why} needs {module.partition('.')[0]}, which cannot be imported: {problem}",
            f"the extra kdcache[{extra}]",
            f'pip install "kdcache[{extra}]"',
        ) from problem


def did_you_mean(name: str, names: list[str]) -> str:
    """Advice for a name that is not among `names`: the close ones, or the first ones."""
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f", … ({len(names)} in all)" if len(names) > 12 else ""
    return f"choose one of {', '.join(names[:12])}{more}" if names else ""


def describe(problem: BaseException) -> str:
    """A foreign error in one line, with the place that raised it: `KeyError: 'x' (data.py, line 3)`."""
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = str(problem).strip().partition("\n")[0]
    return f"{type(problem).__name__}: {message}{place}"
