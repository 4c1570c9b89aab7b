"""What the commands do: specs and settings in, library calls, and what to print out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.cache.layout import predicted_bytes
from kdcache.cache.manifest import Preprocess
from kdcache.cache.reader import open_cache
from kdcache.checkpoints import load_weights, read_checkpoint
from kdcache.config import (
    DatasetSource,
    DumpConfig,
    DumpTeacher,
    Evaluate,
    Execution,
    Input,
    StudentConfig,
    TrainConfig,
    TrainStudent,
    TrainTeacher,
    narrow,
)
from kdcache.datasets import IndexedDataset, open_dataset
from kdcache.dump import dump_teacher as dump
from kdcache.dump import plan_dump
from kdcache.errors import CheckpointError, DatasetError, ModelError, UsageError
from kdcache.evaluate import Evaluation, evaluate_model, plot_confusion
from kdcache.models import BuiltModel, build_model, count_parameters
from kdcache.progress import log
from kdcache.records import from_json, to_json
from kdcache.runs import RunFolder, read_config
from kdcache.student import train_student as learn_from_cache
from kdcache.training import TrainResult, label_objective, train

Report = tuple[dict[str, Any], str]

DATA_ROOT = "data"


def train_teacher(settings: TrainTeacher) -> Report:
    """Train a network on the labels of a dataset's training split."""
    dataset = _open(settings, settings.dataset, "train")
    built = _build(settings.model, dataset, settings, settings.seed, _dataset_preprocess(dataset), training=True)
    test = _open_test(settings, settings.dataset)
    run = RunFolder(Path(settings.out), {"command": "train-teacher", **to_json(settings)}, resume=settings.resume)
    description = _description(built, dataset)
    config = narrow(TrainConfig, settings)
    result = train(
        built.module,
        dataset,
        objective=label_objective(config.label_smoothing),
        preprocess=built.preprocess,
        config=config,
        run=run,
        description=description,
    )
    return _conclude("teacher", built, result, test, config, run, plots=settings.plots)


def dump_teacher(settings: DumpTeacher) -> Report:
    """Run a teacher over one or more splits and keep its logits."""
    reports = [_dump_split(settings, split) for split in dict.fromkeys(settings.split)]
    data = {"cache": settings.out, "dry_run": settings.dry_run, "splits": {data["split"]: data for data, _ in reports}}
    return data, "\n".join(text for _, text in reports)


def _dump_split(settings: DumpTeacher, split: str) -> Report:
    dataset = _open(settings, settings.dataset, split)
    checkpoint = read_checkpoint(settings.checkpoint) if settings.checkpoint else {}
    built = _build(
        settings.teacher, dataset, settings, settings.seed, _dataset_preprocess(dataset), checkpoint=checkpoint
    )
    if settings.checkpoint:
        _check_classes(settings.checkpoint, checkpoint, dataset)
        load_weights(built.module, settings.checkpoint)
    elif not built.has_weights:
        raise UsageError(
            f"the teacher {settings.teacher} has random weights",
            "a trained teacher",
            "give --checkpoint FILE; kdcache train-teacher makes one (best.pt)",
        )
    arguments: dict[str, Any] = {
        "out": settings.out,
        "split": split,
        "teacher_name": settings.teacher,
        "preprocess": built.preprocess,
        "config": narrow(DumpConfig, settings),
    }
    if settings.dry_run:
        plan = plan_dump(built.module, dataset, **arguments)
        data = {
            "split": split,
            "rows": plan.rows,
            "shards": plan.shards,
            "bytes": plan.bytes,
            "free_bytes": plan.free_bytes,
            "complete": plan.existing is not None and plan.existing.complete,
        }
        fits = "fits" if plan.bytes <= plan.free_bytes else "DOES NOT FIT"
        state = "; already complete" if data["complete"] else ""
        return data, (
            f"{split}: {plan.rows:,} rows, {plan.bytes:,} bytes in {plan.shards} shards; "
            f"{plan.free_bytes:,} bytes are free: it {fits}{state}"
        )
    result = dump(built.module, dataset, **arguments)
    accuracy = result.manifest.teacher.accuracy
    data = {
        "split": split,
        "rows": result.rows,
        "computed_rows": result.computed_rows,
        "seconds": result.seconds,
        "bytes": predicted_bytes(result.manifest),
        "teacher_accuracy": accuracy,
        "complete": result.manifest.complete,
    }
    return data, (
        f"{settings.out}/{split}: {result.rows:,} rows ({result.computed_rows:,} now, {result.seconds:.1f} s), "
        f"teacher accuracy {accuracy:.2%}"
    )


def train_student(settings: TrainStudent) -> Report:
    """Train a student from a cache's training split; dataset, classes and preprocessing come from its manifest."""
    cache = open_cache(settings.cache, "train")
    record = cache.manifest.dataset
    spec = settings.dataset or record.name
    dataset = _open(settings, spec, record.split, hint=record.data_root)
    built = _build(settings.student, dataset, settings, settings.seed, cache.manifest.teacher.preprocess, training=True)
    test = _open_test(settings, spec, hint=record.data_root)
    config = narrow(StudentConfig, settings)
    run = RunFolder(Path(settings.out), {"command": "train-student", **to_json(settings)}, resume=settings.resume)
    result = learn_from_cache(
        built.module,
        dataset,
        cache,
        preprocess=built.preprocess,
        config=config,
        run=run,
        description=_description(built, dataset),
    )
    role = "student distilled" if config.distill else "student alone"
    return _conclude(role, built, result, test, config, run, plots=settings.plots)


