"""The teacher's pass over the shards that a worker of a dump has taken: compute, check, commit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain

import numpy as np

from kdcache.core.progress import Progress, log
from kdcache.data.batch import Batch
from kdcache.data.batch_sampler import ShardBatches
from kdcache.data.determinism import check_rows, sampled_crc32c
from kdcache.data.loader import batch_loader
from kdcache.distill.teacher.class_agreement import accuracy_lines
from kdcache.distill.teacher.plan import PreparedDump
from kdcache.distill.teacher.teacher_pass import HEAD_ERROR, Rows
from kdcache.models.loading import auto_workers
from kdcache.models.teacher_outputs import check_stored_kind, looks_like_sigmoid
from kdcache.store.claims import Unit
from kdcache.store.encodings.base import LOGITS
from kdcache.store.records import EMBEDDING, NONE
from kdcache.store.seal import commit_outputs
from kdcache.store.writer import SplitWriter

# A shard, and the views that are computed of it side by side.
Place = tuple[tuple[int, ...], int]

# Shards that wait for the disk while the teacher computes the next one; more would only cost memory.
SHARDS_IN_FLIGHT = 2


class ShardPass:
    """The teacher's pass over shards, whose rows a thread commits while the teacher computes the next ones.

    Args:
        progress: Is advanced by the rows of each batch.
        report: Whether the agreement with the labels is reported for the first shard.

    Attributes:
        rows: Number of rows computed.
    """

    def __init__(self, dump: PreparedDump, writer: SplitWriter, progress: Progress, *, report: bool) -> None:
        self._dump, self._writer, self._progress, self._report = dump, writer, progress, report
        self._batches = ShardBatches(writer.manifest, dump.batch_size)
        workers = dump.config.workers
        if workers is None:
            workers = auto_workers(dump.teacher.network, dump.views, dump.plan.rows)
        self._loader = batch_loader(
            dump.views,
            self._batches,
            preprocessor=dump.teacher.network.preprocessor,
            workers=workers,
            device=dump.teacher.network.device,
        )
        self._sampled: dict[int, dict[int, int]] = {}
        self._views_in_flight = dump.views_in_flight
        self.rows = 0

    def compute(self, units: Iterator[Unit]) -> None:
        """Compute shards and commit them; all are committed on return."""
        dump, manifest = self._dump, self._writer.manifest
        commit = partial(commit_outputs, self._writer, dump.encoding, max_kl=dump.config.max_kl)
        begun: deque[Place] = deque()
        self._batches.places = _recorded(_by_shard(units, self._views_in_flight), begun)
        outputs = dump.teacher.stream(self._loader)
        in_flight: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer") as pool:
            for first in outputs:
                views, shard = begun.popleft()
                samples = manifest.rows_of(shard)
                rows_of: dict[int, Rows] = {view: {} for view in views}
                for filled, view, batch, given in _shard_batches(chain([first], outputs), len(samples), views):
                    rows = rows_of[view]
                    for name, values in given.items():
                        if not filled:
                            rows[name] = np.empty((len(samples), *values.shape[1:]), values.dtype)
                        rows[name][filled : filled + len(values)] = values
                    self._progress.advance(len(batch.labels))
                    if in_flight and in_flight[0].done():
                        in_flight.popleft().result()
                if new := [view for view in views if view not in self._sampled]:
                    self._sampled |= sampled_crc32c(dump.views, new)
                for view, rows in rows_of.items():
                    _check_shard(dump, view, samples, rows, report=self._report and not self.rows)
                    check_rows(dump.views, view, samples, rows["labels"], rows["input_crc32c"], self._sampled[view])
                    while len(in_flight) >= SHARDS_IN_FLIGHT:
                        in_flight.popleft().result()
                    in_flight.append(pool.submit(commit, view, shard, rows))
                    self.rows += len(samples)
            while in_flight:
                in_flight.popleft().result()


def _by_shard(units: Iterator[Unit], most: int) -> Iterator[Place]:
    """Units that follow each other with the same shard, up to `most` of them, as one place."""
    views: list[int] = []
    last = -1
    for view, shard in units:
        if views and (shard != last or len(views) == most):
            yield tuple(views), last
            views = []
        views.append(view)
        last = shard
    if views:
        yield tuple(views), last


def _recorded(places: Iterator[Place], begun: deque[Place]) -> Iterator[Place]:
    """The places, each also appended to `begun` when the loader asks for it."""
    for place in places:
        begun.append(place)
        yield place


def _shard_batches(
    outputs: Iterator[tuple[Batch, Rows]], count: int, views: Sequence[int]
) -> Iterator[tuple[int, int, Batch, Rows]]:
    """The batches of the next shard of `count` samples, each after the number of samples before it and its view."""
    filled = 0
    while filled < count:
        for view in views:
            batch, rows = next(outputs)
            assert batch.input_crc32c is not None, "the loader was asked for checksums"
            crcs = batch.input_crc32c.numpy().astype(np.uint32)
            yield filled, view, batch, rows | {"labels": batch.labels.numpy(), "input_crc32c": crcs}
        filled += len(batch.labels)


def _check_shard(dump: PreparedDump, view: int, samples: range, rows: Rows, *, report: bool) -> None:
    """Refuse rows of the other kind than said; report how they agree with the labels, if asked."""
    network, logits = dump.teacher.network, rows[LOGITS]
    if dump.teacher.head is not None:
        dump.teacher.head.check(rows[HEAD_ERROR], first_sample=samples.start)
    check_stored_kind(logits, network.outputs, narrow=network.narrow)
    if not report or dump.views.dataset.multi_label or network.outputs.kind == EMBEDDING:
        return
    if network.outputs.kind == "logits" and looks_like_sigmoid(logits):
        log(
            f"warning: the teacher's outputs all lie between {logits.min():.3g} and {logits.max():.3g}, as from a "
            "sigmoid; logits are stored as they are, and softmax of these is nearly uniform"
        )
    if dump.views.recipe.mix == NONE or dump.views.recipe.is_plain(view):
        for line in accuracy_lines(rows["labels"], logits.argmax(axis=1), dump.views.dataset.classes):
            log(f"{dump.manifest.dataset.split}: {line}")
