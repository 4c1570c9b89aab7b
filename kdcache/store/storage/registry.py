"""Storages by the scheme of their URL."""

from __future__ import annotations

import os
from collections.abc import Callable

from kdcache.store.storage.base import Storage
from kdcache.store.storage.local import LocalStorage

# Where a cache is: a path, a URL, or an open storage.
Location = str | os.PathLike[str] | Storage

FILE = "file"
KINDS: dict[str, Callable[[str], Storage]] = {FILE: LocalStorage}


def open_storage(location: Location) -> Storage:
    """The storage at a location.

    Raises:
        UsageError: it is no path on this machine, and no URL of a known kind.
    """
    if isinstance(location, Storage):
        return location
    scheme, separator, _ = str(location).partition("://")
    kind = KINDS.get(scheme) if separator else None
    return (kind or KINDS[FILE])(os.fspath(location))
