"""Storages by the scheme of their URL."""

from __future__ import annotations

import os
from collections.abc import Callable

from kdcache.core.errors import UsageError
from kdcache.store.storage.base import Storage
from kdcache.store.storage.local import LocalStorage

# Where a cache is: a path, a URL, or an open storage.
Location = str | os.PathLike[str] | Storage

KINDS: dict[str, Callable[[str], Storage]] = {"file": LocalStorage}


def open_storage(location: Location) -> Storage:
    """The storage at a location.

    Raises:
        UsageError: a URL of a kind that is not supported.
    """
    if isinstance(location, Storage):
        return location
    scheme, separator, _ = str(location).partition("://")
    if not separator:
        return KINDS["file"](os.fspath(location))
    if scheme not in KINDS:
        raise UsageError(f"the cache is at {location}", "a local folder", "copy the cache to a local disk")
    return KINDS[scheme](str(location))
