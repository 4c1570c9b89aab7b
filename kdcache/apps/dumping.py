"""The commands dump-teacher and verify --teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdcache.core.command_result import Report
from kdcache.core.commands import DumpTeacherArgs, VerifyArgs
from kdcache.core.config import DumpConfig, RuntimeConfig
from kdcache.core.errors import CacheDamaged, DatasetError
from kdcache.core.json_records import counted
from kdcache.core.options import narrow
from kdcache.core.text_table import text_table
from kdcache.core.workers import Worker, worker_of
from kdcache.data.batch import BatchRequest
from kdcache.data.dataset import ANY_CLASS, IndexedDataset
from kdcache.data.loader import batch_loader
from kdcache.data.taught import as_taught, known_classes
from kdcache.data.views import Views
from kdcache.distill.student.join_checks import check_join
from kdcache.distill.teacher.dump import dump_teacher as dump
from kdcache.distill.teacher.dump import plan_dump
from kdcache.distill.teacher.estimate import SAMPLES
from kdcache.distill.teacher.plan import EncodingEstimate
from kdcache.distill.teacher.request import without_unreadable
from kdcache.distill.teacher.spot_check import recompute_rows
from kdcache.models.build import open_data
from kdcache.models.device import evaluation_mode, floating_dtype, worker_device
from kdcache.models.evaluate_multi_label import MultiLabelEvaluation
from kdcache.models.feature_hooks import list_layers
from kdcache.models.registry import BuiltModel
from kdcache.models.teacher import load_teacher, recorded_classes
from kdcache.store.cache import open_cache
from kdcache.store.inspect import verify_cache
from kdcache.store.layout import predicted_bytes
from kdcache.store.records import EMBEDDING, ViewRecipe


def dump_teacher(settings: DumpTeacherArgs) -> Report:
    """Run a teacher over one or more splits and keep its logits."""
    if settings.list_layers:
        return _list_layers(settings)
    worker = worker_of(settings.worker)
    reports = [_dump_split(settings, split, worker) for split in dict.fromkeys(settings.split)]
    splits = {report.data["split"]: report.data for report in reports}
    data = {"cache": settings.out, "dry_run": settings.dry_run, "splits": splits}
    return Report(data, "\n".join(report.text for report in reports))


def _teacher_scores(cache_path: str, split: str) -> dict[str, float]:
    """The teacher's scores on samples of several classes each, from the rows of view 0."""
    cache = open_cache(cache_path, split)
    return MultiLabelEvaluation(
        true_nc=cache.column("labels"), logits_nc=cache.column("logits").astype(np.float32)
    ).scores


def _load_teacher(settings: DumpTeacherArgs, dataset: IndexedDataset, recipe: ViewRecipe) -> BuiltModel:
    return load_teacher(
        settings,
        settings.teacher,
        settings.checkpoint,
        dataset,
        recipe,
        kind=settings.teacher_outputs if settings.task == "classification" else settings.task,
        class_map=settings.class_map,
        checkpoint_key=settings.checkpoint_key,
    )


def _open_for_dump(settings: DumpTeacherArgs, split: str) -> IndexedDataset:
    # What has no classes is no fault where the answer is a vector.
    classes = ANY_CLASS if settings.task == EMBEDDING else ()
    try:
        dataset = open_data(settings, settings.dataset, split, classes=classes)
    except DatasetError:
        if not (names := recorded_classes(settings.checkpoint)):
            raise
        dataset = open_data(settings, settings.dataset, split, classes=names)
    return without_unreadable(dataset, settings.out, settings.workers or 0) if settings.skip_unreadable else dataset


def _list_layers(settings: DumpTeacherArgs) -> Report:
    dataset = _open_for_dump(settings, settings.split[0])
    built = _load_teacher(settings, dataset, ViewRecipe())
    preprocessor, device = built.preprocessor, torch.device("cpu")
    (batch,) = batch_loader(dataset, [BatchRequest(np.arange(1))], preprocessor=preprocessor, device=device)
    with evaluation_mode(built.module):
        layers = list_layers(built.module, preprocessor.per_batch(batch.inputs, floating_dtype(built.module)))
    width = max((len(name) for name, _, _ in layers), default=0)
    lines = [f"{name:<{width}}  {shape}  {kind}" for name, kind, shape in layers]
    data = {"layers": [{"layer": name, "type": kind, "shape": shape} for name, kind, shape in layers]}
    return Report(data, "\n".join([*lines, "penultimate is the input of the last linear layer"]))


