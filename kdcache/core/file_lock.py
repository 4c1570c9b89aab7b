"""One dump, sweep or training run at a time on one path of this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdcache.core.atomic_files import storage_errors
from kdcache.core.errors import CacheBusy, MissingExtra

try:
    import fcntl  # noqa: F401, because without it `filelock` falls back to locks that outlive their process
except ImportError as problem:
    raise MissingExtra(
        "this system has no file locks that end with their process (fcntl)",
        "Linux or macOS",
        "on Windows, run it under WSL",
    ) from problem

NAME = ".lock"

# Long enough to try again where the last holder removed the file while it was being opened.
WAIT_S = 0.1


class PathLock:
    """Held from construction to `release`; the system releases it for a process that dies, and a forked child has none.

    Args:
        folder: Folder to lock.
        owner: Kind of the writing process, for messages.

    Raises:
        CacheBusy: another process holds it.
        StorageError: the folder takes no file.
    """

    def __init__(self, folder: Path, owner: str = "dump") -> None:
        self._path = folder / NAME
        self._lock = FileLock(self._path, thread_local=False)
        with storage_errors("lock", folder):
            try:
                self._lock.acquire(timeout=WAIT_S, poll_interval=WAIT_S / 5)
            except Timeout as problem:
                raise CacheBusy(
                    f"another {owner} writes to {folder}",
                    f"one {owner} at a time on one path",
                    "wait for it, stop it, or choose another --out",
                ) from problem

    def release(self) -> None:
        """Release the lock and leave no file behind."""
        # The file is removed first, so that a process that opens it later creates a new one.
        self._path.unlink(missing_ok=True)
        self._lock.release(force=True)

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
