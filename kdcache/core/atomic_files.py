"""Files that are whole or absent: written beside, flushed to disk, then renamed into place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kdcache.core.errors import KdcacheError, StorageError, TargetExists

TEMPORARY = ".tmp"

_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or raise the quota",
    errno.EROFS: "remount the disk writable, or choose another folder",
    errno.EACCES: "give yourself permission to write there, or choose another folder",
    errno.EPERM: "give yourself permission to write there, or choose another folder",
    errno.ENOTDIR: "choose a path that does not lead through a file",
    errno.EISDIR: "choose the path of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or open fewer at once (--workers, --jobs)",
    errno.ENFILE: "close other programs, or raise the system's limit of open files",
}
_NEEDED = {
    errno.ENOTDIR: "a folder",
    errno.EISDIR: "a file",
    errno.ENAMETOOLONG: "a name of at most 255 bytes",
    errno.EMFILE: "a file descriptor: this process has as many files open as it may",
    errno.ENFILE: "a file descriptor: the system has as many files open as it may",
}


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a StorageError that says what to do."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, KdcacheError):
            raise
        code = problem.errno or 0
        remedy, needed = _REMEDIES.get(code, "look at the disk"), _NEEDED.get(code, "a writable location")
        if action == "read" and code not in _NEEDED:
            remedy, needed = "give yourself permission to read it, or look at the disk", "a readable file"
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


def check_folder(path: Path) -> None:
    """Refuse a path that cannot be a folder, because it or one above it is a file.

    Raises:
        TargetExists: it is.
    """
    there = path.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nothing"
        raise TargetExists(
            f"{there} is {kind}, not a folder",
            f"a folder at {path}, or a free path",
            "choose another --out; nothing was changed",
        )


def make_folder(path: Path) -> None:
    """Create a folder and the ones above it, durably."""
    check_folder(path)
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_durable(path: Path, data: bytes | bytearray | memoryview, *, suffix: str = TEMPORARY) -> None:
    """Put `data` at `path` so that a crash leaves the old bytes or all the new ones, never a part.

    Args:
        suffix: End of the name of the file that is written beside; several processes that may write one path at the
            same time need one each.

    Raises:
        StorageError: the disk is full, read-only or closed to us; nothing is left behind.
    """
    with durable_file(path, suffix=suffix) as file:
        file.write(data)


@contextmanager
def durable_file(path: Path, *, suffix: str = TEMPORARY) -> Iterator[BinaryIO]:
    """A file to write that takes its place at `path` once it is whole and on disk. Arguments as for `write_durable`.

    Raises:
        StorageError: the disk is full, read-only or closed to us; nothing is left behind, an old file stays.
    """
    with storage_errors("write", path):
        make_folder(path.parent)
        temporary = path.with_name(path.name + suffix)
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