def evaluate(settings: Evaluate) -> Report:
    """Judge a run's best checkpoint on a split of the dataset it was trained on."""
    folder = Path(settings.run)
    read_config(folder)
    path = folder / "best.pt"
    checkpoint = read_checkpoint(path)
    description = checkpoint.get("kdcache")
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} does not say what it is of", "a checkpoint of a kdcache run")
    spec = settings.dataset or description["dataset"]
    dataset = _open(settings, spec, settings.split, hint=description["data_root"])
    _check_classes(str(path), checkpoint, dataset)
    built = _build(description["model"], dataset, Input(), 0, _recorded_preprocess(checkpoint, path), training=True)
    load_weights(built.module, path)
    preprocess = _recorded_preprocess(checkpoint, path)
    evaluation = evaluate_model(built.module, dataset, preprocess=preprocess, config=narrow(Execution, settings))
    data = {
        "run": settings.run,
        "split": settings.split,
        "samples": len(dataset),
        f"{settings.split}_accuracy": evaluation.accuracy,
        "checkpoint": str(path),
        "first": _first(evaluation),
    }
    if settings.plots:
        data |= _plot(evaluation, dataset, folder)
    return data, _judgement(evaluation, dataset)


def _conclude(
    role: str,
    built: BuiltModel,
    result: TrainResult,
    test: IndexedDataset | None,
    config: TrainConfig,
    run: RunFolder,
    *,
    plots: bool,
) -> Report:
    """Judge the best checkpoint of a finished run on the test split, and keep what there is to say."""
    data: dict[str, Any] = {
        "role": role,
        "model": built.spec,
        "parameters": count_parameters(built.module),
        "test_accuracy": None,
        "epoch_seconds": result.epoch_seconds,
        "checkpoint": str(run.best),
    }
    text = f"{role} {built.spec}: {data['parameters']:,} parameters, checkpoint {run.best}"
    if test is not None:
        load_weights(built.module, run.best)
        evaluation = evaluate_model(built.module, test, preprocess=built.preprocess, config=config)
        data |= {"test_accuracy": evaluation.accuracy, "first": _first(evaluation)}
        text = f"{text}\n{_judgement(evaluation, test)}"
        if plots:
            data |= _plot(evaluation, test, run.path)
    run.save_result(data)
    return data, text


def _open(settings: DatasetSource, spec: str, split: str, hint: str | None = None) -> IndexedDataset:
    root = settings.data_root or hint or DATA_ROOT
    return open_dataset(spec, split=split, data_root=root, download=settings.download)


def _open_test(settings: DatasetSource, spec: str, hint: str | None = None) -> IndexedDataset | None:
    """The test split; None, and said so, where there is none. Opened before training, so that it is known early."""
    try:
        return _open(settings, spec, "test", hint)
    except DatasetError as problem:
        log(f"no accuracy on a test split will be given: {problem}")
        return None


def _dataset_preprocess(dataset: IndexedDataset) -> Preprocess:
    return Preprocess(mean=dataset.default_mean, std=dataset.default_std)


def _build(
    spec: str,
    dataset: IndexedDataset,
    settings: Input,
    seed: int,
    default: Preprocess,
    *,
    training: bool = False,
    checkpoint: dict[str, Any] | None = None,
) -> BuiltModel:
    """A network for a dataset; what a kdcache checkpoint recorded of its preprocessing goes before the default."""
    if checkpoint and "kdcache" in checkpoint:
        default = _recorded_preprocess(checkpoint, Path(spec))
    return build_model(
        spec,
        num_classes=len(dataset.classes),
        input_shape=dataset.input_shape,
        seed=seed,
        mean=settings.mean,
        std=settings.std,
        size=settings.size,
        default=default,
        replace_head=training,
    )


def _recorded_preprocess(checkpoint: dict[str, Any], path: Path) -> Preprocess:
    return from_json(Preprocess, checkpoint["kdcache"]["preprocess"], where=str(path), error=CheckpointError)


def _description(built: BuiltModel, dataset: IndexedDataset) -> dict[str, Any]:
    return {
        "kdcache": {
            "model": built.spec,
            "classes": list(dataset.classes),
            "preprocess": to_json(built.preprocess),
            "dataset": dataset.name,
            "data_root": dataset.data_root,
        }
    }


def _check_classes(path: str, checkpoint: dict[str, Any], dataset: IndexedDataset) -> None:
    """Refuse a kdcache checkpoint whose outputs mean other classes than the dataset's."""
    description = checkpoint.get("kdcache")
    if isinstance(description, dict) and description["classes"] != list(dataset.classes):
        raise ModelError(
            f"{path} was trained for the {len(description['classes'])} classes {description['classes'][:5]} …",
            f"the {len(dataset.classes)} classes {list(dataset.classes[:5])} … of {dataset.name}, in that order",
            "use a checkpoint trained on this dataset's classes",
        )


def _plot(evaluation: Evaluation, dataset: IndexedDataset, folder: Path) -> dict[str, str]:
    path = folder / f"confusion-{dataset.split}.png"
    plot_confusion(evaluation, dataset.classes, path)
    return {"confusion": str(path)}


def _first(evaluation: Evaluation) -> list[dict[str, int]]:
    return [{"true": true, "predicted": predicted} for true, predicted in evaluation.first]


def _judgement(evaluation: Evaluation, dataset: IndexedDataset) -> str:
    answers = [f"{dataset.classes[true]} → {dataset.classes[predicted]}" for true, predicted in evaluation.first]
    return (
        f"{dataset.split} accuracy {evaluation.accuracy:.2%} on {len(dataset):,} samples\n"
        f"first {len(answers)}, true → predicted: {', '.join(answers)}"
    )
