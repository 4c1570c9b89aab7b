"""Settings: one frozen dataclass for each kind of run. A default, a bound and a help text are written once, here.

The dataclasses stand apart from their consumers because the command line is made from them, and `kdcache --help` must
answer without importing torch.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from kdcache.errors import UsageError
from kdcache.records import from_json, to_json

T = TypeVar("T", bound="Settings")


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
) -> Any:
    """A setting: its default, its help text and what it may be.

    Args:
        above: exclusive lower bound, where `minimum` is inclusive.
        argument: given on the command line by position instead of by name.
        required: on the command line; a missing value is a usage error there.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "choices": choices,
        "argument": argument,
        "required": required,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: checks every value against its bounds.

    Raises:
        UsageError: a value is out of bounds or not among the choices.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            value, rule = getattr(self, each.name), each.metadata
            flag = "--" + each.name.replace("_", "-")
            if value is None or not rule:
                continue
            if rule["choices"] and value not in rule["choices"]:
                raise UsageError(f"{flag} is {value!r}", f"one of {', '.join(rule['choices'])}")
            for number in value if isinstance(value, tuple) else (value,):
                if rule["minimum"] is not None and not number >= rule["minimum"]:
                    raise UsageError(f"{flag} is {number}", f"at least {rule['minimum']:g}")
                if rule["above"] is not None and not number > rule["above"]:
                    raise UsageError(f"{flag} is {number}", f"more than {rule['above']:g}")
                if rule["maximum"] is not None and not number <= rule["maximum"]:
                    raise UsageError(f"{flag} is {number}", f"at most {rule['maximum']:g}")


@dataclass(frozen=True, kw_only=True)
class Execution(Settings):
    """How a run is carried out."""

    device: str = option("auto", "auto (a GPU when there is one), cpu, cuda, cuda:N or mps.")
    batch_size: int = option(128, "Samples in a batch.", minimum=1)
    workers: int = option(0, "Processes that load samples; 0 loads in the main one.", minimum=0)
    seed: int = option(0, "Everything random is drawn from it.", minimum=0)
    amp: str = option("off", "Automatic mixed precision: off, bf16 or fp16.", choices=("off", "bf16", "fp16"))


# What a cache may hold in memory by default, and the ways to feed and shuffle its rows.
CACHE_MEMORY = "4GiB"
FEEDS = ("auto", "memory", "mapped", "streamed")
SHUFFLES = ("auto", "exact", "window")

AUGMENT_HELP = (
    "none, affine, crop-flip, crop-flip-randaugment, resized-crop-flip (:PIXELS behind it for another size) or "
    "py:package.module:function."
)
DATASET_HELP = (
    "digits, mnist, fashion-mnist, cifar10, cifar100, imdb, folder:PATH, text-folder:PATH or "
    "py:package.module:function."
)
MODEL_HELP = (
    "cnn, mlp, resnet20, resnet56, resnet110, resnet8x4, resnet32x4, torchvision:NAME[@WEIGHTS], timm:NAME, "
    "for text lstm, gru (sized as lstm:hidden=128,embedding=64) or hf:NAME, or py:package.module:factory."
)


@dataclass(frozen=True, kw_only=True)
class DatasetSource(Settings):
    """Where the samples come from; what is not given is taken from the cache or the run, where there is one."""

    dataset: str | None = option(None, f"Where it is now, if not where it was: {DATASET_HELP}")
    data_root: str | None = option(None, "Folder that holds the named datasets. [default: data]")
    download: bool = option(False, "Download the dataset if it is not in the data root.")


