"""Settings: one frozen dataclass per kind of run. A default, its bounds and its help text are written once, here.

They are separate from their consumers because the command line is built from them, and `kdcache --help` must not import
torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.core.errors import UsageError
from kdcache.core.options import Settings, check_effective, option


@dataclass(frozen=True, kw_only=True)
class LoadingConfig(Settings):
    """Device, batches and worker processes of the loader."""

    device: str = option("auto", "auto (a GPU when there is one), cpu, cuda, cuda:N or mps.")
    batch_size: int | None = option(
        None, "Samples per batch; auto measures what is fastest where the pass is long.", minimum=1, auto=True
    )
    workers: int | None = option(
        None,
        "Worker processes that load samples; 0 loads in the main process, auto starts some where loading takes long.",
        minimum=0,
        auto=True,
    )


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(LoadingConfig):
    """Settings of a forward pass over samples."""

    amp: str = option("off", "Automatic mixed precision: off, bf16 or fp16.", choices=("off", "bf16", "fp16"))


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(InferenceConfig):
    """Settings of a run that draws random numbers."""

    seed: int = option(0, "Seed of all random numbers.", minimum=0)


# Host-memory budget for the rows of a cache, and the ways to read and shuffle them.
CACHE_MEMORY = "4GiB"
# Local disk for the chunks of remote caches.
CACHE_DISK = "100GiB"
ROW_SOURCES = ("auto", "memory", "streamed")
SHUFFLES = ("auto", "exact", "window")

AUGMENT_HELP = (
    "none, affine, crop-flip, crop-flip-randaugment, resized-crop-flip (followed by :PIXELS for another size) or "
    "py:package.module:function."
)
DATASET_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imdb")
CHECKPOINT_KEY_HELP = "Entry of the checkpoint that holds the weights, where several fit, such as state_dict_ema."
DATASET_HELP = (
    f"{', '.join(DATASET_NAMES)}, folder:PATH, text-folder:PATH, csv:FILE, hf-dataset:PATH_OR_NAME or "
    "py:package.module:function."
)
IMAGE_MODELS = ("cnn", "mlp", "resnet20", "resnet56", "resnet110", "resnet8x4", "resnet32x4")
MODEL_NAMES = (*IMAGE_MODELS, "lstm", "gru")
MODEL_HELP = (
    f"{', '.join(IMAGE_MODELS)}, torchvision:NAME[@WEIGHTS], timm:NAME, "
    "hf:NAME, for text lstm, gru (with sizes, as lstm:hidden=128,embedding=64), or py:package.module:factory."
)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Settings):
    """Source of the samples. Commands on a cache or a run default to the dataset recorded there."""

    dataset: str | None = option(None, f"Dataset, if it is no longer at its recorded place: {DATASET_HELP}")
    data_root: str | None = option(None, "Folder of the named datasets. [default: data]")
    download: bool = option(False, "Download the dataset if it is not in the data root.")
    classes: str | None = option(
        None, "File with a class name per line, in the teacher's order, for unlabelled data that does not tell them."
    )


@dataclass(frozen=True, kw_only=True)
class InputConfig(Settings):
    """Input format of a network: values that its weights do not bring, or that replace theirs."""

    mean: tuple[float, ...] | None = option(None, "Mean per channel, as 0.5,0.5,0.5.")
    std: tuple[float, ...] | None = option(None, "Standard deviation per channel, as 0.2,0.2,0.2.", above=0)
    size: int | None = option(None, "Side in pixels of the square that images are resized and cropped to.", minimum=1)
    resize: int | None = option(
        None, "Length in pixels of the shorter side after resizing, instead of --size.", minimum=1
    )
    crop: int | None = option(
        None, "Side in pixels of the square cropped from the centre, instead of --size.", minimum=1
    )
    max_tokens: int | None = option(
        None,
        "Maximum tokens per text; longer texts are truncated. [default: the teacher's, or 256; for hf: up to 512]",
        minimum=1,
    )
    vocabulary_size: int | None = option(
        None, "Number of words in the vocabulary of the training split. [default: the teacher's, or 20000]", minimum=2
    )
    tokenizer: str | None = option(None, "A tokenizer.json for texts, instead of a vocabulary from the training split.")

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
    """Augmentation and mixing: how the shared input is made from the plain sample."""

    augment: str = option("none", f"Augmentation: {AUGMENT_HELP}")
    mix: str = option("none", "Mixing of two samples: none, uniform, mixup:ALPHA or cutmix:ALPHA.")


@dataclass(frozen=True, kw_only=True)
class TeacherOutputConfig(Settings):
    """Conversion from a teacher's outputs to logits of the dataset's classes."""

    teacher_outputs: str = option(
        "logits",
        "Kind of the teacher's outputs: logits (or log-probabilities), or probabilities, stored as log p.",
        choices=("logits", "probabilities"),
        not_with=("task=embedding",),
    )
    class_map: str | None = option(
        None,
        "JSON file that maps each class of the dataset to the index or the class name of the teacher's output, for a "
        "teacher with other classes or another order.",
        not_with=("task=embedding",),
    )


@dataclass(frozen=True, kw_only=True)
class DumpConfig(RuntimeConfig, ViewConfig):
    """How a teacher's logits are computed and stored."""

    memory_format: str = option(
        "auto",
        "Memory format of images: contiguous, channels-last, or auto, which measures for convolutional networks.",
        choices=("auto", "contiguous", "channels-last"),
    )
    compile: bool = option(False, "Compile the teacher with torch.compile; where that fails, it runs as it is.")
    views: int = option(1, "Views per sample: differently augmented versions that the teacher sees.", minimum=1)
    view_seed: int = option(
        0,
        "Seed of the views, used together with the view's and the sample's index.",
        minimum=0,
        only_with=("augment", "mix"),
    )
    plain_view: bool = option(False, "View 0 is the plain sample.", only_with=("augment", "mix"))
    views_in_flight: int | None = option(
        None,
        "Views of a shard that are computed side by side, so that a sample is read once for all of them; auto takes up "
        "to 8, within 1 GiB for their rows.",
        minimum=1,
        auto=True,
        only_with=("augment",),
    )
    features: tuple[str, ...] = option(
        (), "Layer whose output is stored too (a module's path, or penultimate); repeat for several."
    )
    pool: str = option(
        "avg",
        "Pooling of feature maps: avg over positions, or none, which stores them whole.",
        choices=("avg", "none"),
        only_with=("features",),
    )
    encoding: str = option(
        "float16",
        "Encoding of the logits: float16, float32, float64; quantized:BITS (4 to 8 bits per class); topk:K (the K "
        "largest); head (the last linear layer's input) or head:BITS.",
    )
    temperatures: tuple[float, ...] = option(
        (),
        "Temperatures at which students can be trained from topk:K. [default: 1,2,4,8]",
        above=0,
        only_with=("encoding=topk",),
    )
    max_kl: float | None = option(
        None,
        "Stop if the encoding loses more than this mean KL divergence, in nats, in a shard at temperature 1, 2, 4 or 8 "
        "(topk: at its own).",
        above=0,
    )
    compression: str = option(
        "auto", "none, zstd:LEVEL, or auto: zstd:5 for quantized logits, and none for others, which hardly compress."
    )
    skip_unreadable: bool = option(
        False,
        "Leave out samples that cannot be read, such as damaged images, which takes a pass over all of them first; the "
        "manifest lists them, and students leave them out too.",
    )
    license: str = option("", "License of the cache, such as CC-BY-4.0; recorded in its manifest.")
    citation: str = option("", "Citation for users of the cache; recorded in its manifest.")
    shard_rows: int | None = option(None, "Rows per shard, a power of two. [default: 16384, fewer if rows are large]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RuntimeConfig):
    """Settings of the training loop, for teacher and student."""

    batch_size: int = option(128, "Samples per batch.", minimum=1)
    input_memory: str = option(
        "0",
        "Memory budget for inputs, as 2GiB, so that each is made only once: augmented ones where all of them fit, else "
        "decoded ones as far as they fit. The students of a sweep share it.",
    )
    epochs: int = option(5, "Passes over the training samples.", minimum=1)
    optimizer: str = option("adam", "adam, adamw or sgd.", choices=("adam", "adamw", "sgd"))
    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    momentum: float = option(0.9, "Nesterov momentum of sgd.", minimum=0, maximum=1, only_with=("optimizer=sgd",))
    weight_decay: float = option(0.0, "L2 penalty; decoupled with adamw.", minimum=0)
    decay_norm_bias: bool = option(
        True, "Apply --weight-decay to biases and to the weights of normalisation too.", only_with=("weight_decay",)
    )
    schedule: str = option("constant", "constant, cosine or step.", choices=("constant", "cosine", "step"))
    milestones: tuple[float, ...] = option(
        (0.5, 0.75),
        "Epochs at which schedule step lowers the learning rate, as fractions of all epochs.",
        above=0,
        maximum=1,
        only_with=("schedule=step",),
    )
    gamma: float = option(
        0.1, "Factor of the learning rate at each milestone of schedule step.", above=0, only_with=("schedule=step",)
    )
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up from 0; may be fractional.", minimum=0)
    label_smoothing: float = option(
        0.0, "Fraction of the label's weight spread over all classes.", minimum=0, maximum=1
    )
    grad_accumulation: int = option(
        1,
        "Parts in which each batch is computed, one after the other, to save memory; the step is that of the whole.",
        minimum=1,
    )
    compile: bool = option(False, "Compile the network with torch.compile; where that fails, it runs as it is.")
    memory_format: str = option(
        "contiguous",
        "Memory format of images: contiguous, or channels-last, which many convolutional networks compute faster in.",
        choices=("contiguous", "channels-last"),
    )
    log_every: int = option(
        0, "Print losses, learning rate and samples/s every so many steps too; 0 for each epoch only.", minimum=0
    )
    save_every: int = option(0, "Also keep the weights of every so many epochs, as epoch-0010.pt.", minimum=0)
    tensorboard: bool = option(False, "Also write a TensorBoard log into --out (extra: tensorboard).")
    sync_batchnorm: bool = option(
        False, "With several processes on GPUs: compute the statistics of BatchNorm over the batches of all of them."
    )
    clip_norm: float | None = option(None, "Maximum norm of the gradient; larger gradients are scaled down.", above=0)
    ema: float | None = option(
        None, "Decay of an exponential moving average of the weights, which becomes the result.", above=0, maximum=1
    )
    val_fraction: float = option(
        0.0,
        "Fraction of the training split held out to select best.pt; with 0 the last epoch is best.",
        minimum=0,
        maximum=0.9,
    )
    metric: str = option(
        "accuracy",
        "What best.pt is best in on the held-out part: accuracy (for several classes per sample map, the mean average "
        "precision; for embeddings cosine, or retrieval of the same neighbours); nll, the negative log-likelihood; or "
        "agreement with the teacher, which needs no labels.",
        choices=("accuracy", "map", "nll", "agreement", "cosine", "retrieval"),
        only_with=("val_fraction",),
    )
    patience: int | None = option(
        None,
        "Stop after so many epochs without a better --metric on the held-out part.",
        minimum=1,
        only_with=("val_fraction",),
    )


@dataclass(frozen=True, kw_only=True)
class CacheReadConfig(TrainConfig):
    """How a cache is read during a student's training."""

    student_layer: str = option(
        "", "Layer of the student whose features are compared. [default: penultimate]", only_with=("objective",)
    )
    cache_memory: str = option(
        CACHE_MEMORY, "Host-memory budget; a view that fits is loaded whole.", not_with=("distill",)
    )
    cache_on_device: bool = option(
        False, "Hold the view in the device's memory, where it must fit.", not_with=("distill",)
    )
    cache_weights: tuple[float, ...] = option(
        (), "Weights of several caches, as 2,1. [default: all equal]", above=0, not_with=("distill",)
    )
    views: tuple[int, ...] = option((), "Views to train on, as 0,1,2. [default: all]", minimum=0)
    view_schedule: str = option("cycle", "View of each epoch: cycle, shuffle or fixed:K.")
    views_per_sample: int = option(
        1,
        "Views of each sample in a batch of --batch-size inputs. A sample is read once for all of them; an epoch has "
        "that many times as many steps.",
        minimum=1,
    )
    verify_inputs: str = option(
        "sample",
        "Batches whose inputs are compared with the teacher's: all, sample or off.",
        choices=("all", "sample", "off"),
    )
    row_source: str = option(
        "auto", "Source of the cache's rows: auto, memory or streamed.", choices=ROW_SOURCES, not_with=("distill",)
    )
    shuffle: str = option(
        "auto",
        "Shuffling: exact, window (chunk by chunk), or auto: exact unless streamed.",
        choices=SHUFFLES,
        not_with=("distill",),
    )
    cache_dir: str | None = option(
        None, "Local folder in which chunks of a remote cache are kept across epochs and runs.", not_with=("distill",)
    )
    cache_disk: str = option(
        CACHE_DISK,
        "Size of all chunks in --cache-dir; the least recently used are removed.",
        only_with=("cache_dir",),
    )
    allow_partial: bool = option(False, "Train on the committed samples of a cache whose dump has not finished.")


@dataclass(frozen=True, kw_only=True)
class StudentConfig(CacheReadConfig):
    """Training of a student from a cache: alpha · T² · KL(teacher_T ‖ student_T) + (1 − alpha) · CE(label)."""

    temperature: float = option(2.0, "T: divides the logits of teacher and student.", above=0, not_with=("distill",))
    alpha: float = option(
        0.5,
        "Weight of the teacher; the weight of the label is 1 - alpha.",
        minimum=0,
        maximum=1,
        not_with=("distill", "objective"),
    )
    distill: bool = option(True, "Use the teacher's logits; --no-distill trains on the labels alone.")
    tail: str = option(
        "other",
        "Classes that a topk cache leaves out: other (one class) or uniform (all equally likely).",
        choices=("other", "uniform"),
        not_with=("distill",),
    )
    objective: tuple[str, ...] = option(
        (),
        "Term of the loss, as NAME:key=value,key=value; repeat for a sum. Keys: weight, warmup (epochs), layer, "
        "student-layer, and those of the loss. [default: alpha · kd + (1 - alpha) · cross entropy]",
        not_with=("distill",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_effective(self, ["objective"] if self.objective else [])


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """How a cache is converted."""

    encoding: str | None = option(None, "Encoding of the new cache, as for dump-teacher. [default: that of the cache]")
    temperatures: tuple[float, ...] = option(
        (), "Temperatures of topk:K. [default: 1,2,4,8]", above=0, only_with=("encoding=topk",)
    )
    max_kl: float | None = option(
        None, "Stop if the encoding loses more than this mean KL divergence, in nats, in a shard.", above=0
    )
    compression: str = option("auto", "none, zstd:LEVEL, or auto: zstd:5 for quantized logits, and none for others.")
    shard_rows: int | None = option(None, "Rows per shard, a power of two. [default: 16384, fewer if rows are large]")
    views: int | None = option(None, "Number of views to keep, from the first. [default: all]", minimum=1)
    drop_features: bool = option(False, "Leave out the features.")
