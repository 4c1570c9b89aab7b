"""What the commands do: specs and settings in, library calls, and what to print out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.apps.scores import evaluation_text, measured, per_class, plot_matrix, samples_of, worst
from kdcache.core.command_result import Report
from kdcache.core.config import (
    DumpConfig,
    DumpTeacherArgs,
    EvaluateArgs,
    InferenceConfig,
    RuntimeConfig,
    StudentConfig,
    TrainConfig,
    TrainStudentArgs,
    TrainTeacherArgs,
    VerifyArgs,
)
from kdcache.core.errors import CacheDamaged, CacheNotFound, DatasetError
from kdcache.core.json_records import counted, to_json
from kdcache.core.options import default_values, narrow
from kdcache.core.plugins import require_extra
from kdcache.core.progress import log
from kdcache.core.run_dir import LAST, RunFolder, read_config
from kdcache.core.text_table import text_table
from kdcache.core.workers import Worker, launched_process, restarts, worker_of
from kdcache.data.dataset import ANY_CLASS, IndexedDataset, labelled_samples
from kdcache.data.loader import BatchRequest, batch_loader
from kdcache.data.taught import EmbeddingDataset, as_taught, known_classes
from kdcache.data.views import Views
from kdcache.distill.objective import label_objective
from kdcache.distill.student.join_checks import check_join, check_recorded
from kdcache.distill.student.train_student import train_student as learn_from_cache
from kdcache.distill.teacher.dump import dump_teacher as dump
from kdcache.distill.teacher.dump import plan_dump
from kdcache.distill.teacher.estimate import SAMPLES
from kdcache.distill.teacher.plan import EncodingEstimate
from kdcache.distill.teacher.request import without_unreadable
from kdcache.distill.teacher.spot_check import recompute_rows
from kdcache.distill.trainer import TrainResult, train
from kdcache.distill.training_data import training_data
from kdcache.models.build import build, check_classes, dataset_preprocess, describe, open_data, open_test
from kdcache.models.checkpoints import fit_weights, load_weights, read_checkpoint
from kdcache.models.device import evaluation_mode, floating_dtype, worker_device
from kdcache.models.distributed import Processes, lost_processes, processes_of
from kdcache.models.evaluate import Evaluation
from kdcache.models.evaluate_multi_label import MultiLabelEvaluation
from kdcache.models.evaluators import evaluator_of
from kdcache.models.feature_hooks import list_layers
from kdcache.models.from_run import load_trained, open_split
from kdcache.models.registry import BuiltModel, count_parameters
from kdcache.models.teacher import load_teacher, recorded_classes
from kdcache.store.cache import cache_splits, open_cache
from kdcache.store.inspect import verify_cache
from kdcache.store.layout import predicted_bytes
from kdcache.store.manifest import EMBEDDING, Preprocess, ViewRecipe

# Gives the teacher's answers to the samples with given indices.
Teacher = Callable[[NDArray[np.int64]], NDArray[Any]]


@contextlib.contextmanager
def _training_processes(settings: TrainTeacherArgs | TrainStudentArgs) -> Iterator[tuple[Processes, str]]:
    """The processes of a training run, and the device of this one."""
    launched = launched_process()
    device = worker_device(settings.device, launched.local_index)
    with processes_of(launched, device) as processes, lost_processes(processes):
        yield processes, device


def train_teacher(settings: TrainTeacherArgs) -> Report:
    """Train a network on the labels of a dataset's training split."""
    with _training_processes(settings) as (processes, device):
        return _train_teacher(settings, processes, device)


def _train_teacher(settings: TrainTeacherArgs, processes: Processes, device: str) -> Report:
    _check_plots(settings.plots)
    with processes.first_before_others():  # which may download it
        dataset = open_data(settings, settings.dataset, "train")
    recipe = ViewRecipe(augment=settings.augment, mix=settings.mix, seed=settings.seed)
    default = dataset_preprocess(dataset)
    built = build(settings.model, dataset, settings, settings.seed, default, training=True, recipe=recipe)
    test = _judged(open_test(settings, settings.dataset), None)
    run = _run_folder("train-teacher", settings, built, processes)
    description = describe(built, dataset)
    config = dataclasses.replace(narrow(TrainConfig, settings), device=device)
    # A new view of every sample in each epoch.
    data = training_data(Views(dataset, recipe), built.preprocessor, config, schedule=lambda epoch: epoch)
    result = train(
        built.module,
        data,
        objective=label_objective(config.label_smoothing),
        config=config,
        run=run,
        description=description,
        processes=processes,
    )
    return _conclude("teacher", built, result, test, config, run, processes, plots=settings.plots)


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


