"""The interface of a storage."""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO

Bytes = bytes | bytearray | memoryview


class MissingKey(Exception):
    """Nothing is stored under a key."""


class KeyExists(Exception):
    """Something is stored under a key that was to be created."""


class WrongSize(Exception):
    """An object has another size than it was committed with."""


class Storage(ABC):
    """Bytes by key, below one root. Keys are names joined by `/`.

    Every method raises `StorageError` where the storage refuses, and says what to do.

    Attributes:
        url: Where the root is, for messages and for opening it again.
        in_flight: Number of reads to have under way at once.
    """

    url: str
    in_flight = 1

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object.

        Raises:
            MissingKey: there is none.
        """

    @abstractmethod
    def read_range(self, key: str, start: int, *outs: memoryview, size: int) -> None:
        """Fill writable buffers, one after the other, from a position in an object.

        Args:
            start: Position of the first byte.
            size: Bytes that the whole object must have.

        Raises:
            MissingKey: there is none.
            WrongSize: it has another size; the message says which.
        """

    @abstractmethod
    def write(self, key: str, data: Bytes) -> None:
        """Store an object, all of it or nothing; durable on return."""

    @abstractmethod
    def create(self, key: str, data: Bytes) -> None:
        """Like `write`, for a key that must be free. Of several processes that create one key, one succeeds.

        Raises:
            KeyExists: it is not free.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def delete_below(self, prefix: str) -> None:
        """Remove all objects whose keys begin with `prefix/`."""
        for key, _ in list(self.objects(prefix)):
            self.delete(key)

    @abstractmethod
    def objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Keys of all objects, or of those that begin with `prefix/`, sorted, each with its size in bytes."""

    @abstractmethod
    def folders(self) -> list[str]:
        """First names of the keys that have several, sorted."""

    def size(self, key: str) -> int:
        """Size of an object in bytes.

        Raises:
            MissingKey: there is none.
        """
        return len(self.read(key))

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[IO[bytes]]:
        """A file whose bytes become an object when it is closed without an error; else nothing is stored."""
        buffer = io.BytesIO()
        yield buffer
        self.write(key, buffer.getvalue())

    def place(self, key: str) -> str:
        """Full name of an object, for messages."""
        return f"{self.url}/{key}"

    def below(self, prefix: str) -> Storage:
        """The part of the storage whose keys begin with `prefix/`, as a storage of its own."""
        return _Below(self, prefix)

    def is_empty(self) -> bool:
        """Whether nothing is stored, so that a cache may be made here."""
        return next(self.objects(), None) is None

    def check_root(self) -> None:
        """Refuse a root that cannot hold objects.

        Raises:
            TargetExists: something else is there.
        """

    def enclosing(self) -> Iterator[Storage]:
        """Storages whose objects include this one's, the outermost first."""
        return iter(())

    @contextlib.contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """Exclude other writers on this machine, where the storage can, and remove what killed ones left.

        Args:
            owner: What writes, for the message, such as `dump`.

        Raises:
            CacheBusy: another process holds the lock.
        """
        yield

    def sweep(self) -> None:
        """Remove what killed processes of this machine left: a lock that nobody holds, and unfinished objects."""

    def free_bytes(self) -> int | None:
        """Room that is left; None where it is not known."""
        return None


class _Below(Storage):
    def __init__(self, parent: Storage, prefix: str) -> None:
        self._parent, self._prefix = parent, prefix
        self.url, self.in_flight = parent.place(prefix), parent.in_flight

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def read(self, key: str) -> bytes:
        return self._parent.read(self._key(key))

    def read_range(self, key: str, start: int, *outs: memoryview, size: int) -> None:
        self._parent.read_range(self._key(key), start, *outs, size=size)

    def write(self, key: str, data: Bytes) -> None:
        self._parent.write(self._key(key), data)

    def create(self, key: str, data: Bytes) -> None:
        self._parent.create(self._key(key), data)

    def delete(self, key: str) -> None:
        self._parent.delete(self._key(key))

    def delete_below(self, prefix: str) -> None:
        self._parent.delete_below(self._key(prefix))

    def size(self, key: str) -> int:
        return self._parent.size(self._key(key))

    def objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        wanted = self._key(prefix) if prefix else self._prefix
        for key, size in self._parent.objects(wanted):
            yield key[len(self._prefix) + 1 :], size

    def folders(self) -> list[str]:
        return sorted({key.split("/", 1)[0] for key, _ in self.objects() if "/" in key})

    def place(self, key: str) -> str:
        return self._parent.place(self._key(key))
