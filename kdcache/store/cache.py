"""Reading one split of a cache. Needs numpy, numcodecs and crc32c; no torch, no teacher and not even zarr.

Nothing is returned unchecked: manifest against its sha256, ledger against manifest, chunk against ledger.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.config import CACHE_DISK
from kdcache.core.errors import CacheDamaged, CacheIncomplete, CacheNotFound
from kdcache.core.specs import parse_bytes
from kdcache.store.chunk_cache import ChunkCache
from kdcache.store.chunk_reader import REPAIR, ChunkReader, sample_indices
from kdcache.store.constants import open_encoding
from kdcache.store.encodings.base import LOGITS
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import LocalPaths, read_local
from kdcache.store.manifest import Manifest, enclosing_cache, is_cache, read_manifest
from kdcache.store.row_source import ReadOptions, plan_reading
from kdcache.store.sampler import always, batches_of
from kdcache.store.storage.base import Storage
from kdcache.store.storage.registry import Location, StorageOptions, open_storage


def cache_splits(location: Location, *, storage_options: StorageOptions | None = None) -> list[str]:
    """Names of the splits in a cache, sorted.

    Args:
        location: A path, a URL, or an open storage.
        storage_options: Options of an object store, such as `endpoint` or `region`.

    Raises:
        CacheNotFound: there is no cache at the location.
    """
    root = open_storage(location, storage_options)
    if (cache := enclosing_cache(root)) is not None:
        raise CacheNotFound(
            f"no cache at {root.url}: it lies inside the cache {cache}", "the cache itself", f"give {cache}"
        )
    if not is_cache(root):
        found = "nothing is there" if root.is_empty() else "what is there is something else"
        raise CacheNotFound(
            f"no cache at {root.url}: {found}",
            "a folder written by dump-teacher",
            "check the path, or make one with kdcache dump-teacher --out PATH",
        )
    return [name for name in root.folders() if not name.startswith(".")]


def open_cache(
    location: Location,
    split: str = "train",
    *,
    allow_partial: bool = False,
    storage_options: StorageOptions | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_disk: str = CACHE_DISK,
) -> Cache:
    """Open one split of a cache for reading.

    Args:
        location: A path, a URL, or an open storage.
        allow_partial: Open a split whose dump has not finished, too; only its committed samples can be read.
        storage_options: Options of an object store, such as `endpoint` or `region`; never recorded.
        cache_dir: Local folder in which verified chunks are kept across epochs and runs; None keeps none.
        cache_disk: Size of all chunks in `cache_dir`, such as `100GiB`; the least recently used ones are removed.

    Raises:
        CacheNotFound: no cache there, or not this split.
        CacheIncomplete: its dump has not finished.
        CacheDamaged: manifest or ledger fail their checksums.
    """
    root = open_storage(location, storage_options)
    splits = cache_splits(root)
    if split not in splits:
        raise CacheNotFound(
            f"the cache {root.url} has no split {split!r}",
            f"one of {', '.join(splits) or '(none yet)'}",
            f"add it: the dump-teacher command that made the cache, with --split {split}",
        )
    kept = None if cache_dir is None else ChunkCache(Path(cache_dir).expanduser(), parse_bytes(cache_disk))
    return Cache(root, split, allow_partial=allow_partial, chunk_cache=kept)


class Cache:
    """One split of a cache: soft targets by sample index.

    May be used from several threads, and goes to forked and spawned processes, where it opens itself anew.

    Attributes:
        manifest: Provenance of the split.
        url: Where the cache is.
        place: Where the split is, for messages.
        local: Where its dataset was when it was dumped, as a hint.
        encoding: How its logits are stored.
        logit_arrays: Names of the arrays that hold its logits.
    """

    def __init__(
        self, root: Storage, split: str, *, allow_partial: bool = False, chunk_cache: ChunkCache | None = None
    ) -> None:
        storage = root.below(split)
        self._root, self.url, self.place = root, root.url, storage.url
        self.manifest: Manifest = read_manifest(root, split)
        self.local: LocalPaths = read_local(storage, self.manifest)
        self._partial = allow_partial and not self.manifest.complete
        ledger = Ledger(storage, self.manifest, views=self.manifest.readable_views)
        if not self._partial:
            check_complete(self.place, self.manifest, ledger)
        self.reader = ChunkReader(storage, self.manifest, ledger, chunk_cache)
        self.encoding = open_encoding(storage, self.manifest)
        self.logit_arrays = tuple(array.name for array in self.encoding.arrays())

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._root, self.manifest.dataset.split, self._partial, self.reader.chunk_cache)

    def __len__(self) -> int:
        """Number of samples."""
        return self.manifest.dataset.length

    @property
    def views(self) -> int:
        """Number of views of every sample that can be read."""
        return self.manifest.readable_views

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a logit's position is its class."""
        return self.manifest.dataset.classes

    @property
    def complete(self) -> bool:
        """Whether every row is there; only a cache opened with `allow_partial` may lack some."""
        return not self._partial

    def samples(self, view: int = 0) -> NDArray[np.int64]:
        """Indices of the samples that can be read, (n,), ascending: all of them, unless the cache is partial."""
        if not 0 <= view < self.views:
            raise IndexError(f"view is {view}; the cache has {self.views}")
        if not self._partial:
            return np.arange(len(self))
        shards = np.flatnonzero(self.reader.ledger.committed(view))
        return np.concatenate([np.empty(0, np.int64), *(np.array(self.manifest.rows_of(int(s))) for s in shards)])

    def epoch(
        self,
        epoch: int = 0,
        *,
        batch_size: int = 256,
        seed: int = 0,
        view: int = 0,
        temperature: float | None = None,
        options: ReadOptions | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """The samples of one epoch in shuffled order, each exactly once; the same order everywhere for the same seed.

        Args:
            temperature: As for `rows`.
            options: Memory budget, row source and shuffle.

        Yields:
            Sample indices (batch,) and their soft targets (batch, classes).

        Raises:
            ValueError: the batch size is not positive.
            CacheDamaged: a chunk fails its checksum.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        part = self.reader, self.logit_arrays
        plan = plan_reading([part], options or ReadOptions())
        sampler = plan.sampler(self.samples(view), seed)
        source = plan.source(part, always(view), sampler)
        source.start_epoch(epoch)
        for indices in batches_of(sampler, epoch, batch_size):
            yield indices, self.encoding.decode(source.rows(indices), temperature=temperature)

    def rows(
        self,
        indices: Sequence[int] | NDArray[np.integer[Any]],
        view: int = 0,
        *,
        temperature: float | None = None,
    ) -> NDArray[Any]:
        """Soft targets of some samples: the teacher's logits, as exact as the encoding keeps them.

        Args:
            indices: Sample indices, (n,), in any order, repeats allowed.
            temperature: Temperature that a top-k cache's logits are to be exact for; None takes 1, or the lowest.

        Returns:
            (n, classes), in the order of `indices`; of a float encoding in its own dtype.

        Raises:
            IndexError: an index or the view is out of range.
            TypeError: the indices are not integers in one dimension.
            CacheDamaged: a chunk fails its checksum.
        """
        wanted = sample_indices(indices)
        encoded = {name: self.reader.rows(name, view, wanted) for name in self.logit_arrays}
        return self._decode(encoded, temperature)

    def column(self, name: str, view: int = 0) -> NDArray[Any]:
        """One whole array of one view, such as `labels` or `input_crc32c`, (samples, *row_shape), or the `logits`.

        Raises:
            CacheIncomplete: the cache is partial.
            KeyError: the cache does not hold it.
            CacheDamaged: a chunk fails its checksum.
        """
        if self._partial:
            check_complete(self.place, self.manifest, self.reader.ledger)
        everything = range(len(self))
        if name == LOGITS:
            return self._decode({each: self.reader.span(each, view, everything) for each in self.logit_arrays})
        return self.reader.span(name, view, everything)

    def _decode(self, rows: dict[str, NDArray[Any]], temperature: float | None = None) -> NDArray[Any]:
        logits: NDArray[Any] = self.encoding.decode(rows, temperature=temperature)
        return logits


def _reopen(root: Storage, split: str, allow_partial: bool, chunk_cache: ChunkCache | None) -> Cache:
    return Cache(root, split, allow_partial=allow_partial, chunk_cache=chunk_cache)


def check_complete(place: str, manifest: Manifest, ledger: Ledger) -> None:
    """Refuse a split that lacks rows, or whose ledger does not have the digests of the manifest.

    Raises:
        CacheIncomplete: its dump has not finished.
        CacheDamaged: the ledger's digest is another.
    """
    if not manifest.complete:
        done = sum(int(ledger.committed(view).sum()) for view in range(manifest.readable_views))
        raise CacheIncomplete(
            f"{place} is incomplete: {done} of {manifest.shards * manifest.views} shards are committed",
            "a finished dump",
            "run the same dump-teacher command again, which continues it; or give --allow-partial to use what is there",
        )
    for view, digest in enumerate(manifest.view_sha256):
        if (found := ledger.digest(view)) != digest:
            raise CacheDamaged(
                f"the ledger of view {view} in {place} has sha256 {found}",
                f"{digest}, as the manifest says",
                REPAIR,
            )
