"""Datasets without the samples that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcache.core.errors import DatasetError, UnreadableSample
from kdcache.core.json_records import counted
from kdcache.core.progress import Progress, log
from kdcache.data.dataset import IndexedDataset, Indices, WrappedDataset
from kdcache.data.raw_input import Inputs

_SHOWN = 3
_READ_AT_ONCE = 32


class ReadableDataset(WrappedDataset):
    """The samples of a dataset without some of them; those behind one that is left out move up.

    Args:
        excluded: Indices of the samples that are left out, ascending.
    """

    def __init__(self, dataset: IndexedDataset, excluded: Sequence[int]) -> None:
        super().__init__(dataset)
        self.excluded = tuple(excluded)
        self._kept = np.setdiff1d(np.arange(len(dataset)), excluded)

    def __len__(self) -> int:
        return len(self._kept)

    def labels(self) -> NDArray[np.int64] | None:
        labels = self._samples.labels()
        return None if labels is None else labels[self._kept]

    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        return self._samples.fetch(self._kept[np.asarray(indices, np.int64)])


def find_unreadable(dataset: IndexedDataset, workers: int = 0) -> tuple[int, ...]:
    """Indices of the samples that cannot be read, ascending, found by reading all of them.

    Raises:
        DatasetError: there is none that can.
    """
    if dataset.in_memory:
        return ()
    found: list[int] = []
    reasons = _Reasons(dataset)
    loader = DataLoader(reasons, batch_size=_READ_AT_ONCE, num_workers=workers, collate_fn=list)
    with Progress(f"read {dataset.split}", len(dataset), "samples") as progress:
        at = 0
        for batch in loader:
            for reason in batch:
                if reason is not None:
                    if len(found) < _SHOWN:
                        log(f"{dataset.split}: sample {at} is left out: {reason}")
                    found.append(at)
                at += 1
            progress.advance(len(batch))
    if len(found) == len(dataset):
        raise DatasetError(f"no sample of the split {dataset.split} of {dataset.name} can be read", "at least one")
    log(f"{dataset.split}: {counted(len(found), 'sample')} of {len(dataset):,} left out as unreadable")
    return tuple(found)


class _Reasons(Dataset[str | None]):
    """Why each sample of a dataset cannot be read; None where it can."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> str | None:
        try:
            self._dataset.fetch([index])
        except UnreadableSample as problem:
            return problem.found
        return None
