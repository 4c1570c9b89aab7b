"""A teacher with its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdcache.core.config import InputConfig
from kdcache.core.errors import UsageError
from kdcache.core.plugins import PREFIX
from kdcache.data.dataset import ANY_CLASS, IndexedDataset
from kdcache.data.views import Views
from kdcache.models.build import construct, dataset_preprocess, probe_model
from kdcache.models.checkpoints import fit_weights, read_checkpoint
from kdcache.models.embedding import Penultimate
from kdcache.models.huggingface import TextEncoder
from kdcache.models.registry import BuiltModel
from kdcache.models.teacher_outputs import (
    check_class_names,
    class_names,
    head_width,
    read_class_map,
    resolve_columns,
)
from kdcache.store.records import EMBEDDING, LOGITS_KIND, OutputRecord, ViewRecipe


def load_teacher(
    settings: InputConfig,
    spec: str,
    checkpoint_path: str | None,
    dataset: IndexedDataset,
    recipe: ViewRecipe,
    *,
    kind: str = LOGITS_KIND,
    class_map: str | None = None,
    outputs: OutputRecord | None = None,
    checkpoint_key: str | None = None,
) -> BuiltModel:
    """Load a teacher with its weights and the conversion of its outputs to logits of the dataset's classes.

    Where its answer is to be an embedding, a `py:` factory returns that itself, a text model of `hf:` averages the
    vectors of its tokens, and of any other classifier it is the input of the last linear layer.

    Args:
        kind: Kind of its outputs, `logits`, `probabilities` or `embedding`.
        class_map: JSON file that maps each class to a teacher's output; None takes the outputs in order.
        outputs: Kind and class map as recorded in a cache, instead of both.
        checkpoint_key: Entry of the checkpoint that holds the weights, where several fit.

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
    encoder = kind == EMBEDDING
    heads = dataset.classes
    if wanted or encoder:
        heads = _head_classes(checkpoint, wanted) if checkpoint or wanted else ANY_CLASS
    built = construct(
        spec,
        dataset,
        settings,
        0,
        dataset_preprocess(dataset),
        training=False,
        checkpoint=checkpoint,
        classes=heads,
        checkpoint_key=checkpoint_key,
        encoder=encoder,
    )
    if encoder:
        _fit(built, checkpoint, checkpoint_path, checkpoint_key)
        returns_vectors = spec.startswith(PREFIX) or isinstance(built.module, TextEncoder)
        module = built.module if returns_vectors else Penultimate(built.module)
        return replace(built, module=module, outputs=OutputRecord(kind=kind))
    names = class_names(built.module, built.class_names, checkpoint)
    columns: tuple[int, ...] = ()
    if wanted:
        columns = resolve_columns(wanted, names, len(names) or (head_width(checkpoint) if checkpoint else None))
    else:
        # Before its first answer, whose shape alone would not tell what is wrong.
        check_class_names(checkpoint_path or spec, names, dataset.classes, exact="kdcache" in checkpoint)
    built = replace(built, outputs=OutputRecord(kind=kind, columns=columns))
    probe_model(built, Views(dataset, recipe), 0)
    _fit(built, checkpoint, checkpoint_path, checkpoint_key)
    return built


def _fit(built: BuiltModel, checkpoint: dict[str, Any], path: str | None, key: str | None) -> None:
    """Load the teacher's weights, where they did not come with its spec."""
    if path:
        fit_weights(built.module, checkpoint, path, key=key)
    elif not built.has_weights:
        raise UsageError(
            f"the teacher {built.spec} has random weights",
            "a trained teacher",
            "give --checkpoint FILE; kdcache train-teacher makes one (best.pt)",
        )


def recorded_classes(checkpoint_path: str | None) -> tuple[str, ...]:
    """Class names that a checkpoint of kdcache has; empty where there are none."""
    description = read_checkpoint(checkpoint_path).get("kdcache") if checkpoint_path else None
    return tuple(description["classes"]) if isinstance(description, dict) else ()


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
