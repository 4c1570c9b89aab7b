"""The command line. Each command builds its settings, calls one function and prints what it returns.

Nothing here imports torch, zarr or torchvision before a command runs.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from kdcache.cli.options import command_of
from kdcache.core import commands
from kdcache.core.command_result import Report
from kdcache.core.config import ConvertConfig

app = typer.Typer(
    help="Run a teacher once, store its logits, train any number of students from them.",
    no_args_is_help=True,
    context_settings={"max_content_width": 120},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_command = partial(command_of, app)


@_command(
    commands.TrainTeacherArgs, "train-teacher", "kdcache train-teacher --dataset mnist --model cnn --out runs/teacher"
)
def train_teacher(settings: commands.TrainTeacherArgs) -> Report:
    """Train a teacher on the labels of a dataset."""
    from kdcache.apps import training

    return training.train_teacher(settings)


@_command(
    commands.DumpTeacherArgs,
    "dump-teacher",
    "kdcache dump-teacher --dataset mnist --teacher cnn --checkpoint runs/teacher/best.pt --out runs/mnist.zarr",
)
def dump_teacher(settings: commands.DumpTeacherArgs) -> Report:
    """Run a teacher once over a dataset and store its logits in a cache."""
    from kdcache.apps import dumping

    return dumping.dump_teacher(settings)


@_command(
    commands.TrainStudentArgs,
    "train-student",
    "kdcache train-student --cache runs/mnist.zarr --student mlp --temperature 2 --alpha 0.5 --out runs/student",
)
def train_student(settings: commands.TrainStudentArgs) -> Report:
    """Train a student from a cache, without the teacher."""
    from kdcache.apps import training

    return training.train_student(settings)


@_command(commands.EvaluateArgs, "evaluate", "kdcache evaluate --run runs/student")
def evaluate(settings: commands.EvaluateArgs) -> Report:
    """Evaluate a run's best checkpoint on a split."""
    from kdcache.apps import training

    return training.evaluate(settings)


@_command(commands.InspectArgs, "inspect", "kdcache inspect runs/mnist.zarr")
def inspect_cache(settings: commands.InspectArgs) -> Report:
    """Print the manifest of a cache."""
    from kdcache.store.inspect import inspect_cache as inspect_one

    return inspect_one(settings.cache)


@_command(commands.StatusArgs, "status", "kdcache status runs/imagenet.zarr")
def status(settings: commands.StatusArgs) -> Report:
    """Print the progress of a dump and of each of its workers."""
    from kdcache.store.status import cache_status

    return cache_status(settings.cache)


@_command(commands.SealArgs, "seal", "kdcache seal runs/imagenet.zarr")
def seal(settings: commands.SealArgs) -> Report:
    """Seal a dump whose shards are all committed, if its last worker was stopped before it did so."""
    from kdcache.store.seal import seal_splits

    return seal_splits(settings.cache, settings.split)


@_command(commands.VerifyArgs, "verify", "kdcache verify runs/mnist.zarr")
def verify(settings: commands.VerifyArgs) -> Report:
    """Verify the checksums of a cache; with --teacher, also recompute a sample of its rows."""
    if settings.teacher is not None:
        from kdcache.apps import dumping

        return dumping.verify_with_teacher(settings)
    from kdcache.store.inspect import verify_cache

    return verify_cache(settings.cache, settings.split)


@_command(commands.ConvertArgs, "convert", "kdcache convert runs/mnist.zarr --encoding quantized:8 --out small.zarr")
def convert(settings: commands.ConvertArgs) -> Report:
    """Convert a finished cache to another encoding, compression or layout, without the teacher."""
    from kdcache.core.options import narrow
    from kdcache.store.convert import convert_cache

    return convert_cache(settings.cache, settings.out, narrow(ConvertConfig, settings), splits=settings.split)


@_command(commands.PackArgs, "pack", "kdcache pack runs/mnist.zarr --out mnist.zip")
def pack(settings: commands.PackArgs) -> Report:
    """Pack a finished cache into one zip file, which every command reads as it is."""
    from kdcache.store.pack import pack_cache

    return pack_cache(settings.cache, settings.out)


@_command(commands.UnpackArgs, "unpack", "kdcache unpack mnist.zip --out runs/mnist.zarr")
def unpack(settings: commands.UnpackArgs) -> Report:
    """Unpack a packed cache into a folder."""
    from kdcache.store.pack import unpack_cache

    return unpack_cache(settings.archive, settings.out)


@_command(commands.CompareArgs, "compare", "kdcache compare runs/teacher runs/alone runs/student")
def compare(settings: commands.CompareArgs) -> Report:
    """Compare finished runs: accuracy, parameters, seconds per epoch."""
    from kdcache.analysis.compare_runs import compare_runs

    return compare_runs(settings.runs)


@_command(commands.ReportArgs, "report", "kdcache report runs/teacher runs/alone runs/student --out report.html")
def report(settings: commands.ReportArgs) -> Report:
    """Write a page on finished runs: curves, accuracy, calibration, agreement with the teacher (extra: plots)."""
    from kdcache.apps.report.build import make_report

    return make_report(settings)


@_command(
    commands.PlotTemperatureArgs, "plot-temperature", "kdcache plot-temperature runs/mnist.zarr --out temperature.png"
)
def plot_temperature(settings: commands.PlotTemperatureArgs) -> Report:
    """Plot the effect of temperature on the logits in a cache (extra: plots)."""
    from kdcache.analysis.temperature import plot_temperature as plot

    return plot(settings)


@_command(
    commands.SweepArgs,
    "sweep",
    "kdcache sweep --cache runs/mnist.zarr --student mlp --temperature 1,2,4,8 --alpha 0.5,0.9 --out runs/sweep",
)
def sweep(settings: commands.SweepArgs) -> Report:
    """Train many students from one cache, several in parallel; the same command resumes a stopped sweep."""
    from kdcache.apps.sweep import sweep as sweep_all

    return sweep_all(settings)


@_command(commands.PredictArgs, "predict", "kdcache predict --run runs/student photos/ one.png --top 3")
def predict(settings: commands.PredictArgs) -> Report:
    """Predict classes of images or texts with a run's best checkpoint; CSV on stdout, or JSON with --json."""
    from kdcache.apps.predict import predict as predict_all

    return predict_all(settings)


@_command(commands.ExportArgs, "export", "kdcache export --run runs/student --format onnx --out student.onnx")
def export(settings: commands.ExportArgs) -> Report:
    """Export a run's best checkpoint as a program that runs without kdcache, and compare its logits."""
    from kdcache.apps.export import export as write_and_compare

    return write_and_compare(settings)


@_command(commands.BenchArgs, "bench", "kdcache bench --dataset mnist --teacher resnet56 --student resnet8x4")
def bench(settings: commands.BenchArgs) -> Report:
    """Time an epoch on labels, from a cache and with an online teacher, and print the break-even point."""
    from kdcache.apps.bench import bench as time_all

    return time_all(settings)


@_command(commands.DoctorArgs, "doctor", "kdcache doctor runs")
def doctor(settings: commands.DoctorArgs) -> Report:
    """Check versions, devices, extras and the disk."""
    from kdcache.apps.doctor import examine

    return examine(settings)


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