@dataclass(frozen=True, kw_only=True)
class Input(Settings):
    """What a network takes, where it does not say so itself or should be told otherwise."""

    mean: tuple[float, ...] | None = option(None, "Mean of each channel, as 0.5,0.5,0.5.")
    std: tuple[float, ...] | None = option(None, "Standard deviation of each channel, as 0.2,0.2,0.2.", above=0)
    size: int | None = option(None, "Resize and crop to a square of this many pixels.", minimum=1)
    max_tokens: int | None = option(
        None,
        "Of text: longer ones are cut to so many tokens. [default: the teacher's, or 256; of hf: up to 512]",
        minimum=1,
    )
    vocabulary_size: int | None = option(
        None, "Of text: so many words of the training split. [default: the teacher's, or 20000]", minimum=2
    )
    tokenizer: str | None = option(None, "Of text: a tokenizer.json, instead of a vocabulary from the training split.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean or ()) != len(self.std or ()):
            raise UsageError(
                f"--mean is {self.mean} and --std is {self.std}", "both, or neither, with one number a channel"
            )


@dataclass(frozen=True, kw_only=True)
class Augmenting(Settings):
    """How the shared input is made of the plain sample."""

    augment: str = option("none", f"How samples are varied: {AUGMENT_HELP}")
    mix: str = option("none", "How two samples become one: none, uniform, mixup:ALPHA or cutmix:ALPHA.")


@dataclass(frozen=True, kw_only=True)
class DumpConfig(Execution, Augmenting):
    """How a teacher's answers are computed and stored."""

    batch_size: int = option(256, "Samples in a batch.", minimum=1)
    views: int = option(1, "Versions of every sample that the teacher answers for.", minimum=1)
    view_seed: int = option(0, "What views are drawn from, with their number and the sample's index.", minimum=0)
    plain_view: bool = option(False, "Let view 0 be the plain sample.")
    features: tuple[str, ...] = option(
        (), "Store the output of this layer too (a module's path, or penultimate); repeat for several."
    )
    pool: str = option(
        "avg", "Features of maps: avg over places, or none, which stores them whole.", choices=("avg", "none")
    )
    encoding: str = option(
        "float16", "Stored as float16, float32 or float64.", choices=("float16", "float32", "float64")
    )
    compression: str = option("none", "none or zstd:LEVEL. Logits hardly compress, and uncompressed ones read faster.")
    shard_rows: int | None = option(None, "Rows of a shard, a power of two. [default: 16384, fewer if rows are large]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Execution):
    """How a network is trained; teacher and student share the loop."""

    epochs: int = option(5, "Passes over the training samples.", minimum=1)
    optimizer: str = option("adam", "adam, adamw or sgd.", choices=("adam", "adamw", "sgd"))
    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    momentum: float = option(0.9, "Of sgd, with Nesterov's correction.", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "L2 penalty; decoupled with adamw.", minimum=0)
    schedule: str = option("constant", "constant, cosine or step.", choices=("constant", "cosine", "step"))
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "Of step: where the rate drops, as parts of all epochs.", above=0, maximum=1
    )
    gamma: float = option(0.1, "Of step: what the rate is multiplied by at each milestone.", above=0)
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up from 0; may be a fraction.", minimum=0)
    label_smoothing: float = option(0.0, "Part of the label's weight spread over all classes.", minimum=0, maximum=1)
    clip_norm: float | None = option(None, "Largest norm of the gradient; a larger one is scaled down.", above=0)
    ema: float | None = option(
        None, "Decay of an exponential moving average of the weights, which is then the result.", above=0, maximum=1
    )
    val_fraction: float = option(
        0.0,
        "Part of the training split kept out to choose best.pt; with 0 the last epoch is best.",
        minimum=0,
        maximum=0.9,
    )


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TrainConfig):
    """How a student is trained from a cache: alpha · T² · KL(teacher_T ‖ student_T) + (1 − alpha) · CE(label)."""

    temperature: float = option(2.0, "T: softens teacher and student alike.", above=0)
    alpha: float = option(0.5, "Weight of the teacher; the label has 1 - alpha.", minimum=0, maximum=1)
    distill: bool = option(True, "--no-distill trains on the labels alone, through the same loop.")
    objective: tuple[str, ...] = option(
        (),
        "What is minimised, as NAME:key=value,key=value; repeat for a sum. Keys: weight, warmup (epochs), layer, "
        "student-layer, and the loss's own. [default: alpha · kd + (1 - alpha) · cross entropy]",
    )
    student_layer: str = option("", "The student's layer whose features are compared. [default: penultimate]")
    cache_memory: str = option(CACHE_MEMORY, "What may be held of the cache in memory; a view that fits is read once.")
    cache_on_device: bool = option(False, "Hold the view in the device's memory instead; it must fit there.")
    cache_weights: tuple[float, ...] = option((), "Weights of several caches, as 2,1. [default: all equal]", above=0)
    views: tuple[int, ...] = option((), "Views to train on, as 0,1,2. [default: all]", minimum=0)
    view_schedule: str = option("cycle", "Which view an epoch uses: cycle, shuffle or fixed:K.")
    verify_inputs: str = option(
        "sample",
        "Whose inputs are compared with the teacher's: all, sample (of batches) or off.",
        choices=("all", "sample", "off"),
    )
    input_memory: str = option(
        "0", "What augmented inputs may take in memory, as 2GiB; where all fit, each is made only once."
    )
    feed: str = option("auto", "auto, memory, mapped or streamed.", choices=FEEDS)
    shuffle: str = option("auto", "exact, window (chunk by chunk), or auto: exact unless streamed.", choices=SHUFFLES)
    allow_partial: bool = option(False, "Train on the committed samples of a cache whose dump has not finished.")


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(TrainConfig, Augmenting, DatasetSource, Input):
    """`kdcache train-teacher`."""

    dataset: str = option("digits", DATASET_HELP)
    model: str = option("cnn", MODEL_HELP)
    out: str = option("", "Folder for the run.", required=True)
    resume: bool = option(False, "Continue the run in --out.")
    plots: bool = option(False, "Draw a confusion matrix into --out (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class DumpTeacher(DumpConfig, DatasetSource, Input):
    """`kdcache dump-teacher`."""

    dataset: str = option("digits", DATASET_HELP)
    teacher: str = option("cnn", MODEL_HELP)
    checkpoint: str | None = option(None, "The teacher's weights: .pt, .pth or .safetensors.")
    split: tuple[str, ...] = option(("train",), "Split to dump; repeat for several.")
    out: str = option("", "The cache, a folder such as runs/mnist.zarr.", required=True)
    list_layers: bool = option(False, "Show the teacher's layers and the shapes that they give, and do nothing else.")
    dry_run: bool = option(False, "Tell rows, bytes and shards, and write nothing.")
    add_views: int = option(0, "Extend the finished cache at --out to so many views more than --views.", minimum=0)
    repair: bool = option(False, "Check what stands at --out, and compute again what is broken or missing.")


@dataclass(frozen=True, kw_only=True)
class TrainStudent(StudentConfig, DatasetSource, Input):
    """`kdcache train-student`."""

    cache: tuple[str, ...] = option(
        (), "A cache made by dump-teacher; repeat for several teachers, whose logits are averaged.", required=True
    )
    student: str = option("mlp", MODEL_HELP)
    out: str = option("", "Folder for the run.", required=True)
    resume: bool = option(False, "Continue the run in --out.")
    plots: bool = option(False, "Draw a confusion matrix into --out (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Execution, DatasetSource):
    """`kdcache evaluate`."""

    run: str = option("", "Folder of a run.", required=True)
    split: str = option("test", "Split to judge on.")
    plots: bool = option(False, "Draw a confusion matrix into the run's folder (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class Inspect(Settings):
    """`kdcache inspect`."""

    cache: str = option("", "A cache made by dump-teacher.", argument=True, required=True)


@dataclass(frozen=True, kw_only=True)
class Verify(DatasetSource, Input, Execution):
    """`kdcache verify`."""

    cache: str = option("", "A cache made by dump-teacher.", argument=True, required=True)
    split: tuple[str, ...] = option((), "Split to check; repeat for several. [default: all]")
    teacher: str | None = option(None, f"Recompute some rows with this teacher: {MODEL_HELP}")
    checkpoint: str | None = option(None, "The teacher's weights.")
    rows: int = option(256, "With --teacher: how many rows of each split.", minimum=1)
    tolerance: float = option(0.01, "With --teacher: largest difference of a logit x, as a part of 1 + |x|.", above=0)


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """`kdcache compare`."""

    runs: tuple[str, ...] = option((), "Folders of finished runs.", argument=True, required=True)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file or in a run's config.json, as plain values.

    Raises:
        UsageError: the file is missing or is neither.
    """
    path = Path(path)
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
    """Settings from several layers of plain values, the last one on top.

    Raises:
        UsageError: a name that is not a setting, or a value out of bounds.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    for each in fields(config_class):
        if "tuple" in str(each.type) and isinstance(merged.get(each.name), str):
            merged[each.name] = [merged[each.name]]  # one value where several may stand
    return from_json(config_class, merged, where=where, error=UsageError)


def narrow(config_class: type[T], settings: Settings) -> T:
    """The part of some settings that `config_class` names."""
    data = to_json(settings)
    return from_json(
        config_class, {each.name: data[each.name] for each in fields(config_class)}, where="settings", error=UsageError
    )
