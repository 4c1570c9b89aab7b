"""Settings of each command, of which its options are made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kdcache.core.config import (
    CHECKPOINT_KEY_HELP,
    DATASET_HELP,
    MODEL_HELP,
    CacheReadConfig,
    ConvertConfig,
    DatasetConfig,
    DumpConfig,
    InferenceConfig,
    InputConfig,
    LoadingConfig,
    RuntimeConfig,
    StudentConfig,
    TeacherOutputConfig,
    TrainConfig,
    ViewConfig,
)
from kdcache.core.options import Settings, option


@dataclass(frozen=True, kw_only=True)
class TrainTeacherArgs(TrainConfig, ViewConfig, DatasetConfig, InputConfig):
    """`kdcache train-teacher`."""

    dataset: str = option("digits", DATASET_HELP)
    model: str = option("cnn", MODEL_HELP)
    out: str = option("", "Folder for the run.", required=True)
    resume: bool = option(False, "Continue the run in --out.")
    plots: bool = option(False, "Plot a confusion matrix into --out (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class DumpTeacherArgs(DumpConfig, TeacherOutputConfig, DatasetConfig, InputConfig):
    """`kdcache dump-teacher`."""

    dataset: str = option("digits", DATASET_HELP)
    teacher: str = option("cnn", MODEL_HELP)
    checkpoint: str | None = option(None, "The teacher's weights: .pt, .pth or .safetensors.")
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP)
    task: str = option(
        "classification",
        "What the teacher answers: classification, or embedding, a vector of any meaning.",
        choices=("classification", "embedding"),
    )
    split: tuple[str, ...] = option(("train",), "Split to dump; repeat for several.")
    out: str = option(
        "",
        "Folder or URL of the cache, such as runs/mnist.zarr or s3://bucket/mnist.zarr.",
        required=True,
        unless="list_layers",
        url=True,
    )
    list_layers: bool = option(False, "Only list the teacher's layers and the shapes of their outputs.")
    dry_run: bool = option(False, "Print rows, bytes and shards, and write nothing.", not_with=("list_layers",))
    add_views: int = option(
        0,
        "Number of views to append to the finished cache at --out, which has --views of them.",
        minimum=0,
        not_with=("list_layers",),
    )
    repair: bool = option(
        False,
        "Check the cache at --out, and recompute damaged or missing shards.",
        not_with=("list_layers", "dry_run"),
    )
    accept_new_bytes: bool = option(
        False,
        "With --repair: accept recomputed rows that differ from the committed ones; the cache's digest changes.",
        only_with=("repair",),
    )
    allow_device_change: bool = option(
        False, "Continue a dump on another device or with other device settings; recorded in the manifest."
    )
    worker: str | None = option(
        None,
        "Number of this worker, from 0, and of all, as 3/32. [default: as torchrun or SLURM say]",
        not_with=("list_layers", "dry_run"),
    )
    steal: bool = option(
        True,
        "Once a worker's own shards are done, compute those that nobody has begun, and those of workers that are gone.",
        not_with=("list_layers", "dry_run"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainStudentArgs(StudentConfig, DatasetConfig, InputConfig):
    """`kdcache train-student`."""

    cache: tuple[str, ...] = option(
        (),
        "Folder, URL or .zip of a cache; repeat for several teachers, whose logits are averaged.",
        required=True,
        url=True,
    )
    student: str = option("mlp", MODEL_HELP)
    init: str | None = option(None, "Initial weights of the student: .pt, .pth or .safetensors.")
    out: str = option("", "Folder for the run.", required=True)
    resume: bool = option(False, "Continue the run in --out.")
    plots: bool = option(False, "Plot a confusion matrix into --out (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(InferenceConfig, DatasetConfig):
    """`kdcache evaluate`."""

    run: str = option("", "Folder of a run.", required=True)
    split: str = option("test", "Split to evaluate on.")
    cache: str | None = option(
        None,
        "Cache with the teacher's answers to this split, to compare with. [default: for embeddings the run's]",
        url=True,
    )
    plots: bool = option(False, "Plot a confusion matrix into the run's folder (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class InspectArgs(Settings):
    """`kdcache inspect`."""

    cache: str = option("", "Folder, URL or .zip of a cache.", argument=True, required=True, url=True)


@dataclass(frozen=True, kw_only=True)
class StatusArgs(Settings):
    """`kdcache status`."""

    cache: str = option("", "Folder or URL of a cache.", argument=True, required=True, url=True)


@dataclass(frozen=True, kw_only=True)
class SealArgs(Settings):
    """`kdcache seal`."""

    cache: str = option("", "Folder or URL of a cache.", argument=True, required=True, url=True)
    split: tuple[str, ...] = option((), "Split to seal; repeat for several. [default: all]")


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(DatasetConfig, InputConfig, LoadingConfig):
    """`kdcache verify`."""

    inherited_only_with = ("teacher",)

    cache: str = option("", "Folder, URL or .zip of a cache.", argument=True, required=True, url=True)
    split: tuple[str, ...] = option((), "Split to check; repeat for several. [default: all]")
    teacher: str | None = option(None, f"Recompute some rows with this teacher: {MODEL_HELP}")
    checkpoint: str | None = option(None, "The teacher's weights.", only_with=("teacher",))
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP, only_with=("checkpoint",))
    rows: int = option(256, "With --teacher: number of rows per split to recompute.", minimum=1, only_with=("teacher",))
    seed: int = option(0, "With --teacher: seed that selects the rows.", minimum=0, only_with=("teacher",))
    tolerance: float = option(
        0.01,
        "With --teacher: tolerated difference of a logit or feature x, as a fraction of 1 + |x|.",
        above=0,
        only_with=("teacher",),
    )


@dataclass(frozen=True, kw_only=True)
class ConvertArgs(ConvertConfig):
    """`kdcache convert`."""

    cache: str = option("", "Folder or URL of a finished cache.", argument=True, required=True, url=True)
    out: str = option("", "Folder or URL for the new cache.", required=True, url=True)
    split: tuple[str, ...] = option((), "Split to convert; repeat for several. [default: all]")


@dataclass(frozen=True, kw_only=True)
class PackArgs(Settings):
    """`kdcache pack`."""

    cache: str = option("", "Folder or URL of a finished cache.", argument=True, required=True, url=True)
    out: str = option("", "Path or URL of the file, which must end with .zip.", required=True, url=True)


@dataclass(frozen=True, kw_only=True)
class UnpackArgs(Settings):
    """`kdcache unpack`."""

    archive: str = option("", "Path or URL of a packed cache.", argument=True, required=True, url=True)
    out: str = option("", "Folder or URL for the cache.", required=True, url=True)


@dataclass(frozen=True, kw_only=True)
class CompareArgs(Settings):
    """`kdcache compare`."""

    runs: tuple[str, ...] = option((), "Folders of finished runs.", argument=True, required=True)


@dataclass(frozen=True, kw_only=True)
class ReportArgs(RuntimeConfig, DatasetConfig):
    """`kdcache report`."""

    runs: tuple[str, ...] = option((), "Folders of finished runs.", argument=True, required=True)
    out: str = option("", "The page, such as report.html; its figures are written next to it too.", required=True)
    cache: str | None = option(None, "The students' cache, if it is no longer at its recorded place.", url=True)
    train_samples: int = option(5000, "Number of training samples for the agreement with the teacher.", minimum=1)
    shown: int = option(24, "Number of test samples to show, worst disagreements first.", minimum=1, maximum=400)


@dataclass(frozen=True, kw_only=True)
class PlotTemperatureArgs(Settings):
    """`kdcache plot-temperature`."""

    cache: str = option("", "Folder, URL or .zip of a cache.", argument=True, required=True, url=True)
    out: str = option("", "The picture, such as temperature.png.", required=True)
    split: str = option("train", "Split whose logits are plotted.")
    temperatures: tuple[float, ...] = option((0.5, 1.0, 2.0, 4.0, 8.0, 16.0), "Temperatures of the panels.", above=0)
    sample: int | None = option(None, "Index of the sample in the panels. [default: one of median entropy]", minimum=0)
    samples: int = option(2000, "Number of samples behind the curves.", minimum=1)
    seed: int = option(0, "Seed that selects the samples.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class SweepArgs(CacheReadConfig, DatasetConfig, InputConfig):
    """`kdcache sweep`."""

    cache: tuple[str, ...] = option(
        (), "Folder, URL or .zip of a cache; repeat for several teachers.", required=True, url=True
    )
    student: str = option("mlp", MODEL_HELP)
    temperature: tuple[float, ...] = option((2.0,), "Temperatures to try, as 1,2,4,8.", above=0)
    alpha: tuple[float, ...] = option((0.5,), "Weights of the teacher to try, as 0.5,0.9.", minimum=0, maximum=1)
    objective: tuple[str, ...] = option(
        (), "An objective to try instead of alpha, as kd or kd+feature_mse:weight=0.1; repeat for several."
    )
    seeds: int = option(1, "Students per setting, with seeds from --seed upwards.", minimum=1)
    jobs: int | None = option(None, "Students trained in parallel. [default: one per GPU, or per core]", minimum=1)
    teacher: str | None = option(None, f"Online teacher, to measure what the sweep would cost with it: {MODEL_HELP}")
    checkpoint: str | None = option(None, "Weights of the online teacher: .pt, .pth or .safetensors.")
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP)
    out: str = option("", "Folder for the runs, the table and the heat map.", required=True)
    val_fraction: float = option(
        0.1,
        "Fraction of the training split held out, by whose accuracy settings are sorted; with 0 they stay in the order "
        "of the grid.",
        minimum=0,
        maximum=0.9,
    )


@dataclass(frozen=True, kw_only=True)
class PredictArgs(InferenceConfig):
    """`kdcache predict`."""

    run: str = option("", "Folder of a run.", required=True)
    inputs: tuple[str, ...] = option(
        (), "Images, text files, folders of them, or - for texts on stdin, one per line.", argument=True, required=True
    )
    top: int = option(3, "Classes per input, likeliest first.", minimum=1)
    threshold: float | None = option(
        None,
        "Every class of at least this probability instead of --top. [default: 0.5, with several classes per sample]",
        minimum=0,
        maximum=1,
    )
    resize_images: bool = option(False, "Resize images of other sizes than the network was trained on.")


@dataclass(frozen=True, kw_only=True)
class ExportArgs(DatasetConfig):
    """`kdcache export`."""

    run: str = option("", "Folder of a run.", required=True)
    format: str = option(
        "torch", "File format: torch (torch.export, .pt2) or onnx (extra: onnx).", choices=("torch", "onnx")
    )
    out: str = option("", "The file to write.", required=True)
    split: str = option("test", "Split on which the exported program is compared with the network.")
    samples: int = option(64, "Number of samples to compare.", minimum=2)
    tolerance: float = option(1e-4, "Tolerated difference of a logit x, as a fraction of 1 + |x|.", above=0)


def _of(settings_class: type[Settings], name: str) -> Any:
    """Copy of an option of another settings class."""
    (found,) = (each for each in fields(settings_class) if each.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True, kw_only=True)
class BenchArgs(RuntimeConfig, TeacherOutputConfig, DatasetConfig, InputConfig):
    """`kdcache bench`, with the options of `train-student` on which the time per epoch depends."""

    batch_size: int = _of(TrainConfig, "batch_size")
    optimizer: str = _of(TrainConfig, "optimizer")
    learning_rate: float = _of(TrainConfig, "learning_rate")
    momentum: float = _of(TrainConfig, "momentum")
    weight_decay: float = _of(TrainConfig, "weight_decay")
    clip_norm: float | None = _of(TrainConfig, "clip_norm")
    ema: float | None = _of(TrainConfig, "ema")
    cache_memory: str = _of(CacheReadConfig, "cache_memory")
    cache_on_device: bool = _of(CacheReadConfig, "cache_on_device")
    verify_inputs: str = _of(CacheReadConfig, "verify_inputs")
    row_source: str = _of(CacheReadConfig, "row_source")
    shuffle: str = _of(CacheReadConfig, "shuffle")
    dataset: str = option("digits", DATASET_HELP)
    teacher: str = option("cnn", MODEL_HELP)
    checkpoint: str | None = option(
        None, "The teacher's weights (optional: the time per epoch does not depend on them)."
    )
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP)
    student: str = option("mlp", MODEL_HELP)
    rounds: int = option(3, "Number of measurements per kind of epoch, taken in turn.", minimum=1)
    samples: int | None = option(None, "Number of training samples to measure on. [default: all]", minimum=2)


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(Settings):
    """`kdcache doctor`."""

    path: str = option(".", "Folder for caches, whose disk is measured.", argument=True)
