"""Datasets by name, and their fingerprints."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdcache.core import rng
from kdcache.core.errors import DatasetError, KdcacheError
from kdcache.core.json_records import canonical_json
from kdcache.core.plugins import PREFIX, call_with_accepted, describe, did_you_mean, require_extra, resolve
from kdcache.data.dataset import ArrayDataset, IndexedDataset
from kdcache.data.folders import IMAGES, labelled_files
from kdcache.data.map_dataset import as_indexed
from kdcache.data.raw_input import batch_crc32c, dtype_name
from kdcache.data.tables import ImageFiles, open_csv, open_huggingface
from kdcache.data.text_files import open_imdb, open_text_folder

DIGITS_TRAIN = 1437
# Of ImageNet; the usual choice for photographs.
PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dataset(
    spec: str, *, split: str, data_root: str = "data", download: bool = False, classes: Sequence[str] = ()
) -> IndexedDataset:
    """Open a dataset by its spec.

    Args:
        spec: A name of `DATASETS`, `imdb`, `folder:PATH` or `text-folder:PATH` (with `train/` and `test/` or `val/` in
            it, a folder a class), `csv:FILE`, `hf-dataset:PATH_OR_NAME`, or `py:package.module:function`, which returns
            a map-style dataset.
        split: `train` or `test`; for folders any subfolder's name, for functions any name that they accept.
        data_root: Folder of torchvision's datasets.
        download: Download missing datasets.
        classes: Names of the classes, for unlabelled data that does not tell them.

    Raises:
        DatasetError: no such dataset or split, files that are missing or damaged, or a function that fails.
        MissingExtra: `digits` without scikit-learn.
    """
    if spec.startswith("folder:"):
        return _image_folder(spec, split, classes)
    if spec.startswith("text-folder:"):
        return open_text_folder(spec, split, classes)
    if spec.startswith("csv:"):
        return _photos(open_csv(spec, split, classes))
    if spec.startswith("hf-dataset:"):
        return _photos(open_huggingface(spec, split, download, classes))
    if spec.startswith(PREFIX):
        return _from_function(spec, split, data_root, download, classes)
    names = [*DATASETS, "imdb"]
    if spec not in names:
        raise DatasetError(
            f"there is no dataset {spec!r}",
            f"{', '.join(names)}, folder:PATH, text-folder:PATH, csv:FILE, hf-dataset:NAME or "
            "py:package.module:function",
            did_you_mean(spec, names),
        )
    if split not in ("train", "test"):
        raise DatasetError(f"{spec} has no split {split!r}", "train or test", "choose one of them")
    if spec == "imdb":
        texts = open_imdb(split, data_root, download)
        texts.data_root = data_root
        return texts
    source = DATASETS[spec]
    inputs, labels, classes = source.load(spec, split, data_root, download)
    dataset = ArrayDataset(inputs, np.asarray(labels, dtype=np.int64), name=spec, split=split, classes=tuple(classes))
    dataset.default_mean, dataset.default_std = source.mean, source.std
    dataset.data_root = data_root if source.has_files else None
    return dataset


def fingerprint_labels(labels: ArrayLike) -> str:
    """sha256 of labels as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


def fingerprint_samples(dataset: IndexedDataset, count: int = 64) -> str:
    """sha256 over index, shape, dtype and crc32c of the shared inputs of a keyed sample."""
    indices = rng.keyed_sample(len(dataset), count, 0, "fingerprint")
    inputs = dataset.shared_inputs(indices)
    rows = [
        [int(index), list(value.shape), dtype_name(value), crc32c]
        for index, value, crc32c in zip(indices, inputs, batch_crc32c(inputs), strict=True)
    ]
    return hashlib.sha256(canonical_json(rows)).hexdigest()


Loaded = tuple[Tensor, ArrayLike, list[str]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that is held in memory, and its known statistics for pixels in [0, 1]."""

    load: Callable[[str, str, str, bool], Loaded]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    has_files: bool = True


def _digits(spec: str, split: str, data_root: str, download: bool) -> Loaded:
    """8×8 digits that scikit-learn bundles: the first 1437 train, the last 360 test.

    The file is ordered by writer, so most of the test digits come from hands that no training digit comes from.
    """
    images, labels = _read_digits()
    # 0..16 to 0..255, rounded; 16 levels apart, so it can be undone.
    pixels = (images.astype(np.int64) * 255 + 8) // 16
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    inputs = torch.from_numpy(pixels[part].astype(np.uint8)[:, None])
    return inputs, labels[part], [str(digit) for digit in range(10)]


def _read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What scikit-learn's `load_digits` gives, (1797, 8, 8) and (1797,); its import alone takes 2 s."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    bunch = require_extra("sklearn.datasets", "demo", "the dataset digits").load_digits()
    return bunch.images, bunch.target


def _torchvision(class_name: str, folder: str) -> Callable[[str, str, str, bool], Loaded]:
    def load(spec: str, split: str, data_root: str, download: bool) -> Loaded:
        import torchvision  # type: ignore[import-untyped]  # here, because it takes seconds

        path = Path(data_root) / folder
        try:
            dataset = getattr(torchvision.datasets, class_name)(data_root, train=split == "train", download=download)
        except Exception as problem:  # readers of broken files and of broken connections raise all kinds
            if download:
                raise DatasetError(
                    f"{spec} could not be downloaded to {path}: {type(problem).__name__}: {problem}",
                    "a connection, and room on the disk",
                    f"check the connection, or copy its files to {path}",
                ) from problem
            raise DatasetError(
                f"{spec} could not be read from {path}: {problem}",
                "its files in that folder",
                "--download fetches them; --data-root names the folder that has them",
            ) from problem
        data = torch.as_tensor(dataset.data)
        inputs = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2)
        return inputs.contiguous(), dataset.targets, [str(name) for name in dataset.classes]

    return load


DATASETS: dict[str, Source] = {
    "digits": Source(load=_digits, mean=(0.3054,), std=(0.3753,), has_files=False),
    "mnist": Source(load=_torchvision("MNIST", "MNIST/raw"), mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": Source(load=_torchvision("FashionMNIST", "FashionMNIST/raw"), mean=(0.2860,), std=(0.3530,)),
    "cifar10": Source(
        load=_torchvision("CIFAR10", "cifar-10-batches-py"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Source(
        load=_torchvision("CIFAR100", "cifar-100-python"),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def _image_folder(spec: str, split: str, classes: Sequence[str]) -> IndexedDataset:
    return _photos(as_indexed(ImageFiles(*labelled_files(spec, split, IMAGES, classes)), name=spec, split=split))


def _photos(dataset: IndexedDataset) -> IndexedDataset:
    """A dataset with the usual statistics of photographs, where it is of images in colours."""
    if dataset.input_shape is None or dataset.input_shape[0] == len(PHOTO_MEAN):
        dataset.default_mean, dataset.default_std = PHOTO_MEAN, PHOTO_STD
    return dataset


def _from_function(spec: str, split: str, data_root: str, download: bool, classes: Sequence[str]) -> IndexedDataset:
    function = resolve(spec, error=DatasetError)
    try:
        found: Any = call_with_accepted(function, split=split, data_root=data_root, download=download)
    except KdcacheError:
        raise
    except Exception as problem:
        raise DatasetError(f"{spec} fails with {describe(problem)}", "a function that returns a dataset") from problem
    dataset = as_indexed(found, name=spec, split=split, default_classes=classes)
    if dataset.data_root is None:
        dataset.data_root = data_root
    return dataset
