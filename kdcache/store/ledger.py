"""Which shards are committed, and the checksums of what they hold. What the ledger does not name does not exist.

The ledger is a Zarr array of its own: `ledger`, (view, shard, column), uint64, little-endian, crc32c behind each chunk.
The columns of one entry are, for each of the manifest's arrays in order, the length of the shard's file in bytes and
the crc32c of each of its chunks. An entry whose first length is 0 is not committed. One chunk holds up to 256 entries
of one view and is replaced as a whole.

While a split is being written, its entries are objects of their own (`ledger_parts`), so that several workers commit
without a lock; they are folded into the array when the split is sealed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from kdcache.core.errors import CacheDamaged
from kdcache.store.facts import zarr_facts_options
from kdcache.store.layout import chunks_per_shard, zarr_array_options, zarr_constant_options
from kdcache.store.ledger_parts import Entry, Part, has_part, list_parts, read_part, write_part
from kdcache.store.manifest import METADATA, Manifest
from kdcache.store.records import ArrayRecord
from kdcache.store.shard_codec import CRC_BYTES
from kdcache.store.storage.base import MissingKey, Storage

NAME = "ledger"
BLOCK_SHARDS = 256


class Ledger:
    """The ledger of one split, held in memory; every commit goes to disk before the call returns.

    Args:
        storage: The split's part of the storage.
        salvage: take a damaged part as empty instead of raising, and name it in `damaged`.
        views: how many are looked at; None takes all, those included that are being added.

    Attributes:
        damaged: (view, block) of the parts that could not be read.
        suspended: entries of shards that are to be computed again, by (view, shard). They stay on disk until the shard
            is committed, because their checksums tell what must come out.
        unproved: views whose entries are not those of the manifest's digest; they are not saved by a commit.
        parts: of the split while it is being written, by (view, shard).

    Raises:
        CacheDamaged: a ledger file fails its checksum or has the wrong length.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, *, salvage: bool = False, views: int | None = None
    ) -> None:
        self._storage = storage
        self._manifest = manifest
        self._salvage = salvage
        self.parts: dict[tuple[int, int], Part] = {}
        self.damaged: list[tuple[int, int]] = []
        self.suspended: dict[tuple[int, int], NDArray[np.uint64]] = {}
        self.unproved: set[int] = set()
        self._columns: dict[str, tuple[int, int]] = {}
        width = 0
        for array in manifest.arrays:
            self._columns[array.name] = (width, width + 1 + chunks_per_shard(manifest, array))
            width = self._columns[array.name][1]
        self._block = min(manifest.shards, BLOCK_SHARDS)
        blocks = -(-manifest.shards // self._block)
        views = manifest.views if views is None else views
        self._entries = np.zeros((views, blocks * self._block, width), "<u8")
        # Before the blocks, because a worker that seals the split writes these first and removes the parts last.
        parts = self._new_parts() if views > len(manifest.view_sha256) else {}
        for view in range(views):
            for block in range(blocks):
                try:
                    self._load(view, block)
                except CacheDamaged:
                    if not salvage:
                        raise
                    self.damaged.append((view, block))
        self._add(parts)

    def refresh(self) -> None:
        """Read the entries that other workers have added since."""
        self._add(self._new_parts())

    def _new_parts(self) -> dict[tuple[int, int], Part]:
        new = [
            unit
            for unit in list_parts(self._storage)
            if unit not in self.parts and unit[0] < len(self._entries) and unit[1] < self._manifest.shards
        ]
        with ThreadPoolExecutor(self._storage.in_flight) as pool:
            found = zip(new, pool.map(self._read_part, new), strict=True)
            return {unit: part for unit, part in found if part is not None}

    def _add(self, parts: Mapping[tuple[int, int], Part]) -> None:
        self.parts |= parts
        for unit, part in parts.items():
            if unit not in self.suspended:
                self.set(*unit, part.entry)

    def _read_part(self, unit: tuple[int, int]) -> Part | None:
        try:
            return read_part(self._storage, unit)
        except MissingKey:
            return None  # the split is being sealed by another worker
        except CacheDamaged:
            if not self._salvage:
                raise
            self.damaged.append((unit[0], unit[1] // self._block))
            return None

    @staticmethod
    def zarr_array_options(manifest: Manifest) -> dict[str, Any]:
        """Arguments of `zarr.Group.create_array` for the ledger."""
        from zarr.codecs import Crc32cCodec

        width = sum(1 + chunks_per_shard(manifest, array) for array in manifest.arrays)
        return {
            "name": NAME,
            "shape": (manifest.views, manifest.shards, width),
            "dtype": "uint64",
            "chunks": (1, min(manifest.shards, BLOCK_SHARDS), width),
            "compressors": [Crc32cCodec()],
            "fill_value": 0,
            "dimension_names": ["view", "shard", "column"],
        }

    @property
    def entries(self) -> NDArray[np.uint64]:
        """(views, shards, columns), uint64."""
        return self._entries[:, : self._manifest.shards]

    def committed(self, view: int) -> NDArray[np.bool_]:
        """(shards,): which shards of a view are committed."""
        return np.asarray(self.entries[view, :, 0] != 0)

    def lookup(self, array: ArrayRecord, view: int, shard: int) -> tuple[int, NDArray[np.uint64]]:
        """Bytes of the shard's file and the crc32c of each of its chunks."""
        start, stop = self._columns[array.name]
        entry = self.entries[view if array.per_view else 0, shard, start:stop]
        return int(entry[0]), entry[1:]

    def digest(self, view: int) -> str:
        """sha256 of a view's entries."""
        return hashlib.sha256(self.entries[view].tobytes()).hexdigest()

    def is_committed(self, view: int, shard: int) -> bool:
        """Whether a shard is committed, by this process or meanwhile by another worker."""
        return bool(self._entries[view, shard, 0]) or has_part(self._storage, (view, shard))

    def commit(
        self,
        view: int,
        shard: int,
        entry: Entry,
        *,
        session: str = "",
        worker: str = "",
        compute: dict[str, str] | None = None,
    ) -> None:
        """Record a shard whose data is already durable.

        Args:
            session: Process that commits it.
            worker: Its number and that of all workers.
            compute: Device that computed it, and its settings.
        """
        before, suspended = self._entries[view, shard].copy(), self.suspended.pop((view, shard), None)
        try:
            self.set(view, shard, entry)
            if view >= len(self._manifest.view_sha256):
                at = round(time.time(), 3)
                part = Part(entry=entry, session=session, worker=worker, at=at, compute=compute or {})
                write_part(self._storage, (view, shard), part)
                self.parts[view, shard] = part
            elif view not in self.unproved:
                self._save_block(view, shard // self._block)
        except BaseException:
            self._entries[view, shard] = before
            if suspended is not None:
                self.suspended[view, shard] = suspended
            raise

    def suspend(self, view: int, shard: int) -> None:
        """Take a shard for not committed, in memory only."""
        if view not in self.unproved and self._entries[view, shard].any():
            self.suspended[view, shard] = self._entries[view, shard].copy()
        self._entries[view, shard] = 0

    def suspended_entry(self, array: ArrayRecord, view: int, shard: int) -> tuple[int, list[int]] | None:
        """What was committed of a suspended shard: length and checksums; None where nothing is known."""
        if (entry := self.suspended.get((view, shard))) is None:
            return None
        start, stop = self._columns[array.name]
        return int(entry[start]), entry[start + 1 : stop].tolist()

    def set(self, view: int, shard: int, entry: Entry) -> None:
        """Enter a shard in memory only."""
        for name, (length, crcs) in entry.items():
            start, stop = self._columns[name]
            self._entries[view, shard, start:stop] = [length, *crcs]

    def save(self, view: int) -> None:
        """Put all entries of a view to disk."""
        for block in range(self._entries.shape[1] // self._block):
            self._save_block(view, block)

    def _save_block(self, view: int, block: int) -> None:
        entries = self._entries[view, block * self._block : (block + 1) * self._block].copy()
        for (of_view, shard), entry in self.suspended.items():
            if of_view == view and shard // self._block == block:
                entries[shard % self._block] = entry
        payload = entries.tobytes()
        self._storage.write(_key(view, block), payload + crc32c(payload).to_bytes(CRC_BYTES, "little"))

    def _load(self, view: int, block: int) -> None:
        try:
            data = self._storage.read(_key(view, block))
        except MissingKey:
            return
        target = self._entries[view, block * self._block : (block + 1) * self._block]
        payload, stored = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if len(payload) != target.nbytes or crc32c(payload).to_bytes(CRC_BYTES, "little") != stored:
            raise CacheDamaged(
                f"the ledger file {self._storage.place(_key(view, block))} is damaged",
                f"{target.nbytes + CRC_BYTES} bytes that match their crc32c",
                "run the dump-teacher command that made it with --repair, or restore the file from a copy",
            )
        target[:] = np.frombuffer(payload, "<u8").reshape(target.shape)


def _key(view: int, block: int) -> str:
    return f"{NAME}/c/{view}/{block}/0"


def create_arrays(group: Any, manifest: Manifest) -> None:
    """Create a split's arrays and its ledger, without data, in a zarr group."""
    for array in manifest.arrays:
        group.create_array(**zarr_array_options(manifest, array))
    for constant in manifest.constants:
        group.create_array(**zarr_constant_options(constant))
    if manifest.facts:
        group.create_array(**zarr_facts_options(manifest))
    group.create_array(**Ledger.zarr_array_options(manifest))


def array_metadata(manifest: Manifest) -> dict[str, bytes]:
    """The Zarr metadata of a split's arrays and of its ledger, by path within the split."""
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    create_arrays(zarr.create_group(MemoryStore(files), zarr_format=3), manifest)
    return {path: buffer.to_bytes() for path, buffer in files.items() if path != METADATA}
