"""Datasets that a table lists: `csv:FILE`, and those of Hugging Face's `datasets`."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import DatasetError, KdcacheError
from kdcache.core.json_records import brief
from kdcache.core.plugins import describe, require_extra
from kdcache.core.progress import log
from kdcache.data.dataset import ANY_CLASS, IndexedDataset
from kdcache.data.labels import label_vector
from kdcache.data.map_dataset import as_indexed
from kdcache.data.raw_input import read_image
from kdcache.data.text_files import TextDataset
from kdcache.store.records import UNLABELLED

# Columns of a csv file, by what they hold.
PATH_COLUMNS, TEXT_COLUMNS, SPLIT_COLUMN = ("path", "image", "file"), ("text",), "split"
LABEL_COLUMN, LABELS_COLUMN, BETWEEN_LABELS = "label", "labels", ";"
# What a test split may be called instead.
_OTHER_NAMES = {"test": ("val", "validation")}


class _Rows(NamedTuple):
    """Rows of a csv file with their line numbers, and the columns that they were found in."""

    rows: list[tuple[int, dict[str, str]]]
    value: str
    is_text: bool
    label: str | None

    def names(self, row: dict[str, str]) -> list[str]:
        """Names of the classes of a row."""
        text = row[self.label] if self.label is not None else ""
        parts = text.split(BETWEEN_LABELS) if self.label == LABELS_COLUMN else [text]
        return [name.strip() for name in parts if name.strip()]


def open_csv(spec: str, split: str, classes: Sequence[str] = ()) -> IndexedDataset:
    """The samples of `csv:FILE`, in the order of its rows.

    The first line names the columns: `path` (or `image`, `file`; relative to the file's folder) or `text`; `label`, a
    class's name or number, empty for a sample without one, or instead `labels`, any number of classes with `;` between
    them; `split`, without which all rows are of the split `train`.

    Args:
        classes: Names of the classes in their order; else the labels of all splits, sorted: by value if all are whole
            numbers, by name otherwise.

    Raises:
        DatasetError: the file cannot be read, lacks a column or the split, or a label is none of the classes.
    """
    file = Path(spec.partition(":")[2])
    table = _read_csv(file)
    own = _classes(name for _, row in table.rows for name in table.names(row))
    names = own or tuple(classes) if tuple(classes) == ANY_CLASS else tuple(classes) or own
    if not names:
        raise DatasetError(
            f"{file} has no labels", "the names of the classes that the teacher tells apart", "give --classes FILE"
        )
    chosen = _choose_split(spec, split, {row.get(SPLIT_COLUMN) or "train" for _, row in table.rows})
    rows = [(line, row) for line, row in table.rows if (row.get(SPLIT_COLUMN) or "train") == chosen]
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for line, row in rows:
        if unknown := [name for name in table.names(row) if name not in numbers]:
            raise DatasetError(
                f"line {line} of {file} has the label {unknown[0]!r}", f"one of {', '.join(names[:20])}", "correct it"
            )
        found.append([numbers[name] for name in table.names(row)])
    if table.label == LABELS_COLUMN:
        labels: NDArray[Any] = np.stack([label_vector(each, len(names), str(file)) for each in found])
    else:
        labels = np.array([each[0] if each else UNLABELLED for each in found], np.int64)
    if table.is_text:
        texts = [row[table.value].encode() for _, row in rows]
        return TextDataset(texts, labels, name=spec, split=split, classes=names)
    paths = [str(file.parent / row[table.value]) for _, row in rows]
    return as_indexed(ImageFiles(paths, labels, names), name=spec, split=split)


class ImageFiles:
    """Image files with labels as a map-style dataset."""

    def __init__(self, paths: list[str], labels: Sequence[int] | NDArray[Any], classes: tuple[str, ...]) -> None:
        self._paths, self.targets, self.classes = paths, labels, classes

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return read_image(self._paths[index]), self.targets[index]


def _read_csv(file: Path) -> _Rows:
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DatasetError(
            f"{file} cannot be read: {problem}", "a csv file in UTF-8 whose first line names the columns", "correct it"
        ) from problem
    value = next((name for name in (*PATH_COLUMNS, *TEXT_COLUMNS) if name in columns), None)
    label = next((name for name in (LABEL_COLUMN, LABELS_COLUMN) if name in columns), None)
    if value is None:
        raise DatasetError(
            f"{file} has the columns {', '.join(columns) or 'none'}",
            "path or text, and label",
            "name the columns in its first line",
        )
    if not rows:
        raise DatasetError(f"{file} has no rows", "one per sample")
    for line, row in rows:
        if None in row or None in row.values():
            raise DatasetError(
                f"line {line} of {file} has another number of fields than the first one",
                f"{len(columns)}",
                "correct it",
            )
    return _Rows(rows, value, value in TEXT_COLUMNS, label)


def _classes(labels: Iterator[str]) -> tuple[str, ...]:
    found = {label for label in labels if label}
    return tuple(sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found))


def _choose_split(spec: str, split: str, there: set[str]) -> str:
    if split in there:
        return split
    for other in _OTHER_NAMES.get(split, ()):
        if other in there:
            log(f"{spec}: the split {split} is read from {other}: there is no {split}")
            return other
    raise DatasetError(f"{spec} has no split {split!r}", f"one of {', '.join(sorted(there))}", "choose one of them")


def open_huggingface(spec: str, split: str, download: bool, classes: Sequence[str] = ()) -> IndexedDataset:
    """A dataset of Hugging Face's `datasets`: `hf-dataset:PATH_OR_NAME`, images or texts with one label each.

    A path is a folder that `save_to_disk` wrote, or one of images, parquet, csv or json files; a name is on the hub.

    Args:
        download: Whether a name on the hub may be downloaded; else only what was before is read.
        classes: Names of the classes, where the dataset does not tell them.

    Raises:
        DatasetError: it cannot be loaded, has no such split, or no column of images or texts.
        MissingExtra: `datasets` is not installed.
    """
    library = require_extra("datasets", "hf", spec)
    place = spec.partition(":")[2]
    try:
        found = _load(library, place, download)
    except KdcacheError:
        raise
    except Exception as problem:  # of a library that raises all kinds
        raise DatasetError(
            f"{spec} cannot be loaded: {describe(problem)}",
            "a folder of a dataset, or the name of one on the hub that was downloaded before",
            "correct the path, or give --download for a name",
        ) from problem
    chosen = found[_choose_split(spec, split, set(found))]
    if not len(chosen):
        raise DatasetError(f"{spec} has no samples in its split {split!r}", "at least one")
    value, label = _columns(library, spec, chosen.features)
    names = getattr(chosen.features.get(label), "names", None) or classes
    labels = None if label is None else np.asarray(chosen[label], np.int64)
    return as_indexed(_FromHub(chosen, value, labels), name=spec, split=split, classes=tuple(names) or None)


def _load(library: Any, place: str, download: bool) -> Mapping[str, Any]:
    folder = Path(place)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = library.load_from_disk(place)
        return found if isinstance(found, Mapping) else {"train": found}
    with nullcontext() if download else _offline():
        loaded: Mapping[str, Any] = library.load_dataset(str(folder.absolute()) if folder.exists() else place)
    return loaded


@contextmanager
def _offline() -> Iterator[None]:
    """Keep Hugging Face's libraries off the network, where they would try for half a minute before they give up."""
    settings: list[Any] = [importlib.import_module(name) for name in ("datasets.config", "huggingface_hub.constants")]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _columns(library: Any, spec: str, features: Mapping[str, Any]) -> tuple[str, str | None]:
    """Names of the columns of inputs and of labels; None where there are no labels."""
    images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    texts = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    inputs = images or ([name for name in ("text", "sentence") if name in texts] or texts)
    labels = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if getattr(features.get(name), "dtype", "") == "int64"]
    if len(inputs) != 1 or len(labels) > 1:
        raise DatasetError(
            f"{spec} has the columns {brief(dict(features))}",
            "one column of images or texts, and at most one of labels",
            "wrap it by py:package.module:function, which returns (input, label) pairs",
        )
    return inputs[0], labels[0] if labels else None


class _FromHub:
    """Rows of a dataset of Hugging Face as (input, label) pairs."""

    def __init__(self, rows: Any, value: str, labels: NDArray[np.int64] | None) -> None:
        self._rows, self._value = rows, value
        first = rows[0][value]
        # One mode for all, as for the files of a folder.
        self._mode = "L" if getattr(first, "mode", "") in ("1", "L") else "RGB"
        self.targets = np.full(len(rows), UNLABELLED) if labels is None else labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        value = self._rows[int(index)][self._value]
        # More than 8 bits a channel are refused, not clipped.
        if hasattr(value, "convert") and not value.mode.startswith(("I", "F")):
            value = value.convert(self._mode)
        return value, int(self.targets[index])
