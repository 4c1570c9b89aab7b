"""Constants of an encoding: arrays that are stored once per split, each as one chunk with its checksum."""

from __future__ import annotations

from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from kdcache.core.errors import CacheDamaged
from kdcache.store.chunk_reader import REPAIR
from kdcache.store.encodings.base import Encoding
from kdcache.store.encodings.registry import encoding_of
from kdcache.store.layout import constant_key
from kdcache.store.manifest import Manifest
from kdcache.store.records import ConstantRecord
from kdcache.store.shard_codec import CRC_BYTES
from kdcache.store.storage.base import MissingKey, Storage


def constant_records(encoding: Encoding) -> tuple[ConstantRecord, ...]:
    """Records of an encoding's constants for a manifest."""
    return tuple(
        ConstantRecord(name=name, dtype=values.dtype.name, shape=values.shape, crc32c=crc32c(_bytes(values)))
        for name, values in encoding.constants().items()
    )


def write_constants(storage: Storage, manifest: Manifest, encoding: Encoding) -> list[str]:
    """Store the constants of a split that are missing or damaged; their keys."""
    written = []
    for record in manifest.constants:
        if _stored(storage, record) is None:
            payload = _bytes(encoding.constants()[record.name])
            storage.write(constant_key(record), payload + crc32c(payload).to_bytes(CRC_BYTES, "little"))
            written.append(constant_key(record))
    return written


def damaged_constants(storage: Storage, manifest: Manifest) -> list[str]:
    """Keys of the constants that are missing or damaged."""
    return [constant_key(record) for record in manifest.constants if _stored(storage, record) is None]


def open_encoding(storage: Storage, manifest: Manifest) -> Encoding:
    """The encoding of a cache split, with its constants.

    Args:
        storage: The split's part of the storage.

    Raises:
        CacheDamaged: a constant is missing or damaged.
    """
    values: dict[str, NDArray[Any]] = {}
    for record in manifest.constants:
        if (found := _stored(storage, record)) is None:
            place = storage.place(constant_key(record))
            raise CacheDamaged(f"{place} is missing or damaged", f"{record.name}, as the manifest says", REPAIR)
        values[record.name] = found
    encoding = encoding_of(manifest)
    return encoding.with_constants(values) if values else encoding


def _stored(storage: Storage, record: ConstantRecord) -> NDArray[Any] | None:
    """A stored constant; None where it is missing or damaged."""
    try:
        data = storage.read(constant_key(record))
    except MissingKey:
        return None
    payload, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    if crc32c(payload) != record.crc32c or stored != record.crc32c:
        return None
    return np.frombuffer(payload, np.dtype(record.dtype).newbyteorder("<")).reshape(record.shape)


def _bytes(values: NDArray[Any]) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
