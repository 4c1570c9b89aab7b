"""Files that are whole or absent: written beside, flushed to disk, then renamed into place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kdcache.core.errors import KdcacheError, StorageError

TEMPORARY = ".tmp"

_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or raise the quota",
    errno.EROFS: "remount the disk writable, or choose another folder",
    errno.EACCES: "give yourself permission to write there, or choose another folder",
    errno.EPERM: "give yourself permission to write there, or choose another folder",
}


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a StorageError that says what to do."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, KdcacheError):
            raise
        remedy = _REMEDIES.get(problem.errno or 0, "look at the disk")
        needed = "a disk that takes it"
        if action == "read":
            remedy, needed = "give yourself permission to read it, or look at the disk", "a disk that gives it"
        raise StorageError(
            f"could not {action} {path}: {problem.strerror or problem}",
            needed,
            f"{remedy}, then run the same command again; what is committed is kept",
        ) from problem


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and the ones above it, durably."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_durable(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Put `data` at `path` so that a crash leaves the old bytes or all the new ones, never a part.

    Raises:
        StorageError: the disk is full, read-only or closed to us; nothing is left behind.
    """
    with durable_file(path) as file:
        file.write(data)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place at `path` once it is whole and on disk.

    Raises:
        StorageError: the disk is full, read-only or closed to us; nothing is left behind, an old file stays.
    """
    with storage_errors("write", path):
        make_folder(path.parent)
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_tree(path: Path) -> None:
    """Flush every file and folder below `path`, for what another library wrote there."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
