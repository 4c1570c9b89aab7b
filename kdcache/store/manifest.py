"""Provenance manifest: one per split, as JSON in the attributes of the split's Zarr group, with its sha256.

The manifest is the root of trust: it carries the digest of each finished view's ledger, the ledger carries the crc32c
of every chunk, and so one hash covers every byte of a finished split.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from kdcache.core.errors import CacheDamaged, UsageError
from kdcache.core.json_records import ADDED, canonical_json, from_json, to_json
from kdcache.store.storage.base import MissingKey, Storage

SCHEMA = 1
ATTRIBUTE = "kdcache"
METADATA = "zarr.json"
ROOT_MARK = {"cache": 1}

_REMEDY = "run the dump-teacher command that made it with --repair, or restore the file from a copy"
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

# Fields that may differ between two runs of one dump. The device is compared where rows are added (see resume.py), and
# license and citation may change without another dump.
NOT_IDENTITY = frozenset(
    {"views", "view_sha256", "dataset.data_root", "teacher.accuracy", "device", "batch_size"}
    | {"facts", "fidelity", "changed_predictions", "precision"}
    | {"versions.cpu", "versions.python", "compute", "license", "citation", "history"}
)

# Label of a sample that has none.
UNLABELLED = -1
NONE = "none"

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
        p99_kl: 99th percentile over the rows of a shard, of the worst shard.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Provenance manifest of one cache split.

    Attributes:
        views: Number of views per sample, those that are being added included.
        recipe: Recipe of the views.
        arrays: Arrays of the split; those of the encoding come first.
        encoding: Spec of the encoding of the logits; empty in manifests by older versions, where it is the dtype of
            the array `logits`.
        temperatures: Temperatures that rows can be decoded at, where the encoding is not for any.
        constants: Arrays that are stored once; those of the encoding.
        features: Arrays of the teacher's features.
        shard_rows: Rows per shard, the unit that is written and committed whole.
        versions: Versions of the packages that could change an input or a logit.
        amp: Precision of the teacher's forward pass: `off`, `bf16` or `fp16`.
        memory_format: Memory format of images in the forward pass: `contiguous` or `channels-last`.
        compiled: Whether the teacher was compiled by torch.compile.
        precision: What `amp` changed, measured before the first row; None where nothing was measured.
        compute: Device that computes the rows, and its settings that change their last bits (see
            `dump_manifest.compute_facts`); empty in manifests by older versions.
        view_sha256: Digest of the ledger of each finished view, in view order; none until the first dump is complete.
        license: License of the cache, such as an SPDX identifier.
        citation: Text to cite for the cache.
        facts: Columns of the array `facts`, which holds measurements of each shard; empty in older caches.
        fidelity: Loss of the encoding at several temperatures; empty until the dump is complete, and in older caches.
        changed_predictions: Number of rows whose predicted class the encoding changed; None where it is not measured.
        converted_from: Split that this one was converted from; None for a dump.
        history: Changes since the first rows were committed, oldest first.
    """

    schema: int = SCHEMA
    dataset: DatasetRecord
    teacher: TeacherRecord
    views: int = 1
    recipe: ViewRecipe = ViewRecipe()
    arrays: tuple[ArrayRecord, ...]
    encoding: str = field(default="", metadata=ADDED)
    temperatures: tuple[float, ...] = field(default=(), metadata=ADDED)
    constants: tuple[ConstantRecord, ...] = field(default=(), metadata=ADDED)
    features: tuple[FeatureRecord, ...] = ()
    shard_rows: int
    seed: int
    amp: str
    device: str
    batch_size: int
    versions: dict[str, str]
    view_sha256: tuple[str, ...] = ()
    memory_format: str = field(default="contiguous", metadata=ADDED)
    compiled: bool = field(default=False, metadata=ADDED)
    precision: PrecisionRecord | None = field(default=None, metadata=ADDED)
    compute: dict[str, str] = field(default_factory=dict, metadata=ADDED)
    license: str = field(default="", metadata=ADDED)
    citation: str = field(default="", metadata=ADDED)
    facts: tuple[str, ...] = field(default=(), metadata=ADDED)
    fidelity: tuple[FidelityRecord, ...] = field(default=(), metadata=ADDED)
    changed_predictions: int | None = field(default=None, metadata=ADDED)
    converted_from: SourceRecord | None = field(default=None, metadata=ADDED)
    history: tuple[ChangeRecord, ...] = field(default=(), metadata=ADDED)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema}: this version reads {SCHEMA}")
        if self.views < 1 or len(self.view_sha256) > self.views:
            raise ValueError(f"views is {self.views}, {len(self.view_sha256)} are finished: a cache needs at least one")
        for array in self.arrays:
            if self.shard_rows % array.chunk_rows:
                raise ValueError(
                    f"shard_rows is {self.shard_rows}, chunk_rows of {array.name} is {array.chunk_rows}: "
                    "a shard must hold a whole number of chunks"
                )

    @property
    def complete(self) -> bool:
        """Whether there are finished views, which can be read; others may be in the making."""
        return bool(self.view_sha256)

    @property
    def readable_views(self) -> int:
        """Number of finished views; of an unfinished dump, the number that it will have."""
        return len(self.view_sha256) or self.views

    @property
    def extending(self) -> bool:
        """Whether views are being added to finished ones."""
        return 0 < len(self.view_sha256) < self.views

    @property
    def shards(self) -> int:
        """Shards of one view."""
        return -(-self.dataset.length // self.shard_rows)

    def array(self, name: str) -> ArrayRecord:
        """The record of one array.

        Raises:
            KeyError: the cache does not hold it.
        """
        for record in self.arrays:
            if record.name == name:
                return record
        raise KeyError(name)

    @property
    def multi_label(self) -> bool:
        """Whether a sample belongs to any number of classes: its label is 0 and 1 for each."""
        return self.array("labels").row_shape != ()

    @property
    def answers(self) -> str:
        """What the teacher says of a sample: `ONE_CLASS`, `SEVERAL_CLASSES` or `EMBEDDING`."""
        if self.is_embedding:
            return EMBEDDING
        return SEVERAL_CLASSES if self.multi_label else ONE_CLASS

    @property
    def is_embedding(self) -> bool:
        """Whether the teacher's answer is a vector, and not logits of classes."""
        return self.teacher.outputs.kind == EMBEDDING

    def rows_of(self, shard: int) -> range:
        """The sample indices of one shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.dataset.length))


def manifest_attributes(manifest: Manifest) -> dict[str, Any]:
    """The group attributes that carry a manifest."""
    return {ATTRIBUTE: {"manifest": to_json(manifest), "sha256": manifest_sha256(manifest)}}


def recorded_sha256(storage: Storage, split: str) -> str:
    """The digest that a split's manifest was written with: the one to cite.

    Read and not computed, because another version may spell the same manifest in other JSON.

    Raises:
        CacheDamaged: the manifest does not have it.
    """
    read_manifest(storage, split)
    return str(group_attribute(storage.below(split))["sha256"])


def cache_sha256(splits: dict[str, str]) -> str:
    """One digest for a whole cache: sha256 of the canonical JSON of its splits' digests by name."""
    return hashlib.sha256(canonical_json(splits)).hexdigest()


def manifest_sha256(manifest: Manifest) -> str:
    """Digest of a split: of its manifest, and so of everything that the manifest of a finished split covers."""
    return hashlib.sha256(canonical_json(to_json(manifest))).hexdigest()


def read_manifest(storage: Storage, split: str) -> Manifest:
    """The manifest of a split, checked against its digest.

    Args:
        storage: The root of the cache.

    Raises:
        CacheDamaged: it is missing, was edited, or a version wrote it that this one cannot read.
    """
    place, holder = storage.place(split), group_attribute(storage.below(split))
    if not isinstance(holder, dict) or not {"manifest", "sha256"} <= holder.keys():
        raise CacheDamaged(f"{place}: the kdcache attribute is not a manifest with its sha256", remedy=_REMEDY)
    digest = hashlib.sha256(canonical_json(holder["manifest"])).hexdigest()
    if digest != holder["sha256"]:
        raise CacheDamaged(f"{place}: the manifest's sha256 is {digest}", f"{holder['sha256']}, as written", _REMEDY)
    manifest = from_json(Manifest, holder["manifest"], where=place, error=CacheDamaged)
    if manifest.dataset.split != split:
        raise CacheDamaged(
            f"{place} holds the split {manifest.dataset.split!r}",
            f"{split!r}, as its folder says",
            "give the folder its name back",
        )
    return manifest


def enclosing_cache(storage: Storage) -> str | None:
    """Place of the cache that contains a storage; None where none does."""
    # The outermost first, because groups below a root carry another mark.
    return next((outer.url for outer in storage.enclosing() if is_cache(outer)), None)


def is_cache(storage: Storage) -> bool:
    """Whether a storage holds a cache's root group; False for nothing and for anything else.

    Raises:
        CacheDamaged: it is the root of a cache that this version cannot read.
    """
    try:
        document = _parsed(storage, storage.read(METADATA))
    except MissingKey:
        return False
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        return False
    if group_attribute(storage) != ROOT_MARK:
        raise CacheDamaged(
            f"{storage.url} is marked {attributes[ATTRIBUTE]!r}", f"{ROOT_MARK!r}, which this version reads", _REMEDY
        )
    return True


def group_attribute(group: Storage) -> Any:
    """The `kdcache` attribute of a Zarr group; None where there is none.

    Raises:
        CacheDamaged: the group's metadata is missing or damaged.
    """
    try:
        document = _parsed(group, group.read(METADATA))
    except MissingKey as problem:
        place = group.place(METADATA)
        raise CacheDamaged(f"{place} is missing", "the metadata of a Zarr group", _REMEDY) from problem
    try:
        if document["node_type"] != "group" or document["zarr_format"] != 3:
            raise ValueError(f"node_type {document['node_type']!r}, zarr_format {document['zarr_format']!r}")
        return document["attributes"].get(ATTRIBUTE)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise _not_a_group(group, problem) from problem


def _parsed(group: Storage, content: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        return json.loads(content, parse_constant=refuse)
    except ValueError as problem:
        raise _not_a_group(group, problem) from problem


def _not_a_group(group: Storage, problem: Exception) -> CacheDamaged:
    return CacheDamaged(
        f"{group.place(METADATA)} is not the metadata of a Zarr group: {problem}",
        "JSON with node_type group and attributes",
        _REMEDY,
    )
