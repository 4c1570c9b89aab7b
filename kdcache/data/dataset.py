"""Datasets whose samples have stable indices, by which soft targets are joined."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from kdcache.core import rng
from kdcache.core.errors import DatasetError, KdcacheError, UnreadableSample
from kdcache.core.json_records import brief
from kdcache.core.plugins import describe
from kdcache.core.progress import log
from kdcache.data.labels import is_vector, known_vectors, label_vector
from kdcache.data.raw_input import CHANNELS_FIRST, Inputs, as_input, as_sequence, dtype_name, is_channels_last
from kdcache.store.manifest import UNLABELLED

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
        _check_labels(self._labels, self)
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


class MapDataset(IndexedDataset):
    """Any object with `__getitem__` and `__len__` whose items are (input, label), or (index, token ids, label).

    Made by `as_indexed`.
    """

    def __init__(
        self,
        dataset: Any,
        labels: NDArray[Any] | None,
        *,
        name: str,
        split: str,
        classes: tuple[str, ...],
    ) -> None:
        super().__init__(name=name, split=split, classes=classes)
        self._dataset = dataset
        self._labels = labels
        # A hint for sizing networks: samples that differ later are still refused when they are stacked.
        probed = rng.keyed_sample(len(self), 16, 0, "input shape").tolist()
        probed = [index for index in probed if self._is_readable(index)] or probed[:1]
        value, label = self._read(probed[0])
        self._ignores_labels = classes == ANY_CLASS
        self.is_text, self.multi_label = isinstance(value, str), is_vector(label) and not self._ignores_labels
        if labels is not None:
            _check_labels(labels, self)
        probes = [self._item(index)[0] for index in probed]
        self.input_dtype = dtype_name(probes[0])
        shapes = {tuple(probe.shape) for probe in probes}
        if all(map(is_channels_last, shapes)):
            height, width, last = min(shapes)
            log(
                f"{name}: an input of shape ({height}, {width}, {last}) is read as {height} channels of {width} × "
                f"{last} pixels; if it is an image of {last} channels, {CHANNELS_FIRST}"
            )
        self.input_shape = shapes.pop() if len(shapes) == 1 and not self.is_text else None
        channels = {shape[0] for shape in shapes if len(shape) == 3}
        if self.input_shape is None and self.input_dtype == "uint8" and len(channels) == 1:
            # Normalises nothing, and tells how many channels images of differing sizes have.
            (count,) = channels
            self.default_mean, self.default_std = (0.0,) * count, (1.0,) * count
        self.vocabulary_size = getattr(dataset, "vocabulary_size", None)
        if self.vocabulary_size is not None and not (type(self.vocabulary_size) is int and self.vocabulary_size > 0):
            raise DatasetError(
                f"the vocabulary_size of {name} is {brief(self.vocabulary_size)}",
                "a positive whole number: one more than its largest token id",
                "set the dataset's attribute to it",
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def labels(self) -> NDArray[np.int64] | None:
        return self._labels

    def fetch(self, indices: Indices) -> tuple[list[Tensor], Tensor]:
        inputs, labels = zip(*(self._item(int(index)) for index in indices), strict=True)
        if self.multi_label:
            return list(inputs), torch.from_numpy(np.stack(labels))
        return list(inputs), torch.tensor(labels, dtype=torch.int64)

    def _is_readable(self, index: int) -> bool:
        """Whether a sample can be read; where not, it is refused once it is needed, unless it is left out."""
        try:
            value, _ = self._read(index)
            if hasattr(value, "getbands"):  # an image of Pillow, which reads its file when it is decoded
                as_input(value, "")
        except UnreadableSample:
            return False
        return True

    def _read(self, index: int) -> tuple[Any, Any]:
        """The input and the label of an item as they are."""
        where = f"sample {index} of {self.name}"
        try:
            item = self._dataset[index]
        except KdcacheError:
            raise
        except Exception as problem:
            raise UnreadableSample(
                f"{where} cannot be read: {type(self._dataset).__qualname__} raises {describe(problem)}",
                f"an item for every index from 0 to {len(self) - 1}",
                "repair the sample, leave it out of the dataset, or dump with --skip-unreadable",
            ) from problem
        if is_bare_input(item):
            return item, UNLABELLED
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            if isinstance(item, Mapping):
                size = f" with the keys {', '.join(map(str, item))}"
            raise DatasetError(
                f"{where} is a {type(item).__name__}{size}",
                "a pair (input, label), or (index, token ids, label)",
                "wrap the dataset in one whose __getitem__ returns such a pair; kdcache.join takes input_key=… and "
                "label_key=…",
            )
        if len(item) == 3 and not (isinstance(item[0], int | np.integer) and item[0] == index):
            says = f"{item[0]}" if isinstance(item[0], int | np.integer) else f"a {type(item[0]).__name__}"
            raise DatasetError(
                f"{where} is a tuple of 3 whose first, the index, is {says}",
                f"{index}, the index that it was asked for: soft targets are joined by it",
                "let __getitem__ return (index, token ids, label), or a pair (input, label)",
            )
        return item[-2], item[-1]

    def _vector(self, given: Any, index: int, where: str) -> NDArray[np.uint8]:
        label = label_vector(given, len(self.classes), where)
        if self._labels is not None and (label != self._labels[index]).any():
            raise DatasetError(
                f"the label of {where} is {np.flatnonzero(label).tolist()}, and its .targets or .labels says "
                f"{np.flatnonzero(self._labels[index]).tolist()}",
                "one label for each sample",
                "make the attribute agree with __getitem__, or remove it",
            )
        return label

    def _item(self, index: int) -> tuple[Tensor, Any]:
        where = f"sample {index} of {self.name}"
        value, given_label = self._read(index)
        if isinstance(value, str) != self.is_text:
            raise DatasetError(
                f"{where} is a {type(value).__name__}", f"{'text' if self.is_text else 'no text'}, as the others are"
            )
        image = as_sequence(value, where) if isinstance(value, str | list) else as_input(value, where)
        if self.input_dtype and dtype_name(image) != self.input_dtype:
            raise DatasetError(f"{where} has dtype {dtype_name(image)}", f"{self.input_dtype}, as the others have")
        if self._ignores_labels:
            return image, UNLABELLED
        if self.multi_label:
            return image, self._vector(given_label, index, where)
        try:
            label = UNLABELLED if given_label is None else operator.index(given_label)
        except Exception as problem:  # TypeError of most values; an object's own __index__ may raise any
            raise DatasetError(
                f"the label of {where} is {brief(given_label)}: {type(problem).__name__}: {problem}",
                "an integer",
                "return (input, label) with the index of the class, not its name or an image",
            ) from problem
        if self._labels is None:
            _check_labels(np.array([label]), self, first=index)
        elif label != self._labels[index]:
            raise DatasetError(
                f"the label of {where} is {label}, and its .targets or .labels says {self._labels[index]}",
                "one label for each sample",
                "make the attribute agree with __getitem__, or remove it",
            )
        return image, label


def labelled_samples(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Indices of the samples that have a label, (n,); those of all where only reading them would tell."""
    labels = dataset.labels()
    if labels is None or dataset.multi_label:
        return np.arange(len(dataset))
    return np.flatnonzero(labels != UNLABELLED)