def train_student(settings: TrainStudentArgs) -> Report:
    """Train a student from a cache's training split; dataset, classes and preprocessing come from its manifest."""
    with _training_processes(settings) as (processes, device):
        return _train_student(settings, processes, device)


def _train_student(settings: TrainStudentArgs, processes: Processes, device: str) -> Report:
    _check_plots(settings.plots)
    caches = [
        open_cache(
            path,
            "train",
            allow_partial=settings.allow_partial,
            cache_dir=settings.cache_dir,
            cache_disk=settings.cache_disk,
        )
        for path in settings.cache
    ]
    manifest = caches[0].manifest
    local = caches[0].local
    spec = settings.dataset or local.dataset
    names = known_classes(manifest)
    dataset = open_data(settings, spec, manifest.dataset.split, hint=local.data_root, classes=names)
    dataset = as_taught(dataset, manifest)
    default, recipe = manifest.teacher.preprocess, manifest.recipe
    check_recorded(caches[0], Views(dataset, recipe))  # before the student sees an input
    built = _build_student(settings, dataset, default, recipe)
    test = open_test(settings, spec, hint=local.data_root, classes=names)
    teacher: Teacher | None = None
    if test is not None:
        test = as_taught(test, manifest)
        if len(caches) == 1:
            test, teacher = _answers(settings.cache[0], test)
    test = _judged(test, teacher)
    config = dataclasses.replace(narrow(StudentConfig, settings), device=device)
    run = _run_folder("train-student", settings, built, processes)
    result = learn_from_cache(
        built.module,
        dataset,
        caches,
        preprocess=built.preprocessor,
        config=config,
        run=run,
        description=describe(built, dataset),
        processes=processes,
    )
    role = "student distilled" if config.distill else "student alone"
    return _conclude(role, built, result, test, config, run, processes, teacher=teacher, plots=settings.plots)


def _judged(test: IndexedDataset | None, teacher: Teacher | None) -> IndexedDataset | None:
    """The test split, if there is something to judge by; said before the training, not after it."""
    if test is None or teacher is not None:
        return test
    if isinstance(test, EmbeddingDataset):
        log("no score on the test split will be given: the cache has no answers to it; dump it too, by --split test")
        return None
    if not len(labelled_samples(test)):
        log(
            f"no accuracy on a test split will be given: that of {test.name} is unlabelled, and the cache has no "
            "answers to it"
        )
        return None
    return test


def _answers(cache_path: str, dataset: IndexedDataset) -> tuple[IndexedDataset, Teacher | None]:
    """A split without the samples that its teacher left out, and the answers to the plain ones, where a cache has them.

    Raises:
        CacheMismatch: it has those to other samples.
    """
    if dataset.split not in cache_splits(cache_path):
        return dataset, None
    cache = open_cache(cache_path, dataset.split, allow_partial=True)
    dataset = as_taught(dataset, cache.manifest)
    if not cache.complete or not cache.manifest.recipe.is_plain(0):
        return dataset, None
    check_join(cache, Views(dataset, cache.manifest.recipe))
    return dataset, cache.rows


def _build_student(
    settings: TrainStudentArgs, dataset: IndexedDataset, default: Preprocess, recipe: ViewRecipe
) -> BuiltModel:
    """The student, with the weights of `settings.init` where these are given."""
    if settings.init is None:
        return build(settings.student, dataset, settings, settings.seed, default, training=True, recipe=recipe)
    state = Path(settings.out) / LAST
    # A resumed run has its weights in its state, and needs the file that it started from no more.
    path = state if settings.resume and state.exists() else Path(settings.init)
    checkpoint = read_checkpoint(path)
    recorded = checkpoint if isinstance(checkpoint.get("kdcache"), dict) else None
    if recorded is not None:
        check_classes(str(path), recorded["kdcache"]["classes"], dataset)
    built = build(
        settings.student, dataset, settings, settings.seed, default, training=True, checkpoint=recorded, recipe=recipe
    )
    fit_weights(built.module, checkpoint, path)
    return built


