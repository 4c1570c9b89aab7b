"""Items of a user's dataset, as `join` reads and returns them: tuples or dicts, with keys for what they hold."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from kdcache.core.errors import CacheMismatch, DatasetError
from kdcache.core.json_records import brief
from kdcache.data.labels import label_vector
from kdcache.data.map_dataset import is_bare_input
from kdcache.store.records import UNLABELLED

Key = str | int

# Key of the logits in an item that is a dict.
TEACHER_LOGITS = "teacher_logits"


@dataclass(frozen=True, kw_only=True)
class ItemKeys:
    """Where an item holds its parts: keys of a dict, or positions in a tuple.

    Attributes:
        input: Key of the input; None for the last but one of a tuple.
        label: Key of the label; None for the last of a tuple.
        index: Key of the sample's number in the cache; None where the item has none.
    """

    input: Key | None = None
    label: Key | None = None
    index: Key | None = None

    def input_of(self, item: Any, where: str) -> Any:
        """The input of an item.

        Raises:
            DatasetError: it has none under that key; likewise below.
        """
        return _part(item, self.input, -2, "input", where)

    def label_of(self, item: Any, where: str) -> Any:
        """The label of an item, as it is; -1 where the item is an input alone."""
        return UNLABELLED if is_bare_input(item) else _part(item, self.label, -1, "label", where)

    def number_of(self, item: Any, where: str, classes: int | None) -> int | list[int]:
        """The label of an item as a class index; with `classes` as 0 and 1 for each of them.

        Raises:
            DatasetError: it is neither.
        """
        label = self.label_of(item, where)
        if classes is not None:
            return [int(each) for each in label_vector(label, classes, where)]
        return UNLABELLED if label is None else _integer(label, f"the label of {where}")

    def index_of(self, item: Any, where: str) -> int:
        """The number of an item's sample in the cache."""
        assert self.index is not None, "asked for where items have it"
        return _integer(_part(item, self.index, 0, "index", where), f"the index in {where}")

    def joined(self, item: Any, logits: Any) -> Any:
        """An item with the teacher's logits: as `teacher_logits` in a dict, as the last in a tuple."""
        if isinstance(item, Mapping):
            return {**item, TEACHER_LOGITS: logits}
        if is_bare_input(item):
            return item, logits
        return (*item, logits)

    def replaced(self, item: Any, value: Any) -> Any:
        """An item with another input. In a dict a mapping, such as a tokenizer's result, takes the input's place."""
        if isinstance(item, Mapping):
            rest = {key: part for key, part in item.items() if key != self.input}
            return {**rest, **value} if isinstance(value, Mapping) else {**item, self.input: value}
        if is_bare_input(item):
            return value
        parts = list(item)
        parts[_position(self.input, -2)] = value
        return tuple(parts)

    def made(self, value: Any, label: Any) -> Any:
        """An item of an input that was made anew, and its label."""
        if isinstance(self.input, str):
            return {self.input: value, self.label: label}
        return value, label


class Pairs:
    """A dataset of (input, label) pairs, taken out of the items of another one."""

    def __init__(self, dataset: Any, keys: ItemKeys, classes: tuple[str, ...]) -> None:
        self._dataset, self._keys = dataset, keys
        self.classes = getattr(dataset, "classes", None) or classes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item, where = self._dataset[index], f"item {index}"
        return self._keys.input_of(item, where), self._keys.label_of(item, where)


def sample_numbers(dataset: Any, length: int) -> NDArray[np.int64] | None:
    """Number in the cache of each item of a dataset, (n,); None where they are the same.

    A `Subset` of a dataset with as many samples as the cache has the numbers of its indices, and a `ConcatDataset` of
    such subsets has those of its parts.

    Raises:
        CacheMismatch: it is another dataset with another length.
    """
    if len(dataset) == length:
        return None
    if isinstance(dataset, Subset):
        outer = sample_numbers(dataset.dataset, length)
        indices = np.asarray(dataset.indices, np.int64)
        return indices if outer is None else outer[indices]
    if isinstance(dataset, ConcatDataset):
        parts = [sample_numbers(part, length) for part in dataset.datasets]
        return np.concatenate([np.arange(length) if part is None else part for part in parts])
    raise CacheMismatch(
        f"the dataset has {len(dataset)} samples and the cache {length}",
        "the dataset that the teacher was dumped over, or a Subset of it",
        "give indices=[…], the number in the cache of each item, or index_key=KEY where items hold it",
    )


def checked_numbers(indices: Any, items: int, length: int) -> NDArray[np.int64]:
    """The numbers that a user gave for the items of a dataset.

    Raises:
        CacheMismatch: they are not one integer for each item, or the cache has no such sample.
    """
    numbers = np.asarray(indices)
    if numbers.shape != (items,) or numbers.dtype.kind not in "iu":
        raise CacheMismatch(
            f"indices has the shape {numbers.shape} and the dtype {numbers.dtype}, and the dataset has {items} samples",
            "one integer for each item of the dataset: its number in the cache",
        )
    if items and not 0 <= numbers.min() <= numbers.max() < length:
        raise CacheMismatch(
            f"indices go from {numbers.min()} to {numbers.max()}", f"numbers from 0 to {length - 1}, as the cache has"
        )
    return numbers.astype(np.int64)


def _part(item: Any, key: Key | None, position: int, what: str, where: str) -> Any:
    if isinstance(item, Mapping):
        if key is None or key not in item:
            raise DatasetError(
                f"{where} is a dict with the keys {', '.join(map(str, item))}, and {what}_key is {key!r}",
                f"the key of its {what}",
                f"give join {what}_key=…",
            )
        return item[key]
    if is_bare_input(item) and what == "input":
        return item
    if not isinstance(item, tuple | list):
        raise DatasetError(f"{where} is a {type(item).__name__}", "a tuple, a list or a dict")
    at = _position(key, position)
    if key is None and len(item) > 3:
        raise DatasetError(
            f"{where} is a {type(item).__name__} of {len(item)}",
            "a pair (input, label), or the positions of both",
            "give join input_key=… and label_key=…, such as 0 and 1",
        )
    if not -len(item) <= at < len(item):
        raise DatasetError(f"{where} is a {type(item).__name__} of {len(item)}, and {what}_key is {key!r}", "less")
    return item[at]


def _position(key: Key | None, position: int) -> int:
    if isinstance(key, str):
        raise DatasetError(f"the items of the dataset are tuples, and a key is {key!r}", "a position, such as 0")
    return position if key is None else key


def _integer(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except Exception as problem:  # TypeError of most values; an object's own __index__ may raise any
        raise DatasetError(f"{what} is {brief(value)}", "an integer", "give join the key of an integer") from problem
