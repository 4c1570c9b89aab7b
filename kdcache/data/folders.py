"""Folders of images or texts: which files are samples, in which order, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdcache.core.errors import DatasetError
from kdcache.core.progress import log
from kdcache.store.records import UNLABELLED


class FileKind(NamedTuple):
    """Files that are taken as samples, by their suffix in lower case."""

    name: str
    example: str
    suffixes: tuple[str, ...]


# What Pillow reads as one picture of 8 bits a channel. The same table everywhere: a folder must not have other samples
# where Pillow was built without a format, and read_image refuses the file there.
_TYPES = ("avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp")
IMAGES = FileKind("images", "IMAGE", tuple(f".{name}" for name in _TYPES))
TEXTS = FileKind("texts", "TEXT.txt", (".txt",))

# Folders that systems leave beside the user's files without a dot: macOS in archives, Synology for its thumbnails.
_LEFTOVERS = ("__MACOSX", "@eaDir")

# Whose classes must be the same; other folders beside them are looked at only where they are asked for.
_SPLITS = ("train", "test", "val")


class LeftOut:
    """Counts what is passed over, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._suffixes: dict[str, None] = {}

    def add(self, reason: str, path: str) -> None:
        self._counts[reason] += 1
        self._examples.setdefault(reason, path)

    def add_suffix(self, kind: FileKind, path: str) -> None:
        self._suffixes.setdefault(os.path.splitext(path)[1] or "no suffix")
        self.add(f"files that are no {kind.name} by their suffix", path)

    def log(self, where: str) -> None:
        """A line on stderr for each reason, with its count and an example."""
        for reason, count in self._counts.items():
            suffixes = f": {', '.join([*self._suffixes][:8])}" if reason.endswith("suffix") else ""
            line = f"{where}: left out: {reason} ({count:,}{suffixes}), such as {self._examples[reason]}"
            log(printable(line))


