"""Datasets whose samples have stable indices, by which soft targets are joined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import DatasetError
from kdcache.data.raw_input import Inputs, dtype_name
from kdcache.store.records import UNLABELLED

Indices = Sequence[int] | NDArray[np.int64]

# Classes of a dataset whose labels are ignored, because the teacher's answer is an embedding.
ANY_CLASS = ("any",)


class IndexedDataset(ABC):
    """Samples `0 <= i < N`, always the same ones.

    Attributes:
        name: Spec that opens the dataset.
        classes: Class names; a label is an index into this tuple.
        input_dtype: Dtype of the shared inputs, such as `uint8`.
        input_shape: Shape of one shared input, channels first; None where samples differ in size.
        data_root: Folder it was read from; None where it has none.
        default_mean: Mean per channel, for a network without its own preprocessing; empty where unknown.
        default_std: Standard deviation per channel, as long as `default_mean`.
        in_memory: Whether the samples are held in memory.
        multi_label: Whether a sample belongs to any number of classes, and labels are 0 and 1 for each, uint8.
        is_embedding: Whether the classes are the dimensions of an embedding, and no sample has a label.
        excluded: Positions in the source of samples that it leaves out, ascending; later samples move up.
        is_text: Whether the shared inputs are texts in UTF-8, (bytes,) uint8.
        vocabulary_size: where a shared input is a sequence of token ids, (tokens,): these are below it. None where it
            is not known, or there are no tokens.
    """

    in_memory = False
    is_text = False
    multi_label = False
    is_embedding = False
    excluded: tuple[int, ...] = ()
    vocabulary_size: int | None = None

    def __init__(self, *, name: str, split: str, classes: tuple[str, ...]) -> None:
        self.name = name
        self.split = split
        self.classes = classes
        self.input_dtype = ""
        self.input_shape: tuple[int, ...] | None = None
        self.data_root: str | None = None
        self.default_mean: tuple[float, ...] = ()
        self.default_std: tuple[float, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def labels(self) -> NDArray[np.int64] | None:
        """All labels, (N,) int64, `UNLABELLED` of samples without one, or (N, classes) uint8 where `multi_label`.

        None where only reading every sample would tell.
        """

    @abstractmethod
    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        """Shared inputs and labels of some samples, (B,) int64 or (B, classes) uint8, each read once.

        Inputs that come as one tensor are a copy, which the caller may write to.

        Raises:
            DatasetError: a sample cannot be read, or is not what the dataset promised.
        """

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One shared input and its label."""
        inputs, labels = self.fetch([index])
        return inputs[0], int(labels[0])

    def shared_inputs(self, indices: Indices) -> Inputs:
        """The inputs that every network sees, before its own preprocessing."""
        return self.fetch(indices)[0]


class ArrayDataset(IndexedDataset):
    """Samples in memory: a batch is one index into one tensor.

    Args:
        inputs: Tensor (N, ...), contiguous, of any dtype.
        labels: Integers (N,).

    Raises:
        DatasetError: lengths differ, there are no samples, or a label has no class.
    """

    in_memory = True

    def __init__(
        self, inputs: Tensor, labels: NDArray[np.int64], *, name: str, split: str, classes: tuple[str, ...]
    ) -> None:
        super().__init__(name=name, split=split, classes=classes)
        if len(inputs) != len(labels) or not len(labels):
            raise DatasetError(f"{name} has {len(inputs)} inputs and {len(labels)} labels", "as many, and at least one")
        # Bytes, so that numpy can take rows of any dtype. It does so on one thread: torch's index_select, at its best
        # as fast, took up to 8 ms instead of 20 µs for 128 MNIST images while another process kept a core busy.
        self._row_bytes = inputs.detach().contiguous().reshape(len(inputs), -1).view(torch.uint8).numpy()
        self._dtype = inputs.dtype
        self._labels = np.array(labels, dtype=np.int64)
        check_labels(self._labels, self)
        self.input_dtype = dtype_name(inputs)
        self.input_shape = self._row_shape = tuple(inputs.shape[1:])

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> NDArray[np.int64]:
        return self._labels

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        positions = np.asarray(indices, dtype=np.int64)
        rows = torch.from_numpy(self._row_bytes.take(positions, axis=0))
        inputs = rows.view(self._dtype).reshape(len(positions), *self._row_shape)
        return inputs, torch.from_numpy(self._labels[positions])


class WrappedDataset(IndexedDataset):
    """The samples of another dataset; subclasses change what they say of them."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self.__dict__.update(dataset.__dict__)
        self.is_text, self.in_memory, self.multi_label = dataset.is_text, dataset.in_memory, dataset.multi_label
        self.vocabulary_size, self.excluded = dataset.vocabulary_size, dataset.excluded
        self.is_embedding = dataset.is_embedding
        self._samples = dataset

    def __len__(self) -> int:
        return len(self._samples)

    def labels(self) -> NDArray[np.int64] | None:
        return self._samples.labels()

    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        return self._samples.fetch(indices)


class Renumbered(WrappedDataset):
    """Some samples of a larger dataset, under the numbers that they have in it.

    Args:
        dataset: The samples.
        numbers: Number of each in the larger dataset, (n,).
        length: Samples of the larger dataset, which is the length of this one.
    """

    def __init__(self, dataset: IndexedDataset, numbers: NDArray[np.int64], length: int) -> None:
        super().__init__(dataset)
        self.in_memory, self._length = False, length
        self._positions = np.full(length, -1, np.int64)
        self._positions[numbers] = np.arange(len(numbers))

    def __len__(self) -> int:
        return self._length

    def labels(self) -> None:
        return None

    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        positions = self._positions[np.asarray(indices, np.int64)]
        assert (positions >= 0).all(), "only its own samples are asked for"
        return self._samples.fetch(positions)


def labelled_samples(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Indices of the samples that have a label, (n,); those of all where only reading them would tell."""
    labels = dataset.labels()
    if labels is None or dataset.multi_label:
        return np.arange(len(dataset))
    return np.flatnonzero(labels != UNLABELLED)


def check_labels(labels: NDArray[Any], dataset: IndexedDataset, first: int = 0) -> None:
    """Refuse labels of other classes than the dataset has.

    Args:
        labels: Class indices, (n,), or 0 and 1 for each class, (n, classes).
        first: Index of the sample with the first label.

    Raises:
        DatasetError: one lies outside of the classes, or there are other classes.
    """
    if dataset.multi_label and labels.ndim == 2:
        if labels.shape[1] != len(dataset.classes):
            raise DatasetError(
                f"{dataset.name} has labels of {labels.shape[1]} classes",
                f"one of 0 and 1 for each of its {len(dataset.classes)} classes",
                "make the labels agree with the list of classes",
            )
        return
    wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= len(dataset.classes)))
    if len(wrong):
        raise DatasetError(
            f"the label of sample {first + wrong[0]} of {dataset.name} is {labels[wrong[0]]}",
            f"0 to {len(dataset.classes) - 1}, for its {len(dataset.classes)} classes, or -1 without a label",
            "number the labels from 0 in the order of the classes, and name every class",
        )
