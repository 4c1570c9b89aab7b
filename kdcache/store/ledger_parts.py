"""Parts of a ledger that is being written: one object per committed shard, `ledger/unsealed/parts/VIEW/SHARD`.

Workers on several machines cannot safely rewrite one ledger. Each one adds the entries of its shards as parts, and
sealing the split merges the parts into the ledger.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from kdcache.core.errors import CacheDamaged
from kdcache.core.json_records import canonical_json
from kdcache.store.claims import UNSEALED, Unit
from kdcache.store.storage.base import KeyExists, MissingKey, Storage

PARTS = f"{UNSEALED}/parts"

# For each array, the length of a shard's file and the crc32c of each of its chunks.
Entry = dict[str, tuple[int, list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The ledger's entry of one shard, and how it came about.

    Attributes:
        entry: For each array, the length of the shard's file and the crc32c of each of its chunks.
        session: Unique name of the process that committed it.
        worker: Index of that worker and number of workers, as `3/32`; empty if the work was not divided.
        at: Time of the commit, in seconds since 1970, UTC.
        compute: Device that computed it, and its settings, as in the manifest.
    """

    entry: Entry
    session: str
    worker: str
    at: float
    compute: dict[str, str]


def list_parts(storage: Storage) -> list[Unit]:
    """The (view, shard) pairs that have a part."""
    units = []
    for key, _ in storage.objects(PARTS):
        view, shard = key.removeprefix(f"{PARTS}/").split("/")
        units.append((int(view), int(shard)))
    return units


def read_part(storage: Storage, unit: Unit) -> Part:
    """The part of one shard.

    Raises:
        MissingKey: there is none.
        CacheDamaged: it is damaged.
    """
    data = storage.read(_key(unit))
    try:
        document = json.loads(data)
        part = document["part"]
        if crc32c(canonical_json(part)) != document["crc32c"]:
            raise ValueError("its crc32c is another")
        entry = {name: (int(length), list(map(int, crcs))) for name, (length, crcs) in part["entry"].items()}
        return Part(entry=entry, **{name: part[name] for name in ("session", "worker", "at", "compute")})
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CacheDamaged(
            f"the ledger file {storage.place(_key(unit))} is damaged: {problem}",
            "JSON that matches its crc32c",
            "run the dump-teacher command that made it with --repair, or restore the file from a copy",
        ) from problem


def write_part(storage: Storage, unit: Unit, part: Part) -> None:
    """Add the part of a shard whose data are durable. Of several workers that do so, one succeeds, the others agree.

    Where another worker has committed other bytes, which two devices of one kind do not compute, the last to write the
    data must have its checksums in the ledger, and that is this process.
    """
    data = _bytes(part)
    try:
        storage.create(_key(unit), data)
    except KeyExists:
        try:
            if read_part(storage, unit).entry == part.entry:
                return
        except (MissingKey, CacheDamaged):
            pass  # replaced by a whole one
        storage.write(_key(unit), data)


def has_part(storage: Storage, unit: Unit) -> bool:
    """Whether a shard has been committed, by this or another worker."""
    try:
        return storage.size(_key(unit)) > 0
    except MissingKey:
        return False


def _bytes(part: Part) -> bytes:
    body: dict[str, Any] = {
        "entry": {name: [length, crcs] for name, (length, crcs) in part.entry.items()},
        "session": part.session,
        "worker": part.worker,
        "at": part.at,
        "compute": part.compute,
    }
    return json.dumps({"part": body, "crc32c": crc32c(canonical_json(body))}).encode()


def _key(unit: Unit) -> str:
    return f"{PARTS}/{unit[0]}/{unit[1]}"
