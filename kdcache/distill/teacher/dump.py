"""Stage one: the teacher answers once for every sample, and the answers go to the store, shard by shard."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdcache.core.config import DumpConfig
from kdcache.core.errors import ModelError, TeacherOutputError, UsageError
from kdcache.core.file_lock import PathLock
from kdcache.core.json_records import counted
from kdcache.core.paths import local_path
from kdcache.core.progress import Progress, log
from kdcache.core.system import free_bytes
from kdcache.data.augment import Transform
from kdcache.data.batch_sampler import ShardBatches
from kdcache.data.dataset import IndexedDataset, as_indexed
from kdcache.data.determinism import check_deterministic, check_rows, sampled_crc32c
from kdcache.data.loader import Batch, BatchRequest, batch_loader
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.data.views import Views
from kdcache.distill.teacher.class_agreement import accuracy_lines
from kdcache.distill.teacher.dump_manifest import build_manifest
from kdcache.models.device import evaluation_mode, floating_dtype, memory_errors, move_to, resolve_device, to_host
from kdcache.models.feature_hooks import FeatureHooks, pool_features
from kdcache.models.forward import answer, forward
from kdcache.models.teacher_outputs import (
    check_kind,
    check_same,
    check_stored_kind,
    looks_like_sigmoid,
    to_logits,
)
from kdcache.store.cache import check_complete
from kdcache.store.encodings.floats import LOGITS, as_floats
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.layout import predicted_bytes
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import LocalPaths
from kdcache.store.manifest import NONE, Manifest, OutputRecord, Preprocess, ViewRecipe, read_manifest, recorded_sha256
from kdcache.store.repair import prepare_repair
from kdcache.store.resume import check_target
from kdcache.store.tally import Tally
from kdcache.store.writer import SplitWriter

# Shards that wait for the disk while the teacher computes the next one; more would only cost memory.
SHARDS_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """What a dump would write.

    Attributes:
        existing: the manifest of the same dump that already stands there, finished or not.
        bytes: of the arrays' files, without compression; where views are added, of those alone.
        free_bytes: on the disk that would take them.
    """

    manifest: Manifest = field(repr=False)
    existing: Manifest | None = field(repr=False)
    rows: int
    shards: int
    bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class DumpResult:
    """What a dump left.

    Attributes:
        rows: of the split.
        computed_rows: by this call; 0 where the split was already complete.
        seconds: of this call's computing and writing.
    """

    path: Path
    split: str
    manifest: Manifest = field(repr=False)
    rows: int
    computed_rows: int
    seconds: float


def plan_dump(
    teacher: nn.Module,
    dataset: Any,
    *,
    out: str | os.PathLike[str],
    split: str | None = None,
    teacher_name: str = "",
    preprocess: Preprocess | Preprocessor | None = None,
    config: DumpConfig | None = None,
    augment: Transform | None = None,
    add_views: int = 0,
    allow_device_change: bool = False,
    outputs: OutputRecord | None = None,
) -> DumpPlan:
    """Check that a dump can begin and tell what it would write; writes nothing. Arguments as for `dump_teacher`."""
    ways = {"add_views": add_views, "allow_device_change": allow_device_change}
    return _Dump(teacher, dataset, out, split, teacher_name, preprocess, config, augment, outputs, ways).plan


def dump_teacher(
    teacher: nn.Module,
    dataset: Any,
    *,
    out: str | os.PathLike[str],
    split: str | None = None,
    teacher_name: str = "",
    preprocess: Preprocess | Preprocessor | None = None,
    config: DumpConfig | None = None,
    augment: Transform | None = None,
    add_views: int = 0,
    repair: bool = False,
    outputs: OutputRecord | None = None,
    accept_new_bytes: bool = False,
    allow_device_change: bool = False,
) -> DumpResult:
    """Run a teacher once over a dataset and keep its logits.

    Called again with the same arguments it continues where it was stopped; a finished split is left as it is.

    Args:
        teacher: takes (batch, …) and returns logits (batch, classes); is put in eval mode for the time of the call and
            moved to the device.
        dataset: an indexed dataset, or any map-style dataset of (input, label) pairs with a `classes` attribute.
        out: the cache, a folder.
        split: name of the subgroup that is written; None takes an indexed dataset's own, and `train` for others.
        teacher_name: recorded in the manifest; the class's name where empty.
        preprocess: from the shared inputs to what the teacher takes; None scales uint8 to [0, 1] and no more.
        augment: a transform of one plain input, instead of the one that `config.augment` names.
        add_views: extend a finished split by so many views; its views can be read meanwhile.
        repair: check everything that stands there, and compute again what is broken or missing.
        outputs: what the teacher returns (logits, or probabilities, of which log p is stored), and its column for each
            class of the dataset; None takes it for logits of the classes in order.
        repair: check everything that stands there, and compute again what is broken or missing. What is computed again
            must be what was committed, to the byte.
        accept_new_bytes: with `repair`, take other bytes too; the cache then has a new digest, and its manifest's
            history has both.
        allow_device_change: continue a dump that another device, or other settings of this one, began; its manifest's
            history has both.

    Raises:
        DatasetError: a stream without an index, a dataset or a transform that gives another input at a second look,
            wrong labels.
        TeacherOutputError: logits of the wrong shape, not finite, or beyond the encoding's range; probabilities that
            are taken for logits; two answers to one input.
        TargetExists: something else stands at `out`, or rows that another device or other settings computed.
        CacheDamaged: what is there cannot be read, or rows that a repair computed again are not the committed ones.
        StorageError: the disk refused; what is committed stays, and the same call continues.
    """
    if accept_new_bytes and not repair:
        raise UsageError("accept_new_bytes is given without repair", "both, or neither", "give repair=True")
    ways = {
        "repair": repair,
        "add_views": add_views,
        "allow_device_change": allow_device_change,
    }
    dump = _Dump(teacher, dataset, out, split, teacher_name, preprocess, config, augment, outputs, ways)
    return dump.run(accept_new_bytes=accept_new_bytes)


class _Dump:
    def __init__(
        self,
        teacher: nn.Module,
        dataset: Any,
        out: str | os.PathLike[str],
        split: str | None,
        teacher_name: str,
        preprocess: Preprocess | Preprocessor | None,
        config: DumpConfig | None,
        augment: Transform | None,
        outputs: OutputRecord | None,
        ways: dict[str, Any],
    ) -> None:
        config, add_views = config or DumpConfig(), ways["add_views"]
        self.out = Path(local_path(os.fspath(out), "out"))
        self.outputs = outputs or OutputRecord()
        self.config, self.add_views = config, add_views
        self.ways = ways  # of treating what stands there, as `check_target` takes them
        split = split or (dataset.split if isinstance(dataset, IndexedDataset) else "train")
        self.dataset = as_indexed(dataset, name=type(dataset).__name__, split=split)
        self.device = resolve_device(config.device)
        self.teacher = move_to(teacher, self.device)
        self.preprocessor = as_preprocessor(preprocess or Preprocess())
        check_deterministic(self.dataset)
        if augment is not None and config.augment != NONE:
            raise UsageError(f"augment is given twice, as an object and as {config.augment!r}", "one of the two")
        recipe = ViewRecipe(augment=config.augment, mix=config.mix, seed=config.view_seed, plain_view=config.plain_view)
        self.views = Views(self.dataset, recipe, transform=augment)
        self.views.probe()
        if config.views + add_views > 1 and self.views.recipe.is_plain(1):
            raise UsageError(
                f"{config.views + add_views} views are asked for, with neither --augment nor --mix",
                "views that differ: the teacher would say the same of each",
                "give --augment or --mix, or leave out --views",
            )
        self.layers = list(dict.fromkeys(config.features))
        with FeatureHooks(teacher, self.layers) as taps:
            shapes = self._probe(taps)
        name = teacher_name or type(teacher).__name__
        record = self.preprocessor.record
        manifest = build_manifest(teacher, self.views, split, name, record, self.device, config, shapes)
        self.manifest = replace(manifest, teacher=replace(manifest.teacher, outputs=self.outputs))
        existing = check_target(self.out, self.manifest, **ways)
        target = existing or self.manifest
        finished = predicted_bytes(replace(target, views=target.readable_views)) if target.extending else 0
        self.plan = DumpPlan(
            manifest=target,
            existing=existing,
            rows=target.dataset.length * target.views,
            shards=target.shards * target.views,
            bytes=predicted_bytes(target) - finished,
            free_bytes=free_bytes(self.out),
        )

    def run(self, *, accept_new_bytes: bool) -> DumpResult:
        existing, split = self.plan.existing, self.manifest.dataset.split
        repair = self.ways.get("repair", False)
        done = existing is not None and existing.complete and not (self.add_views and existing.extending)
        if existing is not None and done and not repair:
            return self._leave(existing)
        began = time.perf_counter()
        local = LocalPaths(dataset=self.dataset.name, data_root=self.dataset.data_root)
        with SplitWriter(
            self.out, self.manifest, local=local, accept_new_bytes=accept_new_bytes, **self.ways
        ) as writer:
            for change in writer.changes:
                log(f"{self.out / split}: change of {change.what}, recorded in the manifest: {change.after}")
            if repair:
                found = prepare_repair(writer)
                for line in found or ["nothing is broken"]:
                    log(f"repair: {line}")
            result = self._run(writer, began)
        if repair and existing is not None and len(result.manifest.history) > len(existing.history):
            log(f"{self.out / split} has new rows, and a new digest: {recorded_sha256(self.out / split)}")
        return result

    def _leave(self, existing: Manifest) -> DumpResult:
        """A finished split, whose rows stay as they are."""
        split_path = self.out / self.manifest.dataset.split
        check_complete(split_path, existing, Ledger(split_path, existing))
        if read_manifest(split_path) != existing:
            with SplitWriter(self.out, self.manifest, **self.ways):
                log(f"{split_path} has other terms of use now, and a new digest: {recorded_sha256(split_path)}")
        PathLock.sweep(self.out)
        more = existing.views - existing.readable_views
        views = counted(more, "more view is", "more views are")
        adding = f"; {views} being added: --add-views {more} goes on" if more else ""
        log(
            f"{split_path} is already complete; nothing was computed, and no bytes were checked: "
            f"kdcache verify {self.out} does that{adding}"
        )
        return self._result(existing, 0, 0.0)

    def _run(self, writer: SplitWriter, began: float) -> DumpResult:
        manifest, split = self.plan.manifest, self.plan.manifest.dataset.split
        pending = writer.pending()
        computed = sum(len(manifest.rows_of(shard)) for _, shard in pending)
        if computed < self.plan.rows:
            log(
                f"{self.out / split}: {self.plan.rows - computed:,} of {counted(self.plan.rows, 'row')} are committed; "
                "continuing"
            )
        tally = Tally(writer)
        with (
            evaluation_mode(self.teacher),
            FeatureHooks(self.teacher, self.layers) as taps,
            memory_errors(self.config.batch_size),
            Progress(f"dump {split}", self.plan.rows, "rows", self.plan.rows - computed) as progress,
        ):
            self._write(tally, pending, taps, progress)
        return self._result(tally.finish(), computed, time.perf_counter() - began)

    def _result(self, manifest: Manifest, computed_rows: int, seconds: float) -> DumpResult:
        return DumpResult(
            path=self.out,
            split=manifest.dataset.split,
            manifest=manifest,
            rows=manifest.dataset.length * manifest.readable_views,
            computed_rows=computed_rows,
            seconds=seconds,
        )

    def _forward(self, batch: Batch, taps: FeatureHooks) -> Callable[[], dict[str, NDArray[Any]]]:
        """Queue the teacher's answer to a batch; calling the result waits for it and gives logits and features."""
        logits = answer(
            self.teacher,
            batch.inputs,
            preprocessor=self.preprocessor,
            device=self.device,
            amp=self.config.amp,
            classes=len(self.dataset.classes),
            error=TeacherOutputError,
            outputs=self.outputs,
            samples=batch.indices,
        )
        answers = {"logits": logits} | {
            f"features.{layer}": pool_features(features, self.config.pool) for layer, features in taps.take().items()
        }
        waits = {
            name: to_host(answer if answer.dtype == torch.float64 else answer.float())
            for name, answer in answers.items()
        }
        return lambda: {name: wait() for name, wait in waits.items()}

    def _probe(self, taps: FeatureHooks) -> dict[str, tuple[int, ...]]:
        """Let the teacher answer for one small batch, so that a wrong teacher is refused before anything is written.

        It answers for the batch twice, and for its first sample beside another one, because it must give one answer.

        Returns:
            The shape of one row of the features of each layer.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        encoding = encoding_named(self.config.encoding)
        indices = np.arange(min(2, len(self.dataset)))
        requests = [BatchRequest(indices, view) for view in (0, 1)[: 1 if self.views.recipe.is_plain(1) else 2]]
        with evaluation_mode(self.teacher):
            for request, batch in zip(requests, self._probed(requests), strict=True):
                found = self._forward(batch, taps)()
                returned = forward(
                    self.teacher, batch.inputs, preprocessor=self.preprocessor, device=self.device, amp=self.config.amp
                )
                check_kind(returned.cpu().double().numpy(), self.outputs, narrow=self.narrow)
                for name, answers in found.items():
                    if name == LOGITS:
                        encoding.encode(answers, first_sample=0)
                    else:
                        as_floats(answers, encoding.feature_dtype, first_sample=0, name=name)
                    shapes[name] = answers.shape[1:]
                    if len(answers) != len(indices):
                        raise ModelError(
                            f"{name} has shape {answers.shape} for a batch of {len(indices)}",
                            "a layer whose output has a row for each sample",
                            "choose another; see --list-layers",
                        )
                again = to_logits(returned, self.outputs).cpu().double().numpy()
                check_same(found["logits"], again, sample=0, narrow=self.narrow, other_batch=False)
                if request.view == 0:
                    self._check_beside_another(found["logits"])
        return {layer: shapes[f"features.{layer}"] for layer in self.layers}

    def _check_beside_another(self, logits: NDArray[Any]) -> None:
        """Refuse a teacher whose answer to a sample depends on what is beside it in the batch.

        Args:
            logits: the teacher's answer to the first samples of view 0.
        """
        last = len(self.dataset) - 1
        beside = BatchRequest(np.array([0, last if last > 1 else 0]), 0)  # two samples: batch norm takes no single one
        (batch,) = self._probed([beside])
        with FeatureHooks(self.teacher, []) as none:
            elsewhere = self._forward(batch, none)()["logits"]
        check_same(logits[:1], elsewhere[:1], sample=0, narrow=self.narrow, other_batch=True)

    def _probed(self, requests: list[BatchRequest]) -> Iterable[Batch]:
        return batch_loader(self.views, requests, preprocessor=self.preprocessor, device=self.device)

    @property
    def narrow(self) -> bool:
        """Whether the teacher computes in less than float32."""
        return self.config.amp != "off" or floating_dtype(self.teacher).itemsize < 4

    def _answers(self, loader: Iterable[Batch], taps: FeatureHooks) -> Iterator[tuple[Batch, dict[str, NDArray[Any]]]]:
        """Batches with the teacher's answers, one behind, so that the device computes while the host stores."""
        waiting: tuple[Batch, Callable[[], dict[str, NDArray[Any]]]] | None = None
        for batch in loader:
            queued = batch, self._forward(batch, taps)
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = queued
        if waiting is not None:
            yield waiting[0], waiting[1]()

    def _write(self, tally: Tally, pending: list[tuple[int, int]], taps: FeatureHooks, progress: Progress) -> None:
        manifest = self.plan.manifest
        batches = ShardBatches(manifest, pending, self.config.batch_size)
        loader = batch_loader(
            self.views, batches, preprocessor=self.preprocessor, workers=self.config.workers, device=self.device
        )
        sampled = lru_cache(maxsize=1)(partial(sampled_crc32c, self.views))
        answers = self._answers(loader, taps)
        in_flight: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="kdcache-writer") as pool:
            for view, shard in pending:
                rows = manifest.rows_of(shard)
                buffers: dict[str, NDArray[Any]] = {}
                filled = 0
                for size in batches.sizes(shard):
                    batch, given = next(answers)
                    assert batch.input_crc32c is not None, "the loader was asked for checksums"
                    given |= {
                        "labels": batch.labels.numpy(),
                        "input_crc32c": batch.input_crc32c.numpy().astype(np.uint32),
                    }
                    for name, values in given.items():
                        if not filled:
                            buffers[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
                        buffers[name][filled : filled + size] = values
                    filled += size
                    progress.advance(size)
                    if in_flight and in_flight[0].done():
                        in_flight.popleft().result()
                self._check_shard(view, buffers, first=(view, shard) == pending[0])
                check_rows(self.views, view, rows, buffers["labels"], buffers["input_crc32c"], sampled(view))
                while len(in_flight) >= SHARDS_IN_FLIGHT:
                    in_flight.popleft().result()
                in_flight.append(pool.submit(tally.commit, view, shard, buffers))
            while in_flight:
                in_flight.popleft().result()

    def _check_shard(self, view: int, buffers: dict[str, NDArray[Any]], *, first: bool) -> None:
        """Refuse rows of the other kind than said; of the first shard, report how they agree with the labels."""
        logits, classes = buffers["logits"], self.dataset.classes
        check_stored_kind(logits, self.outputs, narrow=self.narrow)
        if not first:
            return
        if self.outputs.kind == "logits" and looks_like_sigmoid(logits):
            log(
                f"warning: the teacher's outputs all lie between {logits.min():.3g} and {logits.max():.3g}, as from a "
                "sigmoid; logits are stored as they are, and softmax of these is nearly uniform"
            )
        if self.views.recipe.mix == NONE or self.views.recipe.is_plain(view):
            for line in accuracy_lines(buffers["labels"], logits.argmax(axis=1), classes):
                log(f"{self.manifest.dataset.split}: {line}")
