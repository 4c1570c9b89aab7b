"""From specs and settings to datasets and networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.core import rng
from kdcache.core.config import DatasetConfig, InputConfig
from kdcache.core.errors import CheckpointError, DatasetError, ModelError, UsageError
from kdcache.core.json_records import from_json, to_json
from kdcache.core.progress import log
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import BatchRequest, batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.data.registry import open_dataset
from kdcache.data.text_preprocess import is_sequences, recorded_tokenizer, sequence_preprocessor
from kdcache.data.views import Views, as_views
from kdcache.models.checkpoints import fit_weights, fits, read_checkpoint
from kdcache.models.device import evaluation_mode
from kdcache.models.forward import answer
from kdcache.models.registry import (
    BuiltModel,
    build_model,
    build_text_model,
    check_reader,
    has_own_tokenizer,
    reads_sequences,
)
from kdcache.models.teacher_outputs import (
    LOGITS,
    check_class_names,
    class_names,
    head_width,
    read_class_map,
    resolve_columns,
)
from kdcache.store.manifest import OutputRecord, Preprocess, ViewRecipe

DATA_ROOT = "data"


def load_teacher(
    settings: InputConfig,
    spec: str,
    checkpoint_path: str | None,
    dataset: IndexedDataset,
    recipe: ViewRecipe,
    *,
    kind: str = LOGITS,
    class_map: str | None = None,
    outputs: OutputRecord | None = None,
    checkpoint_key: str | None = None,
) -> BuiltModel:
    """A teacher with its weights, and how its outputs become logits of the dataset's classes.

    Args:
        kind: what it returns, `logits` or `probabilities`.
        class_map: a JSON file from each class of the dataset to the teacher's output; None takes them in order.
        outputs: both of these, as a cache recorded them.
        checkpoint_key: entry of the checkpoint that holds the weights, where several fit.

    Raises:
        UsageError: it has no weights, or the class map is wrong.
        CheckpointError: the checkpoint cannot be read or does not fit.
        ModelError: it cannot be built, or names other classes than the dataset's and there is no class map.
    """
    check_checkpoint_key(checkpoint_path, checkpoint_key)
    checkpoint = read_checkpoint(checkpoint_path) if checkpoint_path else {}
    wanted = read_class_map(class_map, dataset.classes) if class_map else {}
    if outputs is not None:
        kind, wanted = outputs.kind, dict(zip(dataset.classes, outputs.columns, strict=False))
    default = dataset_preprocess(dataset)
    heads = _head_classes(checkpoint, wanted) if wanted else dataset.classes
    built = _construct(
        spec,
        dataset,
        settings,
        0,
        default,
        training=False,
        checkpoint=checkpoint,
        classes=heads,
        checkpoint_key=checkpoint_key,
    )
    names = class_names(built.module, built.class_names, checkpoint)
    columns: tuple[int, ...] = ()
    if wanted:
        columns = resolve_columns(wanted, names, len(names) or (head_width(checkpoint) if checkpoint else None))
    else:
        # Before its first answer, whose shape alone would not tell what is wrong.
        check_class_names(checkpoint_path or spec, names, dataset.classes, exact="kdcache" in checkpoint)
    built = replace(built, outputs=OutputRecord(kind=kind, columns=columns))
    _probe(built, Views(dataset, recipe), 0)
    if checkpoint_path:
        fit_weights(built.module, checkpoint, checkpoint_path, key=checkpoint_key)
    elif not built.has_weights:
        raise UsageError(
            f"the teacher {spec} has random weights",
            "a trained teacher",
            "give --checkpoint FILE; kdcache train-teacher makes one (best.pt)",
        )
    return built


def _head_classes(checkpoint: dict[str, Any], class_map: dict[str, int | str]) -> tuple[str, ...]:
    """Names for the outputs of a teacher that has others than the dataset's classes: as many as its head has rows."""
    if isinstance(description := checkpoint.get("kdcache"), dict):
        return tuple(description["classes"])
    count = head_width(checkpoint) or 1 + max((at for at in class_map.values() if isinstance(at, int)), default=0)
    return tuple(map(str, range(max(count, len(class_map)))))


def check_checkpoint_key(checkpoint: str | None, key: str | None) -> None:
    """Refuse a key without the file whose entry it names."""
    if key is not None and checkpoint is None:
        raise UsageError(f"--checkpoint-key is {key!r}, and there is no --checkpoint", "both", "add --checkpoint FILE")


