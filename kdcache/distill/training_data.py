"""The data of a training run: views, their order, the part held out, and the join with soft targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.config import TrainConfig
from kdcache.core.errors import DatasetError, UsageError
from kdcache.core.progress import log
from kdcache.core.specs import parse_bytes
from kdcache.data.batch_sampler import EpochBatches, samples_record, split_validation
from kdcache.data.dataset import IndexedDataset, labelled_samples
from kdcache.data.kept_inputs import KeptInputs
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.data.views import Views, as_views
from kdcache.distill.objective import Join
from kdcache.store.records import NONE, Preprocess
from kdcache.store.sampler import ExactSampler, Sampler, Schedule, always


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Where the batches of a run come from.

    Attributes:
        views: Views of the dataset.
        preprocessor: From the shared inputs to what the network takes.
        sampler: Order of the training samples in each epoch.
        validation_indices: Samples that choose the best epoch, (n,) int64; empty where the last one is the result.
        record: Number and digest of the samples, held-out ones included; a run is continued with the same only.
        schedule: View of each epoch, or of each turn where a batch has several views of a sample.
        views_per_sample: Views of each sample in a batch.
        join: Adds soft targets to each batch.
        teacher: Gives the teacher's logits of samples, for agreement on the held-out part; None without a teacher.
        kept: Memory for inputs that other processes share; None for that of this run alone.
        verify_inputs: Batches that reach the join with checksums of their inputs: `all`, `sample` or `off`.

    Raises:
        UsageError: a part is held out, and inputs are mixed with any sample.
    """

    views: Views
    preprocessor: Preprocessor
    sampler: Sampler
    validation_indices: NDArray[np.int64]
    record: dict[str, Any]
    schedule: Schedule = field(default_factory=lambda: always(0))
    join: Join | None = None
    verify_inputs: str = "off"
    views_per_sample: int = 1
    teacher: Callable[[NDArray[np.int64]], NDArray[Any]] | None = None
    kept: KeptInputs | None = None

    def __post_init__(self) -> None:
        if self.views.recipe.mix != NONE and len(self.validation_indices):
            raise UsageError(
                f"{len(self.validation_indices)} samples are held out by --val-fraction, and inputs are mixed "
                f"({self.views.recipe.mix}) with any sample, also with those",
                "--val-fraction 0 with mixed inputs",
                "leave out --val-fraction; the last epoch is then the result",
            )

    def batches(self, batch_size: int) -> EpochBatches:
        """The batches of each epoch, in its order."""
        return EpochBatches(
            self.sampler,
            batch_size,
            schedule=self.schedule,
            verify_inputs=self.verify_inputs,
            views_per_sample=self.views_per_sample,
        )


def keep_inputs(data: TrainingData, config: TrainConfig) -> None:
    """Let the views of a run keep their inputs in memory, as `config.input_memory` allows, and say which.

    Raises:
        UsageError: that is no size.
    """
    limit = parse_bytes(config.input_memory)
    turns = [data.schedule(turn) for turn in range(config.epochs * data.views_per_sample)]
    used = list(dict.fromkeys(turns))
    if limit:
        kept = data.kept or KeptInputs(2 + max(used), len(data.views), limit)
        log(data.views.keep(kept, used, again=data.kept is not None or len(turns) > len(used)))
    elif len(turns) > len(used) and not all(map(data.views.recipe.is_plain, used)):
        log("augmented inputs are made at every use; --input-memory keeps them")


def training_data(
    dataset: IndexedDataset | Views,
    preprocess: Preprocess | Preprocessor,
    config: TrainConfig,
    *,
    schedule: Schedule | None = None,
    join: Join | None = None,
) -> TrainingData:
    """All labelled samples of a dataset, without those that `config.val_fraction` holds out, shuffled in each epoch.

    Raises:
        DatasetError: no sample has a label.
    """
    views = as_views(dataset)
    samples = labelled_samples(views.dataset)
    if not len(samples):
        raise DatasetError(
            f"{views.dataset.name} is unlabelled", "labels to train on", "train a student on it, from a teacher's cache"
        )
    train_indices, validation_indices = split_validation(samples, config.val_fraction, config.seed)
    return TrainingData(
        views=views,
        preprocessor=as_preprocessor(preprocess),
        sampler=ExactSampler(train_indices, config.seed),
        validation_indices=validation_indices,
        schedule=schedule or always(0),
        join=join,
        record=samples_record(samples),
    )
