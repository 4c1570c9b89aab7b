"""Texts with labels: the IMDB reviews as they are published, and folders of text files."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import DatasetError, UnreadableSample
from kdcache.data.dataset import IndexedDataset, Indices
from kdcache.data.folders import TEXTS, LeftOut, find_files, is_hidden, labelled_files, printable

# Maas et al., Learning word vectors for sentiment analysis, 2011.
IMDB_FOLDER, IMDB_ARCHIVE = "aclImdb", "aclImdb_v1.tar.gz"
IMDB_URL = f"https://ai.stanford.edu/~amaas/data/sentiment/{IMDB_ARCHIVE}"
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
IMDB_CLASSES = ("neg", "pos")


class TextDataset(IndexedDataset):
    """Texts in memory, as UTF-8.

    Args:
        texts: Texts in UTF-8, ordered by class and then in a stable order.
        labels: Integers (N,), or 0 and 1 for each class, (N, classes) uint8.
    """

    in_memory = True
    is_text = True

    def __init__(
        self, texts: list[bytes], labels: NDArray[Any], *, name: str, split: str, classes: tuple[str, ...]
    ) -> None:
        super().__init__(name=name, split=split, classes=classes)
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)])
        self._labels = labels
        self.multi_label = labels.ndim == 2
        self.input_dtype = "uint8"

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> NDArray[Any]:
        return self._labels

    def fetch(self, indices: Indices) -> tuple[list[Tensor], Tensor]:
        positions = np.asarray(indices, dtype=np.int64)
        starts, ends = self._ends[:-1][positions], self._ends[1:][positions]
        inputs = [torch.from_numpy(self._bytes[start:end].copy()) for start, end in zip(starts, ends, strict=True)]
        return inputs, torch.from_numpy(self._labels[positions])


def open_imdb(split: str, data_root: str, download: bool) -> TextDataset:
    """The labelled IMDB reviews, from the folder or else the archive in the data root.

    Raises:
        DatasetError: neither is there, or what is there is damaged or cannot be downloaded.
    """
    root = Path(data_root)
    folder, archive = root / IMDB_FOLDER, root / IMDB_ARCHIVE
    if not folder.is_dir() and not archive.is_file():
        if not download:
            raise DatasetError(
                f"imdb could not be read from {root}: it holds neither {IMDB_FOLDER}/ nor {IMDB_ARCHIVE}",
                "the reviews as they are published",
                "--download fetches them; --data-root names the folder that has them",
            )
        # Here, because its import takes seconds.
        from torchvision.datasets.utils import download_url  # type: ignore[import-untyped]

        try:
            download_url(IMDB_URL, str(root), IMDB_ARCHIVE, IMDB_MD5)
        except Exception as problem:  # of connections, of disks, and RuntimeError for a wrong checksum
            raise DatasetError(
                f"imdb could not be downloaded to {root}: {type(problem).__name__}: {problem}",
                "a connection, and room on the disk",
                f"check the connection, or copy {IMDB_ARCHIVE} to {root}",
            ) from problem
    if folder.is_dir():
        return _of_files("imdb", split, IMDB_CLASSES, _imdb_files(folder / split))
    return _of_files("imdb", split, IMDB_CLASSES, _members(archive, split))


def open_text_folder(spec: str, split: str, classes: Sequence[str] = ()) -> TextDataset:
    """The texts of `text-folder:PATH`, ordered by class, folder and name.

    Raises:
        DatasetError: there is no such split, a class has no texts, or a file is not UTF-8.
    """
    paths, labels, names = labelled_files(spec, split, TEXTS, classes)
    if not any(label >= 0 for label in labels):
        texts = [_utf8(*_read("", path)[1:]) for path in paths]
        return TextDataset(texts, np.array(labels), name=spec, split=split, classes=names)
    return _of_files(spec, split, names, (_read(names[label], path) for path, label in zip(paths, labels, strict=True)))


def _imdb_files(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, place and content of the reviews' files."""
    left_out = LeftOut()
    for name in IMDB_CLASSES:
        if (folder / name).is_dir():
            yield from (_read(name, path) for path in find_files(str(folder / name), TEXTS, left_out))
    left_out.log("imdb")


def _read(class_name: str, path: str) -> tuple[str, str, bytes]:
    try:
        return class_name, path, Path(path).read_bytes()
    except OSError as problem:
        raise UnreadableSample(
            f"{printable(path)} cannot be read: {problem.strerror or problem}",
            "readable text files",
            "copy the files again",
        ) from problem


def _members(archive: Path, split: str) -> Iterator[tuple[str, str, bytes]]:
    """The same of the archive's files, read without unpacking it."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = member.name.split("/")
                ours = parts[:2] == [IMDB_FOLDER, split] and len(parts) == 4 and parts[2] in IMDB_CLASSES
                if (
                    ours
                    and parts[3].endswith(".txt")
                    and not is_hidden(parts[3])
                    and (file := tar.extractfile(member)) is not None
                ):
                    yield parts[2], f"{archive}, {member.name}", file.read()
            # Behind the last file, so that gzip compares its checksum of the whole.
            while tar.fileobj is not None and tar.fileobj.read(2**20):
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as problem:
        raise DatasetError(
            f"{archive} cannot be read: {type(problem).__name__}: {problem}",
            "the whole archive, as it is published",
            "copy or download it again",
        ) from problem


def _utf8(place: str, content: bytes) -> bytes:
    try:
        content.decode()
    except UnicodeDecodeError as problem:
        raise DatasetError(
            f"{printable(place)} is not UTF-8: {problem}",
            "text files in UTF-8",
            "convert it, with iconv for example",
        ) from problem
    return content


def _of_files(name: str, split: str, classes: tuple[str, ...], files: Iterator[tuple[str, str, bytes]]) -> TextDataset:
    # By name within a class, so that folder and archive, whose order is any, give one dataset.
    found = sorted(files, key=lambda each: (classes.index(each[0]), os.path.split(each[1])))
    counts = dict.fromkeys(classes, 0)
    for class_name, place, content in found:
        counts[class_name] += 1
        _utf8(place, content)
    if empty := [class_name for class_name, count in counts.items() if not count]:
        raise DatasetError(
            f"{name} has no texts of {', '.join(empty)} in its split {split!r}",
            f"{split}/{empty[0]}/NAME.txt",
            "add texts, or remove the empty folder",
        )
    labels = np.repeat(np.arange(len(classes)), list(counts.values()))
    return TextDataset([content for _, _, content in found], labels, name=name, split=split, classes=classes)
