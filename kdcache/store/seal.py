"""Encoding of a shard's rows, and the results of a split once all its shards are committed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.command_result import Report
from kdcache.core.errors import CacheDamaged, CacheIncomplete, CacheNotFound, TeacherOutputError
from kdcache.core.json_records import counted
from kdcache.store.cache import cache_splits
from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.constants import open_encoding
from kdcache.store.encodings.base import LOGITS, Encoding
from kdcache.store.encodings.floats import as_floats
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.facts import COUNTS, all_facts, fidelity_of, kl, measure_shard, temperatures_of
from kdcache.store.ledger import Ledger
from kdcache.store.manifest import Manifest, read_manifest, recorded_sha256
from kdcache.store.records import NONE, UNLABELLED, ChangeRecord
from kdcache.store.resume import COMMITTED, ResumePolicy
from kdcache.store.storage.registry import Location, open_storage
from kdcache.store.writer import SplitWriter

# From the smallest to the largest; what satisfies a bound is named from these.
_ALTERNATIVES = ("quantized:4", "quantized:5", "quantized:6", "quantized:7", "quantized:8", "float16", "float32")


def commit_outputs(
    writer: SplitWriter,
    encoding: Encoding,
    view: int,
    shard: int,
    outputs: Mapping[str, NDArray[Any]],
    *,
    max_kl: float | None = None,
) -> None:
    """Encode the teacher's outputs for the samples of one shard, measure what is lost, and commit.

    Args:
        encoding: The split's encoding, with its constants.
        outputs: By name: `logits`, features, and the encoding's source as the teacher computed them; `labels`,
            `input_crc32c`.
        max_kl: Largest mean KL at any temperature, in nats; None allows any.

    Raises:
        TeacherOutputError: a value that the encoding cannot hold, or a loss above `max_kl`.
        StorageError: the storage refused.
    """
    manifest = writer.manifest
    first = manifest.rows_of(shard).start
    rows = encoding.encode(outputs[encoding.source], first_sample=first)
    features = {
        feature.array: as_floats(
            outputs[feature.array], manifest.array(feature.array).dtype, first_sample=first, name=feature.array
        )
        for feature in manifest.features
        if feature.array not in rows
    }
    others = {name: outputs[name] for name in ("labels", "input_crc32c")}
    facts = measure_shard(encoding, outputs[LOGITS], rows, outputs["labels"]) if manifest.facts else None
    if facts is not None and max_kl is not None:
        _check_loss(encoding, outputs[LOGITS], facts, max_kl, writer, view, shard)
    writer.commit(view, shard, {**rows, **features, **others}, facts)


def _check_loss(
    encoding: Encoding,
    logits: NDArray[Any],
    facts: NDArray[np.float64],
    max_kl: float,
    writer: SplitWriter,
    view: int,
    shard: int,
) -> None:
    """Refuse a shard whose loss is above a bound, naming the smallest encoding that satisfies it."""
    measured = temperatures_of(encoding)
    means = facts[len(COUNTS) :: 3]
    if means.max() <= max_kl:
        return
    satisfying = "no encoding but float64"
    for spec in _ALTERNATIVES:
        other = encoding_named(spec, encoding.classes)
        decoded = other.decode(other.encode(logits, first_sample=0))
        if max(kl(logits, decoded, each).mean() for each in measured) <= max_kl:
            satisfying = f"--encoding {spec}, the smallest that satisfies it on this shard,"
            break
    raise TeacherOutputError(
        f"{encoding.spec} loses a mean KL of {means.max():.3g} at temperature {measured[int(means.argmax())]:g} in "
        f"shard {shard} of view {view} of {writer.storage.url}",
        f"at most {max_kl:g} (--max-kl)",
        f"use {satisfying} with another --out, or raise --max-kl; the shards before it are committed",
    )


def seal(writer: SplitWriter, encoding: Encoding) -> Manifest:
    """Finish a split whose shards are all committed: accuracy, fidelity, hash of the labels, and digests.

    Raises:
        CacheDamaged: finished rows came out otherwise than they were committed, and new bytes are not accepted.
    """
    _check_bytes(writer)
    manifest = writer.manifest
    reader = ChunkReader(writer.storage, manifest, writer.ledger)
    labels = reader.span("labels", 0, range(manifest.dataset.length))
    facts = all_facts(writer.storage, manifest, range(manifest.views))
    mixed = manifest.recipe.mix != NONE and not manifest.recipe.is_plain(0)
    labelled = 0 if manifest.multi_label else int((labels != UNLABELLED).sum())
    accuracy = None
    if labelled and not mixed:
        accuracy = _correct(reader, encoding, labels, None if facts is None else facts[0]) / labelled
    finished = replace(
        manifest,
        dataset=replace(
            manifest.dataset, labels_sha256=hashlib.sha256(labels.astype("<i8", copy=False).tobytes()).hexdigest()
        ),
        teacher=replace(manifest.teacher, accuracy=accuracy),
        view_sha256=tuple(writer.ledger.digest(view) for view in range(manifest.views)),
        fidelity=manifest.fidelity if facts is None else fidelity_of(facts, encoding),
        changed_predictions=manifest.changed_predictions
        if facts is None
        else int(facts[:, :, COUNTS.index("changed")].sum()),
        history=(*manifest.history, *_other_devices(writer), *_new_bytes(writer)),
    )
    writer.finish(finished)
    return finished


def _check_bytes(writer: SplitWriter) -> None:
    """Refuse a repaired split of which finished rows are not what was committed, unless new bytes are accepted."""
    problems = list(writer.rejected)
    if not problems and not writer.policy.accept_new_bytes:
        problems = [
            f"view {view}: sha256 of its ledger {old} committed, {new} now"
            for view, (old, new) in writer.new_digests().items()
        ]
    if not problems:
        return
    there, here = writer.manifest.compute, writer.compute
    apart = [f"{name} {old} there, {here.get(name)} here" for name, old in there.items() if here.get(name) != old]
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise CacheDamaged(
        f"{writer.storage.url}: {counted(len(problems), 'part')} computed again differ from what was committed: "
        + "; ".join(problems[:3])
        + more
        + (f" (what differs: {', '.join(apart)})" if apart else ""),
        "the committed bytes: other ones make another cache",
        "repair with the device and settings that made it, or restore it from a copy; --accept-new-bytes takes "
        "the new rows and gives the cache a new digest; what differs was left as it is",
    )


def seal_splits(location: Location, splits: Sequence[str] = ()) -> Report:
    """Seal the splits of a cache whose shards are all committed, as the last worker of a dump does.

    Args:
        splits: Names of the splits; empty for all.

    Raises:
        CacheNotFound: no cache there, or not one of these splits.
        CacheIncomplete: shards are not committed.
    """
    root = open_storage(location)
    there = cache_splits(root)
    if missing := [name for name in splits if name not in there]:
        raise CacheNotFound(f"the cache {root.url} has no split {missing[0]!r}", f"one of {', '.join(there)}")
    lines, data = [], {}
    for name in splits or there:
        manifest, storage = read_manifest(root, name), root.below(name)
        already = manifest.complete and not manifest.extending
        if not already:
            ledger = Ledger(storage, manifest)
            left = sum(int((~ledger.committed(view)).sum()) for view in range(manifest.views))
            if left:
                raise CacheIncomplete(
                    f"{storage.url}: {left} of {manifest.shards * manifest.views} shards are not committed",
                    "all of them",
                    "run the dump-teacher command again; kdcache status shows its workers",
                )
        encoding = open_encoding(storage, manifest)
        with SplitWriter(root, manifest, ResumePolicy(shared=True), encoding=encoding) as writer:
            if already:
                writer.clear()
            else:
                seal(writer, encoding)
        lines.append(f"{storage.url}: {'was sealed already' if already else 'sealed'}")
        data[name] = {"sealed_now": not already, "sha256": recorded_sha256(root, name)}
    return Report({"cache": root.url, "splits": data}, "\n".join(lines))


def _other_devices(writer: SplitWriter) -> list[ChangeRecord]:
    """Entries in the history for devices that computed some shards, and that neither manifest nor history names."""
    manifest = writer.manifest
    if not manifest.compute:
        return []  # of an older version, which recorded the kind of device alone
    # The history has only the settings of a device that changed.
    known = [manifest.compute]
    for change in manifest.history:
        if change.what == "device":
            known += [{name: value for name, value in change.before.items() if name != COMMITTED}, change.after]
    records = []
    for unit in sorted(writer.ledger.parts):
        compute = writer.ledger.parts[unit].compute
        if not compute or any(each and each.items() <= compute.items() for each in known):
            continue
        apart = [name for name in {**manifest.compute, **compute} if manifest.compute.get(name) != compute.get(name)]
        before, after = ({name: each[name] for name in apart if name in each} for each in (manifest.compute, compute))
        records.append(ChangeRecord(what="device", before=before, after=after))
        known.append(compute)
    return records


def _correct(
    reader: ChunkReader, encoding: Encoding, labels: NDArray[Any], facts_sx: NDArray[np.float64] | None
) -> int:
    """Samples that the teacher is right on in view 0: from the facts, or in older caches from the rows."""
    manifest = reader.manifest
    if facts_sx is not None:
        return int(facts_sx[:, COUNTS.index("correct")].sum())
    correct = 0
    for shard in range(manifest.shards):
        rows = manifest.rows_of(shard)
        encoded = {array.name: reader.span(array.name, 0, rows) for array in encoding.arrays()}
        correct += int((encoding.decode(encoded).argmax(axis=1) == labels[rows.start : rows.stop]).sum())
    return correct


def _new_bytes(writer: SplitWriter) -> list[ChangeRecord]:
    """The entry in the history for finished views whose rows were replaced by others."""
    changed = writer.new_digests()
    if not changed:
        return []
    before = {f"view {view}": old for view, (old, _) in changed.items()}
    after = {f"view {view}": new for view, (_, new) in changed.items()}
    before["manifest_sha256"] = recorded_sha256(writer.root, writer.manifest.dataset.split)
    return [ChangeRecord(what="bytes", before=before, after=after | writer.compute)]
