"""Every error that kdcache raises on purpose.

    KdcacheError                    exit 1
    ├── UsageError                  exit 2   (ValueError)             flags or arguments that make no sense
    ├── MissingExtra                         (ImportError)            an optional dependency is not installed
    ├── DatasetError                         (ValueError)             a dataset that cannot be read or indexed
    │   └── UnreadableSample                                          a damaged file, or an item that cannot be had
    ├── ModelError                           (ValueError)             a model that cannot be built
    ├── CheckpointError                      (ValueError)             weights that cannot be read or do not fit
    ├── TeacherOutputError                   (ValueError)             logits that must not be stored
    ├── TargetExists                         (FileExistsError)        an output path that holds something else
    ├── CacheBusy                            (OSError)                another dump, sweep or run writes to the path
    ├── StorageError                         (OSError)                the disk refused a write or a read
    ├── TrainingDiverged                     (ArithmeticError)        a loss that is not finite
    ├── CacheNotFound                        (FileNotFoundError)      no cache at a path, or no such split
    ├── CacheIncomplete             exit 3   (ValueError)             shards are missing from the ledger
    ├── CacheDamaged                exit 3   (ValueError)             bytes that fail their checksum
    └── CacheMismatch               exit 4   (ValueError)             a cache of other data than the student's

A message says what was found, what was needed and what to do next; each part is also an attribute.
"""

from __future__ import annotations

from typing import Any


class KdcacheError(Exception):
    """Base of every error that kdcache raises on purpose.

    Args:
        found: What was found, with its value.
        needed: What is required, with its value.
        remedy: What the user can do next.
    """

    exit_code = 1

    def __init__(self, found: str, needed: str = "", remedy: str = "") -> None:
        # One argument only: of several, an OSError makes its errno, strerror and filename.
        super().__init__(found)
        self.found = found
        self.needed = needed
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # The error must survive pickling out of a DataLoader worker.
        return type(self), (self.found, self.needed, self.remedy), self.__dict__

    def __str__(self) -> str:
        lines = [self.found]
        if self.needed:
            lines.append(f"  needed: {self.needed}")
        if self.remedy:
            lines.append(f"  to do:  {self.remedy}")
        return "\n".join(lines)


class UsageError(KdcacheError, ValueError):
    exit_code = 2


class MissingExtra(KdcacheError, ImportError):
    pass


class DatasetError(KdcacheError, ValueError):
    pass


class UnreadableSample(DatasetError):
    """A file that is damaged, or an item that a dataset cannot give."""


class ModelError(KdcacheError, ValueError):
    pass


class CheckpointError(KdcacheError, ValueError):
    pass


class TeacherOutputError(KdcacheError, ValueError):
    pass


class TargetExists(KdcacheError, FileExistsError):
    pass


class CacheBusy(KdcacheError, OSError):
    pass


class StorageError(KdcacheError, OSError):
    pass


class TrainingDiverged(KdcacheError, ArithmeticError):
    pass


class CacheNotFound(KdcacheError, FileNotFoundError):
    pass


class CacheIncomplete(KdcacheError, ValueError):
    exit_code = 3


class CacheDamaged(KdcacheError, ValueError):
    exit_code = 3


class CacheMismatch(KdcacheError, ValueError):
    exit_code = 4