def is_bare_input(item: Any) -> bool:
    """Whether an item of a dataset is an input without a label: a text, a tensor, an array or a PIL image."""
    return isinstance(item, str | Tensor | np.ndarray) or hasattr(item, "getbands")


def as_indexed(
    dataset: Any,
    *,
    name: str,
    split: str,
    classes: Sequence[str] | None = None,
    default_classes: Sequence[str] = (),
) -> IndexedDataset:
    """Any map-style dataset as an indexed one; an indexed one is returned as it is.

    Args:
        dataset: items are (input, label), or an input alone where there are no labels; an input is a PIL image, which
            becomes uint8 (C, H, W), a text, which becomes its UTF-8, a list of integers, such as token ids, which
            becomes int64, or a tensor or array, taken as it is; a label is an integer, or None or -1 for a sample
            without one, or for several classes a list of their indices or an array (classes,) of 0 and 1. Items may
            also be (index, token ids, label).
        name: how manifests call it.
        classes: names of the classes; taken from `.classes`, or counted in `.targets` or `.labels`, where not given.
        default_classes: names of the classes where it does not tell them; `ANY_CLASS` to leave labels aside.

    Raises:
        DatasetError: it is a stream, it is empty, its classes are unknown, or a first sample is not such a pair.
    """
    if isinstance(dataset, IndexedDataset):
        return dataset
    indexable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not indexable:
        raise DatasetError(
            f"{name} is a {type(dataset).__name__}, which is read in order and not by index",
            "a map-style dataset, with __getitem__ and __len__: soft targets are joined by sample index, and a "
            "stream has none",
            "write the stream to files or arrays first, or load it into a list of (input, label)",
        )
    try:
        count, labels = len(dataset), _known_labels(dataset)
        if classes is None:
            classes = _known_classes(dataset)
    except KdcacheError:
        raise
    except Exception as problem:  # the user's own properties
        raise DatasetError(
            f"{name} does not tell its length, labels and classes: {type(dataset).__qualname__} raises "
            f"{describe(problem)}",
            "a length, and where they are attributes a list of classes, and of targets or labels",
            "repair the dataset's __len__, or that attribute",
        ) from problem
    if not count:
        raise DatasetError(f"{name} has no samples", "at least one")
    if tuple(default_classes) == ANY_CLASS:
        return MapDataset(dataset, np.full(count, UNLABELLED), name=name, split=split, classes=ANY_CLASS)
    if classes is None and labels is not None and labels.ndim == 1 and labels.max() >= 0:
        classes = [str(label) for label in range(int(labels.max()) + 1)]
    classes = classes or default_classes
    if not classes:
        raise DatasetError(
            f"{name} does not tell its classes",
            "class names, in the order of the labels",
            "give the dataset an attribute `classes`, a list of names, or pass classes=[...] (--classes FILE)",
        )
    return MapDataset(dataset, labels, name=name, split=split, classes=tuple(classes))


