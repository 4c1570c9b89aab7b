"""Storages by the scheme of their URL."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdcache.core.paths import REMOTE_SCHEMES
from kdcache.store.storage.base import Storage
from kdcache.store.storage.local import LocalStorage
from kdcache.store.storage.object_store import ObjectStorage
from kdcache.store.storage.zip_file import ZipStorage

# Where a cache is: a path, a URL, or an open storage.
Location = str | os.PathLike[str] | Storage
StorageOptions = Mapping[str, Any]

FILE, ZIP = "file", ".zip"
KINDS: dict[str, Callable[[str, StorageOptions], Storage]] = {
    FILE: lambda path, _: LocalStorage(path),
    **dict.fromkeys(REMOTE_SCHEMES, ObjectStorage),
}

_process_options: dict[str, Any] = {}


@contextlib.contextmanager
def storage_options(options: StorageOptions) -> Iterator[None]:
    """Options of every object store that this process opens without options of its own, as `--storage-option` does.

    They stay in memory: a settings class would write them into a run's config.json.
    """
    before = dict(_process_options)
    set_process_options(options)
    try:
        yield
    finally:
        set_process_options(before)


def set_process_options(options: StorageOptions) -> None:
    """Set what `storage_options` sets, for as long as the process lives."""
    _process_options.clear()
    _process_options.update(options)


def process_options() -> StorageOptions:
    """What `storage_options` has set, for processes that this one starts."""
    return dict(_process_options)


def open_storage(location: Location, options: StorageOptions | None = None) -> Storage:
    """The storage at a location. A location that ends with `.zip` is a packed cache, unless it is a local folder.

    Args:
        options: Options of an object store, such as `endpoint`; None for those of the process.

    Raises:
        UsageError: it is no path on this machine, and no URL of a known kind.
        MissingExtra: an object store, without the extra `cloud`.
    """
    if isinstance(location, Storage):
        return location
    text = os.fspath(location)
    scheme, separator, _ = text.partition("://")
    remote = separator and scheme in KINDS
    if text.endswith(ZIP) and (remote or not Path(text).expanduser().is_dir()):
        folder, slash, name = text.rpartition("/")
        return ZipStorage(open_storage(folder or slash or ".", options), name)
    kind = KINDS[scheme] if remote else KINDS[FILE]
    return kind(text, _process_options if options is None else options)