def open_data(settings: DatasetConfig, spec: str, split: str, hint: str | None = None) -> IndexedDataset:
    """A split of the dataset of this spec.

    Args:
        hint: the data root that a cache or a run recorded.
    """
    root = settings.data_root or hint or DATA_ROOT
    try:
        return open_dataset(spec, split=split, data_root=root, download=settings.download)
    except DatasetError as problem:
        if settings.dataset or settings.data_root:
            raise
        where = "--dataset and --data-root say where it is, if not where it was"
        raise DatasetError(problem.found, problem.needed, "; ".join(filter(None, (problem.remedy, where)))) from problem


def open_test(settings: DatasetConfig, spec: str, hint: str | None = None) -> IndexedDataset | None:
    """The test split; None, and said so, where there is none. Opened before training, so that it is known early."""
    try:
        return open_data(settings, spec, "test", hint)
    except DatasetError as problem:
        log(f"no accuracy on a test split will be given: {problem}")
        return None


def dataset_preprocess(dataset: IndexedDataset) -> Preprocess:
    return Preprocess(mean=dataset.default_mean, std=dataset.default_std)


def build(
    spec: str,
    dataset: IndexedDataset,
    settings: InputConfig,
    seed: int,
    default: Preprocess,
    *,
    training: bool = False,
    checkpoint: dict[str, Any] | None = None,
    recipe: ViewRecipe | None = None,
) -> BuiltModel:
    """A network for a dataset. The preprocessing in a kdcache checkpoint goes before the default.

    Args:
        checkpoint: What will be loaded into the network; its weights are not loaded here.
        recipe: Recipe of the views that the network will see beside the plain samples.
    """
    classes = dataset.classes
    built = _construct(
        spec, dataset, settings, seed, default, training=training, checkpoint=checkpoint or {}, classes=classes
    )
    if not training and not checkpoint:
        check_class_names(spec, class_names(built.module, built.class_names, {}), classes, exact=False)
    _probe(built, Views(dataset, recipe or ViewRecipe()), seed)
    return built


def _construct(
    spec: str,
    dataset: IndexedDataset,
    settings: InputConfig,
    seed: int,
    default: Preprocess,
    *,
    training: bool,
    checkpoint: dict[str, Any],
    classes: tuple[str, ...],
    checkpoint_key: str | None = None,
) -> BuiltModel:
    """A network without a trial forward pass. The preprocessing in a kdcache checkpoint goes before the default.

    Args:
        classes: Names of the network's outputs.
        checkpoint_key: Entry of the checkpoint that holds the weights, where several fit.
    """
    if checkpoint and "kdcache" in checkpoint:
        default = recorded_preprocess(checkpoint, Path(spec))
    if is_sequences(dataset):
        return _build_reader(
            spec, dataset, settings, seed, default, training=training, checkpoint=checkpoint, classes=classes
        )
    if reads_sequences(spec):
        raise ModelError(
            f"{spec} reads texts or token ids, and an input of {dataset.name} is {dataset.input_dtype} "
            f"{dataset.input_shape or 'of varying size'}",
            "a dataset of texts, or of token ids that tells its vocabulary_size",
            "take imdb or text-folder:PATH, or give the dataset an attribute vocabulary_size, its largest id plus one",
        )
    if settings.tokenizer or settings.vocabulary_size or settings.max_tokens:
        raise ModelError(
            "--tokenizer, --vocabulary-size or --max-tokens is given, and "
            f"an input of {dataset.name} is {dataset.input_dtype} {dataset.input_shape or 'of varying size'}",
            "texts, or token ids of a dataset that tells its vocabulary_size",
            "leave it out",
        )
    _check_channels_first(spec, dataset, settings)
    return build_model(
        spec,
        num_classes=len(classes),
        input_shape=dataset.input_shape,
        seed=seed,
        mean=settings.mean,
        std=settings.std,
        size=settings.size,
        resize=settings.resize,
        crop=settings.crop,
        default=default,
        replace_head=training,
        fits=partial(fits, content=checkpoint, key=checkpoint_key) if checkpoint else None,
    )


def _check_channels_first(spec: str, dataset: IndexedDataset, settings: InputConfig) -> None:
    """Refuse arrays of (height, width, channels), which would be taken for images of `height` channels.

    Code of the user's may want them so, and the mlp takes any shape.
    """
    shape = dataset.input_shape or ()
    any_shape = spec.startswith("py:") or (spec == "mlp" and not (settings.size or settings.mean))
    if len(shape) != 3 or shape[2] not in (1, 3, 4) or min(shape[:2]) < 8 or any_shape:
        return
    height, width, channels = shape
    raise ModelError(
        f"an input of {dataset.name} has shape {shape}, which looks like (height, width, channels)",
        f"channels first: {(channels, height, width)}",
        "let the dataset return array.transpose(2, 0, 1), tensor.permute(2, 0, 1), or a PIL image",
    )


