"""The commands train-teacher, train-student and evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.apps.scores import evaluation_text, measured, per_class, plot_matrix, samples_of, worst
from kdcache.core.command_result import Report
from kdcache.core.commands import EvaluateArgs, TrainStudentArgs, TrainTeacherArgs
from kdcache.core.config import InferenceConfig, StudentConfig, TrainConfig
from kdcache.core.errors import CacheNotFound
from kdcache.core.json_records import to_json
from kdcache.core.options import default_values, narrow
from kdcache.core.plugins import require_extra
from kdcache.core.progress import log
from kdcache.core.run_dir import LAST, RunFolder, read_config
from kdcache.core.workers import launched_process, restarts
from kdcache.data.dataset import IndexedDataset, labelled_samples
from kdcache.data.kept_inputs import KeptInputs
from kdcache.data.taught import as_taught, known_classes
from kdcache.data.views import Views
from kdcache.distill.objective import label_objective
from kdcache.distill.student.join_checks import check_join, check_recorded
from kdcache.distill.student.train_student import train_student as learn_from_cache
from kdcache.distill.trainer import TrainResult, train
from kdcache.distill.training_data import training_data
from kdcache.models.build import build, check_classes, dataset_preprocess, describe, open_data, open_test
from kdcache.models.checkpoints import fit_weights, load_weights, read_checkpoint
from kdcache.models.device import worker_device
from kdcache.models.distributed import Processes, lost_processes, processes_of
from kdcache.models.evaluate import Evaluation
from kdcache.models.evaluators import evaluator_of
from kdcache.models.from_run import load_trained, open_split
from kdcache.models.registry import BuiltModel, count_parameters
from kdcache.store.cache import cache_splits, open_cache
from kdcache.store.records import Preprocess, ViewRecipe

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


def train_student(settings: TrainStudentArgs, kept: KeptInputs | None = None) -> Report:
    """Train a student from a cache's training split; dataset, classes and preprocessing come from its manifest.

    Args:
        kept: Memory for inputs that is shared with other students of the cache.
    """
    with _training_processes(settings) as (processes, device):
        return _train_student(settings, processes, device, kept)


def _train_student(settings: TrainStudentArgs, processes: Processes, device: str, kept: KeptInputs | None) -> Report:
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
        kept=kept,
    )
    role = "student distilled" if config.distill else "student alone"
    return _conclude(role, built, result, test, config, run, processes, teacher=teacher, plots=settings.plots)


def _judged(test: IndexedDataset | None, teacher: Teacher | None) -> IndexedDataset | None:
    """The test split, or None, with a message, where neither labels nor a teacher's answers allow a score."""
    if test is None or teacher is not None:
        return test
    if test.is_embedding:
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
    if path is None and dataset.is_embedding:
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
