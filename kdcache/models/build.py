"""Datasets and networks from specs and settings."""

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
from kdcache.core.json_records import counted, from_json, to_json
from kdcache.core.progress import log
from kdcache.data.batch import BatchRequest
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.data.registry import open_dataset
from kdcache.data.text_preprocess import is_sequences, recorded_tokenizer, sequence_preprocessor
from kdcache.data.views import Views, as_views
from kdcache.models.checkpoints import fits
from kdcache.models.device import evaluation_mode
from kdcache.models.forward import ForwardPass
from kdcache.models.registry import (
    BuiltModel,
    build_model,
    build_text_model,
    check_reader,
    has_own_tokenizer,
    reads_sequences,
)
from kdcache.models.teacher_outputs import (
    check_class_names,
    class_names,
)
from kdcache.store.records import Preprocess, ViewRecipe

DATA_ROOT = "data"


def open_data(
    settings: DatasetConfig, spec: str, split: str, hint: str | None = None, classes: Sequence[str] = ()
) -> IndexedDataset:
    """Open a split of a dataset.

    Args:
        hint: Data root that a cache or a run recorded.
        classes: Names of the classes that a cache or a run recorded, for unlabelled data; `--classes` wins.
    """
    if settings.classes is not None:
        classes = _read_classes(Path(settings.classes))
    root = settings.data_root or hint or DATA_ROOT
    try:
        return open_dataset(spec, split=split, data_root=root, download=settings.download, classes=classes)
    except DatasetError as problem:
        if settings.dataset or settings.data_root:
            raise
        where = "--dataset and --data-root say where it is, if not where it was"
        raise DatasetError(problem.found, problem.needed, "; ".join(filter(None, (problem.remedy, where)))) from problem


def _read_classes(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(
            f"--classes {path} cannot be read: {problem}", "a text file in UTF-8 with a class name per line"
        ) from problem
    names = [name.strip() for name in names if name.strip()]
    if len(set(names)) < max(len(names), 1):
        raise UsageError(
            f"--classes {path} holds {counted(len(names), 'name')}, {len(set(names))} of them different",
            "a different name for each class, one per line",
        )
    return names


def open_test(
    settings: DatasetConfig, spec: str, hint: str | None = None, classes: Sequence[str] = ()
) -> IndexedDataset | None:
    """Open the test split; None, with a message, where there is none. Called before training, to report it early."""
    try:
        return open_data(settings, spec, "test", hint, classes)
    except DatasetError as problem:
        log(f"no accuracy on a test split will be given: {problem}")
        return None


def dataset_preprocess(dataset: IndexedDataset) -> Preprocess:
    """Preprocessing with the dataset's known statistics, for a network without its own."""
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
    """Build a network for a dataset, and try it on two samples.

    Args:
        default: Preprocessing of a network without its own.
        training: Whether `dataset` is the split to train on, for which a head and a vocabulary may be made.
        checkpoint: Content of the checkpoint that will be loaded into the network; its weights are not loaded here.
        recipe: Recipe of the views that the network will see, in addition to the plain samples.
    """
    built = construct(spec, dataset, settings, seed, default, training=training, checkpoint=checkpoint)
    if not training and not checkpoint:
        check_class_names(spec, class_names(built.module, built.class_names, {}), dataset.classes, exact=False)
    probe_model(built, Views(dataset, recipe or ViewRecipe()), seed)
    return built


def construct(
    spec: str,
    dataset: IndexedDataset,
    settings: InputConfig,
    seed: int,
    default: Preprocess,
    *,
    training: bool = False,
    checkpoint: dict[str, Any] | None = None,
    classes: tuple[str, ...] | None = None,
    checkpoint_key: str | None = None,
    encoder: bool = False,
) -> BuiltModel:
    """Build a network without a forward pass.

    The preprocessing in a checkpoint of kdcache replaces that of published weights and the default.

    Args:
        classes: Names of the network's outputs; None takes the dataset's classes.
        encoder: Whether an `hf:` model of texts is to give vectors, and not classes.
        checkpoint_key: Entry of the checkpoint that holds the weights, where several fit.
    """
    checkpoint, classes = checkpoint or {}, classes or dataset.classes
    if "kdcache" in checkpoint:
        default = recorded_preprocess(checkpoint, Path(spec))
    if is_sequences(dataset):
        return _build_reader(
            spec,
            dataset,
            settings,
            seed,
            default,
            training=training,
            checkpoint=checkpoint,
            classes=classes,
            encoder=encoder,
        )
    if reads_sequences(spec):
        raise ModelError(
            f"{spec} reads texts or token ids, and an input of {dataset.name} is {dataset.input_dtype} "
            f"{dataset.input_shape or 'of varying size'}",
            "a dataset of texts, or of token ids with its vocabulary_size",
            "take imdb or text-folder:PATH, or give the dataset an attribute vocabulary_size, its largest id plus one",
        )
    if settings.tokenizer or settings.vocabulary_size or settings.max_tokens:
        raise ModelError(
            "--tokenizer, --vocabulary-size or --max-tokens is given, and "
            f"an input of {dataset.name} is {dataset.input_dtype} {dataset.input_shape or 'of varying size'}",
            "texts, or token ids of a dataset with its vocabulary_size",
            "leave it out",
        )
    _check_channels_first(spec, dataset, settings)
    return build_model(
        spec,
        num_classes=len(classes),
        input_shape=dataset.input_shape,
        seed=seed,
        settings=settings,
        default=default,
        recorded=default if "kdcache" in checkpoint else None,
        replace_head=training,
        fits=partial(fits, content=checkpoint, key=checkpoint_key) if checkpoint else None,
    )


def _check_channels_first(spec: str, dataset: IndexedDataset, settings: InputConfig) -> None:
    """Refuse arrays of (height, width, channels), which would be read as images of `height` channels.

    A user's own network may need that order, and the mlp takes any shape.
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
    encoder: bool,
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
            f"--tokenizer or --vocabulary-size is given, and {spec} has its own tokenizer", "neither", "leave it out"
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
        encoder=encoder,
    )


def probe_model(built: BuiltModel, views: Views, seed: int) -> None:
    """Let a network answer for two samples, so that one that does not suit the dataset is refused at once."""
    preprocessor, device = built.preprocessor, torch.device("cpu")
    indices = np.arange(min(2, len(views)))
    # The plain sample too, because networks are evaluated on it.
    looks = [(as_views(views.dataset), 0)] + ([] if views.recipe.is_plain(1) else [(views, 1)])
    network = ForwardPass(built.module, preprocessor, device, classes=len(views.dataset.classes), outputs=built.outputs)
    with torch.random.fork_rng(devices=[]), evaluation_mode(built.module):
        # Lazy layers draw their weights in their first forward pass, from the global generator.
        torch.default_generator.manual_seed(rng.generator_seed(seed, "lazy init"))
        for source, view in looks:
            request = BatchRequest(indices, view)
            (batch,) = batch_loader(source, [request], preprocessor=preprocessor, device=device)
            network(batch.inputs, batch.indices)


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
            # Left out of others: what a run of an older version recorded is compared when it is continued.
            **({"multi_label": True} if dataset.multi_label else {}),
            **({"embedding": True} if dataset.is_embedding else {}),
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
