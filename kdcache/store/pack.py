"""A cache as one file: Zarr's ZipStore layout, entries uncompressed, so that chunks can be read by ranges."""

from __future__ import annotations

import contextlib
import os
import zipfile

from kdcache.core.command_result import Report
from kdcache.core.errors import CacheIncomplete, CacheNotFound, TargetExists, UsageError
from kdcache.core.json_records import counted
from kdcache.core.progress import Progress
from kdcache.store.cache import cache_splits
from kdcache.store.claims import UNSEALED
from kdcache.store.inspect import inspect_cache
from kdcache.store.manifest import METADATA
from kdcache.store.storage.base import MissingKey
from kdcache.store.storage.registry import ZIP, Location, open_storage
from kdcache.store.storage.zip_file import ZipStorage

# The same cache gives the same file, whenever it is packed: the earliest time that a zip file can hold.
_TIME = (1980, 1, 1, 0, 0, 0)


def pack_cache(location: Location, out: str | os.PathLike[str]) -> Report:
    """Write a finished cache into one zip file. What is there afterwards is the whole file, or nothing.

    Args:
        location: A path, a URL, or an open storage.
        out: Path or URL of the file, which ends with `.zip` and must be free.

    Raises:
        UsageError: `out` does not end with .zip.
        TargetExists: `out` is not free.
        CacheNotFound, CacheIncomplete, CacheDamaged: there is no finished cache to pack.
        StorageError: the storage refuses.
    """
    text = os.fspath(out)
    folder, slash, name = text.rpartition("/")
    if not name.endswith(ZIP) or name == ZIP:
        raise UsageError(f"--out is {text}", f"a name that ends with {ZIP}: packed caches are recognised by it")
    root, parent = open_storage(location), open_storage(folder or slash or ".")
    found = inspect_cache(root).data
    if found["sha256"] is None:
        raise CacheIncomplete(
            f"{root.url} is not finished", "a cache whose splits are all complete", "finish its dump, then pack it"
        )
    with contextlib.suppress(MissingKey):
        parent.size(name)
        raise TargetExists(f"{text} exists already", "a free path", "choose another --out; nothing was changed")
    # A worker that was killed at the very end may have left its record.
    objects = [(key, size) for key, size in root.objects() if f"/{UNSEALED}/" not in key]
    total = sum(size for _, size in objects)
    with (
        Progress("pack", total, "bytes") as progress,
        parent.writing(name) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for key, size in objects:
            entry = zipfile.ZipInfo(key, _TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, root.read(key))
            progress.advance(size)
    packed = parent.size(name)
    data = {"cache": root.url, "file": text, "objects": len(objects), "bytes": packed, "sha256": found["sha256"]}
    return Report(
        data,
        f"{text}: {counted(len(objects), 'object')}, {counted(packed, 'byte')}\n"
        f"sha256 to cite: {found['sha256']}, which kdcache inspect {name} prints",
    )


def unpack_cache(archive: str | os.PathLike[str], out: Location) -> Report:
    """Write the objects of a packed cache into a folder or below a URL; an interrupted call is continued by the same.

    The root's metadata come last, so that what is not whole is no cache.

    Args:
        archive: Path or URL of a file written by `pack_cache`.

    Raises:
        UsageError: `archive` is no packed cache by its name.
        CacheNotFound, CacheDamaged: there is no whole packed cache.
        TargetExists: `out` holds something else.
        StorageError: the storage refuses.
    """
    source, target = open_storage(archive), open_storage(out)
    if not isinstance(source, ZipStorage):
        raise UsageError(
            f"{os.fspath(archive)} is not the name of a packed cache",
            f"a file whose name ends with {ZIP}",
            "give the file that kdcache pack wrote",
        )
    if not cache_splits(source):
        raise CacheNotFound(f"{source.url} holds no split", "a packed cache", "obtain it from its author again")
    target.check_root()
    objects = dict(source.objects())
    there = dict(target.objects())
    if METADATA in there or there.keys() - objects.keys():
        first = METADATA if METADATA in there else min(there.keys() - objects.keys())
        raise TargetExists(
            f"{target.url} is not empty: it holds {first}", "a free path", "choose another --out; nothing was changed"
        )
    with Progress("unpack", sum(objects.values()), "bytes") as progress, target.lock("unpack"):
        for key in sorted(objects, key=lambda each: (each == METADATA, each)):
            target.write(key, source.read(key))
            progress.advance(objects[key])
    total = sum(objects.values())
    data = {"file": source.url, "cache": target.url, "objects": len(objects), "bytes": total}
    return Report(data, f"{target.url}: {counted(len(objects), 'object')}, {counted(total, 'byte')}")
