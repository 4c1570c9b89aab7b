"""Checking everything that a split holds, in parallel and without torch; finding what a repair must recompute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kdcache.core.errors import CacheDamaged, CacheIncomplete, KdcacheError
from kdcache.core.system import core_count
from kdcache.store.cache import check_complete
from kdcache.store.chunk_reader import ChunkReader, open_shard
from kdcache.store.layout import chunks_in_shard, shard_path
from kdcache.store.ledger import NAME as LEDGER
from kdcache.store.ledger import Ledger, create_arrays
from kdcache.store.manifest import METADATA, ArrayRecord, Manifest, read_manifest
from kdcache.store.shard_codec import ABSENT, CRC_BYTES, BadChunk, check_crc, chunk_stride, decode_index, index_bytes

Place = tuple[ArrayRecord, int, int]


@dataclass(kw_only=True)
class SplitReport:
    """What was found in one split.

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
    split_path: Path, *, threads: int | None = None, on_read: Callable[[int], None] | None = None
) -> SplitReport:
    """Check manifest, ledger, every byte of every committed shard, and the metadata that other Zarr readers go by.

    Args:
        threads: that read at the same time; None takes one a core.
        on_read: called with the bytes of each shard that was checked.
    """
    report = SplitReport()
    try:
        manifest = read_manifest(split_path)
        ledger = Ledger(split_path, manifest)
    except KdcacheError as problem:
        report.problems.append(problem.found)
        return report
    try:
        check_complete(split_path, manifest, ledger)
    except (CacheIncomplete, CacheDamaged) as problem:
        report.problems.append(f"{problem.found}; needed: {problem.needed}")
    reader = ChunkReader(split_path, manifest, ledger)
    places = committed_places(manifest, ledger)
    report.rows = manifest.dataset.length * manifest.readable_views
    report.shards = len({(view, shard) for _, view, shard in places})
    for place, damage in check_places(reader, places, threads=threads, on_read=on_read):
        if damage is None:
            report.bytes += ledger.lookup(*place)[0]
        else:
            report.problems.append(damage.found)
    report.problems += _metadata_problems(split_path, manifest)
    report.notes += _foreign_files(split_path, manifest, places)
    return report


def committed_places(manifest: Manifest, ledger: Ledger) -> list[Place]:
    """Every (array, view, shard) that the ledger names a file for."""
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
    """Check shards in parallel; each with what is wrong with it, or None."""

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
    """Check every byte of one shard's file.

    Raises:
        BadChunk: a byte is not as committed.
        StorageError: the disk refuses.
    """
    manifest = reader.manifest
    length, crcs = reader.ledger.lookup(array, view, shard)
    used = chunks_in_shard(manifest, array, shard)
    index = index_bytes(manifest, array)
    with open_shard(shard_path(reader.path, array, view if array.per_view else 0, shard), length) as descriptor:
        table = np.array([[0, length]], np.uint64)
        if index:
            table = decode_index(os.pread(descriptor, index, length - index))
            if (table[used:] != ABSENT).any():
                raise BadChunk("its index names chunks that it does not have")
        end = 0
        for position, (offset, size) in enumerate(table[:used].tolist()):
            if offset != end or (array.compression == "none" and size != chunk_stride(array)):
                raise BadChunk(f"its index places chunk {position} at {offset}, {size} bytes long")
            data = os.pread(descriptor, size, offset)
            if len(data) != size:
                raise BadChunk("its file ends early")
            # A view, because a copy of every chunk costs more than its checksum.
            check_crc(np.frombuffer(data, np.uint8, len(data) - CRC_BYTES), data[-CRC_BYTES:], int(crcs[position]))
            end = offset + size
        if end != length - index:
            raise BadChunk("its file holds bytes that no chunk names")


def _metadata_problems(split_path: Path, manifest: Manifest) -> list[str]:
    """Where the arrays' zarr.json differ from the manifest: kdcache reads by the manifest, other readers do not."""
    import zarr
    from zarr.storage import MemoryStore

    expected, before = (zarr.create_group(MemoryStore(), zarr_format=3) for _ in range(2))
    create_arrays(expected, manifest)
    # While views are being added, the arrays may have grown already or not yet.
    create_arrays(before, replace(manifest, views=manifest.readable_views))
    problems = []
    for name, array in sorted(expected.arrays()):
        path = split_path / name
        try:
            found = zarr.open_array(path, mode="r", zarr_format=3).metadata.to_dict()
        except Exception as problem:  # whatever zarr makes of a damaged file
            problems.append(f"{path / METADATA} cannot be read: {type(problem).__name__}: {problem}")
            continue
        wanted, earlier = array.metadata.to_dict(), before[name].metadata.to_dict()
        problems += [
            f"{path / METADATA}: {key} is {found.get(key)!r}; needed: {wanted[key]!r}"
            for key in wanted
            if key != "attributes" and repr(found.get(key)) not in (repr(wanted[key]), repr(earlier[key]))
        ]
    return problems


def _foreign_files(split_path: Path, manifest: Manifest, places: list[Place]) -> list[str]:
    known = {shard_path(split_path, array, view if array.per_view else 0, shard) for array, view, shard in places}
    return [
        f"{path} does not belong to the store"
        for path in sorted(split_path.rglob("*"))
        if path.is_file()
        and path not in known
        and path.name != METADATA
        and path.relative_to(split_path).parts[0] != LEDGER
    ]
