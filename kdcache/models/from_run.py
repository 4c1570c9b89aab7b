"""A finished run's network, rebuilt from its checkpoint alone: neither the dataset nor the cache is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.core.errors import CheckpointError
from kdcache.core.progress import log
from kdcache.core.run_dir import BEST, RESULT, read_config
from kdcache.data.preprocess import Preprocessor
from kdcache.data.text_preprocess import recorded_tokenizer
from kdcache.models.build import recorded_preprocess
from kdcache.models.checkpoints import fit_weights, read_checkpoint
from kdcache.models.registry import build_model, build_text_model

_FACTS = (
    "model",
    "classes",
    "preprocess",
    "tokenizer",
    "dataset",
    "data_root",
    "input_shape",
    "input_dtype",
    "is_text",
)


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """The result of a run.

    Attributes:
        module: with the best weights, on the CPU, in eval mode.
        preprocessor: from a shared input to what the module takes.
        classes: names; an answer is a position in this tuple.
        input_shape: of one shared input that it was trained on, channels first; None where they differ in size.
        input_dtype: of the shared inputs, such as `uint8`.
        is_text: whether a shared input is a text, as UTF-8.
        dataset: the spec of the dataset that it was trained on.
        data_root: where that was.
        taught_by: for each cache the digests of the views that it learnt from; empty where none are recorded.
    """

    spec: str
    module: nn.Module
    preprocessor: Preprocessor
    classes: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    input_dtype: str
    is_text: bool
    dataset: str
    data_root: str | None
    taught_by: list[list[str]]
    checkpoint: Path


def load_trained(folder: Path) -> TrainedNetwork:
    """The network of a run folder.

    Raises:
        UsageError: there is no run.
        CheckpointError: its `best.pt` is missing, damaged, or does not say what it is of.
    """
    read_config(folder)
    path = folder / BEST
    if not path.exists():
        raise CheckpointError(
            f"the run at {folder} has no {BEST}: it has not come to its end",
            "a finished run",
            f"continue it with --resume; if it was finished, copy its {BEST} again",
        )
    checkpoint = read_checkpoint(path)
    recorded = checkpoint.get("kdcache")
    facts: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    if missing := [name for name in _FACTS if name not in facts]:
        raise CheckpointError(
            f"{path} does not say what it is of: {', '.join(missing)} are missing",
            "a checkpoint that train-teacher or train-student of this version wrote",
            "train it again with them; a network that was trained from Python takes it by "
            "kdcache.models.checkpoints.load_weights",
        )
    if not (folder / RESULT).exists():  # with --val-fraction the best so far is there from the first epoch on
        log(f"{folder} has not come to its end: this is its best checkpoint so far")
    spec, classes = facts["model"], tuple(facts["classes"])
    shape = None if facts["input_shape"] is None else tuple(facts["input_shape"])
    record = recorded_preprocess(checkpoint, path)
    if record.max_tokens is not None:
        preprocessor = Preprocessor(record, recorded_tokenizer(facts, record))
        module = build_text_model(
            spec, classes=classes, seed=0, preprocessor=preprocessor, max_tokens=record.max_tokens, replace_head=True
        ).module
    else:
        preprocessor = Preprocessor(record)
        module = build_model(
            spec,
            num_classes=len(classes),
            input_shape=shape,
            seed=0,
            default=record,
            replace_head=True,
            fits=lambda module: True,  # its weights come from the checkpoint
        ).module
    fit_weights(module, checkpoint, path)
    return TrainedNetwork(
        spec=spec,
        module=module.eval(),
        preprocessor=preprocessor,
        classes=classes,
        input_shape=shape,
        input_dtype=facts["input_dtype"],
        is_text=facts["is_text"],
        dataset=facts["dataset"],
        data_root=facts["data_root"],
        taught_by=checkpoint.get("rows") or [],
        checkpoint=path,
    )