def _dump_split(settings: DumpTeacherArgs, split: str, worker: Worker) -> Report:
    dataset = _open_for_dump(settings, split)
    recipe = ViewRecipe(augment=settings.augment, mix=settings.mix, seed=settings.view_seed)
    built = _load_teacher(settings, dataset, recipe)
    device = worker_device(settings.device, worker.local_index)
    arguments: dict[str, Any] = {
        "out": settings.out,
        "split": split,
        "teacher_name": settings.teacher,
        "preprocess": built.preprocessor,
        "config": dataclasses.replace(narrow(DumpConfig, settings), device=device),
        "add_views": settings.add_views,
        "outputs": built.outputs,
        "allow_device_change": settings.allow_device_change,
    }
    if settings.dry_run:
        plan = plan_dump(built.module, dataset, **arguments)
        data = {
            "split": split,
            "rows": plan.rows,
            "shards": plan.shards,
            "bytes": plan.bytes,
            "free_bytes": plan.free_bytes,
            "complete": plan.existing is not None and plan.existing.complete and not plan.existing.extending,
        }
        room = ""
        if plan.free_bytes is not None:
            fits = "fits" if plan.bytes <= plan.free_bytes else "DOES NOT FIT"
            room = f"; {plan.free_bytes:,} bytes are free: it {fits}"
        state = "; already complete" if data["complete"] else ""
        data["encodings"] = [dataclasses.asdict(each) for each in plan.encodings]
        lines = [
            f"{split}: {counted(plan.rows, 'row')}, {counted(plan.bytes, 'byte')} in {counted(plan.shards, 'shard')}"
            f"{room}{state}",
            *_encoding_table(plan.encodings),
        ]
        return Report(data, "\n".join(lines))
    result = dump(
        built.module,
        dataset,
        **arguments,
        repair=settings.repair,
        accept_new_bytes=settings.accept_new_bytes,
        worker=worker,
        steal=settings.steal,
    )
    accuracy = result.manifest.teacher.accuracy
    data = {
        "split": split,
        "rows": result.rows,
        "computed_rows": result.computed_rows,
        "seconds": result.seconds,
        "bytes": predicted_bytes(result.manifest),
        "teacher_accuracy": accuracy,
        "complete": result.manifest.complete,
        "pending_shards": result.pending_shards,
    }
    known = "not known: view 0 is mixed, or unlabelled" if accuracy is None else f"{accuracy:.2%}"
    if result.manifest.is_embedding:
        known = ""
    elif result.manifest.multi_label and result.manifest.complete:
        scores = _teacher_scores(settings.out, split)
        data["teacher_scores"], known = scores, f"mAP {scores['map']:.2%}"
    state = (
        f"{counted(result.pending_shards, 'shard')} left to other workers"
        if result.pending_shards
        else f"teacher accuracy {known}"
        if known
        else counted(len(result.manifest.dataset.classes), "dimension")
    )
    return Report(
        data,
        f"{settings.out}/{split}: {counted(result.rows, 'row')} ({result.computed_rows:,} now, "
        f"{result.seconds:.1f} s), {state}",
    )


def _encoding_table(estimates: Sequence[EncodingEstimate]) -> list[str]:
    """Size and loss of each encoding, to choose one from."""
    temperatures = list(dict.fromkeys(name for each in estimates for name in each.mean_kl))
    header = ["encoding", "bytes per row", "bytes", *(f"KL at T = {name}" for name in temperatures)]
    rows = [
        [
            each.encoding,
            f"{each.bytes_per_row:,}",
            f"{each.bytes:,}",
            *(f"{each.mean_kl[name]:.1e}" if name in each.mean_kl else "-" for name in temperatures),
        ]
        for each in estimates
    ]
    measured = f", and mean KL in nats on {SAMPLES} samples or fewer" if temperatures else ""
    title = f"the teacher's outputs before compression{measured}:"
    return [title, *text_table(header, rows, numbers=header[1:])]


def verify_with_teacher(settings: VerifyArgs) -> Report:
    """Check every byte, and let the teacher answer once more for a sample of rows."""
    report = verify_cache(settings.cache, settings.split)
    if report.exit_code:
        return report
    lines, data, exit_code = [report.text], report.data, 0
    for split in data["splits"]:
        cache = open_cache(settings.cache, split)
        local = cache.local
        names = known_classes(cache.manifest)
        dataset = open_data(settings, settings.dataset or local.dataset, split, hint=local.data_root, classes=names)
        dataset = as_taught(dataset, cache.manifest)
        recipe = cache.manifest.recipe
        built = load_teacher(
            settings,
            str(settings.teacher),
            settings.checkpoint,
            dataset,
            recipe,
            outputs=cache.manifest.teacher.outputs,
            checkpoint_key=settings.checkpoint_key,
        )
        views = Views(dataset, recipe)
        check_join(cache, views)
        found = recompute_rows(
            built.module,
            views,
            cache,
            rows=settings.rows,
            execution=RuntimeConfig(
                device=settings.device, batch_size=settings.batch_size, workers=settings.workers, seed=settings.seed
            ),
            tokenizer=built.preprocessor.tokenizer,
        )
        data["splits"][split]["recomputed"] = dataclasses.asdict(found)
        recorded = {f"{each.temperature:g}": each.max_kl for each in cache.manifest.fidelity}
        # A recomputed logit may differ in its last bits, and the loss with it.
        within = all(value <= 1.01 * recorded.get(name, math.inf) + 1e-6 for name, value in found.max_kl.items())
        same = found.same_weights and within and found.largest_difference <= settings.tolerance
        exit_code = exit_code if same else CacheDamaged.exit_code
        compared = [
            f"KL at T = {name} up to {value:.2g}, {recorded.get(name, math.nan):.2g} in the manifest"
            for name, value in found.max_kl.items()
        ]
        if not found.max_kl or found.largest_difference > 0:
            compared.append(
                f"difference up to {found.largest_difference:.2g} of 1 + |x| in {found.array} "
                f"at sample {found.sample} in view {found.view}, tolerance {settings.tolerance:g}"
            )
        if not found.same_weights:
            compared.append("the teacher's weights are not those of the manifest")
        lines.append(f"{split}: {counted(found.rows, 'row')} recomputed; {'; '.join(compared)}")
    data["whole"] = exit_code == 0
    return Report(data, "\n".join(lines), exit_code)
