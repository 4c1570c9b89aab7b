"""Samples as the teacher of a cache answered for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.dataset import ANY_CLASS, IndexedDataset, Indices, WrappedDataset
from kdcache.data.raw_input import Inputs
from kdcache.data.readable import ReadableDataset
from kdcache.store.manifest import Manifest
from kdcache.store.records import UNLABELLED


class EmbeddingDataset(WrappedDataset):
    """The samples of a dataset without their labels; its classes are the dimensions of an embedding, `0`, `1`, ….

    Args:
        dataset: The samples.
        width: Number of dimensions.
    """

    def __init__(self, dataset: IndexedDataset, width: int) -> None:
        super().__init__(dataset)
        self.is_embedding, self.multi_label, self.classes = True, False, tuple(map(str, range(width)))

    def labels(self) -> NDArray[np.int64]:
        return np.full(len(self), UNLABELLED)

    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        inputs, labels = self._samples.fetch(indices)
        return inputs, torch.full((len(labels),), UNLABELLED)


def known_classes(manifest: Manifest) -> tuple[str, ...]:
    """Classes for a dataset that does not tell its own, as the teacher of a cache has them."""
    return ANY_CLASS if manifest.is_embedding else manifest.dataset.classes


def as_taught(dataset: IndexedDataset, manifest: Manifest) -> IndexedDataset:
    """The samples as the teacher of a cache answered for them: without those that it left out, and of embeddings
    without labels.
    """
    record = manifest.dataset
    whole = len(dataset) == record.length + len(record.excluded) and dataset.split == record.split
    if record.excluded and whole and not dataset.excluded:
        dataset = ReadableDataset(dataset, record.excluded)
    if not manifest.is_embedding or dataset.is_embedding:
        return dataset
    return EmbeddingDataset(dataset, len(manifest.dataset.classes))
