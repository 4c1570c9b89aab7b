"""Local files: objects are whole or absent, durable, and protected by a lock while one process writes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kdcache.core.atomic_files import (
    TEMPORARY,
    check_folder,
    durable_file,
    make_folder,
    storage_errors,
    sync_folder,
    write_durable,
)
from kdcache.core.errors import StorageError
from kdcache.core.file_lock import NAME as LOCK_NAME
from kdcache.core.file_lock import PathLock
from kdcache.core.paths import local_path
from kdcache.core.system import free_bytes, is_alive, machine_name
from kdcache.store.storage.base import Bytes, KeyExists, MissingKey, Storage, WrongSize

# What file systems answer that have no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

# Of a write into a folder that vanishes: more than workers that seal a split at the same time.
_ATTEMPTS = 100


def _suffix() -> str:
    """End of the names of this process's unfinished files; several workers may write one object at the same time."""
    return f".{machine_name()}-{os.getpid()}{TEMPORARY}"


def _is_abandoned(name: str) -> bool:
    """Whether an unfinished file was left by a dead process of this machine, or by an older version of kdcache."""
    if not name.endswith(TEMPORARY):
        return False
    match = re.search(rf"\.(\w+)-(\d+){re.escape(TEMPORARY)}$", name)
    return match is None or (match[1] == machine_name() and not is_alive(int(match[2])))


def _is_transient(name: str) -> bool:
    """Whether a file is no object: the lock, or what a killed process had begun to write."""
    return name == LOCK_NAME or name.endswith(TEMPORARY)


def _while_folders_vanish(write: Callable[[], None]) -> None:
    """Write, again where another worker removes the folder meanwhile, as each does that seals the split."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            write()
            return
        except StorageError as problem:
            if not left or not isinstance(problem.__cause__, FileNotFoundError):
                raise


class LocalStorage(Storage):
    """A folder.

    Args:
        root: The folder, made by the first write; `~` is expanded.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(local_path(os.fspath(root), "the cache"))
        self.url = str(self._root)

    def read(self, key: str) -> bytes:
        path = self._root / key
        with storage_errors("read", path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError) as problem:
                raise MissingKey(key) from problem

    def read_range(self, key: str, start: int, *outs: memoryview, size: int) -> None:
        path = self._root / key
        with storage_errors("read", path):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError) as problem:
                raise MissingKey(key) from problem
            try:
                found = os.fstat(descriptor).st_size
                # Straight into the caller's memory: for large chunks one more copy is a third of the time.
                if found != size or os.preadv(descriptor, list(outs), start) != sum(out.nbytes for out in outs):
                    raise WrongSize(f"has {found} bytes, the ledger says {size}")
            finally:
                os.close(descriptor)

    def write(self, key: str, data: Bytes) -> None:
        _while_folders_vanish(lambda: write_durable(self._root / key, data, suffix=_suffix()))

    def create(self, key: str, data: Bytes) -> None:
        _while_folders_vanish(lambda: self._create(key, data))

    def _create(self, key: str, data: Bytes) -> None:
        path = self._root / key
        # Written beside, then linked: a link fails where its name is taken, and the object is never seen half.
        beside = path.with_name(f"{path.name}.new{_suffix()}")
        write_durable(beside, data, suffix=_suffix())
        with storage_errors("create", path):
            try:
                os.link(beside, path)
            except FileExistsError as problem:
                raise KeyExists(key) from problem
            except OSError as problem:
                if problem.errno not in _NO_LINKS:
                    raise
                self._create_unlinked(key, data)
            finally:
                beside.unlink(missing_ok=True)
            sync_folder(path.parent)

    def _create_unlinked(self, key: str, data: Bytes) -> None:
        """Create an object where there are no hard links: a process that is killed meanwhile may leave it half."""
        try:
            with open(self._root / key, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as problem:
            raise KeyExists(key) from problem

    def delete(self, key: str) -> None:
        path = self._root / key
        with storage_errors("delete", path):
            path.unlink(missing_ok=True)

    def delete_below(self, prefix: str) -> None:
        # Several workers may do so at the same time.
        shutil.rmtree(self._root / prefix, ignore_errors=True)

    def size(self, key: str) -> int:
        with storage_errors("read", self._root / key):
            try:
                return (self._root / key).stat().st_size
            except (FileNotFoundError, NotADirectoryError) as problem:
                raise MissingKey(key) from problem

    @contextmanager
    def writing(self, key: str) -> Iterator[IO[bytes]]:
        with durable_file(self._root / key, suffix=_suffix()) as file:
            yield file

    def objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        with storage_errors("read", self._root / prefix):
            found = []
            for folder, _, names in os.walk(self._root / prefix):
                for name in names:
                    path = Path(folder, name)
                    # Other workers may remove files meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        if not _is_transient(name):
                            found.append((path.relative_to(self._root).as_posix(), path.stat().st_size))
            yield from sorted(found)

    def folders(self) -> list[str]:
        with storage_errors("read", self._root):
            return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir()) if self._root.is_dir() else []

    def place(self, key: str) -> str:
        return str(self._root / key)

    def is_empty(self) -> bool:
        if not os.path.lexists(self._root):
            return True
        return self._root.is_dir() and all(map(_is_transient, os.listdir(self._root)))

    def check_root(self) -> None:
        check_folder(self._root)

    def enclosing(self) -> Iterator[Storage]:
        return (LocalStorage(folder) for folder in reversed(self._root.absolute().parents))

    @contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        with storage_errors("create", self._root):
            make_folder(self._root)
        with PathLock(self._root, owner):
            self._remove_abandoned()
            yield

    def sweep(self) -> None:
        PathLock.sweep(self._root)
        self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove what killed processes had begun to write."""
        for folder, _, names in os.walk(self._root):
            for name in filter(_is_abandoned, names):
                with contextlib.suppress(FileNotFoundError):  # another worker was faster
                    os.unlink(os.path.join(folder, name))

    def free_bytes(self) -> int:
        return free_bytes(self._root)
