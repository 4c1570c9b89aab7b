"""Conversion of a finished cache to another encoding, compression or layout, without the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdcache.core.command_result import Report
from kdcache.core.config import ConvertConfig
from kdcache.core.errors import CacheNotFound, UsageError
from kdcache.core.json_records import counted, to_json
from kdcache.core.progress import Progress, log
from kdcache.store.cache import Cache, cache_splits, open_cache
from kdcache.store.constants import constant_records
from kdcache.store.encodings.base import LOGITS, Encoding
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.facts import fact_names
from kdcache.store.inspect import describe_fidelity
from kdcache.store.layout import build_arrays
from kdcache.store.manifest import Manifest, recorded_sha256
from kdcache.store.records import ONE_CLASS, SourceRecord
from kdcache.store.resume import ResumePolicy, find_dump
from kdcache.store.seal import commit_outputs, seal
from kdcache.store.storage.base import Storage
from kdcache.store.storage.registry import Location, open_storage
from kdcache.store.writer import SplitWriter


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One split to convert: its source, and the manifest and encoding of the result."""

    cache: Cache
    manifest: Manifest
    encoding: Encoding

    @property
    def same_rows(self) -> bool:
        """Whether stored rows are copied as they are."""
        return self.encoding.spec == self.cache.encoding.spec


def convert_cache(location: Location, out: Location, config: ConvertConfig, *, splits: Sequence[str] = ()) -> Report:
    """Write a finished cache in another encoding, compression or layout.

    Called again with the same arguments it continues where it was stopped. The loss is measured against the logits of
    the source, and the manifest records the source's encoding and digest.

    Args:
        location: The cache: a path, or an open storage.
        out: Where the new cache is, or will be.
        splits: Names of the splits; empty for all.

    Raises:
        UsageError: the encoding needs what the cache does not hold, or there are fewer views.
        CacheNotFound, CacheIncomplete, CacheDamaged: the cache cannot be read.
        TeacherOutputError: the encoding loses more than `max_kl`, or cannot hold a value.
        TargetExists: something else is stored at `out`.
    """
    source, root = open_storage(location), open_storage(out)
    there = cache_splits(source)
    if missing := [name for name in splits if name not in there]:
        raise CacheNotFound(f"the cache {source.url} has no split {missing[0]!r}", f"one of {', '.join(there)}")
    # All are planned before the first row is written.
    conversions = [_plan(open_cache(source, name), source, config) for name in splits or there]
    manifests = [_convert(root, each, config) for each in conversions]
    lines, data = [], {}
    for conversion, manifest in zip(conversions, manifests, strict=True):
        split = manifest.dataset.split
        rows = manifest.dataset.length * manifest.views
        lines.append(
            f"{root.place(split)}: {counted(rows, 'row')} in {conversion.encoding.spec}, from "
            f"{conversion.cache.encoding.spec}; fidelity to the source: {describe_fidelity(manifest)}"
        )
        data[split] = {"rows": rows, "encoding": manifest.encoding, "fidelity": to_json(manifest.fidelity)}
    return Report({"cache": root.url, "splits": data}, "\n".join(lines))


def _plan(cache: Cache, source: Storage, config: ConvertConfig) -> _Conversion:
    old = cache.manifest
    encoding = _target(cache, config)
    views = old.views if config.views is None else config.views
    if views > cache.views:
        raise UsageError(f"--views is {views}", f"at most {cache.views}, as many as {cache.place} has")
    features = () if config.drop_features else old.features
    separate = [each for each in features if each.array not in cache.logit_arrays]
    if not set(cache.logit_arrays) <= {array.name for array in encoding.arrays()}:
        features = tuple(separate)  # those that the old encoding held are gone
    shard_rows, arrays = build_arrays(
        length=len(cache),
        encoding=encoding,
        features={each.array: old.array(each.array).row_shape for each in separate},
        feature_dtype=old.array(separate[0].array).dtype if separate else None,
        compression=config.compression,
        shard_rows=config.shard_rows,
    )
    same = encoding.spec == cache.encoding.spec
    manifest = replace(
        old,
        teacher=replace(old.teacher, accuracy=None),
        views=views,
        arrays=arrays,
        encoding=encoding.spec,
        temperatures=encoding.temperatures,
        constants=constant_records(encoding),
        features=features,
        shard_rows=shard_rows,
        view_sha256=(),
        facts=() if same or old.answers != ONE_CLASS else fact_names(encoding),
        fidelity=old.fidelity if same else (),
        changed_predictions=old.changed_predictions if same else None,
        converted_from=SourceRecord(
            encoding=cache.encoding.spec, manifest_sha256=recorded_sha256(source, old.dataset.split)
        ),
    )
    return _Conversion(cache, manifest, encoding)


