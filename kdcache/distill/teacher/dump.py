"""Stage one: the teacher runs once on every sample, and its logits go to the store, shard by shard."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from kdcache.core.config import DumpConfig
from kdcache.core.errors import TargetExists
from kdcache.core.json_records import counted
from kdcache.core.progress import Progress, log
from kdcache.core.workers import Worker
from kdcache.data.augment import Transform
from kdcache.data.preprocess import Preprocessor
from kdcache.distill.teacher.estimate import compare_encodings
from kdcache.distill.teacher.plan import DumpPlan, PreparedDump
from kdcache.distill.teacher.request import DumpRequest
from kdcache.distill.teacher.shard_pass import ShardPass
from kdcache.models.device import memory_errors
from kdcache.store.cache import check_complete
from kdcache.store.claims import UNSEALED
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import LocalPaths
from kdcache.store.manifest import Manifest, read_manifest, recorded_sha256
from kdcache.store.records import OutputRecord, Preprocess
from kdcache.store.repair import prepare_repair
from kdcache.store.resume import ResumePolicy
from kdcache.store.seal import seal
from kdcache.store.storage.registry import Location
from kdcache.store.work import Work
from kdcache.store.writer import SplitWriter


@dataclass(frozen=True, kw_only=True)
class DumpResult:
    """What a dump left.

    Attributes:
        path: Where the cache is.
        split: Name of the split.
        manifest: Manifest of the split as it is stored.
        rows: Rows of the split.
        computed_rows: Rows computed by this call; 0 where the split was already complete.
        pending_shards: Shards that are left to other workers; 0 where the split is complete.
        seconds: Time that this call computed and wrote.
    """

    path: str
    split: str
    manifest: Manifest = field(repr=False)
    rows: int
    computed_rows: int
    pending_shards: int = 0
    seconds: float


def plan_dump(
    teacher: nn.Module,
    dataset: Any,
    *,
    out: Location,
    split: str | None = None,
    teacher_name: str = "",
    preprocess: Preprocess | Preprocessor | None = None,
    config: DumpConfig | None = None,
    augment: Transform | None = None,
    outputs: OutputRecord | None = None,
    add_views: int = 0,
    allow_device_change: bool = False,
) -> DumpPlan:
    """Check that a dump can begin, and what it would write; writes nothing. Arguments as for `dump_teacher`."""
    request = DumpRequest(
        teacher=teacher,
        dataset=dataset,
        out=out,
        split=split,
        teacher_name=teacher_name,
        preprocess=preprocess,
        config=config or DumpConfig(),
        augment=augment,
        outputs=outputs,
        policy=ResumePolicy(add_views=add_views, allow_device_change=allow_device_change),
    )
    prepared = PreparedDump(request)
    return replace(prepared.plan, encodings=compare_encodings(prepared))


def dump_teacher(
    teacher: nn.Module,
    dataset: Any,
    *,
    out: Location,
    split: str | None = None,
    teacher_name: str = "",
    preprocess: Preprocess | Preprocessor | None = None,
    config: DumpConfig | None = None,
    augment: Transform | None = None,
    outputs: OutputRecord | None = None,
    add_views: int = 0,
    repair: bool = False,
    accept_new_bytes: bool = False,
    allow_device_change: bool = False,
    worker: Worker | None = None,
    steal: bool = True,
) -> DumpResult:
    """Run a teacher once over a dataset and store its logits.

    Called again with the same arguments it continues where it was stopped; a finished split is left as it is. Several
    processes may do so together, each with its `worker`.

    Args:
        teacher: Takes (batch, …) and returns logits (batch, classes); is put in eval mode for the time of the call and
            moved to the device.
        dataset: An indexed dataset, or any map-style dataset of (input, label) pairs with a `classes` attribute.
        out: Where the cache is, or will be: a path, or an open storage.
        split: Name of the split that is written; None takes an indexed dataset's own, and `train` for others.
        teacher_name: Name for the manifest; the class's name where empty.
        preprocess: From the shared inputs to what the teacher takes; None scales uint8 to [0, 1] and no more.
        config: Batch size, device, views, features and how they are stored.
        augment: A transform of one plain input, instead of the one that `config.augment` names.
        outputs: What the teacher returns (logits, or probabilities, of which log p is stored), and its column for each
            class of the dataset; None takes it for logits of the classes in order.
        add_views: Number of views to add to a finished split; its views can be read meanwhile.
        repair: Check everything that is stored, and compute again what is broken or missing. What is computed again
            must be what was committed, to the byte.
        accept_new_bytes: With `repair`, take other bytes too; the cache then has a new digest, and its manifest's
            history has both.
        allow_device_change: Continue a dump that another device, or other settings of this one, began; its manifest's
            history has both.
        worker: Which of several processes this one is; None for the only one, which locks a local cache.
        steal: Whether this worker, once its own run of shards is done, computes those that nobody has claimed and those
            of workers that are gone, and waits for the others; else it returns when its own run is committed.

    Raises:
        DatasetError: a stream without an index, a dataset or a transform that gives another input at a second look,
            wrong labels.
        TeacherOutputError: logits of the wrong shape, not finite, or beyond the encoding's range; probabilities that
            are taken for logits; two outputs for one input.
        TargetExists: something else is stored at `out`, or rows that another device or other settings computed.
        CacheDamaged: what is there cannot be read, or rows that a repair computed again are not the committed ones.
        StorageError: the storage refused; what is committed stays, and the same call continues.
    """
    policy = ResumePolicy(
        repair=repair,
        add_views=add_views,
        allow_device_change=allow_device_change,
        accept_new_bytes=accept_new_bytes,
        shared=worker is not None and worker.count > 1,
    )
    request = DumpRequest(
        teacher=teacher,
        dataset=dataset,
        out=out,
        split=split,
        teacher_name=teacher_name,
        preprocess=preprocess,
        config=config or DumpConfig(),
        augment=augment,
        outputs=outputs,
        policy=policy,
    )
    dump = PreparedDump(request)
    existing = dump.plan.existing
    if existing is None or repair or not existing.complete or (add_views and existing.extending):
        return _write_split(dump, worker or Worker(), steal=steal)
    return _leave_finished(dump, existing)


def _leave_finished(dump: PreparedDump, existing: Manifest) -> DumpResult:
    """A finished split: its rows stay as they are, and at most its terms of use change."""
    root, split = dump.root, existing.dataset.split
    place = root.place(split)
    check_complete(place, existing, Ledger(root.below(split), existing))
    if read_manifest(root, split) != existing:
        with SplitWriter(root, dump.manifest, dump.policy, encoding=dump.encoding):
            log(f"{place} has other terms of use now, and a new digest: {recorded_sha256(root, split)}")
    if not existing.extending:
        root.below(split).delete_below(UNSEALED)
    root.sweep()
    more = existing.views - existing.readable_views
    views = counted(more, "more view is", "more views are")
    adding = f"; {views} being added: --add-views {more} goes on" if more else ""
    log(
        f"{place} is already complete; nothing was computed, and no bytes were checked: "
        f"kdcache verify {root.url} does that{adding}"
    )
    return _result(dump, existing, computed_rows=0, seconds=0.0)


def _write_split(dump: PreparedDump, worker: Worker, *, steal: bool) -> DumpResult:
    began, root, split = time.perf_counter(), dump.root, dump.manifest.dataset.split
    place, existing = root.place(split), dump.plan.existing
    dataset = dump.views.dataset
    local = LocalPaths(dataset=dataset.name, data_root=dataset.data_root)
    with _open_writer(dump, local) as writer:
        for change in writer.changes:
            log(f"{place}: change of {change.what}, recorded in the manifest: {change.after}")
        if dump.policy.repair:
            for line in prepare_repair(writer) or ["nothing is broken"]:
                log(f"repair: {line}")
        pending = writer.pending()
        rows, left = dump.plan.rows, sum(len(writer.manifest.rows_of(shard)) for _, shard in pending)
        if left < rows:
            log(f"{place}: {rows - left:,} of {counted(rows, 'row')} are committed; continuing")
        with (
            dump.teacher,
            memory_errors(dump.batch_size),
            Work(writer, worker, steal=steal or worker.count == 1) as work,
        ):
            computed = _write_shards(dump, writer, work, worker)
            manifest = work.sealed
        if manifest is not None:
            writer.clear()  # of what was written after another worker sealed the split
        elif dump.policy.repair or not writer.pending():
            manifest = seal(writer, dump.encoding)
        else:
            log(f"{place}: {counted(len(writer.pending()), 'shard')} left to other workers, the last of which seals it")
    if dump.policy.repair and existing is not None and len(writer.manifest.history) > len(existing.history):
        log(f"{place} has new rows, and a new digest: {recorded_sha256(root, split)}")
    return _result(
        dump,
        manifest or writer.manifest,
        computed_rows=computed,
        pending_shards=0 if manifest is not None else len(writer.pending()),
        seconds=time.perf_counter() - began,
    )


def _open_writer(dump: PreparedDump, local: LocalPaths) -> SplitWriter:
    try:
        return SplitWriter(dump.root, dump.manifest, dump.policy, encoding=dump.encoding, local=local)
    except TargetExists:
        if not dump.adopt_stored():
            raise
        return SplitWriter(dump.root, dump.manifest, dump.policy, encoding=dump.encoding, local=local)


def _result(
    dump: PreparedDump, manifest: Manifest, *, computed_rows: int, pending_shards: int = 0, seconds: float
) -> DumpResult:
    return DumpResult(
        path=dump.root.url,
        split=manifest.dataset.split,
        manifest=manifest,
        rows=manifest.dataset.length * manifest.readable_views,
        computed_rows=computed_rows,
        pending_shards=pending_shards,
        seconds=seconds,
    )


def _write_shards(dump: PreparedDump, writer: SplitWriter, work: Work, worker: Worker) -> int:
    """Compute and commit the shards of this worker's run, then those that others left; returns the number of rows."""
    several = worker.count > 1
    title = f"dump {dump.manifest.dataset.split}" + (f", worker {worker}" if several else "")
    total, done = work.own_rows()
    with Progress(title, total, "rows", done, lines=several) as progress:
        shards = ShardPass(dump, writer, progress, report=worker.index == 0)
        shards.compute(work.own())
        while (unit := work.next_left()) is not None:
            progress.extend(len(writer.manifest.rows_of(unit[1])))
            shards.compute(iter([unit]))
    return shards.rows