def _known_classes(dataset: Any) -> list[str] | None:
    found = getattr(dataset, "classes", None)
    if found is None:
        if isinstance(dataset, ConcatDataset):
            first, *others = map(_known_classes, dataset.datasets)
            return first if all(each == first for each in others) else None
        return _known_classes(dataset.dataset) if isinstance(dataset, Subset) else None
    # ImageNet's are tuples of synonyms.
    return [", ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in found]


def _known_labels(dataset: Any) -> NDArray[Any] | None:
    """Labels that can be had without reading samples; None where there are none."""
    if isinstance(dataset, Subset):
        labels = _known_labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(each) for each in dataset.datasets]
        known = [each for each in parts if each is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    found = dataset.tensors[1] if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2 else None
    for attribute in ("targets", "labels"):
        if found is None and getattr(dataset, "target_transform", None) is None:
            found = getattr(dataset, attribute, None)
    if found is None or callable(found):
        return None
    if (vectors := known_vectors(found, len(dataset))) is not None:
        return vectors
    try:
        labels = np.asarray(found)
    except ValueError:  # lists of several lengths, which are no class indices
        return None
    fits = labels.shape == (len(dataset),) and labels.dtype.kind in "iub"
    return labels.astype(np.int64) if fits else None


def _check_labels(labels: NDArray[Any], dataset: IndexedDataset, first: int = 0) -> None:
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
