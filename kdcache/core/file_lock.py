"""One dump, sweep or training run at a time on one path."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from kdcache.core.atomic_files import storage_errors
from kdcache.core.errors import CacheBusy, MissingExtra

try:
    import fcntl
except ImportError as problem:
    raise MissingExtra(
        "this system has no file locks that end with their process (fcntl)",
        "Linux or macOS",
        "on Windows, run it under WSL",
    ) from problem

NAME = ".lock"


class PathLock:
    """Held from construction to `release`; the system releases it for a process that dies.

    Args:
        folder: Folder to lock.
        what: Name of the writing process for messages.

    Raises:
        CacheBusy: another process holds it.
        StorageError: the folder takes no file.
    """

    def __init__(self, folder: Path, what: str = "dump") -> None:
        self._path, self._what = folder / NAME, what
        with storage_errors("lock", folder):
            while not self._take(folder):
                pass

    def _take(self, folder: Path) -> bool:
        """Lock the file at the path; False if its last holder removed it while it was being opened."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._still_there():
                os.close(self._descriptor)
                return False
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError as problem:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise CacheBusy(
                f"another {self._what} writes to {folder}" + (f" (process {holder})" if holder else ""),
                f"one {self._what} at a time on one path",
                "wait for it, stop it, or choose another --out",
            ) from problem
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self._descriptor)
        return True

    def release(self) -> None:
        """Release the lock and remove its file; it is removed first, so that later openers create a new one."""
        self._path.unlink(missing_ok=True)
        _held.discard(self._descriptor)
        os.close(self._descriptor)

    def __enter__(self) -> PathLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @classmethod
    def sweep(cls, folder: Path) -> None:
        """Remove the file that a killed holder left; one that is held stays."""
        if (folder / NAME).exists():
            with contextlib.suppress(CacheBusy):
                cls(folder).release()

    def _still_there(self) -> bool:
        """Whether the locked file is the one at the path; its holder may have removed it while we opened it."""
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


# A forked worker must not hold what its parent locked: it may outlive it.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