def _target(cache: Cache, config: ConvertConfig) -> Encoding:
    """The encoding to convert to.

    Raises:
        UsageError: the cache does not hold what it needs.
    """
    spec = config.encoding or cache.encoding.spec
    temperatures = config.temperatures or cache.encoding.temperatures
    answers = cache.manifest.answers
    if config.max_kl is not None and answers != ONE_CLASS:
        raise UsageError(
            f"--max-kl {config.max_kl:g} is given, and {cache.place} holds the answer {answers} to each sample",
            "logits of one class, between whose softmaxes there is a divergence",
            "leave it out",
        )
    wanted = encoding_named(spec, len(cache.classes), temperatures, answers=answers)
    if wanted.spec == cache.encoding.spec and wanted.temperatures == cache.encoding.temperatures:
        return cache.encoding
    if not cache.encoding.dense:
        raise UsageError(
            f"{cache.place} holds {cache.encoding.spec} for {cache.encoding.temperatures}, and --encoding is {spec}",
            "a cache with the logits of every class",
            "convert the cache that it was made from, or dump again",
        )
    if wanted.source != LOGITS:
        raise UsageError(
            f"--encoding is {spec}, and {cache.place} holds {cache.encoding.spec}",
            "the teacher's features and the weights of its last layer",
            f"dump again with --encoding {spec}, or choose another encoding",
        )
    return wanted


def _convert(root: Storage, conversion: _Conversion, config: ConvertConfig) -> Manifest:
    manifest = conversion.manifest
    split = manifest.dataset.split
    existing = find_dump(root, manifest, ResumePolicy())
    if existing is not None and existing.complete:
        log(f"{root.place(split)} is already complete; nothing was converted")
        return existing
    with SplitWriter(root, manifest, encoding=conversion.encoding, local=conversion.cache.local) as writer:
        pending = writer.pending()
        total = manifest.shards * manifest.views
        with Progress(f"convert {split}", total, "shards", total - len(pending)) as progress:
            for view, shard in pending:
                _commit(writer, conversion, view, shard, config.max_kl)
                progress.advance(1)
        return seal(writer, conversion.encoding)


def _commit(writer: SplitWriter, conversion: _Conversion, view: int, shard: int, max_kl: float | None) -> None:
    reader, samples = conversion.cache.reader, writer.manifest.rows_of(shard)

    def stored(name: str) -> Any:
        return reader.span(name, view if reader.manifest.array(name).per_view else 0, samples)

    if conversion.same_rows:
        writer.commit(view, shard, {array.name: stored(array.name) for array in writer.manifest.arrays})
        return
    old = conversion.cache.encoding
    outputs = {array.name: stored(array.name) for array in writer.manifest.arrays if array.name in _others(conversion)}
    outputs[LOGITS] = old.decode({array.name: stored(array.name) for array in old.arrays()})
    commit_outputs(writer, conversion.encoding, view, shard, outputs, max_kl=max_kl)


def _others(conversion: _Conversion) -> set[str]:
    """Arrays of the result that are not of its encoding."""
    own = {array.name for array in conversion.encoding.arrays()}
    return {array.name for array in conversion.manifest.arrays} - own
