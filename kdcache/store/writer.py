"""Writing one split: create it or continue it, commit shard by shard, finish it.

The manifest comes first and is created exclusively: of several workers one creates the split, and the others compare.
The order within a commit is data, flush, ledger, here and nowhere else. Whatever is killed in between leaves a split
that the next run with the same manifest continues.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import CacheBusy, CacheDamaged
from kdcache.store.claims import UNSEALED, is_worked_on
from kdcache.store.constants import write_constants
from kdcache.store.encodings.base import Encoding
from kdcache.store.facts import write_facts
from kdcache.store.layout import shard_key
from kdcache.store.ledger import Ledger, array_metadata
from kdcache.store.local_paths import LocalPaths
from kdcache.store.manifest import (
    ATTRIBUTE,
    METADATA,
    ROOT_MARK,
    Manifest,
    is_cache,
    manifest_attributes,
    read_manifest,
)
from kdcache.store.records import ArrayRecord, ChangeRecord
from kdcache.store.resume import ResumePolicy, check_proof, find_dump, recorded_manifest
from kdcache.store.shard_codec import encode_shard
from kdcache.store.storage.base import KeyExists, MissingKey
from kdcache.store.storage.registry import Location, open_storage


class SplitWriter:
    """Writes the rows of one split behind a manifest. A context manager that holds the cache's lock, unless shared.

    Args:
        root: Where the cache is, or will be.
        manifest: Manifest of the split, without results.
        policy: How to treat what is already stored.
        encoding: Encoding with its constants; needed where the manifest has any.
        local: Where its dataset is now; recorded beside the manifest of a new split.

    Attributes:
        session: Process that commits, for the parts of the ledger.
        worker: Its number and that of all workers, likewise.
        manifest: The stored manifest; complete once every view is finished.
        proof_needed: Whether the stored manifest is damaged, and `finish` must prove that it was this one; nothing else
            is written before.
        restored: Metadata that was written again, as text.
        changes: What opening the split added to the manifest's history.
        rejected: Recomputed parts that are not what was committed, as text; nothing of them is written.

    Raises:
        TargetExists: something else is stored, or the same split of another dump; the message names the settings that
            differ.
        CacheNotFound, CacheIncomplete: views are to be added to what is not there, or not finished.
        CacheBusy: another dump writes to the cache.
        CacheDamaged: what is stored cannot be read.
    """

    def __init__(
        self,
        root: Location,
        manifest: Manifest,
        policy: ResumePolicy | None = None,
        *,
        encoding: Encoding | None = None,
        local: LocalPaths | None = None,
    ) -> None:
        self.root, self.policy = open_storage(root), policy or ResumePolicy()
        self.storage = self.root.below(manifest.dataset.split)
        self.compute = manifest.compute
        self._local = {} if local is None else local.attribute()
        self._encoding = encoding
        self.restored: list[str] = []
        self.rejected: list[str] = []
        self.changes: tuple[ChangeRecord, ...] = ()
        self.session = self.worker = ""
        find_dump(self.root, manifest, self.policy)
        with contextlib.ExitStack() as stack:
            if not self.policy.shared:
                stack.enter_context(self.root.lock("dump"))
            self._open(manifest)
            self._lock = stack.pop_all()

    def _open(self, manifest: Manifest) -> None:
        # Again, now that nobody else writes: what was free may have been taken since.
        found = find_dump(self.root, manifest, self.policy)
        if not is_cache(self.root):
            group = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: ROOT_MARK}}
            with contextlib.suppress(KeyExists):
                self.root.create(METADATA, json.dumps(group, indent=2).encode())
        if found is None:
            try:
                self.storage.create(METADATA, json.dumps(self._group_document(manifest), indent=2).encode())
            except KeyExists:
                found = find_dump(self.root, manifest, self.policy)
        if self.policy.repair and is_worked_on(self.storage):
            raise CacheBusy(
                f"other workers write to {self.storage.url}",
                "no other worker while a cache is repaired",
                "wait for them, or stop them; kdcache status shows them",
            )
        self.manifest = found or manifest
        self.proof_needed = found is manifest
        if self.policy.repair and not self.proof_needed:
            self._restore_manifest(manifest)
        if found is not None and not self.proof_needed and self._stored_manifest() != found:
            self.changes = found.history[len(self._stored_manifest().history) :]
            self._put_manifest(found)
        growing = not self.manifest.complete or self.manifest.extending
        if (growing or self.policy.repair) and not self.proof_needed:
            self._put_metadata()
        self.ledger = Ledger(self.storage, self.manifest, salvage=self.policy.repair)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()

    def pending(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs that are not committed, in writing order."""
        return [
            (view, int(shard))
            for view in range(self.manifest.views)
            for shard in np.flatnonzero(~self.ledger.committed(view))
        ]

    def commit(
        self, view: int, shard: int, arrays: dict[str, NDArray[Any]], facts: NDArray[np.float64] | None = None
    ) -> None:
        """Write the rows of one shard, flush them, and enter them into the ledger.

        Args:
            facts: The manifest's facts about the shard, (facts,); None where it has none.
            arrays: for each array of the manifest its rows, (rows, *row_shape), in the array's dtype. Arrays that all
                views share are written with view 0 and passed over with the others.

        Raises:
            ValueError: an array has another shape or dtype than the shard.
            StorageError: the disk refused; what was committed before stays.

        A shard that was committed before must come out with the same checksums. Otherwise it is named in `rejected`
        and left as it is, unless new bytes are accepted.
        """
        if not (0 <= view < self.manifest.views and 0 <= shard < self.manifest.shards):
            raise ValueError(f"there is no shard {shard} of view {view}")
        self.check_proved()
        if self.policy.shared and self.ledger.is_committed(view, shard):
            return  # by a worker that took this one for dead
        stored = [array for array in self.manifest.arrays if array.per_view or view == 0]
        for array in stored:
            rows, needed = arrays[array.name], (len(self.manifest.rows_of(shard)), *array.row_shape)
            if rows.shape != needed or rows.dtype != np.dtype(array.dtype):
                raise ValueError(
                    f"{array.name} of shard {shard} is {rows.dtype} {rows.shape}, not {array.dtype} {needed}"
                )
        encoded: Iterable[tuple[ArrayRecord, bytes | bytearray, list[int]]] = (
            (array, *encode_shard(self.manifest, array, arrays[array.name])) for array in stored
        )
        if (view, shard) in self.ledger.suspended and not self.policy.accept_new_bytes:
            encoded = list(encoded)
            if changed := list(filter(None, (self._deviation(view, shard, *each) for each in encoded))):
                self.rejected += changed
                return
        entry = {}
        for array, data, crcs in encoded:
            self.storage.write(shard_key(array, view, shard), data)
            entry[array.name] = len(data), crcs
        if facts is not None:
            write_facts(self.storage, view, shard, facts)
        self.ledger.commit(view, shard, entry, session=self.session, worker=self.worker, compute=self.compute)

    def _deviation(
        self, view: int, shard: int, array: ArrayRecord, data: bytes | bytearray, crcs: list[int]
    ) -> str | None:
        """How an array of a shard differs from what was committed; None where it does not."""
        committed = self.ledger.suspended_entry(array, view, shard)
        if committed is None or committed == (len(data), crcs):
            return None
        samples, (length, old) = self.manifest.rows_of(shard), committed
        chunk = next((at for at, (one, two) in enumerate(zip(old, crcs, strict=True)) if one != two), None)
        how = f"{length} bytes committed, {len(data)} now"
        if chunk is not None:
            how = f"crc32c of chunk {chunk} {old[chunk]:#010x} committed, {crcs[chunk]:#010x} now"
        return f"{array.name}, view {view}, shard {shard} (samples {samples.start} to {samples.stop - 1}): {how}"

    def new_digests(self) -> dict[int, tuple[str, str]]:
        """Finished views whose ledger is not the one that the manifest has the digest of: old and new digest."""
        now = {view: self.ledger.digest(view) for view in range(len(self.manifest.view_sha256))}
        return {view: (old, now[view]) for view, old in enumerate(self.manifest.view_sha256) if now[view] != old}

    def _restore_manifest(self, manifest: Manifest) -> None:
        try:
            self._stored_manifest()
        except CacheDamaged:
            recorded = recorded_manifest(self.storage, manifest)
            assert recorded is not None, "else its proof would be needed"
            self.restored.append("the manifest was damaged; what is left of it proves what it was")
            target, self.manifest = self.manifest, recorded
            self._put_manifest(recorded)
            self.manifest = target

    def check_proved(self) -> None:
        """Refuse to write rows while nothing proves that the split is of this dump.

        Raises:
            CacheDamaged: the manifest there is damaged.
        """
        if self.proof_needed:
            raise CacheDamaged(
                f"the manifest of {self.storage.url} is damaged, and so are rows: nothing proves that they are "
                "of this dump",
                "a manifest, or whole rows",
                "restore the manifest from a copy, or dump again into another folder; nothing was changed",
            )

    def _stored_manifest(self) -> Manifest:
        return read_manifest(self.root, self.manifest.dataset.split)

    def _put_metadata(self) -> None:
        """Write the arrays' metadata again where it is not what the manifest says: it is missing, damaged or grew."""
        for key, expected in array_metadata(self.manifest).items():
            try:
                current = json.loads(self.storage.read(key))
            except (MissingKey, ValueError):
                current = None
            if current != json.loads(expected):
                self.restored.append(f"{self.storage.place(key)} is written again")
                self.storage.write(key, expected)
        if self._encoding is not None:
            for key in write_constants(self.storage, self.manifest, self._encoding):
                self.restored.append(f"{self.storage.place(key)} is written again")

    def finish(self, manifest: Manifest) -> None:
        """Seal the split: put the manifest with its results and the digests of the ledger.

        Raises:
            ValueError: rows are pending, or the digests are not the ledger's.
            CacheDamaged: the manifest there is damaged, and nothing proves that it was this one.
        """
        if self.pending():
            raise ValueError(f"{len(self.pending())} shards are pending: a split is sealed once all are committed")
        if manifest.view_sha256 != tuple(self.ledger.digest(view) for view in range(manifest.views)):
            raise ValueError("view_sha256 is not that of the ledger")
        for view in sorted(self.ledger.unproved | set(range(len(self.manifest.view_sha256), manifest.views))):
            self.ledger.save(view)
        # One that is stored already keeps the spelling, and so the digest, of the version that wrote it.
        if self.proof_needed or self._stored_manifest() != manifest:
            self._put_manifest(manifest)
        self.clear()

    def clear(self) -> None:
        """Remove what only a split that is being written needs: parts, claims, and what killed workers left."""
        self.storage.delete_below(UNSEALED)
        self.root.sweep()

    def _put_manifest(self, manifest: Manifest) -> None:
        attributes = manifest_attributes(manifest)
        try:
            self._stored_manifest()
        except CacheDamaged as problem:
            check_proof(self.storage, attributes[ATTRIBUTE], problem)
            document = self._group_document(manifest)
        else:
            document = json.loads(self.storage.read(METADATA))
            document["attributes"][ATTRIBUTE] |= attributes[ATTRIBUTE]
        self.storage.write(METADATA, json.dumps(document, indent=2).encode())
        self.manifest = manifest

    def _group_document(self, manifest: Manifest) -> dict[str, Any]:
        attributes = manifest_attributes(manifest)
        attributes[ATTRIBUTE] |= self._local
        return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
