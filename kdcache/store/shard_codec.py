"""The bytes of one shard, as Zarr's format 3 lays them out: chunks, each followed by its crc32c, then their index.

Written here rather than by zarr because the ledger needs each chunk's checksum as it left memory, and a shard must be
flushed before it is committed. The tests read every layout back with zarr.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs.blosc import SHUFFLE, Blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from kdcache.store.layout import chunks_per_shard, fill_value, is_sharded, row_bytes, zstd_level
from kdcache.store.manifest import Manifest
from kdcache.store.records import ArrayRecord

CRC_BYTES = 4
ABSENT = 2**64 - 1
# Of Blosc. In its own choice of 128 KiB blocks and less, logits take up to 8 % more room and up to 2.5 times as long to
# decode. Readers take it from the data, so the array's metadata leaves it to the writer.
BLOCK_BYTES = 1 << 20


class BadChunk(Exception):
    """A chunk's bytes are not the committed ones; the reader says which shard and what to do."""


def encode_shard(manifest: Manifest, array: ArrayRecord, values: NDArray[Any]) -> tuple[bytes, list[int]]:
    """The file of one shard and the crc32c of each of its chunks, as many as a full shard has (0 where there is none).

    Args:
        values: the shard's rows, (rows, *row_shape), in the array's dtype; fewer than `shard_rows` in the last shard.
    """
    level = zstd_level(array.compression)
    parts: list[bytes] = []
    index = np.full((chunks_per_shard(manifest, array), 2), ABSENT, "<u8")
    crcs = [0] * len(index)
    offset = 0
    for chunk, start in enumerate(range(0, len(values), array.chunk_rows)):
        rows = values[start : start + array.chunk_rows]
        if len(rows) < array.chunk_rows:
            padding = np.full((array.chunk_rows - len(rows), *array.row_shape), fill_value(array.dtype), array.dtype)
            rows = np.concatenate([rows, padding])
        rows = np.ascontiguousarray(rows, stored_dtype(array))
        blosc = Blosc(cname="zstd", clevel=level or 0, shuffle=SHUFFLE, blocksize=BLOCK_BYTES)
        payload = rows.tobytes() if level is None else bytes(blosc.encode(rows))
        crcs[chunk] = crc32c(payload)
        parts += [payload, crcs[chunk].to_bytes(CRC_BYTES, "little")]
        index[chunk] = offset, len(payload) + CRC_BYTES
        offset += len(payload) + CRC_BYTES
    if is_sharded(manifest, array):
        parts += [index.tobytes(), crc32c(index.tobytes()).to_bytes(CRC_BYTES, "little")]
    return b"".join(parts), crcs


def index_bytes(manifest: Manifest, array: ArrayRecord) -> int:
    """Bytes of the index at the end of a shard; 0 where a shard is one plain chunk."""
    return 16 * chunks_per_shard(manifest, array) + CRC_BYTES if is_sharded(manifest, array) else 0


def chunk_stride(array: ArrayRecord) -> int:
    """Bytes from one uncompressed chunk to the next."""
    return array.chunk_rows * row_bytes(array.dtype, array.row_shape) + CRC_BYTES


def decode_index(index: bytes) -> NDArray[np.uint64]:
    """(chunks, 2) offsets and lengths.

    Raises:
        BadChunk: the index does not match its own crc32c.
    """
    table, stored = index[:-CRC_BYTES], int.from_bytes(index[-CRC_BYTES:], "little")
    if crc32c(table) != stored:
        raise BadChunk("the index fails its crc32c")
    return np.frombuffer(table, "<u8").reshape(-1, 2)


def check_crc(payload: bytes | NDArray[Any], stored: bytes, committed: int) -> None:
    """Compare a chunk's bytes with the crc32c that follows them and with the ledger's.

    Raises:
        BadChunk: they differ.
    """
    data = payload if isinstance(payload, bytes) else payload.data
    found, beside = crc32c(data), int.from_bytes(stored, "little")
    if not found == beside == committed:
        raise BadChunk(f"crc32c is {found:#010x}, stored beside it {beside:#010x}, in the ledger {committed:#010x}")


def stored_dtype(array: ArrayRecord) -> np.dtype[Any]:
    """The dtype of the bytes on disk: little-endian."""
    return np.dtype(array.dtype).newbyteorder("<")
