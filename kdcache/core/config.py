"""Settings: one frozen dataclass per kind of run. A default, its bounds and its help text are written once, here.

The dataclasses stand apart from their consumers because the command line is made from them, and `kdcache --help` must
answer without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kdcache.core.errors import UsageError
from kdcache.core.options import Settings, check_effective, option


@dataclass(frozen=True, kw_only=True)
class LoadingConfig(Settings):
    """Where samples are loaded and networks run."""

    device: str = option("auto", "auto (a GPU when there is one), cpu, cuda, cuda:N or mps.")
    batch_size: int = option(128, "Samples in a batch.", minimum=1)
    workers: int = option(0, "Processes that load samples; 0 loads in the main one.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(LoadingConfig):
    """How a network is run over samples."""

    amp: str = option("off", "Automatic mixed precision: off, bf16 or fp16.", choices=("off", "bf16", "fp16"))


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(InferenceConfig):
    """How a run is carried out."""

    seed: int = option(0, "Everything random is drawn from it.", minimum=0)


# Host-memory budget for the rows of a cache, and the ways to read and shuffle them.
CACHE_MEMORY = "4GiB"
ROW_SOURCES = ("auto", "memory", "streamed")
SHUFFLES = ("auto", "exact", "window")

AUGMENT_HELP = (
    "none, affine, crop-flip, crop-flip-randaugment, resized-crop-flip (:PIXELS behind it for another size) or "
    "py:package.module:function."
)
DATASET_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imdb")
CHECKPOINT_KEY_HELP = "Entry of the checkpoint that holds the weights, where several fit, such as state_dict_ema."
DATASET_HELP = f"{', '.join(DATASET_NAMES)}, folder:PATH, text-folder:PATH or py:package.module:function."
IMAGE_MODELS = ("cnn", "mlp", "resnet20", "resnet56", "resnet110", "resnet8x4", "resnet32x4")
MODEL_NAMES = (*IMAGE_MODELS, "lstm", "gru")
MODEL_HELP = (
    f"{', '.join(IMAGE_MODELS)}, torchvision:NAME[@WEIGHTS], timm:NAME, "
    "hf:NAME, for text lstm, gru (sized as lstm:hidden=128,embedding=64), or py:package.module:factory."
)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Settings):
    """Where the samples come from; what is not given is taken from the cache or the run, where there is one."""

    dataset: str | None = option(None, f"Where it is now, if not where it was: {DATASET_HELP}")
    data_root: str | None = option(None, "Folder that holds the named datasets. [default: data]")
    download: bool = option(False, "Download the dataset if it is not in the data root.")


@dataclass(frozen=True, kw_only=True)
class InputConfig(Settings):
    """What a network takes, where it does not say so itself or should be told otherwise."""

    mean: tuple[float, ...] | None = option(None, "Mean of each channel, as 0.5,0.5,0.5.")
    std: tuple[float, ...] | None = option(None, "Standard deviation of each channel, as 0.2,0.2,0.2.", above=0)
    size: int | None = option(None, "Resize and crop to a square of this many pixels.", minimum=1)
    resize: int | None = option(None, "Instead of --size: pixels of the shorter side after resizing.", minimum=1)
    crop: int | None = option(None, "Instead of --size: pixels of the square cropped from the centre.", minimum=1)
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
        if self.size is not None and (self.resize is not None or self.crop is not None):
            raise UsageError(
                f"--size {self.size} is given, and --resize or --crop with it",
                "--size, which sets both, or --resize and --crop",
                "leave out --size",
            )
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise UsageError(
                f"--resize is {self.resize} and --crop is {self.crop}",
                "a crop that lies within the image",
                "give a --crop of at most --resize",
            )


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Settings):
    """How the shared input is made of the plain sample."""

    augment: str = option("none", f"How samples are varied: {AUGMENT_HELP}")
    mix: str = option("none", "How two samples become one: none, uniform, mixup:ALPHA or cutmix:ALPHA.")


@dataclass(frozen=True, kw_only=True)
class TeacherOutputConfig(Settings):
    """From what a teacher returns to logits of the dataset's classes."""

    teacher_outputs: str = option(
        "logits",
        "What the teacher returns: logits (or log-probabilities), or probabilities, of which log p is stored.",
        choices=("logits", "probabilities"),
    )
    class_map: str | None = option(
        None,
        "JSON file from each class of the dataset to the teacher's output, as its index or its class's name, where "
        "the teacher has other classes or another order.",
    )


