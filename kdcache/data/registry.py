"""Names to indexed datasets, and what tells one dataset from another. Start here: the rest is re-exported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # type: ignore[import-untyped]
from numpy.typing import ArrayLike
from torch import Tensor

from kdcache.core import rng
from kdcache.core.errors import DatasetError, KdcacheError
from kdcache.core.json_records import canonical_json
from kdcache.core.plugins import PREFIX, call_with_accepted, describe, did_you_mean, require_extra, resolve
from kdcache.data.dataset import ArrayDataset, IndexedDataset, as_indexed
from kdcache.data.raw_input import batch_crc32c, dtype_name, read_image
from kdcache.data.text_files import open_imdb, open_text_folder

DIGITS_TRAIN = 1437
# Of ImageNet; the usual choice for photographs.
PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_dataset(spec: str, *, split: str, data_root: str = "data", download: bool = False) -> IndexedDataset:
    """Open a dataset by its spec.

    Args:
        spec: a name of `DATASETS`, `imdb`, `folder:PATH` or `text-folder:PATH` (with `train/` and `test/` or `val/` in
            it, a folder a class), or `py:package.module:function`, which returns a map-style dataset.
        split: `train` or `test`; for folders the name of any, for functions whatever they take.
        data_root: folder of torchvision's datasets.
        download: fetch what is not there.

    Raises:
        DatasetError: no such dataset or split, files that are missing or damaged, or a function that fails.
        MissingExtra: `digits` without scikit-learn.
    """
    if spec.startswith("folder:"):
        return _image_folder(spec, split)
    if spec.startswith("text-folder:"):
        folder, classes = _split_folder(spec, split, "TEXT.txt")
        return open_text_folder(spec, split, folder, tuple(classes))
    if spec.startswith(PREFIX):
        return _from_function(spec, split, data_root, download)
    names = [*DATASETS, "imdb"]
    if spec not in names:
        raise DatasetError(
            f"there is no dataset {spec!r}",
            f"{', '.join(names)}, folder:PATH, text-folder:PATH or py:package.module:function",
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
    bunch = require_extra("sklearn.datasets", "demo", "the dataset digits").load_digits()
    # 0..16 to 0..255, rounded; 16 levels apart, so it can be undone.
    pixels = (bunch.images.astype(np.int64) * 255 + 8) // 16
    part = slice(DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    inputs = torch.from_numpy(pixels[part].astype(np.uint8)[:, None])
    return inputs, bunch.target[part], [str(name) for name in bunch.target_names]


def _torchvision(class_name: str, folder: str) -> Callable[[str, str, str, bool], Loaded]:
    def load(spec: str, split: str, data_root: str, download: bool) -> Loaded:
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


def _split_folder(spec: str, split: str, file: str) -> tuple[Path, list[str]]:
    """The folder of a split, and its class folders, which every split has."""
    root = Path(spec.partition(":")[2])
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    chosen = "val" if split == "test" and "test" not in names else split
    if chosen not in names:
        what = f"holds {', '.join(names[:8]) or 'no folders'}" if root.is_dir() else "is no folder"
        raise DatasetError(
            f"{spec} has no split {split!r}: {root.absolute()} {what}",
            f"{root}/{'test or val' if split == 'test' else split}/CLASS/{file}",
            "arrange the files so, or correct the path",
        )
    classes = _class_folders(root / chosen)
    for other in sorted({"train", "test", "val"} & set(names)):
        others = _class_folders(root / other)
        if others != classes:
            raise DatasetError(
                f"{root / chosen} has the classes {_brief(classes)}; {root / other} has {_brief(others)}",
                "the same class folders in every split: a label is a position among them",
                "rename or add the folders that differ",
            )
    return root / chosen, classes


def _image_folder(spec: str, split: str) -> IndexedDataset:
    folder, _ = _split_folder(spec, split, "IMAGE")
    try:
        images = torchvision.datasets.ImageFolder(folder, loader=read_image)
    except OSError as problem:
        raise DatasetError(
            f"{spec} cannot be read: {problem}", "images in every class folder", "add images, or remove empty folders"
        ) from problem
    dataset = as_indexed(images, name=spec, split=split)
    dataset.default_mean, dataset.default_std = PHOTO_MEAN, PHOTO_STD
    return dataset


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _brief(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"


def _from_function(spec: str, split: str, data_root: str, download: bool) -> IndexedDataset:
    function = resolve(spec, error=DatasetError)
    try:
        found: Any = call_with_accepted(function, split=split, data_root=data_root, download=download)
    except KdcacheError:
        raise
    except Exception as problem:
        raise DatasetError(f"{spec} fails with {describe(problem)}", "a function that returns a dataset") from problem
    dataset = as_indexed(found, name=spec, split=split)
    if dataset.data_root is None:
        dataset.data_root = data_root
    return dataset
