"""Map-style datasets, such as torchvision's, as indexed ones."""

from __future__ import annotations

import operator
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
from kdcache.data.dataset import ANY_CLASS, IndexedDataset, Indices, check_labels
from kdcache.data.labels import is_vector, known_vectors, label_vector
from kdcache.data.raw_input import CHANNELS_FIRST, as_input, as_sequence, dtype_name, is_channels_last
from kdcache.store.records import UNLABELLED


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
            check_labels(labels, self)
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
            # The identity; its length gives the number of channels of images that differ in size.
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
            check_labels(np.array([label]), self, first=index)
        elif label != self._labels[index]:
            raise DatasetError(
                f"the label of {where} is {label}, and its .targets or .labels says {self._labels[index]}",
                "one label for each sample",
                "make the attribute agree with __getitem__, or remove it",
            )
        return image, label


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
