"""The report of `kdcache status`: progress of a dump, and of each of its workers. Needs no torch."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from kdcache.core.command_result import Report
from kdcache.core.errors import CacheIncomplete
from kdcache.core.json_records import counted
from kdcache.core.text_table import text_table
from kdcache.store.cache import cache_splits
from kdcache.store.claims import Liveness, Unit, WorkerRecord, latest_claims, read_claim, read_workers
from kdcache.store.ledger import Ledger
from kdcache.store.manifest import Manifest, read_manifest
from kdcache.store.storage.base import Storage
from kdcache.store.storage.registry import Location, open_storage


def cache_status(location: Location) -> Report:
    """Progress of each split of a cache: committed shards, and the workers of a split that is being dumped.

    Raises:
        CacheNotFound, CacheDamaged: the cache cannot be read.
        CacheIncomplete: not even one split was begun.
    """
    root = open_storage(location)
    names = cache_splits(root)
    if not names:
        raise CacheIncomplete(f"the cache {root.url} has no split yet", "a dump", "run dump-teacher again")
    data, texts = {}, []
    for name in names:
        manifest, storage = read_manifest(root, name), root.below(name)
        data[name] = _progress(storage, manifest)
        texts.append("\n".join([f"{storage.url}: {_summary(data[name])}", *_table(data[name]["workers"])]))
    return Report({"cache": root.url, "splits": data}, "\n".join(texts))


def _progress(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    ledger = Ledger(storage, manifest)
    units = [(view, shard) for view in range(manifest.views) for shard in range(manifest.shards)]
    committed = {unit for unit in units if ledger.committed(unit[0])[unit[1]]}
    sealed = len(manifest.view_sha256) == manifest.views
    workers = [] if sealed else _workers(storage, manifest, ledger, committed)
    rate = sum(each["rows_per_second"] for each in workers if each["state"] == "running")
    rows_left = sum(len(manifest.rows_of(shard)) for view, shard in units if (view, shard) not in committed)
    return {
        "complete": sealed,
        "shards": len(units),
        "committed_shards": len(committed),
        "rows": manifest.dataset.length * manifest.views,
        "rows_left": rows_left,
        "rows_per_second": rate,
        "seconds_left": rows_left / rate if rate else None,
        "unclaimed_shards": 0 if sealed else len(set(units) - committed - latest_claims(storage).keys()),
        "workers": workers,
    }


def _workers(storage: Storage, manifest: Manifest, ledger: Ledger, committed: set[Unit]) -> list[dict[str, Any]]:
    """What each worker has done and is doing, in the order of their numbers."""
    liveness, now = Liveness(storage), time.time()
    records = {record.session: record for record in read_workers(storage)}
    rows: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    names = {session: record.worker for session, record in records.items()}
    last: dict[str, float] = {}
    for (_, shard), part in ledger.parts.items():
        rows[part.session] += len(manifest.rows_of(shard))
        shards[part.session] += 1
        names[part.session] = part.worker
        last[part.session] = max(last.get(part.session, 0.0), part.at)
    in_flight: dict[str, list[Unit]] = {}
    for unit, number in sorted(latest_claims(storage).items()):
        if unit not in committed and (claim := read_claim(storage, unit, number)) is not None:
            in_flight.setdefault(claim.session, []).append(unit)
    found = []
    for session in dict.fromkeys([*records, *shards, *in_flight]):
        record = records.get(session)
        seconds = last[session] - record.started if record is not None and session in last else 0.0
        found.append(
            {
                "worker": names.get(session, ""),
                "session": session,
                "state": _state(record, liveness),
                "device": "" if record is None else record.device,
                "committed_shards": shards[session],
                "rows_per_second": rows[session] / seconds if seconds > 0 else 0.0,
                "in_flight": [list(unit) for unit in in_flight.get(session, [])],
                "heard_seconds_ago": None if record is None else max(now - record.heard, 0.0),
            }
        )
    return sorted(found, key=lambda each: (each["state"] != "running", _number(each["worker"]), each["session"]))


def _state(record: WorkerRecord | None, liveness: Liveness) -> str:
    if record is None:
        return "ended"
    return "gone" if liveness.is_gone(record) else "running"


def _number(worker: str) -> int:
    return int(worker.partition("/")[0] or -1)


def _summary(data: dict[str, Any]) -> str:
    shards = counted(data["shards"], "shard")
    if data["complete"]:
        return f"complete, {shards}"
    text = f"{data['committed_shards']:,} of {shards} committed"
    if data["committed_shards"] == data["shards"]:
        return f"{text}, not sealed yet: kdcache seal does it"
    if data["seconds_left"] is None:
        return f"{text}; no worker is known to compute: run the dump-teacher command again to continue"
    return f"{text}, {data['rows_per_second']:,.0f} rows/s, {_duration(data['seconds_left'])} left"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _table(workers: list[dict[str, Any]]) -> list[str]:
    if not workers:
        return []
    header = ["worker", "state", "heard of", "shards", "rows/s", "in flight (view, shard)", "process"]
    rows = [
        [
            each["worker"] or "?",
            each["state"],
            "-" if each["heard_seconds_ago"] is None else f"{_duration(each['heard_seconds_ago'])} ago",
            f"{each['committed_shards']:,}",
            f"{each['rows_per_second']:,.0f}",
            ", ".join(f"({view}, {shard})" for view, shard in each["in_flight"]) or "-",
            each["session"].rpartition("-")[0],
        ]
        for each in workers
    ]
    return [f"  {line}" for line in text_table(header, rows, numbers=["shards", "rows/s"])]
