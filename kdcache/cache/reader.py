"""Reading one split of a cache. Needs numpy and numcodecs, no torch, no teacher and not even zarr.

Nothing is returned unchecked: manifest against its sha256, ledger against manifest, chunk against ledger.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.files import storage_errors
from kdcache.cache.layout import shard_path
from kdcache.cache.ledger import Ledger
from kdcache.cache.manifest import ATTRIBUTE, METADATA, ArrayRecord, Manifest, read_attributes, read_manifest
from kdcache.cache.shards import BadChunk, chunk_stride, decode_chunk, decode_index, index_bytes
from kdcache.errors import CacheDamaged, CacheIncomplete, CacheNotFound


def cache_splits(path: str | os.PathLike[str]) -> list[str]:
    """Names of the splits in a cache, sorted.

    Raises:
        CacheNotFound: there is no cache at the path.
    """
    root = Path(path)
    attributes = read_attributes(root) if (root / METADATA).exists() else None
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        found = "nothing is there" if not root.exists() else "what is there is something else"
        raise CacheNotFound(
            f"no cache at {root}: {found}",
            "a folder written by dump-teacher",
            "check the path, or make one with kdcache dump-teacher --out PATH",
        )
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def open_cache(path: str | os.PathLike[str], split: str = "train") -> Cache:
    """Open one split of a cache for reading.

    Raises:
        CacheNotFound: no cache there, or not this split.
        CacheIncomplete: its dump has not finished.
        CacheDamaged: manifest or ledger fail their checksums.
    """
    splits = cache_splits(path)
    if split not in splits:
        raise CacheNotFound(
            f"the cache {path} has no split {split!r}",
            f"one of {', '.join(splits) or '(none yet)'}",
            f"add it: the dump-teacher command that made the cache, with --split {split}",
        )
    return Cache(Path(path) / split)


class ChunkReader:
    """Reads chunks that the ledger names, and checks each before any of it is used."""

    def __init__(self, split_path: Path, manifest: Manifest, ledger: Ledger) -> None:
        self._path, self._manifest, self._ledger = split_path, manifest, ledger

    def rows(self, name: str, view: int, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows of an array, (n, *row_shape), in the order asked.

        Raises:
            IndexError: an index or the view is out of range.
            CacheDamaged: a chunk fails its checksum.
        """
        length = self._manifest.dataset.length
        if indices.size and (indices.min() < 0 or indices.max() >= length):
            raise IndexError(f"sample indices run from {indices.min()} to {indices.max()}; the cache has {length}")
        array = self._manifest.array(name)
        result = np.empty((len(indices), *array.row_shape), array.dtype)
        chunks = indices // array.chunk_rows
        for chunk in np.unique(chunks):
            here = np.flatnonzero(chunks == chunk)
            result[here] = self.chunk(array, view, int(chunk))[indices[here] % array.chunk_rows]
        return result

    def span(self, name: str, view: int, rows: range) -> NDArray[Any]:
        """Consecutive rows of an array, (n, *row_shape).

        Raises:
            CacheDamaged: a chunk fails its checksum.
        """
        array = self._manifest.array(name)
        result = np.empty((len(rows), *array.row_shape), array.dtype)
        for chunk in range(rows.start // array.chunk_rows, -(-rows.stop // array.chunk_rows)):
            first = chunk * array.chunk_rows
            start, stop = max(rows.start, first), min(rows.stop, first + array.chunk_rows)
            result[start - rows.start : stop - rows.start] = self.chunk(array, view, chunk)[
                start - first : stop - first
            ]
        return result

    def chunk(self, array: ArrayRecord, view: int, chunk: int) -> NDArray[Any]:
        """One chunk, (chunk_rows, *row_shape), read-only; rows past the last sample are padding.

        Raises:
            CacheDamaged: its bytes are not the committed ones.
        """
        if not 0 <= view < self._manifest.views:
            raise IndexError(f"view is {view}; the cache has {self._manifest.views}")
        shard, position = divmod(chunk, self._manifest.shard_rows // array.chunk_rows)
        path = shard_path(self._path, array, view, shard)
        length, crcs = self._ledger.lookup(array, view, shard)
        try:
            if not path.exists():
                raise BadChunk("its file is missing")
            with storage_errors("read", path), open(path, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != length:
                    raise BadChunk(f"its file has {found} bytes, the ledger says {length}")
                offset, size = self._place(file.fileno(), array, length, position)
                data = os.pread(file.fileno(), size, offset)
            return decode_chunk(array, data, int(crcs[position]))
        except BadChunk as problem:
            rows = self._manifest.rows_of(shard)
            raise CacheDamaged(
                f"{array.name}, view {view}, shard {shard} (samples {rows.start} to {rows.stop - 1}) of {self._path} "
                f"is damaged: {problem}",
                "the bytes that the dump committed",
                "restore the cache from a copy, or dump again into another folder",
            ) from problem

    def _place(self, descriptor: int, array: ArrayRecord, length: int, position: int) -> tuple[int, int]:
        """Offset and bytes of one chunk with its crc32c, within a shard's file of `length` bytes."""
        if array.compression == "none":
            return position * chunk_stride(array), chunk_stride(array)
        index = index_bytes(self._manifest, array)
        if not index:
            return 0, length
        offset, size = (int(n) for n in decode_index(os.pread(descriptor, index, length - index))[position])
        if offset + size > length - index:
            raise BadChunk(f"its index places chunk {position} outside the file")
        return offset, size


class Cache:
    """One split of a cache: soft targets by sample index.

    Attributes:
        manifest: what the split is of.
        path: folder of the split.
    """

    def __init__(self, split_path: Path) -> None:
        self.path = split_path
        self.manifest: Manifest = read_manifest(split_path)
        self._ledger = Ledger(split_path, self.manifest)
        self._check_complete()
        self._chunks = ChunkReader(split_path, self.manifest, self._ledger)

    def __len__(self) -> int:
        """Number of samples."""
        return self.manifest.dataset.length

    @property
    def views(self) -> int:
        """Number of views of every sample."""
        return self.manifest.views

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a logit's position is its class."""
        return self.manifest.dataset.classes

    def rows(self, indices: Sequence[int] | NDArray[np.integer[Any]], view: int = 0) -> NDArray[Any]:
        """Soft targets of some samples: logits as the teacher gave them.

        Args:
            indices: sample indices, (n,), in any order, repeats allowed.

        Returns:
            (n, classes), in the stored dtype, in the order asked.

        Raises:
            IndexError: an index or the view is out of range.
            CacheDamaged: a chunk fails its checksum.
        """
        return self._chunks.rows("logits", view, np.asarray(indices, np.int64))

    def column(self, name: str, view: int = 0) -> NDArray[Any]:
        """One whole array of one view, such as `logits`, `labels` or `input_crc32c`: (samples, *row_shape).

        Raises:
            KeyError: the cache does not hold it.
            CacheDamaged: a chunk fails its checksum.
        """
        return self._chunks.span(name, view, range(len(self)))

    def _check_complete(self) -> None:
        manifest = self.manifest
        if not manifest.complete:
            done = sum(int(self._ledger.committed(view).sum()) for view in range(manifest.views))
            raise CacheIncomplete(
                f"{self.path} is incomplete: {done} of {manifest.shards * manifest.views} shards are committed",
                "a finished dump",
                "run the same dump-teacher command again; it continues from the last committed shard",
            )
        for view, digest in enumerate(manifest.view_sha256):
            if (found := self._ledger.digest(view)) != digest:
                raise CacheDamaged(
                    f"the ledger of view {view} in {self.path} has sha256 {found}",
                    f"{digest}, as the manifest says",
                    "restore the cache from a copy, or dump again into another folder",
                )