@dataclass(frozen=True, kw_only=True)
class DumpConfig(RuntimeConfig, ViewConfig):
    """How a teacher's answers are computed and stored."""

    batch_size: int = option(256, "Samples in a batch.", minimum=1)
    views: int = option(1, "Versions of every sample that the teacher answers for.", minimum=1)
    view_seed: int = option(
        0,
        "What views are drawn from, with their number and the sample's index.",
        minimum=0,
        only_with=("augment", "mix"),
    )
    plain_view: bool = option(False, "Let view 0 be the plain sample.", only_with=("augment", "mix"))
    features: tuple[str, ...] = option(
        (), "Store the output of this layer too (a module's path, or penultimate); repeat for several."
    )
    pool: str = option(
        "avg",
        "Features of maps: avg over places, or none, which stores them whole.",
        choices=("avg", "none"),
        only_with=("features",),
    )
    encoding: str = option("float16", "How logits are stored: float16, float32 or float64.")
    compression: str = option("none", "none or zstd:LEVEL. Logits hardly compress, and uncompressed ones read faster.")
    license: str = option("", "License of the cache, such as CC-BY-4.0, for its manifest.")
    citation: str = option("", "What to cite for the cache, for its manifest.")
    shard_rows: int | None = option(None, "Rows of a shard, a power of two. [default: 16384, fewer if rows are large]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RuntimeConfig):
    """How a network is trained; teacher and student share the loop."""

    epochs: int = option(5, "Passes over the training samples.", minimum=1)
    optimizer: str = option("adam", "adam, adamw or sgd.", choices=("adam", "adamw", "sgd"))
    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    momentum: float = option(
        0.9, "Of sgd, with Nesterov's correction.", minimum=0, maximum=1, only_with=("optimizer=sgd",)
    )
    weight_decay: float = option(0.0, "L2 penalty; decoupled with adamw.", minimum=0)
    schedule: str = option("constant", "constant, cosine or step.", choices=("constant", "cosine", "step"))
    milestones: tuple[float, ...] = option(
        (0.5, 0.75),
        "Of step: where the rate drops, as parts of all epochs.",
        above=0,
        maximum=1,
        only_with=("schedule=step",),
    )
    gamma: float = option(
        0.1, "Of step: what the rate is multiplied by at each milestone.", above=0, only_with=("schedule=step",)
    )
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up from 0; may be a fraction.", minimum=0)
    label_smoothing: float = option(0.0, "Part of the label's weight spread over all classes.", minimum=0, maximum=1)
    tensorboard: bool = option(False, "Write the log for TensorBoard into --out too (extra: tensorboard).")
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
class CacheReadConfig(TrainConfig):
    """How a cache is read while a student trains."""

    student_layer: str = option(
        "", "The student's layer whose features are compared. [default: penultimate]", only_with=("objective",)
    )
    cache_memory: str = option(
        CACHE_MEMORY, "Host-memory budget; a view that fits is loaded whole.", not_with=("distill",)
    )
    cache_on_device: bool = option(
        False, "Hold the view in the device's memory instead; it must fit there.", not_with=("distill",)
    )
    cache_weights: tuple[float, ...] = option(
        (), "Weights of several caches, as 2,1. [default: all equal]", above=0, not_with=("distill",)
    )
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
    row_source: str = option("auto", "auto, memory or streamed.", choices=ROW_SOURCES, not_with=("distill",))
    shuffle: str = option(
        "auto",
        "exact, window (chunk by chunk), or auto: exact unless streamed.",
        choices=SHUFFLES,
        not_with=("distill",),
    )
    allow_partial: bool = option(False, "Train on the committed samples of a cache whose dump has not finished.")


@dataclass(frozen=True, kw_only=True)
class StudentConfig(CacheReadConfig):
    """How a student is trained from a cache: alpha · T² · KL(teacher_T ‖ student_T) + (1 − alpha) · CE(label)."""

    temperature: float = option(2.0, "T: softens teacher and student alike.", above=0, not_with=("distill",))
    alpha: float = option(
        0.5, "Weight of the teacher; the label has 1 - alpha.", minimum=0, maximum=1, not_with=("distill", "objective")
    )
    distill: bool = option(True, "--no-distill trains on the labels alone, through the same loop.")
    objective: tuple[str, ...] = option(
        (),
        "What is minimised, as NAME:key=value,key=value; repeat for a sum. Keys: weight, warmup (epochs), layer, "
        "student-layer, and the loss's own. [default: alpha · kd + (1 - alpha) · cross entropy]",
        not_with=("distill",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_effective(self, ["objective"] if self.objective else [])


@dataclass(frozen=True, kw_only=True)
class TrainTeacherArgs(TrainConfig, ViewConfig, DatasetConfig, InputConfig):
    """`kdcache train-teacher`."""

    dataset: str = option("digits", DATASET_HELP)
    model: str = option("cnn", MODEL_HELP)
    out: str = option("", "Folder for the run.", required=True)
    resume: bool = option(False, "Continue the run in --out.")
    plots: bool = option(False, "Draw a confusion matrix into --out (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class DumpTeacherArgs(DumpConfig, TeacherOutputConfig, DatasetConfig, InputConfig):
    """`kdcache dump-teacher`."""

    dataset: str = option("digits", DATASET_HELP)
    teacher: str = option("cnn", MODEL_HELP)
    checkpoint: str | None = option(None, "The teacher's weights: .pt, .pth or .safetensors.")
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP)
    split: tuple[str, ...] = option(("train",), "Split to dump; repeat for several.")
    out: str = option("", "The cache, a folder such as runs/mnist.zarr.", required=True, unless="list_layers")
    list_layers: bool = option(False, "Show the teacher's layers and the shapes that they give, and do nothing else.")
    dry_run: bool = option(False, "Tell rows, bytes and shards, and write nothing.", not_with=("list_layers",))
    add_views: int = option(
        0,
        "Extend the finished cache at --out to so many views more than --views.",
        minimum=0,
        not_with=("list_layers",),
    )
    repair: bool = option(
        False,
        "Check what stands at --out, and compute again what is broken or missing.",
        not_with=("list_layers", "dry_run"),
    )
    accept_new_bytes: bool = option(
        False,
        "With --repair: replace rows even where they are not what was committed; the cache's digest changes.",
        only_with=("repair",),
    )
    allow_device_change: bool = option(
        False, "Continue a dump on another device or with other settings of it; recorded in the manifest."
    )


@dataclass(frozen=True, kw_only=True)
class TrainStudentArgs(StudentConfig, DatasetConfig, InputConfig):
    """`kdcache train-student`."""

    cache: tuple[str, ...] = option(
        (), "A cache made by dump-teacher; repeat for several teachers, whose logits are averaged.", required=True
    )
    student: str = option("mlp", MODEL_HELP)
    init: str | None = option(None, "Weights that the student starts from: .pt, .pth or .safetensors.")
    out: str = option("", "Folder for the run.", required=True)
    resume: bool = option(False, "Continue the run in --out.")
    plots: bool = option(False, "Draw a confusion matrix into --out (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(InferenceConfig, DatasetConfig):
    """`kdcache evaluate`."""

    run: str = option("", "Folder of a run.", required=True)
    split: str = option("test", "Split to judge on.")
    plots: bool = option(False, "Draw a confusion matrix into the run's folder (extra: plots).")


@dataclass(frozen=True, kw_only=True)
class InspectArgs(Settings):
    """`kdcache inspect`."""

    cache: str = option("", "A cache made by dump-teacher.", argument=True, required=True)


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(DatasetConfig, InputConfig, LoadingConfig):
    """`kdcache verify`."""

    inherited_only_with = ("teacher",)

    cache: str = option("", "A cache made by dump-teacher.", argument=True, required=True)
    split: tuple[str, ...] = option((), "Split to check; repeat for several. [default: all]")
    teacher: str | None = option(None, f"Recompute some rows with this teacher: {MODEL_HELP}")
    checkpoint: str | None = option(None, "The teacher's weights.", only_with=("teacher",))
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP, only_with=("checkpoint",))
    rows: int = option(256, "With --teacher: how many rows of each split.", minimum=1, only_with=("teacher",))
    seed: int = option(0, "With --teacher: draws the rows.", minimum=0, only_with=("teacher",))
    tolerance: float = option(
        0.01,
        "With --teacher: largest difference of a logit or feature x, as a part of 1 + |x|.",
        above=0,
        only_with=("teacher",),
    )


@dataclass(frozen=True, kw_only=True)
class CompareArgs(Settings):
    """`kdcache compare`."""

    runs: tuple[str, ...] = option((), "Folders of finished runs.", argument=True, required=True)


@dataclass(frozen=True, kw_only=True)
class ReportArgs(RuntimeConfig, DatasetConfig):
    """`kdcache report`."""

    runs: tuple[str, ...] = option((), "Folders of finished runs.", argument=True, required=True)
    out: str = option("", "The page, such as report.html; its pictures lie beside it too.", required=True)
    cache: str | None = option(None, "The students' cache, if it is not where it was.")
    train_samples: int = option(5000, "Training samples that agreement with the teacher is measured on.", minimum=1)
    shown: int = option(24, "Test samples to show, worst disagreements first.", minimum=1, maximum=400)


@dataclass(frozen=True, kw_only=True)
class PlotTemperatureArgs(Settings):
    """`kdcache plot-temperature`."""

    cache: str = option("", "A cache made by dump-teacher.", argument=True, required=True)
    out: str = option("", "The picture, such as temperature.png.", required=True)
    split: str = option("train", "Whose answers are looked at.")
    temperatures: tuple[float, ...] = option((0.5, 1.0, 2.0, 4.0, 8.0, 16.0), "Of the six panels.", above=0)
    sample: int | None = option(None, "Index of the sample in the panels. [default: one of median entropy]", minimum=0)
    samples: int = option(2000, "How many samples the curves are of.", minimum=1)
    seed: int = option(0, "That draws the samples.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class SweepArgs(CacheReadConfig, DatasetConfig, InputConfig):
    """`kdcache sweep`."""

    cache: tuple[str, ...] = option((), "A cache made by dump-teacher; repeat for several teachers.", required=True)
    student: str = option("mlp", MODEL_HELP)
    temperature: tuple[float, ...] = option((2.0,), "Temperatures to try, as 1,2,4,8.", above=0)
    alpha: tuple[float, ...] = option((0.5,), "Weights of the teacher to try, as 0.5,0.9.", minimum=0, maximum=1)
    objective: tuple[str, ...] = option(
        (), "An objective to try instead of alpha, as kd or kd+feature_mse:weight=0.1; repeat for several."
    )
    seeds: int = option(1, "Students of each setting, from --seed upwards.", minimum=1)
    jobs: int | None = option(None, "Students trained at once. [default: one for each GPU, or each core]", minimum=1)
    teacher: str | None = option(None, f"Measure what the sweep would cost with this live teacher: {MODEL_HELP}")
    checkpoint: str | None = option(None, "The live teacher's weights.")
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP)
    out: str = option("", "Folder for the runs, the table and the heat map.", required=True)
    val_fraction: float = option(
        0.1,
        "Part of the training split kept out of training, by whose accuracy settings are sorted; with 0 they stay in "
        "the order of the grid.",
        minimum=0,
        maximum=0.9,
    )


@dataclass(frozen=True, kw_only=True)
class PredictArgs(InferenceConfig):
    """`kdcache predict`."""

    run: str = option("", "Folder of a run.", required=True)
    inputs: tuple[str, ...] = option(
        (), "Images, text files, folders of them, or - for texts on stdin, one a line.", argument=True, required=True
    )
    top: int = option(3, "Answers for each input, likeliest first.", minimum=1)
    resize: bool = option(False, "Resize images that are not of the size that the network was trained on.")


@dataclass(frozen=True, kw_only=True)
class ExportArgs(DatasetConfig):
    """`kdcache export`."""

    run: str = option("", "Folder of a run.", required=True)
    format: str = option("torch", "torch (torch.export, .pt2) or onnx (extra: onnx).", choices=("torch", "onnx"))
    out: str = option("", "The file to write.", required=True)
    split: str = option("test", "Whose samples the artefact is compared with the student on.")
    samples: int = option(64, "How many of them.", minimum=2)
    tolerance: float = option(1e-4, "Largest difference of a logit x, as a part of 1 + |x|.", above=0)


def _of(settings_class: type[Settings], name: str) -> Any:
    """An option of other settings: its default, its bounds and its help text."""
    (found,) = (each for each in fields(settings_class) if each.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True, kw_only=True)
class BenchArgs(RuntimeConfig, TeacherOutputConfig, DatasetConfig, InputConfig):
    """`kdcache bench`: of the options of `train-student` those that an epoch's time depends on."""

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
    checkpoint: str | None = option(None, "The teacher's weights; its speed does not depend on them.")
    checkpoint_key: str | None = option(None, CHECKPOINT_KEY_HELP)
    student: str = option("mlp", MODEL_HELP)
    rounds: int = option(3, "Times that each epoch is measured, in turn.", minimum=1)
    samples: int | None = option(None, "Measure on so many samples of the training split. [default: all]", minimum=2)


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(Settings):
    """`kdcache doctor`."""

    path: str = option(".", "Where caches will lie: its disk is measured.", argument=True)
