"""Writing one split: create it or continue it, commit shard by shard, finish it.

The order within a commit is data, flush, ledger, here and nowhere else. Whatever is killed in between leaves a split
that the next run with the same manifest continues.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core import file_lock
from kdcache.core.atomic_files import TEMPORARY, make_folder, storage_errors, sync_folder, sync_tree, write_durable
from kdcache.core.errors import CacheDamaged
from kdcache.store.layout import shard_path
from kdcache.store.ledger import Ledger, array_metadata
from kdcache.store.manifest import (
    ATTRIBUTE,
    METADATA,
    ROOT_MARK,
    Manifest,
    is_cache,
    manifest_attributes,
    read_manifest,
)
from kdcache.store.resume import check_proof, check_target, recorded_manifest
from kdcache.store.shard_codec import encode_shard

_BUILDING = ".{}.creating"


class SplitWriter:
    """Writes the rows of one split behind a manifest. Use it as a context: it holds the cache's lock until it is left.

    Args:
        path: the cache; created where it does not exist.
        manifest: of the split to write, without results.
        repair: open a split whose manifest or ledger is damaged, too.
        add_views: room for so many views more than the manifest's is made in a finished split, whose views stay
            readable meanwhile.

    Attributes:
        manifest: as it stands on disk; complete once every view is finished.
        proof_needed: whether the manifest there is damaged, and `finish` must prove that it was this one; nothing else
            is written before.
        restored: what metadata was written again, as text.

    Raises:
        TargetExists: the path holds something else, or the same split of another dump; the message names the settings
            that differ.
        CacheNotFound, CacheIncomplete: views are to be added to what is not there, or not finished.
        CacheBusy: another dump writes to the path.
        CacheDamaged: what is there cannot be read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, repair: bool = False, add_views: int = 0) -> None:
        self.path = path / manifest.dataset.split
        check_target(path, manifest, repair=repair, add_views=add_views)
        with storage_errors("create", path):
            make_folder(path)
        self._lock = file_lock.PathLock(path)
        self.restored: list[str] = []
        try:
            # Again, now that nobody else writes: what was free may have been taken since.
            found = check_target(path, manifest, repair=repair, add_views=add_views)
            if not is_cache(path):
                root = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: ROOT_MARK}}
                write_durable(path / METADATA, json.dumps(root, indent=2).encode())
            if found is None:
                _create_split(self.path, manifest)
            self.manifest = found or manifest
            self.proof_needed = found is manifest
            if repair and not self.proof_needed:
                self._restore_manifest(manifest)
            if self.manifest.extending and read_manifest(self.path) != self.manifest:
                self._put_manifest(self.manifest)
            if (self.manifest.extending or repair) and not self.proof_needed:
                self._put_metadata()
            for leftover in self.path.rglob(f"*{TEMPORARY}"):
                leftover.unlink()
            self.ledger = Ledger(self.path, self.manifest, salvage=repair)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def pending(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs that are not committed, in writing order."""
        return [
            (view, int(shard))
            for view in range(self.manifest.views)
            for shard in np.flatnonzero(~self.ledger.committed(view))
        ]

    def commit(self, view: int, shard: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Write the rows of one shard, flush them, and enter them into the ledger.

        Args:
            arrays: for each array of the manifest its rows, (rows, *row_shape), in the array's dtype. Arrays that all
                views share are written with view 0 and passed over with the others.

        Raises:
            ValueError: an array has another shape or dtype than the shard.
            StorageError: the disk refused; what was committed before stays.
        """
        if not (0 <= view < self.manifest.views and 0 <= shard < self.manifest.shards):
            raise ValueError(f"there is no shard {shard} of view {view}")
        self.check_proved()
        entry = {}
        for array in self.manifest.arrays:
            if not array.per_view and view > 0:
                continue
            rows, needed = arrays[array.name], (len(self.manifest.rows_of(shard)), *array.row_shape)
            if rows.shape != needed or rows.dtype != np.dtype(array.dtype):
                raise ValueError(
                    f"{array.name} of shard {shard} is {rows.dtype} {rows.shape}, not {array.dtype} {needed}"
                )
            data, crcs = encode_shard(self.manifest, array, rows)
            write_durable(shard_path(self.path, array, view, shard), data)
            entry[array.name] = len(data), crcs
        self.ledger.commit(view, shard, entry)

    def _restore_manifest(self, manifest: Manifest) -> None:
        try:
            read_manifest(self.path)
        except CacheDamaged:
            recorded = recorded_manifest(self.path, manifest)
            assert recorded is not None, "else its proof would be needed"
            self.restored.append("the manifest was damaged; what is left of it proves what it was")
            self._put_manifest(recorded)

    def check_proved(self) -> None:
        """Refuse to write rows while nothing proves that the split is of this dump.

        Raises:
            CacheDamaged: the manifest there is damaged.
        """
        if self.proof_needed:
            raise CacheDamaged(
                f"the manifest of {self.path} is damaged, and so are rows: nothing proves that they are of this dump",
                "a manifest, or whole rows",
                "restore the manifest from a copy, or dump again into another folder; nothing was changed",
            )

    def _put_metadata(self) -> None:
        """Let the arrays' metadata say what the manifest says, where it does not: it is missing, damaged or grew."""
        for name, expected in array_metadata(self.manifest).items():
            path = self.path / name
            try:
                with storage_errors("read", path):
                    current = json.loads(path.read_bytes()) if path.exists() else None
            except ValueError:
                current = None
            if current != json.loads(expected):
                self.restored.append(f"{path} is written again")
                make_folder(path.parent)
                write_durable(path, expected)

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
        self._put_manifest(manifest)

    def _put_manifest(self, manifest: Manifest) -> None:
        path, attributes = self.path / METADATA, manifest_attributes(manifest)
        try:
            read_manifest(self.path)
        except CacheDamaged as problem:
            check_proof(path, attributes[ATTRIBUTE], problem)
            document: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        else:
            document = json.loads(path.read_bytes())
        document["attributes"] |= attributes
        write_durable(path, json.dumps(document, indent=2).encode())
        self.manifest = manifest


def _create_split(split_path: Path, manifest: Manifest) -> None:
    """Build the split's metadata beside its place and move it there, so that a kill leaves all of it or nothing."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": manifest_attributes(manifest)}
    building = split_path.with_name(_BUILDING.format(split_path.name))
    with storage_errors("create", split_path):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        (building / METADATA).write_text(json.dumps(group, indent=2))
        for path, document in array_metadata(manifest).items():
            (building / path).parent.mkdir()
            (building / path).write_bytes(document)
        sync_tree(building)
        building.replace(split_path)
        sync_folder(split_path.parent)
