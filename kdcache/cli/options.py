"""From settings to commands: a dataclass of settings becomes options, and what was given becomes settings again.

A default or a help text is thus written once, in the dataclass.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kdcache.core.command_result import Report
from kdcache.core.errors import KdcacheError, UsageError
from kdcache.core.options import Settings, merge, read_settings

INTERRUPTED = 130


def command_of(app: typer.Typer, settings_class: type[Settings], name: str, example: str) -> Callable[..., Any]:
    """Register a function of settings as a command whose options are the fields of `settings_class`."""

    names = {each.name for each in dataclasses.fields(settings_class)}

    def register(function: Callable[[Any], Report]) -> Callable[[Any], Report]:
        def command(**given: Any) -> None:
            as_json, file = given.pop("as_json"), given.pop("config", None)
            try:
                settings = _settings(settings_class, given, file)
                report = function(settings)
            except KdcacheError as problem:
                typer.echo(f"error: {problem}", err=True)
                raise typer.Exit(problem.exit_code) from problem
            except KeyboardInterrupt as problem:
                again = "the same command with --resume" if "resume" in names else "the same command"
                typer.echo(f"stopped; what is finished is kept, and {again} goes on from there", err=True)
                raise typer.Exit(INTERRUPTED) from problem
            typer.echo(json.dumps(report.data) if as_json else report.text)
            if report.exit_code:
                raise typer.Exit(report.exit_code)

        parameters = [_parameter(each, settings_class) for each in _own_first(settings_class)]
        if not any(each.metadata["argument"] for each in dataclasses.fields(settings_class)):
            parameters.append(
                _keyword(
                    "config",
                    str | None,
                    typer.Option("--config", help="Settings from a TOML file or a run's config.json; flags win."),
                )
            )
        parameters.append(
            _keyword("as_json", bool, typer.Option("--json", help="Print one JSON object on stdout."), False)
        )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name, help=f"{inspect.getdoc(function)}\n\nExample: {example}")(command)
        return function

    return register


def _own_first(settings_class: type) -> list[dataclasses.Field[Any]]:
    """The fields with those of the class itself before those that it shares with other commands."""
    ranks = {
        name: rank
        for rank, base in reversed(list(enumerate(settings_class.__mro__)))
        for name in vars(base).get("__annotations__", {})
    }
    return sorted(dataclasses.fields(settings_class), key=lambda each: ranks[each.name])


def _keyword(name: str, hint: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])


def _parameter(each: dataclasses.Field[Any], settings_class: type) -> inspect.Parameter:
    """One option or argument. Its default is None, so that what was given can be told from what was not."""
    hint = typing.get_type_hints(settings_class)[each.name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    kind = kinds[0] if typing.get_origin(hint) is not tuple else hint
    many = typing.get_origin(kind) is tuple
    numbers = many and typing.get_args(kind)[0] in (int, float)
    text = each.metadata["help"]
    if each.metadata["required"]:
        text += " [required]"
    elif each.default not in (None, ()) and not isinstance(each.default, bool):
        default: Any = each.default
        text += f" [default: {','.join(map(str, default)) if many else default}]"
    hint = list[str] | None if many and not numbers else (str if numbers else kind) | None
    if each.metadata["argument"]:
        return _keyword(each.name, hint, typer.Argument(help=text, show_default=False))
    flag = "--" + each.name.replace("_", "-")
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}" if each.default else flag
    return _keyword(each.name, hint, typer.Option(flag, help=text, show_default=False))


def _settings(settings_class: type[Settings], given: dict[str, Any], file: str | None) -> Settings:
    """Settings from a file with the given flags on top."""
    names = {each.name for each in dataclasses.fields(settings_class)}
    layers = [read_settings(file)] if file else []
    if not file and given.get("resume") and given.get("out"):
        from pathlib import Path

        from kdcache.core.run_dir import read_config

        layers = [read_config(Path(given["out"]))]
    hints = typing.get_type_hints(settings_class)
    flags = {
        name: _numbers(name, value, hints[name]) if isinstance(value, str) and "tuple" in str(hints[name]) else value
        for name, value in given.items()
        if name in names and value is not None and value != []
    }
    layers = [{k: v for k, v in layer.items() if k != "command"} for layer in layers]
    settings = merge(settings_class, *layers, flags, where=file or "the command line")
    for each in dataclasses.fields(settings_class):
        if each.metadata["required"] and not getattr(settings, each.name):
            flag = each.name.upper() if each.metadata["argument"] else "--" + each.name.replace("_", "-")
            raise UsageError(f"{flag} is missing", each.metadata["help"], "see --help")
    return settings


def _numbers(name: str, text: str, hint: Any) -> list[float] | list[int]:
    whole = "int" in str(hint)
    try:
        return [int(part) for part in text.split(",")] if whole else [float(part) for part in text.split(",")]
    except ValueError as problem:
        example = "whole numbers with commas between, as 0,1,2" if whole else "numbers with commas between, as 0.5,0.5"
        raise UsageError(f"--{name.replace('_', '-')} is {text!r}", example) from problem
