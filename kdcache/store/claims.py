"""Claims of shards by the workers of a dump: no two compute the same one, and none is left by a worker that died.

Below `ledger/unsealed` of a split, until it is sealed:

- `workers/SESSION`: one record per running worker, rewritten every `HEARTBEAT_S`;
- `claims/VIEW/SHARD/NUMBER`: names the worker that computes a shard. A claim is created exclusively and never changed.
  If its worker is gone, another worker claims the shard under the next number.

Claims only save work. Two workers that compute one shard do no harm: its data are equal, and its part of the ledger is
created exclusively.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kdcache.core.errors import CacheDamaged, StorageError
from kdcache.core.json_records import from_json, to_json
from kdcache.core.progress import log
from kdcache.core.system import is_alive, machine_name
from kdcache.core.workers import Worker
from kdcache.store.storage.base import KeyExists, MissingKey, Storage

UNSEALED = "ledger/unsealed"
WORKERS, CLAIMS = f"{UNSEALED}/workers", f"{UNSEALED}/claims"
HEARTBEAT_S = 20.0
# A worker that has not been heard of for so long is gone: long enough for a machine that swaps or a slow file system,
# and for clocks that differ.
STALE_S = 120.0

Unit = tuple[int, int]  # (view, shard)
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A worker that is running, or was stopped before it could remove its record.

    Attributes:
        session: Unique name of the process.
        worker: Index of the worker and number of workers, as `3/32`.
        machine: Host name.
        process: Process ID on that host.
        device: Kind of device.
        started: Start time, in seconds since 1970, UTC.
        heard: Time of the last heartbeat, in seconds since 1970, UTC.
    """

    session: str
    worker: str
    machine: str
    process: int
    device: str
    started: float
    heard: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRecord:
    """The worker that computes a shard, and when it claimed the shard."""

    session: str
    machine: str
    process: int
    at: float


@dataclass(kw_only=True)
class _Seen:
    heard: float
    since: float = field(default_factory=time.monotonic)


class Liveness:
    """Which workers of a split are gone."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._seen: dict[str, _Seen] = {}

    def is_gone(self, record: WorkerRecord | ClaimRecord) -> bool:
        """Whether a worker has ended, was killed on this machine, or has not been heard of for `STALE_S`."""
        if record.machine == machine_name() and not is_alive(record.process):
            return True
        current = _read(self._storage, f"{WORKERS}/{record.session}", WorkerRecord)
        if current is None:
            return True
        seen = self._seen.get(record.session)
        if seen is None or seen.heard != current.heard:
            seen = self._seen[record.session] = _Seen(heard=current.heard)
        # By the clock here and by the clock there: either may be wrong.
        return max(time.monotonic() - seen.since, time.time() - current.heard) > STALE_S


class Claims:
    """This process's claims, and its heartbeat. A context manager: within `with` the heartbeat is written.

    Args:
        storage: The split's part of the storage.
        worker: Which worker this process is.
        device: Kind of its device.

    Attributes:
        session: Name of this process, unique in the dump.
    """

    def __init__(self, storage: Storage, worker: Worker, device: str) -> None:
        self._storage = storage
        self.session = f"{machine_name()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        now = time.time()
        self._record = WorkerRecord(
            session=self.session,
            worker=str(worker),
            machine=machine_name(),
            process=os.getpid(),
            device=device,
            started=now,
            heard=now,
        )
        self.liveness = Liveness(storage)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="kdcache-heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._storage.delete(f"{WORKERS}/{self.session}")

    def claim(self, unit: Unit, latest: dict[Unit, int]) -> bool:
        """Claim a shard, unless it is claimed by another worker that is still alive; returns whether that succeeded.

        Args:
            latest: Number of the last claim of each shard that has one, as `latest_claims` gives it.
        """
        number = latest.get(unit, -1)
        if number >= 0:
            record = read_claim(self._storage, unit, number)
            if record is not None and not self.liveness.is_gone(record):
                return False
        claim = ClaimRecord(
            session=self.session, machine=self._record.machine, process=self._record.process, at=time.time()
        )
        try:
            self._storage.create(_claim_key(unit, number + 1), _bytes(claim))
        except KeyExists:
            return False
        return True

    def _beat(self) -> None:
        failed = False
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self._write()
                failed = False
            except StorageError as problem:
                if not failed:
                    log(f"warning: the heartbeat of worker {self._record.worker} could not be written: {problem.found}")
                failed = True

    def _write(self) -> None:
        record = to_json(self._record) | {"heard": time.time()}
        self._storage.write(f"{WORKERS}/{self.session}", json.dumps(record).encode())


def read_workers(storage: Storage) -> list[WorkerRecord]:
    """Records of the workers of a split that are running, or were stopped before they could remove theirs."""
    keys = [key for key, _ in storage.objects(WORKERS)]
    return [record for key in keys if (record := _read(storage, key, WorkerRecord)) is not None]


def is_worked_on(storage: Storage) -> bool:
    """Whether any worker is writing to a split."""
    liveness = Liveness(storage)
    return not all(map(liveness.is_gone, read_workers(storage)))


def read_claim(storage: Storage, unit: Unit, number: int) -> ClaimRecord | None:
    """Read a claim; None if it is missing or damaged."""
    return _read(storage, _claim_key(unit, number), ClaimRecord)


def latest_claims(storage: Storage) -> dict[Unit, int]:
    """Number of the last claim of each claimed shard."""
    latest: dict[Unit, int] = {}
    for key, _ in storage.objects(CLAIMS):
        view, shard, number = map(int, key.removeprefix(f"{CLAIMS}/").split("/"))
        latest[view, shard] = max(latest.get((view, shard), 0), number)
    return latest


def _claim_key(unit: Unit, number: int) -> str:
    return f"{CLAIMS}/{unit[0]}/{unit[1]}/{number}"


def _bytes(record: WorkerRecord | ClaimRecord) -> bytes:
    return json.dumps(to_json(record)).encode()


def _read(storage: Storage, key: str, kind: type[Record]) -> Record | None:
    """Read a record; None if it is missing or damaged, which at worst means that a shard is computed twice."""
    try:
        return from_json(kind, json.loads(storage.read(key)), where=storage.place(key), error=CacheDamaged)
    except (MissingKey, ValueError, CacheDamaged):
        return None
