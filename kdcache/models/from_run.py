"""The network of a run, rebuilt from its checkpoint; neither the dataset nor the cache is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from kdcache.core.config import DatasetConfig, InputConfig
from kdcache.core.errors import CheckpointError, DatasetError
from kdcache.core.progress import log
from kdcache.core.run_dir import BEST, RESULT, read_config
from kdcache.data.dataset import ANY_CLASS, IndexedDataset, Indices
from kdcache.data.preprocess import Preprocessor
from kdcache.data.taught import EmbeddingDataset
from kdcache.models.build import check_classes, construct, open_data, recorded_preprocess
from kdcache.models.checkpoints import fit_weights, read_checkpoint
from kdcache.store.records import Preprocess

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
    """The network of a run with its best weights.

    Attributes:
        spec: Name that the network was built from.
        module: Network on the CPU, in eval mode.
        preprocessor: Preprocessing from shared inputs to the network's inputs.
        classes: Class names; a prediction is an index into this tuple.
        input_shape: Shape of one shared input of the training split, channels first; None where they differ in size.
        input_dtype: Dtype of the shared inputs, such as `uint8`.
        is_text: Whether the shared inputs are texts, as UTF-8.
        multi_label: Whether a sample belongs to any number of classes.
        embedding: Whether its answer is a vector, and its classes are the dimensions of that.
        dataset: Spec of the training dataset.
        data_root: Data root of the training dataset.
        taught_by: Digests of the views that the network was trained on, per cache; empty where none are recorded.
        checkpoint: Path of the weights.
    """

    spec: str
    module: nn.Module
    preprocessor: Preprocessor
    classes: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    input_dtype: str
    is_text: bool
    multi_label: bool
    embedding: bool
    dataset: str
    data_root: str | None
    taught_by: list[list[str]]
    checkpoint: Path


class _RecordedDataset(IndexedDataset):
    """The training dataset as recorded in a checkpoint, without its samples."""

    def __init__(self, facts: dict[str, Any], preprocess: Preprocess) -> None:
        super().__init__(name=facts["dataset"], split="train", classes=tuple(facts["classes"]))
        self.input_dtype, self.is_text, self.data_root = facts["input_dtype"], facts["is_text"], facts["data_root"]
        self.input_shape = None if facts["input_shape"] is None else tuple(facts["input_shape"])
        self.vocabulary_size = preprocess.vocabulary_size  # only of token ids

    def __len__(self) -> int:
        return 0

    def labels(self) -> None:
        return None

    def fetch(self, indices: Indices) -> NoReturn:
        raise DatasetError(f"a checkpoint holds no samples of {self.name}", "the dataset itself", "open it")


def load_trained(folder: Path) -> TrainedNetwork:
    """Load the network of a run folder.

    Raises:
        UsageError: there is no run.
        CheckpointError: its `best.pt` is missing, damaged, or lacks the record of how it was trained.
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
    dataset = _RecordedDataset(facts, recorded_preprocess(checkpoint, path))
    built = construct(facts["model"], dataset, InputConfig(), 0, Preprocess(), checkpoint=checkpoint)
    fit_weights(built.module, checkpoint, path)
    return TrainedNetwork(
        spec=built.spec,
        module=built.module.eval(),
        preprocessor=built.preprocessor,
        classes=dataset.classes,
        input_shape=dataset.input_shape,
        input_dtype=dataset.input_dtype,
        is_text=dataset.is_text,
        multi_label=bool(facts.get("multi_label")),
        embedding=bool(facts.get("embedding")),
        dataset=dataset.name,
        data_root=dataset.data_root,
        taught_by=checkpoint.get("rows") or [],
        checkpoint=path,
    )


def open_split(trained: TrainedNetwork, settings: DatasetConfig, split: str) -> IndexedDataset:
    """A split of the dataset that a network was trained on, or of another one with the same classes.

    Raises:
        DatasetError: it cannot be opened.
        ModelError: it has other classes.
    """
    dataset = open_data(
        settings,
        settings.dataset or trained.dataset,
        split,
        hint=trained.data_root,
        classes=ANY_CLASS if trained.embedding else trained.classes,
    )
    if trained.embedding:
        return EmbeddingDataset(dataset, len(trained.classes))
    check_classes(str(trained.checkpoint), trained.classes, dataset)
    return dataset
