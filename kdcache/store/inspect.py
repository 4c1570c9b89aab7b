"""The reports of `kdcache inspect` and `kdcache verify`, as text and as data; needs no torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from kdcache.core.command_result import Report
from kdcache.core.errors import CacheDamaged, CacheIncomplete, CacheNotFound
from kdcache.core.json_records import counted, to_json
from kdcache.core.progress import Progress
from kdcache.store.cache import cache_splits
from kdcache.store.chunk_reader import REPAIR
from kdcache.store.encodings.registry import encoding_of
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import LocalPaths, read_local
from kdcache.store.manifest import Manifest, cache_sha256, read_manifest, recorded_sha256
from kdcache.store.records import Preprocess
from kdcache.store.storage.base import Storage
from kdcache.store.storage.registry import Location, open_storage
from kdcache.store.verify import SplitReport, verify_split


def inspect_cache(location: Location) -> Report:
    """Manifest and progress of each split of a cache.

    Raises:
        CacheNotFound, CacheDamaged: the cache cannot be read.
        CacheIncomplete: not even one split was begun.
    """
    root = open_storage(location)
    splits = {name: _inspect_split(root, name) for name in cache_splits(root)}
    if not splits:
        raise CacheIncomplete(f"the cache {root.url} has no split yet", "a dump", "run dump-teacher again")
    details = {name: split[0] for name, split in splits.items()}
    finished = all(each["complete"] and not each["views_being_added"] for each in details.values())
    digest = cache_sha256({name: each["sha256"] for name, each in details.items()}) if finished else None
    cited = f"{digest}, the digest to cite for the whole cache" if digest else "to cite once every split is complete"
    texts = [f"{root.url}\n  sha256  {cited}", *(text for _, text in splits.values())]
    return Report({"cache": root.url, "sha256": digest, "splits": details}, "\n\n".join(texts))


def verify_cache(location: Location, splits: Sequence[str] = ()) -> Report:
    """Check every byte of some splits, or of all; exit code 3 where something is wrong.

    Raises:
        CacheNotFound: no cache there, or not one of these splits.
    """
    root = open_storage(location)
    names = cache_splits(root)
    if missing := [name for name in splits if name not in names]:
        raise CacheNotFound(
            f"the cache {root.url} has no split {missing[0]!r}", f"of {', '.join(names) or '(none yet)'}"
        )
    reports: dict[str, SplitReport] = {}
    began = time.perf_counter()
    for name in splits or names:
        total = sum(size for _, size in root.objects(name))
        with Progress(f"verify {name}", total, "bytes") as progress:
            reports[name] = verify_split(root, name, on_read=progress.advance)
    seconds = time.perf_counter() - began
    whole = bool(reports) and not any(report.problems for report in reports.values())
    lines = [] if reports else [f"{root.url} has no split yet"]
    for name, report in reports.items():
        state = counted(len(report.problems), "problem") if report.problems else "whole"
        shards = counted(report.shards, "shard")
        lines.append(f"{root.place(name)}: {state}; {counted(report.bytes, 'byte')} of {shards} checked")
        lines += [f"  damage: {problem}" for problem in report.problems] + [f"  note: {note}" for note in report.notes]
    checked = sum(report.bytes for report in reports.values())
    lines.append(f"{checked:,} bytes in {seconds:.2f} s ({checked / max(seconds, 1e-9) / 1e6:,.0f} MB/s)")
    if not whole:
        lines.append(f"to do: {REPAIR}")
    data = {
        "cache": root.url,
        "whole": whole,
        "seconds": seconds,
        "splits": {name: dataclasses.asdict(report) for name, report in reports.items()},
    }
    return Report(data, "\n".join(lines), 0 if whole else CacheDamaged.exit_code)


def _inspect_split(root: Storage, split: str) -> tuple[dict[str, Any], str]:
    manifest, storage = read_manifest(root, split), root.below(split)
    ledger = Ledger(storage, manifest)
    committed = sum(int(ledger.committed(view).sum()) for view in range(manifest.views))
    stored = sum(size for _, size in storage.objects())
    shards = manifest.shards * manifest.views
    data = {
        "complete": manifest.complete,
        "committed_shards": committed,
        "shards": shards,
        "views": manifest.readable_views,
        "views_being_added": manifest.views - manifest.readable_views,
        "rows": manifest.dataset.length * manifest.readable_views,
        "bytes": stored,
        "sha256": recorded_sha256(root, split),
        "manifest": to_json(manifest),
    }
    return data, _describe(storage.url, manifest, data, read_local(storage, manifest))


def _describe(place: str, manifest: Manifest, data: dict[str, Any], local: LocalPaths) -> str:
    committed, shards = data["committed_shards"], counted(data["shards"], "shard")
    dataset, teacher = manifest.dataset, manifest.teacher
    logits = manifest.arrays[0]
    unknown = "not known: view 0 is mixed, or unlabelled" if manifest.complete else "not known yet"
    accuracy = unknown if teacher.accuracy is None else f"{teacher.accuracy:.2%} on this split"
    state = "complete" if manifest.complete else f"incomplete: {committed} of {shards} committed"
    if manifest.extending:
        added = manifest.views - manifest.readable_views
        views = counted(added, "more view is", "more views are")
        state += f"; {views} being added, {committed} of {shards} committed"
    shape = "of varying size" if dataset.input_shape is None else "×".join(map(str, dataset.input_shape))
    classes = ", ".join(dataset.classes[:10]) + (", …" if len(dataset.classes) > 10 else "")
    plain = to_json(Preprocess())
    steps = [f"{key} {value}" for key, value in to_json(teacher.preprocess).items() if value != plain.get(key)]
    preprocess = ", ".join(steps) or "none but scaling to [0, 1]"
    features = "; ".join(
        f"{each.layer} ({'×'.join(map(str, manifest.array(each.array).row_shape))}), pool {each.pool}"
        for each in manifest.features
    )
    lines = {
        "state": state,
        "sha256": data["sha256"],
        "license": manifest.license or "not given",
        "citation": manifest.citation or "not given",
        "dataset": f"{dataset.name}, split {dataset.split}, {counted(dataset.length, 'sample')}, "
        f"{dataset.input_dtype} {shape}{_left_out(dataset.excluded)}",
        "classes": f"none: an embedding of {counted(len(dataset.classes), 'dimension')}"
        if manifest.is_embedding
        else f"{len(dataset.classes)}: {classes}",
        "labels": "none" if manifest.is_embedding else f"sha256 {dataset.labels_sha256}",
        "inputs": f"sha256 of a sample {dataset.sample_sha256}",
        "teacher": f"{teacher.spec}, {teacher.parameters:,} parameters"
        + ("" if manifest.is_embedding else f", accuracy {accuracy}"),
        "weights": f"sha256 {teacher.weights_sha256}",
        "preprocessing": preprocess,
        "views": _describe_views(manifest),
        "features": features or "none",
        "rows": f"{dataset.length * manifest.readable_views:,}",
        "encoding": f"{encoding_of(manifest).spec}, compression {logits.compression}, amp {manifest.amp}",
        "fidelity": describe_fidelity(manifest),
        "converted from": "nothing: dumped by the teacher"
        if manifest.converted_from is None
        else f"{manifest.converted_from.encoding}, sha256 of its manifest {manifest.converted_from.manifest_sha256}",
        "layout": f"chunks of {logits.chunk_rows} rows in shards of {manifest.shard_rows}, "
        f"{counted(data['bytes'], 'byte')} in all",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        + f" on {manifest.device}, seed {manifest.seed}",
        "device": ", ".join(f"{name} {value}" for name, value in manifest.compute.items()) or "not recorded",
        "changes": "; ".join(f"{each.what}: {each.before} to {each.after}" for each in manifest.history) or "none",
        "local paths": f"dataset {local.dataset}, data root {local.data_root or 'none'} (no part of the sha256)",
    }
    width = max(map(len, lines))
    below = "\n" + " " * (width + 4)
    described = (f"  {name:<{width}}  {value}".replace("\n", below) for name, value in lines.items())
    return "\n".join([place, *described])


def _left_out(excluded: tuple[int, ...]) -> str:
    """Samples of the source that the dump left out, for a line."""
    if not excluded:
        return ""
    listed = ", ".join(map(str, excluded[:10])) + (", …" if len(excluded) > 10 else "")
    return f"; left out as unreadable: {listed}"


def describe_fidelity(manifest: Manifest) -> str:
    """Loss of the encoding, for a person."""
    if not manifest.fidelity:
        return "not known yet" if manifest.facts and not manifest.complete else "not measured"
    losses = ", ".join(
        f"{each.mean_kl:.1e} at T = {each.temperature:g} (at most {each.max_kl:.1e})" for each in manifest.fidelity
    )
    changed = counted(manifest.changed_predictions or 0, "predicted class", "predicted classes")
    return f"{changed} changed, mean KL in nats {losses}"


def _describe_views(manifest: Manifest) -> str:
    recipe, count = manifest.recipe, manifest.readable_views
    if recipe.is_plain(1):
        return f"{count}, the plain sample"
    plain = "; view 0 is the plain sample" if recipe.plain_view else ""
    return f"{count}, augment {recipe.augment}, mix {recipe.mix}, seed {recipe.seed}{plain}"
