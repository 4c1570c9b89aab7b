"""Writing one split: create it or continue it, commit shard by shard, finish it.

The order within a commit is data, flush, ledger, here and nowhere else. Whatever is killed in between leaves a split
that the next run with the same manifest continues.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import lock
from kdcache.cache.files import TEMPORARY, make_folder, storage_errors, sync_folder, sync_tree, write_durable
from kdcache.cache.layout import shard_path
from kdcache.cache.ledger import Ledger, array_metadata
from kdcache.cache.manifest import (
    ATTRIBUTE,
    METADATA,
    NOT_IDENTITY,
    ROOT_MARK,
    Manifest,
    is_cache,
    manifest_attributes,
    manifest_sha256,
    read_manifest,
)
from kdcache.cache.shards import encode_shard
from kdcache.errors import CacheDamaged, CacheIncomplete, CacheNotFound, TargetExists
from kdcache.records import brief, differences, from_json, to_json

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
        self._lock = lock.PathLock(path)
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
            _check_proof(path, attributes[ATTRIBUTE], problem)
            document: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        else:
            document = json.loads(path.read_bytes())
        document["attributes"] |= attributes
        write_durable(path, json.dumps(document, indent=2).encode())
        self.manifest = manifest


def check_target(path: Path, manifest: Manifest, *, repair: bool = False, add_views: int = 0) -> Manifest | None:
    """The manifest of the same dump that stands at a target, None where the place is free; reads only.

    A dump may be asked for fewer views than stand there: it was extended since.

    Args:
        repair: take `manifest` itself where the one there is damaged; `SplitWriter.finish` asks for proof.
        add_views: give the manifest that stands there room for so many more than `manifest` has.

    Raises:
        TargetExists: something else stands there.
        CacheNotFound, CacheIncomplete: there is nothing to add views to, or its dump has not finished.
        CacheDamaged: a cache stands there that cannot be read.
    """
    found = _same_dump(path, manifest, repair=repair, exact_versions=repair or add_views > 0)
    split = path / manifest.dataset.split
    if add_views:
        return _with_room(split, found, manifest.views, add_views)
    if found is None or manifest.views == found.readable_views:
        return found
    there, coming = found.readable_views, found.views - found.readable_views
    if found.complete and manifest.views < there:
        return found
    advice = f"give --views {there} --add-views {manifest.views - there} to extend it, or " if found.complete else ""
    if coming and found.complete:
        advice = f"give --views {there} --add-views {coming} to finish what is being added, or "
    raise TargetExists(
        f"{split} holds another dump: views is {there} there and {manifest.views} here",
        f"--views {there} to continue or keep it",
        f"{advice}choose another --out; nothing was changed",
    )


def _with_room(split: Path, found: Manifest | None, views: int, add_views: int) -> Manifest:
    """What stands there with room for `views` + `add_views` in all: a number to reach, so it can be asked for twice."""
    if found is None:
        raise CacheNotFound(
            f"there is no {split} to add views to", "a finished dump", "leave out --add-views to dump it first"
        )
    if not found.complete:
        raise CacheIncomplete(
            f"{split} has not finished its {found.views} views", "a finished dump", "run it without --add-views first"
        )
    there, wanted = found.readable_views, views + add_views
    if there == wanted and not found.extending:
        return found
    if there != views or (found.extending and found.views != wanted):
        coming = f", and {found.views - there} more are being added" if found.extending else ""
        advice = f"--views {there} --add-views {found.views - there if found.extending else add_views}"
        raise TargetExists(
            f"{split} has {there} views{coming}; --views {views} --add-views {add_views} asks for {wanted}",
            f"--views {there}, as many as there are, and --add-views, as many as are to come",
            f"give {advice}; nothing was changed",
        )
    return replace(found, views=wanted)


def _same_dump(path: Path, manifest: Manifest, *, repair: bool, exact_versions: bool) -> Manifest | None:
    if not is_cache(path):
        if os.path.lexists(path) and not (path.is_dir() and _is_free(path)):
            raise TargetExists(
                f"{path} exists and is not a kdcache cache",
                "a free path, an empty folder, or a cache",
                "choose another --out; nothing was changed",
            )
        return None
    split = path / manifest.dataset.split
    if not split.exists():
        return None
    try:
        found = read_manifest(split)
    except CacheDamaged:
        if repair:
            return recorded_manifest(split, manifest) or manifest
        raise
    # A finished split is only read, so another version of a package cannot mix two kinds of rows in it.
    ignore = NOT_IDENTITY | ({"versions"} if found.complete and not exact_versions else set())
    if None in (found.dataset.labels_sha256, manifest.dataset.labels_sha256):
        ignore |= {"dataset.labels_sha256"}
    if changes := differences(found, manifest, ignore=ignore):
        raise TargetExists(
            f"{split} holds another dump: "
            + "; ".join(f"{field} is {brief(old)} there and {brief(new)} here" for field, old, new in changes[:8]),
            "the same settings to continue or keep it",
            "choose another --out, or give the settings it was made with; nothing was changed",
        )
    return found


def recorded_manifest(split_path: Path, manifest: Manifest) -> Manifest | None:
    """The manifest that a damaged one was, if what is left of it proves that it was of this dump; None if nothing does.

    What a dump is of is known from the dump; what came out of it is taken from what is recorded. Together they are it
    if they have the recorded sha256, or if the recorded settings are those of this dump.
    """
    try:
        attribute = json.loads((split_path / METADATA).read_bytes())["attributes"][ATTRIBUTE]
        recorded = attribute["manifest"]
        results = {name: recorded[name] for name in ("views", "view_sha256", "device", "batch_size", "versions")}
        own = to_json(manifest)
        candidate = from_json(
            Manifest,
            own
            | results
            | {"dataset": own["dataset"] | {name: recorded["dataset"][name] for name in ("data_root", "labels_sha256")}}
            | {"teacher": own["teacher"] | {"accuracy": recorded["teacher"]["accuracy"]}},
            where=str(split_path),
            error=CacheDamaged,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return candidate if manifest_sha256(candidate) == attribute.get("sha256") else None


def _check_proof(path: Path, attribute: dict[str, Any], problem: CacheDamaged) -> None:
    """Let a manifest take the place of a damaged one only if it is that one: by its sha256, or by what it says."""
    recorded = path.read_bytes() if path.exists() else b""
    if attribute["sha256"].encode() in recorded:
        return
    try:
        if json.loads(recorded)["attributes"][ATTRIBUTE]["manifest"] == attribute["manifest"]:
            return
    except (ValueError, KeyError, TypeError):
        pass
    raise CacheDamaged(
        f"{problem.found}; the manifest that this dump would write is another one",
        "proof that the split is of this dump: the recorded sha256, or the recorded manifest",
        "give the very command and versions that made it, or dump again into another folder",
    ) from problem


def _is_free(folder: Path) -> bool:
    """Whether a folder holds nothing but what a dump that was killed at its very start leaves."""
    return all(entry.name == lock.NAME or entry.name == METADATA + TEMPORARY for entry in folder.iterdir())


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