def _build_reader(
    spec: str,
    dataset: IndexedDataset,
    settings: InputConfig,
    seed: int,
    default: Preprocess,
    *,
    training: bool,
    checkpoint: dict[str, Any],
    classes: tuple[str, ...],
) -> BuiltModel:
    """A network for texts or token ids."""
    if settings.mean or settings.size or settings.resize or settings.crop:
        raise ModelError(
            f"--mean, --std, --size, --resize or --crop is given, and {dataset.name} has no images",
            "images",
            "leave it out; --max-tokens and --vocabulary-size are for texts",
        )
    check_reader(spec, is_text=dataset.is_text)
    recorded = None
    if "kdcache" in checkpoint and not settings.tokenizer:
        recorded = recorded_tokenizer(checkpoint["kdcache"], default)
    preprocessor = None
    if not has_own_tokenizer(spec):
        preprocessor = sequence_preprocessor(settings, dataset, default=default, recorded=recorded, may_build=training)
    elif settings.tokenizer or settings.vocabulary_size:
        raise ModelError(
            f"--tokenizer or --vocabulary-size is given, and {spec} brings its tokenizer", "neither", "leave it out"
        )
    elif recorded is not None:
        record = replace(default, max_tokens=settings.max_tokens or default.max_tokens)
        preprocessor = Preprocessor(record, recorded)
    return build_text_model(
        spec,
        classes=classes,
        seed=seed,
        preprocessor=preprocessor,
        max_tokens=settings.max_tokens or (default.max_tokens if checkpoint else None),
        # A checkpoint brings its own head, whose number of classes the weights of the hub need not have.
        replace_head=training or "kdcache" in checkpoint,
    )


def _probe(built: BuiltModel, views: Views, seed: int) -> None:
    """Let a network answer for two samples, so that one that does not suit the dataset is refused at once."""
    preprocessor, device = built.preprocessor, torch.device("cpu")
    indices = np.arange(min(2, len(views)))
    # The plain sample too, because networks are judged on it.
    looks = [(as_views(views.dataset), 0)] + ([] if views.recipe.is_plain(1) else [(views, 1)])
    classes = len(views.dataset.classes)
    with torch.random.fork_rng(devices=[]), evaluation_mode(built.module):
        # Lazy layers draw their weights in their first forward pass, from the global generator.
        torch.default_generator.manual_seed(rng.generator_seed(seed, "lazy init"))
        for source, view in looks:
            request = BatchRequest(indices, view)
            (batch,) = batch_loader(source, [request], preprocessor=preprocessor, device=device)
            answer(
                built.module,
                batch.inputs,
                preprocessor=preprocessor,
                device=device,
                amp="off",
                classes=classes,
                outputs=built.outputs,
                samples=batch.indices,
            )


def recorded_preprocess(checkpoint: dict[str, Any], path: Path) -> Preprocess:
    return from_json(Preprocess, checkpoint["kdcache"]["preprocess"], where=str(path), error=CheckpointError)


def describe(built: BuiltModel, dataset: IndexedDataset) -> dict[str, Any]:
    return {
        "kdcache": {
            "model": built.spec,
            "classes": list(dataset.classes),
            "preprocess": to_json(built.preprocess),
            "tokenizer": built.preprocessor.tokenizer.document if built.preprocessor.tokenizer else None,
            "dataset": dataset.name,
            "data_root": dataset.data_root,
            "input_shape": None if dataset.input_shape is None else list(dataset.input_shape),
            "input_dtype": dataset.input_dtype,
            "is_text": dataset.is_text,
        }
    }


def check_classes(path: str, classes: Sequence[str], dataset: IndexedDataset) -> None:
    """Refuse a checkpoint whose outputs mean other classes than the dataset's."""
    if tuple(classes) != dataset.classes:
        raise ModelError(
            f"{path} was trained for the {len(classes)} classes {list(classes[:5])} …",
            f"the {len(dataset.classes)} classes {list(dataset.classes[:5])} … of {dataset.name}, in that order",
            "use a checkpoint trained on this dataset's classes",
        )