def printable(path: str | os.PathLike[str]) -> str:
    """A path that any output can hold: bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find_files(folder: str, kind: FileKind, left_out: LeftOut) -> list[str]:
    """The files of a kind in a folder and in those below it, links followed, by folder and then by name.

    The order is that of torchvision's ImageFolder, which caches are joined by. What is hidden is not taken.

    Raises:
        DatasetError: a folder cannot be read.
    """
    found: list[str] = []
    _walk(folder, kind, left_out, (), found)
    return sorted(found, key=os.path.split)


def _walk(folder: str, kind: FileKind, left_out: LeftOut, above: tuple[str, ...], found: list[str]) -> None:
    real = os.path.realpath(folder)
    if real in above:
        left_out.add("links that lead back to a folder above them", folder)
        return
    for entry in _entries(folder):
        if is_hidden(entry.name):
            left_out.add("hidden files and folders", entry.path)
        elif entry.is_dir():
            _walk(entry.path, kind, left_out, (*above, real), found)
        elif os.path.splitext(entry.name)[1].lower() in kind.suffixes:
            found.append(entry.path)
        else:
            left_out.add_suffix(kind, entry.path)


def split_folder(spec: str, split: str, kind: FileKind) -> tuple[Path, tuple[str, ...]]:
    """The folder of a split, and its classes, which every split has. `test` is read from `val/` where it must be.

    A folder without class folders, such as the unlabelled `test/` of a competition, is no split.

    Raises:
        DatasetError: there is no such split, or another one has other classes.
    """
    root = Path(spec.partition(":")[2])
    names = _folders(root) if root.is_dir() else []
    wanted = [name for name in names if name in (*_SPLITS, split)]
    classes = {name: found for name in wanted if (found := tuple(_folders(root / name)))}
    chosen = "val" if split == "test" and "test" not in classes and "val" in classes else split
    if chosen not in classes:
        what = f"holds {', '.join(names[:8]) or 'no folders'}" if root.is_dir() else "is no folder"
        flat = f", and {split}/ holds no class folders" if split in names else ""
        raise DatasetError(
            f"{spec} has no split {split!r}: {root.absolute()} {what}{flat}",
            f"{root}/{'test or val' if split == 'test' else split}/CLASS/{kind.example}",
            "arrange the files so, or correct the path",
        )
    if chosen != split:
        why = "test/ holds no class folders" if split in names else "there is no test/"
        log(f"{spec}: the split test is read from val/: {why}")
    for other in classes:
        if classes[other] != classes[chosen]:
            raise DatasetError(
                f"{root / chosen} has the classes {_brief(classes[chosen])}; {root / other} has "
                f"{_brief(classes[other])}",
                "the same class folders in every split: a label is a position among them",
                "rename or add the folders that differ",
            )
    return root / chosen, classes[chosen]


def labelled_files(
    spec: str, split: str, kind: FileKind, classes: Sequence[str] = ()
) -> tuple[list[str], list[int], tuple[str, ...]]:
    """The files of a split, their labels, and the classes; a line on stderr for each reason to leave others out.

    A split without class folders is unlabelled, if its classes are known: from `classes`, or from another split.

    Args:
        classes: Names of the classes, where the folders do not tell them.

    Raises:
        DatasetError: there is no such split, a folder cannot be read, or a class has no files of the kind.
    """
    if (unlabelled := _unlabelled_files(spec, split, kind, tuple(classes))) is not None:
        return unlabelled
    folder, classes = split_folder(spec, split, kind)
    left_out = LeftOut()
    for entry in _entries(str(folder)):
        if is_hidden(entry.name):
            left_out.add("hidden files and folders", entry.path)
        elif not entry.is_dir():
            left_out.add("files beside the class folders", entry.path)
    found = [find_files(str(folder / name), kind, left_out) for name in classes]
    left_out.log(spec)
    if empty := [name for name, files in zip(classes, found, strict=True) if not files]:
        raise DatasetError(
            f"{spec} has no {kind.name} of {', '.join(empty[:8])} in its split {split!r}",
            f"{folder / empty[0]}/{kind.example}, a file that ends in {', '.join(kind.suffixes)}",
            f"add {kind.name}, or remove the empty folder",
        )
    labels = [label for label, files in enumerate(found) for _ in files]
    return [path for files in found for path in files], labels, classes


def _unlabelled_files(
    spec: str, split: str, kind: FileKind, classes: tuple[str, ...]
) -> tuple[list[str], list[int], tuple[str, ...]] | None:
    """What `labelled_files` gives for a split without class folders; None where it has such, or no files."""
    root = Path(spec.partition(":")[2])
    names = _folders(root) if root.is_dir() else []
    own = {name: tuple(_folders(root / name)) for name in names if name in (*_SPLITS, split)}
    read_elsewhere = split == "test" and own.get("val")
    if own.get(split) != () or read_elsewhere:
        return None
    left_out = LeftOut()
    files = find_files(str(root / split), kind, left_out)
    known = classes or next(filter(None, own.values()), ())
    if not files:
        return None
    if not known:
        raise DatasetError(
            f"{spec} is unlabelled: {printable(root / split)} holds {kind.name} and no class folders",
            "the names of the classes that the teacher tells apart",
            "give --classes FILE, with a name per line in the teacher's order, or a class folder for each class",
        )
    left_out.log(spec)
    return files, [UNLABELLED] * len(files), known


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's samples, such as `.ipynb_checkpoints`."""
    return name.startswith(".") or name in _LEFTOVERS


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(str(folder)) if not is_hidden(entry.name) and entry.is_dir())


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """In order of their names, so that the examples in messages are always the same."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as problem:
        raise DatasetError(
            f"{printable(folder)} cannot be read: {problem.strerror or problem}",
            "a folder that may be read",
            "give yourself permission to read it, or name another",
        ) from problem


def _brief(names: tuple[str, ...]) -> str:
    return f"{len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
