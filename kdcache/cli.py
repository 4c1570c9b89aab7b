"""The command line. Each command builds its settings, calls one function and prints what it returns.

Options are made from the settings' dataclasses, so a default or a help text is written once. Nothing here imports
torch, zarr or torchvision before a command runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kdcache import config
from kdcache.errors import KdcacheError, UsageError
from kdcache.records import Report

INTERRUPTED = 130

app = typer.Typer(
    help="Run a teacher once, keep its logits, train any number of students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _command(settings_class: type[config.Settings], name: str, example: str) -> Callable[..., Any]:
    """Register a function of settings as a command whose options are the fields of `settings_class`."""

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
                typer.echo("stopped; what is finished is kept, and the same command continues it", err=True)
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


def _settings(settings_class: type[config.Settings], given: dict[str, Any], file: str | None) -> config.Settings:
    """Settings from a file with the given flags on top."""
    names = {each.name for each in dataclasses.fields(settings_class)}
    layers = [config.read_settings(file)] if file else []
    if not file and given.get("resume") and given.get("out"):
        from pathlib import Path

        from kdcache.runs import read_config

        layers = [read_config(Path(given["out"]))]
    hints = typing.get_type_hints(settings_class)
    flags = {
        name: _numbers(name, value, hints[name]) if isinstance(value, str) and "tuple" in str(hints[name]) else value
        for name, value in given.items()
        if name in names and value is not None and value != []
    }
    layers = [{k: v for k, v in layer.items() if k != "command"} for layer in layers]
    settings = config.merge(settings_class, *layers, flags, where=file or "the command line")
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


@_command(config.TrainTeacher, "train-teacher", "kdcache train-teacher --dataset mnist --model cnn --out runs/teacher")
def train_teacher(settings: config.TrainTeacher) -> Report:
    """Train a teacher on the labels of a dataset."""
    from kdcache import commands

    return commands.train_teacher(settings)


@_command(
    config.DumpTeacher,
    "dump-teacher",
    "kdcache dump-teacher --dataset mnist --teacher cnn --checkpoint runs/teacher/best.pt --out runs/mnist.zarr",
)
def dump_teacher(settings: config.DumpTeacher) -> Report:
    """Run a teacher once over a dataset and keep its logits in a cache."""
    from kdcache import commands

    return commands.dump_teacher(settings)


@_command(
    config.TrainStudent,
    "train-student",
    "kdcache train-student --cache runs/mnist.zarr --student mlp --temperature 2 --alpha 0.5 --out runs/student",
)
def train_student(settings: config.TrainStudent) -> Report:
    """Train a student from a cache, without the teacher."""
    from kdcache import commands

    return commands.train_student(settings)


@_command(config.Evaluate, "evaluate", "kdcache evaluate --run runs/student")
def evaluate(settings: config.Evaluate) -> Report:
    """Judge a run's best checkpoint on a split."""
    from kdcache import commands

    return commands.evaluate(settings)


@_command(config.Inspect, "inspect", "kdcache inspect runs/mnist.zarr")
def inspect_cache(settings: config.Inspect) -> Report:
    """Show what a cache is of."""
    from kdcache.inspection import inspect_cache as inspect_one

    return inspect_one(settings.cache)


@_command(config.Verify, "verify", "kdcache verify runs/mnist.zarr")
def verify(settings: config.Verify) -> Report:
    """Check every byte of a cache; with --teacher, recompute a sample of rows as well."""
    if settings.teacher is not None:
        from kdcache import commands

        return commands.verify_with_teacher(settings)
    from kdcache.inspection import verify_cache

    return verify_cache(settings.cache, settings.split)


@_command(config.Compare, "compare", "kdcache compare runs/teacher runs/alone runs/student")
def compare(settings: config.Compare) -> Report:
    """Show finished runs side by side: accuracy, parameters, seconds an epoch."""
    from kdcache.inspection import compare_runs

    return compare_runs(settings.runs)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("kdcache"))
        raise typer.Exit


def main() -> None:
    """Entry point of the `kdcache` script."""
    app()


if __name__ == "__main__":
    main()
