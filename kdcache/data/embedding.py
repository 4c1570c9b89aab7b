"""Samples whose answer is a vector and no class."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.dataset import ANY_CLASS, IndexedDataset, Indices
from kdcache.data.raw_input import Inputs
from kdcache.store.manifest import UNLABELLED, Manifest


class EmbeddingDataset(IndexedDataset):
    """The samples of a dataset without their labels; its classes are the dimensions of an embedding, `0`, `1`, ….

    Args:
        dataset: The samples.
        width: Number of dimensions.
    """

    def __init__(self, dataset: IndexedDataset, width: int) -> None:
        self.__dict__.update(dataset.__dict__)
        self.is_text, self.in_memory, self.multi_label = dataset.is_text, dataset.in_memory, False
        self.vocabulary_size = dataset.vocabulary_size
        self.classes = tuple(map(str, range(width)))
        self._samples = dataset

    def __len__(self) -> int:
        return len(self._samples)

    def labels(self) -> NDArray[np.int64]:
        return np.full(len(self), UNLABELLED)

    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        inputs, labels = self._samples.fetch(indices)
        return inputs, torch.full((len(labels),), UNLABELLED)


def known_classes(manifest: Manifest) -> tuple[str, ...]:
    """Classes for a dataset that does not tell its own, as the teacher of a cache has them."""
    return ANY_CLASS if manifest.is_embedding else manifest.dataset.classes


def as_taught(dataset: IndexedDataset, manifest: Manifest) -> IndexedDataset:
    """The samples as the teacher of a cache answered for them: of embeddings, without labels."""
    if not manifest.is_embedding or isinstance(dataset, EmbeddingDataset):
        return dataset
    return EmbeddingDataset(dataset, len(manifest.dataset.classes))
