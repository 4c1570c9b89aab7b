"""Preparation of a repair: which shards must be recomputed, and which ledgers can be rebuilt and proved."""

from __future__ import annotations

import contextlib

from kdcache.core.errors import StorageError
from kdcache.core.json_records import counted
from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.layout import chunks_in_shard, chunks_per_shard, shard_key
from kdcache.store.records import ArrayRecord
from kdcache.store.shard_codec import CRC_BYTES, BadChunk, chunk_stride, decode_index, index_bytes
from kdcache.store.storage.base import MissingKey
from kdcache.store.verify import check_places, committed_places, damaged_facts
from kdcache.store.writer import SplitWriter


def prepare_repair(writer: SplitWriter) -> list[str]:
    """Mark every damaged shard as pending. Returns the findings as text; writes nothing but ledgers that are proved.

    Where the ledger of a finished view is not the one of the manifest's digest, it is rebuilt from the checksums in the
    shards' own files. If that does not prove it, its entries are believed until all is computed, and then either have
    the digest or are refused; with `accept_new_bytes` the whole view is computed again.
    """
    manifest, ledger = writer.manifest, writer.ledger
    found = list(writer.restored)
    reader = ChunkReader(writer.storage, manifest, ledger)
    if writer.proof_needed:
        found.append("the manifest is damaged; it is written again if its sha256 or what it says proves it")
    for view in writer.new_digests():
        _rebuild(reader, view)
        if view in writer.new_digests():
            ledger.unproved.add(view)
            found.append(f"the ledger of view {view} is damaged, and so are shards of it")
        else:
            ledger.save(view)
            found.append(f"the ledger of view {view} was damaged; rebuilt from the shards and proved by the manifest")
    for view in sorted({view for view, _ in ledger.damaged if view >= len(manifest.view_sha256)}):
        found.append(f"the ledger of view {view} is damaged; its shards are computed again")
    broken: set[tuple[int, int]] = set()
    for (_, view, shard), problem in check_places(reader, committed_places(manifest, ledger)):
        if problem is not None:
            found.append(problem.found)
            broken.add((view, shard))
    for view, shard in damaged_facts(writer.storage, manifest, ledger):
        found.append(f"the facts about shard {shard} of view {view} are missing or damaged")
        broken.add((view, shard))
    if broken or writer.pending():
        writer.check_proved()
    missing = [place for place in writer.pending() if place not in broken]
    if missing and manifest.complete:
        found.append(f"{counted(len(missing), 'shard')} not in the ledger")
    if writer.policy.accept_new_bytes:
        broken |= {(view, shard) for view in ledger.unproved for shard in range(manifest.shards)}
    for view, shard in sorted(broken):
        ledger.suspend(view, shard)
    return found


def _rebuild(reader: ChunkReader, view: int) -> None:
    """Rebuild a view's ledger entries in memory from the checksums in its shards."""
    manifest, ledger = reader.manifest, reader.ledger
    for shard in range(manifest.shards):
        with contextlib.suppress(BadChunk, MissingKey, StorageError):
            entry = {
                array.name: _describe(reader, array, view, shard)
                for array in manifest.arrays
                if array.per_view or view == 0
            }
            ledger.set(view, shard, entry)


def _describe(reader: ChunkReader, array: ArrayRecord, view: int, shard: int) -> tuple[int, list[int]]:
    """Ledger entry of a shard, read from the shard: its length, and the crc32c after each chunk."""
    manifest = reader.manifest
    data = reader.storage.read(shard_key(array, view, shard))
    ends = [len(data)]
    if index := index_bytes(manifest, array):
        table = decode_index(data[len(data) - index :])[: chunks_in_shard(manifest, array, shard)]
        ends = [int(offset + size) for offset, size in table]
    elif array.compression == "none" and len(data) != chunk_stride(array):
        raise BadChunk(f"its file has {len(data)} bytes")
    crcs = [int.from_bytes(data[end - CRC_BYTES : end], "little") for end in ends]
    return len(data), crcs + [0] * (chunks_per_shard(manifest, array) - len(crcs))
