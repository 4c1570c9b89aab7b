"""Records of which a manifest consists."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from kdcache.core.errors import UsageError
from kdcache.core.json_records import ADDED

# Label of a sample that has none.
UNLABELLED = -1
NONE = "none"

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

# Kinds of a teacher's outputs.
LOGITS_KIND, PROBABILITIES, EMBEDDING = "logits", "probabilities", "embedding"
# What a teacher says of a sample, beside `EMBEDDING`: logits of a softmax, or of a sigmoid for each class.
ONE_CLASS, SEVERAL_CLASSES = "one class", "several classes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Deterministic preprocessing from a shared input to the input of one network.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels; None keeps the size.
        stretch: Whether both sides get the length `resize`, whatever the image's aspect ratio.
        crop: Side of the centre square kept after resizing, in pixels; None keeps everything.
        interpolation: Resampling method: `nearest`, `bilinear` or `bicubic`.
        antialias: Whether resampling is antialiased.
        mean: Mean per channel, subtracted after scaling uint8 to [0, 1]; empty subtracts nothing.
        std: Standard deviation per channel, the divisor; as long as `mean`.
        max_tokens: Length of token sequences: longer ones are truncated, shorter ones padded; None for other inputs.
        pad_id: Token id of the padding.
        vocabulary_size: Upper bound of token ids, exclusive; given with `max_tokens`.
        tokenizer_sha256: Hash of the tokenizer; empty where samples are token ids already.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"
    antialias: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    max_tokens: int | None = None
    pad_id: int = 0
    vocabulary_size: int | None = None
    tokenizer_sha256: str = ""
    stretch: bool = field(default=False, metadata=ADDED)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}: both must name the same")
        if not all(value > 0 and math.isfinite(value) for value in self.std):
            raise ValueError(f"std is {self.std}: every channel must be positive and finite")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}: every channel must be finite")
        for name in ("resize", "crop"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} is {size}: it must be at least 1 pixel")
        if self.stretch and self.resize is None:
            raise ValueError("stretch is given without resize: it needs a length")
        if (self.max_tokens is None) != (self.vocabulary_size is None):
            raise ValueError(
                f"max_tokens is {self.max_tokens}, vocabulary_size {self.vocabulary_size}: both or neither"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: a sequence needs at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRecord:
    """Identity of a dataset split: its samples and their order.

    Attributes:
        name: Spec of the dataset without the path of a machine, such as `mnist` or `folder:images`.
        classes: Class names; a label is a position in this tuple. Of embeddings, the numbers of their dimensions.
        input_dtype: Dtype of the shared input, such as `uint8`.
        input_shape: Shape of one shared input, channels first; None where samples differ in size.
        sample_sha256: Fingerprint of a keyed sample of the shared inputs (indices, shapes and bytes).
        labels_sha256: Fingerprint of all labels as little-endian int64; None until all are known.
        data_root: Folder of the data, in manifests by older versions; now in `LocalPaths`.
        excluded: Positions in the source of samples that were left out as unreadable; `length` does not count them.
    """

    name: str
    split: str
    length: int
    classes: tuple[str, ...]
    input_dtype: str
    input_shape: tuple[int, ...] | None
    sample_sha256: str
    labels_sha256: str | None = None
    data_root: str | None = None
    excluded: tuple[int, ...] = field(default=(), metadata=ADDED)

    def __post_init__(self) -> None:
        if not _SPLIT_NAME.fullmatch(self.split):
            raise UsageError(f"the split is named {self.split!r}", "letters, digits, _, - and . (not in front)")
        if self.length < 1:
            raise ValueError(f"length is {self.length}: a cache needs at least one sample")
        if not self.classes:
            raise ValueError("classes is empty: a cache needs class names")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRecord:
    """Conversion of a teacher's outputs to logits of the dataset's classes.

    Attributes:
        kind: `logits`; `probabilities`, of which the logarithm is taken; or `embedding`, a vector that is no
            classification, whose dimensions stand in place of the classes.
        columns: Column of the teacher's output for each class of the dataset; empty where its outputs are the
            dataset's classes in their order.
    """

    kind: str = LOGITS_KIND
    columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (LOGITS_KIND, PROBABILITIES, EMBEDDING):
            raise ValueError(f"kind is {self.kind!r}: a teacher returns logits, probabilities or an embedding")
        if self.kind == EMBEDDING and self.columns:
            raise ValueError(f"columns is {self.columns}: an embedding has no classes to choose")
        if len(set(self.columns)) != len(self.columns) or any(column < 0 for column in self.columns):
            raise ValueError(f"columns is {self.columns}: each class needs an output of its own, counted from 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecord:
    """Identity of the teacher.

    Attributes:
        spec: Name that it was built from, without the path of a machine.
        weights_sha256: Hash of names, shapes, dtypes and bytes of the weights.
        parameters: Number of parameters.
        accuracy: Top-1 accuracy on the dumped split's view 0, 0 to 1; None until the dump is complete, and where view 0
            is mixed and has no one label.
        outputs: Conversion of its outputs to logits of the dataset's classes.
    """

    spec: str
    weights_sha256: str
    parameters: int
    preprocess: Preprocess
    accuracy: float | None = None
    outputs: OutputRecord = field(default=OutputRecord(), metadata=ADDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecipe:
    """Recipe of the shared input of (view, sample) from plain samples. The default is the plain sample.

    Attributes:
        augment: Spec of the augmentation, such as `affine`; `none` leaves samples as they are.
        parameters: Parameters of the augmentation by dotted name, as text.
        mix: Mixing of samples: `none`, `mixup:ALPHA`, `cutmix:ALPHA` or `uniform`.
        seed: Seed that, with view and index, determines augmentation and mixing.
        plain_view: Whether view 0 is the plain sample.
        input_shape: Shape of one augmented input, channels first; None where they differ in size.
    """

    augment: str = NONE
    parameters: dict[str, str] = field(default_factory=dict)
    mix: str = NONE
    seed: int = 0
    plain_view: bool = False
    input_shape: tuple[int, ...] | None = None

    def is_plain(self, view: int) -> bool:
        """Whether a view is the plain sample."""
        return (self.augment == NONE and self.mix == NONE) or (self.plain_view and view == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRecord:
    """Layout of one array of a split.

    Attributes:
        name: Name of the Zarr array.
        dtype: Stored dtype by numpy's name, without byte order: `float16`, `int64`, …; always little-endian on disk.
        row_shape: Shape of one row: (C,) for logits, () for labels.
        row_names: Dimension names of `row_shape`.
        chunk_rows: Rows per chunk, the unit that is read, checked and decoded whole.
        per_view: Whether each view has rows of its own (logits) or all views share them (labels).
        compression: Compression: `none` or `zstd:LEVEL`.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...] = ()
    row_names: tuple[str, ...] = ()
    chunk_rows: int
    per_view: bool = True
    compression: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantRecord:
    """An array that is stored once per split, such as the weight of the teacher's last layer.

    Attributes:
        name: Name of the Zarr array, which is one chunk.
        dtype: Stored dtype by numpy's name, without byte order.
        shape: Shape of the array.
        crc32c: Checksum of its little-endian bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    crc32c: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityRecord:
    """Loss of a lossy encoding, or of a narrower precision: KL(softmax(z / T) ‖ softmax(z' / T)) in nats.

    z are the teacher's logits, and z' is what is left of them.

    Attributes:
        temperature: T.
        mean_kl: Mean over all rows.
        p99_kl: 99th percentile over the rows of a shard, maximum over shards.
        max_kl: Maximum over all rows.
    """

    temperature: float
    mean_kl: float
    p99_kl: float
    max_kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRecord:
    """What automatic mixed precision changed in the teacher's answers to a sample, against float32.

    Attributes:
        samples: Number of samples.
        changed_predictions: Samples whose predicted class changed.
        fidelity: KL divergence at several temperatures.
    """

    samples: int
    changed_predictions: int
    fidelity: tuple[FidelityRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """The cache split that a converted one was made from.

    Attributes:
        encoding: Its encoding.
        manifest_sha256: Digest of its manifest.
    """

    encoding: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRecord:
    """An array of the teacher's features.

    Attributes:
        layer: Path of the module whose output is stored, or `penultimate`.
        pool: `avg` where positions were averaged, else `none`.
        array: Name of the Zarr array.
    """

    layer: str
    pool: str
    array: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRecord:
    """A change that the user asked for after the first rows of a split were committed.

    Attributes:
        what: Kind of change: `device` (rows by another device or other settings of it), `bytes` (rows replaced by
            others) or `terms` (license, citation).
        before: Values before the change, as text; with `manifest_sha256`, the digest of the manifest before the change.
        after: Values after the change, as text.
    """

    what: str
    before: dict[str, str]
    after: dict[str, str]
