"""Division of a split among workers: each computes its own run of shards, then what others left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from kdcache.core.errors import CacheDamaged, StorageError
from kdcache.core.json_records import counted
from kdcache.core.progress import log
from kdcache.core.workers import Worker
from kdcache.store.claims import Claims, Unit, latest_claims
from kdcache.store.ledger import Ledger
from kdcache.store.manifest import Manifest, read_manifest
from kdcache.store.writer import SplitWriter

# Pause between two looks at shards that other workers compute.
POLL_S = 2.0
# Pause between two lines about them.
LINE_S = 60.0


class Work:
    """The shards that one worker computes, each claimed before it is yielded. A context manager.

    Args:
        worker: Which worker this process is.
        steal: Whether it takes shards of the runs of other workers, once its own run is done: those that nobody has
            claimed, and those of workers that are gone.

    Attributes:
        sealed: The split's manifest, where another worker has sealed it meanwhile.
    """

    def __init__(self, writer: SplitWriter, worker: Worker, *, steal: bool = True) -> None:
        self._writer = writer
        self.sealed: Manifest | None = None
        manifest = writer.manifest
        # A repair, which no other worker takes part in, and which leaves what it may not replace.
        self._alone = writer.policy.repair
        # Numbered alike by all workers, whatever is committed already.
        first = 0 if self._alone else len(manifest.view_sha256)
        # The views of a shard follow each other, so that its samples can be read once for all of them.
        units = [(view, shard) for shard in range(manifest.shards) for view in range(first, manifest.views)]
        run = worker.run(len(units))
        self._own = units[run.start : run.stop]
        self._open = units if steal else self._own
        self._claims = Claims(writer.storage, worker, manifest.compute.get("device", ""))
        writer.session, writer.worker = self._claims.session, str(worker)

    def __enter__(self) -> Work:
        if not self._alone:
            self._claims.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        if not self._alone:
            self._claims.__exit__(*problem)

    def own(self) -> Iterator[Unit]:
        """The shards of this worker's own run that are neither committed nor claimed by a worker that is alive.

        They may be asked for before the ones before them are committed.
        """
        if self._alone:
            yield from sorted(self._writer.pending(), key=lambda unit: (unit[1], unit[0]))
            return
        pending, latest = set(self._writer.pending()), latest_claims(self._writer.storage)
        for unit in self._own:
            if unit in pending and self._claims.claim(unit, latest):
                yield unit

    def own_rows(self) -> tuple[int, int]:
        """Rows of this worker's own run, and how many of them are committed."""
        pending, manifest = set(self._writer.pending()), self._writer.manifest
        rows = {unit: len(manifest.rows_of(unit[1])) for unit in self._own}
        return sum(rows.values()), sum(count for unit, count in rows.items() if unit not in pending)

    def next_left(self) -> Unit | None:
        """A shard that others left, once all that this worker claimed before is committed; None where none is left.

        Waits for shards that other workers are computing, and takes those of workers that are gone.

        Raises:
            CacheDamaged: another worker sealed the split with other bytes of a shard that this one wrote after it.
        """
        if self._alone:
            return None
        said = -LINE_S
        while True:
            self._writer.ledger.refresh()
            if self._is_sealed():
                return None
            pending = set(self._writer.pending())
            # Workers go through their runs from the front, so the last shards are the last to be claimed by their own.
            left = [unit for unit in reversed(self._open) if unit in pending]
            if not left:
                return None
            latest = latest_claims(self._writer.storage)
            for unit in left:
                if self._claim(unit, latest):
                    return unit
            if time.monotonic() - said > LINE_S:
                said = time.monotonic()
                log(f"waiting for {counted(len(left), 'shard')} that other workers compute; kdcache status shows them")
            time.sleep(POLL_S)

    def _claim(self, unit: Unit, latest: dict[Unit, int]) -> bool:
        try:
            return self._claims.claim(unit, latest)
        except StorageError:
            # Whoever seals the split removes the claims.
            if self._is_sealed():
                return False
            raise

    def _is_sealed(self) -> bool:
        """Whether another worker has sealed the split; remembers its manifest."""
        found = read_manifest(self._writer.root, self._writer.manifest.dataset.split)
        if len(found.view_sha256) < self._writer.manifest.views:
            return False
        self.sealed = found
        sealed, mine = Ledger(self._writer.storage, found), self._writer.ledger
        for unit, part in mine.parts.items():
            if part.session == self._claims.session and (sealed.entries[unit] != mine.entries[unit]).any():
                raise CacheDamaged(
                    f"shard {unit[1]} of view {unit[0]} of {self._writer.storage.url} was computed by two workers with "
                    "different results, and written after the split was sealed",
                    "equal bytes from devices of one kind",
                    "run the dump-teacher command again with --repair; choose deterministic algorithms on the device",
                )
        return True