def evaluate(settings: EvaluateArgs) -> Report:
    """Judge a run's best checkpoint on a split of the dataset it was trained on."""
    folder = Path(settings.run)
    trained = load_trained(folder)
    dataset, teacher = _named_answers(settings, folder, open_split(trained, settings, settings.split))
    evaluation = evaluator_of(dataset)(
        trained.module,
        dataset,
        preprocess=trained.preprocessor,
        config=narrow(InferenceConfig, settings),
        indices=None if teacher is None else np.arange(len(dataset)),
        teacher=teacher,
    )
    data = {
        "run": settings.run,
        "split": settings.split,
        "samples": samples_of(evaluation),
        "checkpoint": str(trained.checkpoint),
        **measured(evaluation, dataset),
        "classes": per_class(evaluation, dataset),
    }
    if settings.plots and isinstance(evaluation, Evaluation):
        data |= plot_matrix(evaluation, dataset, folder)
    return Report(data, "\n".join(filter(None, (evaluation_text(evaluation, dataset), worst(data["classes"])))))


def _named_answers(
    settings: EvaluateArgs, folder: Path, dataset: IndexedDataset
) -> tuple[IndexedDataset, Teacher | None]:
    """The split, and the teacher's answers to it in the cache that is given, or of embeddings in the run's.

    Raises:
        CacheNotFound: it does not have this split.
    """
    path = settings.cache
    if path is None and isinstance(dataset, EmbeddingDataset):
        (path, *_) = read_config(folder)["cache"]
    if path is None:
        return dataset, None
    dataset, found = _answers(path, dataset)
    if found is None:
        raise CacheNotFound(
            f"the cache {path} has no answers to the plain samples of the split {dataset.split!r}",
            "a finished split, or one whose first view is the plain sample",
            f"dump it: dump-teacher --split {dataset.split}; or give another one by --cache",
        )
    return dataset, found


def _run_folder(
    command: str, settings: TrainTeacherArgs | TrainStudentArgs, built: BuiltModel, processes: Processes
) -> RunFolder | None:
    """The folder of a training run, for the process that writes it."""
    if not processes.first:
        return None
    tokenizer = built.preprocessor.tokenizer
    # A launcher that starts failed processes again gives them the same arguments.
    again = restarts() > 0 and (Path(settings.out) / LAST).exists()
    return RunFolder(
        Path(settings.out),
        {"command": command, **to_json(settings)},
        resume=settings.resume or again,
        defaults=default_values(type(settings)),
        tokenizer=None if tokenizer is None else tokenizer.document,
    )


def _conclude(
    role: str,
    built: BuiltModel,
    result: TrainResult,
    test: IndexedDataset | None,
    config: TrainConfig,
    run: RunFolder | None,
    processes: Processes,
    *,
    teacher: Teacher | None = None,
    plots: bool,
) -> Report:
    """Judge the best checkpoint of a finished run on the test split, and keep what there is to say."""
    data: dict[str, Any] = {
        "role": role,
        "model": built.spec,
        "parameters": count_parameters(built.module),
        "test_accuracy": None,
        "epoch_seconds": result.epoch_seconds,
        "checkpoint": None if run is None else str(run.best),
    }
    text = f"{role} {built.spec}: {data['parameters']:,} parameters, checkpoint {data['checkpoint']}"
    if test is not None:
        if run is not None:
            load_weights(built.module, run.best)
        processes.synchronize(built.module.state_dict())
        evaluation = evaluator_of(test)(
            built.module,
            test,
            preprocess=built.preprocessor,
            config=config,
            indices=None if teacher is None else np.arange(len(test)),
            teacher=teacher,
            processes=processes,
        )
        data |= measured(evaluation, test)
        text = f"{text}\n{evaluation_text(evaluation, test)}"
        if plots and run is not None and isinstance(evaluation, Evaluation):
            data |= plot_matrix(evaluation, test, run.path)
    if run is not None:
        run.save_result(data)
    return Report(data, text, silent=run is None)


def _check_plots(wanted: bool) -> None:
    """Know before the training that nothing could be drawn after it."""
    if wanted:
        require_extra("matplotlib", "plots", "--plots")
