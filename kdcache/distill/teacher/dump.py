"""Stage one: the teacher runs once on every sample, and its logits go to the store, shard by shard."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

from kdcache.core.config import DumpConfig
from kdcache.core.json_records import counted
from kdcache.core.progress import Progress, log
from kdcache.core.workers import Worker
from kdcache.data.augment import Transform
from kdcache.data.batch_sampler import ShardBatches
from kdcache.data.determinism import check_rows, sampled_crc32c
from kdcache.data.loader import Batch, batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.distill.teacher.class_agreement import accuracy_lines
from kdcache.distill.teacher.estimate import compare_encodings
from kdcache.distill.teacher.plan import DumpPlan, DumpRequest, PreparedDump
from kdcache.distill.teacher.teacher_pass import HEAD_ERROR, Rows
from kdcache.models.device import memory_errors
from kdcache.models.teacher_outputs import check_stored_kind, looks_like_sigmoid
from kdcache.store.cache import check_complete
from kdcache.store.claims import WORK, Unit
from kdcache.store.encodings.base import LOGITS
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import LocalPaths
from kdcache.store.manifest import NONE, Manifest, OutputRecord, Preprocess, read_manifest, recorded_sha256
from kdcache.store.repair import prepare_repair
from kdcache.store.resume import ResumePolicy
from kdcache.store.seal import commit_outputs, seal
from kdcache.store.storage.registry import Location
from kdcache.store.work import Work
from kdcache.store.writer import SplitWriter

# Shards that wait for the disk while the teacher computes the next one; more would only cost memory.
SHARDS_IN_FLIGHT = 2


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
        root.below(split).delete_below(WORK)
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
    with SplitWriter(root, dump.manifest, dump.policy, encoding=dump.encoding, local=local) as writer:
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
            memory_errors(dump.config.batch_size),
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
        shards = _ShardPass(dump, writer, progress, report=worker.index == 0)
        shards.compute(work.own())
        while (unit := work.next_left()) is not None:
            progress.extend(len(writer.manifest.rows_of(unit[1])))
            shards.compute(iter([unit]))
    return shards.rows


class _ShardPass:
    """The teacher's pass over shards, whose rows a thread commits while the teacher computes the next ones.

    Args:
        report: Whether the agreement with the labels is reported for the first shard.

    Attributes:
        rows: Number of rows computed.
    """

    def __init__(self, dump: PreparedDump, writer: SplitWriter, progress: Progress, *, report: bool) -> None:
        self._dump, self._writer, self._progress, self._report = dump, writer, progress, report
        self._batches = ShardBatches(writer.manifest, dump.config.batch_size)
        self._loader = batch_loader(
            dump.views,
            self._batches,
            preprocessor=dump.teacher.network.preprocessor,
            workers=dump.config.workers,
            device=dump.teacher.network.device,
        )
        self._sampled = lru_cache(maxsize=1)(partial(sampled_crc32c, dump.views))
        self.rows = 0

    def compute(self, units: Iterator[Unit]) -> None:
        """Compute shards and commit them; all are committed on return."""
        dump, manifest = self._dump, self._writer.manifest
        commit = partial(commit_outputs, self._writer, dump.encoding, max_kl=dump.config.max_kl)
        begun: deque[Unit] = deque()
        self._batches.places = _recorded(units, begun)
        outputs = dump.teacher.stream(self._loader)
        in_flight: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer") as pool:
            for first in outputs:
                view, shard = begun.popleft()
                samples = manifest.rows_of(shard)
                rows: Rows = {}
                for filled, batch, given in _shard_batches(chain([first], outputs), len(samples)):
                    for name, values in given.items():
                        if not filled:
                            rows[name] = np.empty((len(samples), *values.shape[1:]), values.dtype)
                        rows[name][filled : filled + len(values)] = values
                    self._progress.advance(len(batch.labels))
                    if in_flight and in_flight[0].done():
                        in_flight.popleft().result()
                _check_shard(dump, view, samples, rows, report=self._report and not self.rows)
                check_rows(dump.views, view, samples, rows["labels"], rows["input_crc32c"], self._sampled(view))
                while len(in_flight) >= SHARDS_IN_FLIGHT:
                    in_flight.popleft().result()
                in_flight.append(pool.submit(commit, view, shard, rows))
                self.rows += len(samples)
            while in_flight:
                in_flight.popleft().result()


def _recorded(units: Iterator[Unit], begun: deque[Unit]) -> Iterator[Unit]:
    """The units, each also appended to `begun` when the loader asks for it."""
    for unit in units:
        begun.append(unit)
        yield unit


def _shard_batches(outputs: Iterator[tuple[Batch, Rows]], count: int) -> Iterator[tuple[int, Batch, Rows]]:
    """The batches of the next shard of `count` samples, each after the number of samples before it."""
    filled = 0
    while filled < count:
        batch, rows = next(outputs)
        assert batch.input_crc32c is not None, "the loader was asked for checksums"
        crcs = batch.input_crc32c.numpy().astype(np.uint32)
        yield filled, batch, rows | {"labels": batch.labels.numpy(), "input_crc32c": crcs}
        filled += len(batch.labels)


def _check_shard(dump: PreparedDump, view: int, samples: range, rows: Rows, *, report: bool) -> None:
    """Refuse rows of the other kind than said; report how they agree with the labels, if asked."""
    network, logits = dump.teacher.network, rows[LOGITS]
    if dump.teacher.head is not None:
        dump.teacher.head.check(rows[HEAD_ERROR], first_sample=samples.start)
    check_stored_kind(logits, network.outputs, narrow=network.narrow)
    if not report:
        return
    if network.outputs.kind == "logits" and looks_like_sigmoid(logits):
        log(
            f"warning: the teacher's outputs all lie between {logits.min():.3g} and {logits.max():.3g}, as from a "
            "sigmoid; logits are stored as they are, and softmax of these is nearly uniform"
        )
    if dump.views.recipe.mix == NONE or dump.views.recipe.is_plain(view):
        for line in accuracy_lines(rows["labels"], logits.argmax(axis=1), dump.views.dataset.classes):
            log(f"{dump.manifest.dataset.split}: {line}")
