"""Verification of a split: manifest, ledger, every byte, and the Zarr metadata; in parallel and without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from kdcache.core.errors import CacheDamaged, CacheIncomplete, KdcacheError
from kdcache.core.system import core_count
from kdcache.store.cache import check_complete
from kdcache.store.chunk_reader import ChunkReader, Place
from kdcache.store.constants import damaged_constants
from kdcache.store.facts import facts_key, read_facts
from kdcache.store.layout import chunks_in_shard, constant_key, shard_key
from kdcache.store.ledger import NAME as LEDGER
from kdcache.store.ledger import Ledger, create_arrays
from kdcache.store.manifest import METADATA, Manifest, read_manifest
from kdcache.store.records import ArrayRecord
from kdcache.store.shard_codec import ABSENT, CRC_BYTES, BadChunk, check_crc, chunk_stride, index_bytes
from kdcache.store.storage.base import Storage


@dataclass(kw_only=True)
class SplitReport:
    """Result of the verification of one split.

    Attributes:
        problems: every damage, as text that names array, view, shard and samples; empty for a split that is whole.
        notes: what is not damage, such as files that do not belong to the store.
        bytes: that were read and checked.
    """

    rows: int = 0
    shards: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_split(
    root: Storage, split: str, *, threads: int | None = None, on_read: Callable[[int], None] | None = None
) -> SplitReport:
    """Check manifest, ledger, every byte of every committed shard, and the Zarr metadata.

    Args:
        threads: Number of threads; None for one per core.
        on_read: Called with the bytes of each shard that was checked.
    """
    report, storage = SplitReport(), root.below(split)
    try:
        manifest = read_manifest(root, split)
        ledger = Ledger(storage, manifest)
    except KdcacheError as problem:
        report.problems.append(problem.found)
        return report
    try:
        check_complete(storage.url, manifest, ledger)
    except (CacheIncomplete, CacheDamaged) as problem:
        report.problems.append(f"{problem.found}; needed: {problem.needed}")
    reader = ChunkReader(storage, manifest, ledger)
    places = committed_places(manifest, ledger)
    report.rows = manifest.dataset.length * manifest.readable_views
    report.shards = len({(view, shard) for _, view, shard in places})
    for place, damage in check_places(reader, places, threads=threads, on_read=on_read):
        if damage is None:
            report.bytes += ledger.lookup(*place)[0]
        else:
            report.problems.append(damage.found)
    report.problems += [f"{storage.place(key)} is missing or damaged" for key in damaged_constants(storage, manifest)]
    report.problems += [
        f"the facts about shard {shard} of view {view} in {storage.url} are missing or damaged"
        for view, shard in damaged_facts(storage, manifest, ledger)
    ]
    report.problems += _metadata_problems(storage, manifest)
    report.notes += _foreign_objects(storage, manifest, places)
    return report


def committed_places(manifest: Manifest, ledger: Ledger) -> list[Place]:
    """Every committed (array, view, shard)."""
    return [
        (array, view, int(shard))
        for view in range(manifest.views)
        for shard in np.flatnonzero(ledger.committed(view))
        for array in manifest.arrays
        if array.per_view or view == 0
    ]


def check_places(
    reader: ChunkReader,
    places: Iterable[Place],
    *,
    threads: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Iterable[tuple[Place, CacheDamaged | None]]:
    """Check shards in parallel; yields each with its error, or None."""

    def check(place: Place) -> tuple[Place, CacheDamaged | None]:
        try:
            check_shard(reader, *place)
        except BadChunk as problem:
            return place, reader.damage(*place, problem)
        return place, None

    with ThreadPoolExecutor(threads or core_count()) as pool:
        for place, problem in pool.map(check, places):
            if on_read is not None:
                on_read(reader.ledger.lookup(*place)[0])
            yield place, problem


def check_shard(reader: ChunkReader, array: ArrayRecord, view: int, shard: int) -> None:
    """Check every byte of one shard.

    Raises:
        BadChunk: a byte is not as committed.
        StorageError: the storage refuses.
    """
    place, manifest = (array, view, shard), reader.manifest
    length, crcs = reader.ledger.lookup(*place)
    used, index = chunks_in_shard(manifest, array, shard), index_bytes(manifest, array)
    table = reader.shard_index(place)
    if (table[used:] != ABSENT).any():
        raise BadChunk("its index names chunks that it does not have")
    end = 0
    for position, (offset, size) in enumerate(table[:used].tolist()):
        if offset != end or (array.compression == "none" and size != chunk_stride(array)):
            raise BadChunk(f"its index places chunk {position} at {offset}, {size} bytes long")
        if not CRC_BYTES <= size <= length - index - offset:
            raise BadChunk(f"its index places chunk {position} outside the file")
        data = bytearray(size)
        reader.shard_range(place, offset, memoryview(data))
        # A view, because a copy of every chunk costs more than its checksum.
        check_crc(np.frombuffer(data, np.uint8, size - CRC_BYTES), bytes(data[-CRC_BYTES:]), int(crcs[position]))
        end = offset + size
    if end != length - index:
        raise BadChunk("its file holds bytes that no chunk names")


def _metadata_problems(storage: Storage, manifest: Manifest) -> list[str]:
    """Differences between the arrays' zarr.json, which other Zarr readers use, and the manifest."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    expected, before = (zarr.create_group(MemoryStore(), zarr_format=3) for _ in range(2))
    create_arrays(expected, manifest)
    # While views are being added, the arrays may have grown already or not yet.
    create_arrays(before, replace(manifest, views=manifest.readable_views))
    to_buffer = default_buffer_prototype().buffer.from_bytes
    problems = []
    for name, array in sorted(expected.arrays()):
        key = f"{name}/{METADATA}"
        try:
            store = MemoryStore({METADATA: to_buffer(storage.read(key))})
            found = zarr.open_array(store, mode="r", zarr_format=3).metadata.to_dict()
        except Exception as problem:  # whatever zarr makes of damaged metadata
            problems.append(f"{storage.place(key)} cannot be read: {type(problem).__name__}: {problem}")
            continue
        wanted, earlier = array.metadata.to_dict(), before[name].metadata.to_dict()
        problems += [
            f"{storage.place(key)}: {field} is {found.get(field)!r}; needed: {wanted[field]!r}"
            for field in wanted
            if field != "attributes" and repr(found.get(field)) not in (repr(wanted[field]), repr(earlier[field]))
        ]
    return problems


def damaged_facts(storage: Storage, manifest: Manifest, ledger: Ledger) -> list[tuple[int, int]]:
    """Committed (view, shard) whose facts are missing or damaged; none in caches without facts."""
    if not manifest.facts:
        return []
    return [
        (view, int(shard))
        for view in range(manifest.views)
        for shard in np.flatnonzero(ledger.committed(view))
        if read_facts(storage, manifest, view, int(shard)) is None
    ]


def _foreign_objects(storage: Storage, manifest: Manifest, places: list[Place]) -> list[str]:
    known = {shard_key(array, view if array.per_view else 0, shard) for array, view, shard in places}
    known |= {constant_key(constant) for constant in manifest.constants}
    known |= {facts_key(view, shard) for _, view, shard in places if manifest.facts}
    return [
        f"{storage.place(key)} does not belong to the store"
        for key, _ in storage.objects()
        if key not in known and key.rpartition("/")[2] != METADATA and not key.startswith(f"{LEDGER}/")
    ]
