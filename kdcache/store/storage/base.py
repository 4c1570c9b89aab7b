"""The interface of a storage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

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
    """

    url: str

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
            WrongSize: it has another size.
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

    @abstractmethod
    def objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Keys that begin with `prefix/`, or all keys, with the size of each object in bytes, sorted."""

    @abstractmethod
    def folders(self) -> list[str]:
        """First parts of all keys that have several, sorted."""

    def exists(self, key: str) -> bool:
        """Whether an object is stored under a key."""
        try:
            self.read(key)
        except MissingKey:
            return False
        return True

    def lock(self, owner: str) -> AbstractContextManager[object]:
        """Exclude other writers on this machine while the context is open, where the storage can.

        Args:
            owner: What writes, for the message, such as `dump`.

        Raises:
            CacheBusy: another process holds the lock.
        """
        return nullcontext()

    def free_bytes(self) -> int | None:
        """Room that is left; None where it is not known."""
        return None

    def place(self, key: str) -> str:
        """Full name of an object, for messages."""
        return f"{self.url}/{key}"
