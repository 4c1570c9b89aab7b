"""Commands from settings classes: their fields become options, and the given options become settings.

A default or a help text is thus written once, in the dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kdcache.cli.early import check_early
from kdcache.core.command_result import Report
from kdcache.core.errors import KdcacheError, UsageError
from kdcache.core.json_records import to_json
from kdcache.core.options import (
    AUTO,
    Settings,
    ValueType,
    check_effective,
    flag_of,
    merge,
    read_settings,
    suggestion,
    value_types,
)
from kdcache.core.paths import local_path
from kdcache.core.plugins import describe
from kdcache.core.specs import split_numbers

# Settings class of each command, filled in by `command_of`.
SETTINGS_CLASSES: dict[str, type[Settings]] = {}
INTERRUPTED = 130
UNEXPECTED = "error: unexpected "

# Panels of a command's help in order, from common to rare. Options in none of them are the command's own.
OWN, GENERAL = "Options", "General"
PANELS = {
    "Loss": ("temperature", "alpha", "distill", "tail", "objective", "student_layer", "label_smoothing"),
    "Optimisation": (
        *("epochs", "optimizer", "learning_rate", "weight_decay", "schedule", "warmup_epochs"),
        *("val_fraction", "metric", "patience", "momentum", "milestones", "gamma", "clip_norm", "ema"),
        *("decay_norm_bias", "grad_accumulation", "compile", "memory_format", "sync_batchnorm"),
    ),
    "Logs and checkpoints": ("log_every", "save_every", "tensorboard"),
    "Data and preprocessing": (
        *("dataset", "data_root", "download", "classes", "mean", "std", "size", "resize", "crop"),
        *("teacher_outputs", "class_map", "skip_unreadable"),
    ),
    "Views": (
        *("augment", "mix", "views", "view_seed", "plain_view", "view_schedule", "add_views"),
        *("views_per_sample", "views_in_flight"),
    ),
    "Text": ("max_tokens", "vocabulary_size", "tokenizer"),
    "Execution": ("device", "batch_size", "workers", "input_memory", "amp", "seed"),
    "Workers": ("worker", "steal"),
    "Storage": (
        *("features", "drop_features", "pool", "encoding", "temperatures", "max_kl", "compression", "shard_rows"),
        *("license", "citation"),
    ),
    "Reading the cache": (
        *("verify_inputs", "allow_partial", "cache_weights", "cache_memory", "cache_on_device"),
        *("cache_dir", "cache_disk"),
        *("row_source", "shuffle"),
    ),
}


def command_of(app: typer.Typer, settings_class: type[Settings], name: str, example: str) -> Callable[..., Any]:
    """Register a function of settings as a command whose options are the fields of `settings_class`."""
    names = {each.name for each in dataclasses.fields(settings_class)}
    SETTINGS_CLASSES[name] = settings_class

    def register(function: Callable[[Any], Report]) -> Callable[[Any], Report]:
        def command(**given: Any) -> None:
            as_json, debug, file = given.pop("as_json"), given.pop("debug"), given.pop("config", None)
            settings: Any = None
            try:
                options = _storage_options(given.pop("storage_option", None) or [])
                settings = _settings(settings_class, given, file)
                with options:
                    check_early(settings)
                    report = function(settings)
            except KdcacheError as problem:
                _show(f"error: {problem}", problem if debug else None)
                raise typer.Exit(problem.exit_code) from problem
            except KeyboardInterrupt as problem:
                typer.echo(f"stopped; {_kept(settings if 'resume' in names else None)}", err=True)
                raise typer.Exit(INTERRUPTED) from problem
            except Exception as problem:  # a defect of kdcache or of the user's code
                again = "" if debug else "\n  to do:  run the same command with --debug for the traceback"
                _show(f"{UNEXPECTED}{describe(problem)}{again}", problem if debug else None)
                raise typer.Exit(1) from problem
            if not report.silent:
                typer.echo(json.dumps(report.data) if as_json else report.text)
            if report.exit_code:
                raise typer.Exit(report.exit_code)

        types = value_types(settings_class)
        parameters = [_parameter(each, types[each.name]) for each in _own_first(settings_class)]
        if not any(each.metadata["argument"] for each in dataclasses.fields(settings_class)):
            parameters.append(
                _keyword(
                    "config",
                    str | None,
                    typer.Option(
                        "--config",
                        help="Settings from a TOML file or a run's config.json; flags win.",
                        rich_help_panel=GENERAL,
                    ),
                )
            )
        if any(each.metadata["url"] for each in dataclasses.fields(settings_class)):
            # No setting: settings are written to a run's config.json, and a value may be a secret.
            parameters.append(
                _keyword(
                    "storage_option",
                    list[str] | None,
                    typer.Option(
                        "--storage-option",
                        metavar="KEY=VALUE",
                        help="Option of the object store, such as endpoint=URL; repeat for several. Never recorded.",
                        rich_help_panel=GENERAL,
                    ),
                )
            )
        for key, flag, text in (
            ("as_json", "--json", "Print one JSON object on stdout."),
            ("debug", "--debug", "Print the traceback of an error."),
        ):
            parameters.append(_keyword(key, bool, typer.Option(flag, help=text, rich_help_panel=GENERAL), False))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        help_text = f"{inspect.getdoc(function)}\n\nExample: {example}"
        app.command(name, cls=_command_class(settings_class), help=help_text)(command)
        return function

    return register


def _storage_options(given: list[str]) -> contextlib.AbstractContextManager[None]:
    """Options of object stores, from KEY=VALUE, as a context.

    Raises:
        UsageError: an option has no key or no value; its text is not repeated, as it may be a secret.
    """
    if not given:
        return contextlib.nullcontext()
    from kdcache.store.storage.registry import storage_options

    for number, text in enumerate(given, 1):
        key, equals, _ = text.partition("=")
        if not key.strip() or not equals:
            raise UsageError(f"--storage-option number {number} is not KEY=VALUE", "such as region=eu-west-1")
    return storage_options({key.strip(): value for key, _, value in (text.partition("=") for text in given)})


def _show(message: str, problem: BaseException | None) -> None:
    """Print a message on stderr, after the traceback of `problem` if given."""
    if problem is not None:
        typer.echo("".join(traceback.format_exception(problem)), err=True)
    typer.echo(message, err=True)


def _command_class(settings_class: type[Settings]) -> type[TyperCommand]:
    class Command(TyperCommand):
        """Command with its options in panels, and with advice for names of options in other tools."""

        def format_options(self, ctx: Any, formatter: Any) -> None:
            panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in ("Arguments", OWN, *PANELS, GENERAL)}
            for each in self.get_params(ctx):
                panel = "Arguments" if each.param_type_name == "argument" else getattr(each, "rich_help_panel", None)
                if (record := each.get_help_record(ctx)) is not None:
                    panels[panel or GENERAL].append(record)
            for panel, records in panels.items():
                if records:
                    with formatter.section(panel):
                        formatter.write_dl(records)

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            known = {flag for each in self.get_params(ctx) for flag in (*each.opts, *each.secondary_opts)}
            for given in itertools.takewhile(lambda each: each != "--", args):
                flag = given.partition("=")[0]
                if flag.startswith("--") and flag not in known and (advice := suggestion(flag[2:], settings_class)):
                    ctx.fail(f"No such option: {flag}: {advice}")
            return super().parse_args(ctx, args)

    return Command


def _kept(run: Any) -> str:
    """Message about the progress that survives Ctrl-C.

    Args:
        run: Settings of a training run; None for other commands.
    """
    if run is None:
        return "what is finished is kept, and the same command goes on from there"
    from pathlib import Path

    from kdcache.core.run_dir import LAST

    if (Path(run.out) / LAST).exists():
        return "finished epochs are kept, and the same command with --resume goes on from there"
    return "no epoch had finished, so nothing was saved: the same command starts from the beginning"


def _own_first(settings_class: type) -> list[dataclasses.Field[Any]]:
    """Fields of a settings class: its own first, then the inherited ones."""
    ranks = {
        name: rank
        for rank, base in reversed(list(enumerate(settings_class.__mro__)))
        for name in vars(base).get("__annotations__", {})
    }
    return sorted(dataclasses.fields(settings_class), key=lambda each: ranks[each.name])


def _keyword(name: str, hint: Any, info: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])


def _parameter(each: dataclasses.Field[Any], value_type: ValueType) -> inspect.Parameter:
    """Option or argument of one setting. Its default on the command line is None, which marks it as not given."""
    kind, several = value_type
    text = each.metadata["help"]
    if each.metadata["required"]:
        text += " [required]"
    elif each.metadata["auto"]:
        text += f" [default: {AUTO}]"
    elif each.default not in (None, (), "") and not isinstance(each.default, bool):
        default: Any = each.default
        text += f" [default: {','.join(map(str, default)) if several else default}]"
    # Several numbers are one text with commas; several texts are a repeated option.
    plain = kind if not each.metadata["auto"] else str
    hint: Any = (plain if not several else list[str] if kind is str else str) | None
    if each.metadata["argument"]:
        return _keyword(each.name, hint, typer.Argument(help=text, show_default=False))
    flag = flag_of(each.name)
    if kind is bool and each.default:
        flag = f"{flag}/{flag_of(each.name, off=True)}"
    panel = next((panel for panel, names in PANELS.items() if each.name in names), OWN)
    return _keyword(each.name, hint, typer.Option(flag, help=text, show_default=False, rich_help_panel=panel))


def _settings(settings_class: type[Settings], given: dict[str, Any], file: str | None) -> Settings:
    """Settings from the given flags, on top of those in a file or in the run to resume."""
    types = value_types(settings_class)
    from_file = read_settings(file) if file else {}
    below = from_file
    if not file and given.get("resume") and given.get("out"):
        from pathlib import Path

        from kdcache.core.run_dir import read_config

        below = read_config(Path(local_path(given["out"], "--out")))
    rules = {each.name: each for each in dataclasses.fields(settings_class)}
    flags = {
        name: _value(name, value, types[name], auto=rules[name].metadata["auto"])
        for name, value in given.items()
        if name in types and value is not None and value != []
    }
    below = {name: value for name, value in below.items() if name != "command"}
    settings = merge(settings_class, below, flags, where=file or "the command line")
    # A run's config.json holds every setting, so one at its default was not asked for.
    defaults = to_json(settings_class())
    asked = [name for name, value in from_file.items() if name in types and value not in (defaults[name], None)]
    check_effective(settings, dict.fromkeys([*flags, *asked]))
    for each in dataclasses.fields(settings_class):
        spared = each.metadata["unless"] and getattr(settings, each.metadata["unless"])
        if each.metadata["required"] and not spared and not getattr(settings, each.name):
            flag = each.name.upper() if each.metadata["argument"] else flag_of(each.name)
            raise UsageError(f"{flag} is missing", each.metadata["help"], "see --help")
    return settings


def _value(name: str, given: Any, value_type: ValueType, *, auto: bool) -> Any:
    if auto and given != AUTO:
        try:
            return value_type.kind(given)
        except ValueError as problem:
            raise UsageError(f"{flag_of(name)} is {given!r}", f"a whole number, or {AUTO}") from problem
    if not (value_type.several and isinstance(given, str)):
        return given
    try:
        return split_numbers(given, value_type.kind)
    except ValueError as problem:
        raise UsageError(f"{flag_of(name)} is {given!r}", str(problem)) from problem
