"""Provenance manifest: one per split, as JSON in the attributes of the split's Zarr group, with its sha256.

The manifest is the root of trust: it carries the digest of each finished view's ledger, the ledger carries the crc32c
of every chunk, and so one hash covers every byte of a finished split.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from kdcache.core.errors import CacheDamaged
from kdcache.core.json_records import ADDED, canonical_json, from_json, to_json
from kdcache.store.records import (
    EMBEDDING,
    ONE_CLASS,
    SEVERAL_CLASSES,
    ArrayRecord,
    ChangeRecord,
    ConstantRecord,
    DatasetRecord,
    FeatureRecord,
    FidelityRecord,
    PrecisionRecord,
    SourceRecord,
    TeacherRecord,
    ViewRecipe,
)
from kdcache.store.storage.base import MissingKey, Storage

SCHEMA = 1
ATTRIBUTE = "kdcache"
METADATA = "zarr.json"
ROOT_MARK = {"cache": 1}

_REMEDY = "run the dump-teacher command that made it with --repair, or restore the file from a copy"

# Fields that may differ between two runs of one dump. The device is compared where rows are added (see resume.py), and
# license and citation may change without another dump.
NOT_IDENTITY = frozenset(
    {"views", "view_sha256", "dataset.data_root", "teacher.accuracy", "device", "batch_size"}
    | {"facts", "fidelity", "changed_predictions", "precision"}
    | {"versions.cpu", "versions.python", "compute", "license", "citation", "history"}
)


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
    recipe: ViewRecipe = field(default_factory=ViewRecipe)
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
