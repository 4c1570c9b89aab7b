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

from kdcache.cache.files import TEMPORARY, make_folder, storage_errors, sync_folder, sync_tree, write_durable
from kdcache.cache.layout import shard_path, zarr_array_options
from kdcache.cache.ledger import Ledger
from kdcache.cache.manifest import (
    ATTRIBUTE,
    METADATA,
    NOT_IDENTITY,
    Manifest,
    manifest_attributes,
    read_attributes,
    read_manifest,
)
from kdcache.cache.shards import encode_shard
from kdcache.errors import CacheDamaged, CacheIncomplete, TargetExists
from kdcache.records import differences

ROOT_ATTRIBUTES = {ATTRIBUTE: {"cache": 1}}


class SplitWriter:
    """Writes the rows of one split behind a manifest.

    Args:
        path: the cache; created where it does not exist.
        manifest: of the split to write, without results.

    Attributes:
        manifest: as it stands on disk; complete once every view is finished.

    Raises:
        TargetExists: the path holds something else, or the same split of another dump; the message names the settings
            that differ.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path / manifest.dataset.split
        _open_root(path)
        found = self._existing()
        if found is None:
            _create_split(self.path, manifest)
            found = manifest
        _refuse_other(self.path, found, manifest)
        self.manifest = found
        for leftover in self.path.rglob(f"*{TEMPORARY}"):
            leftover.unlink()
        self.ledger = Ledger(self.path, found)

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
            StorageError: the disk refused; what was committed before stays.
        """
        entry = {}
        for array in self.manifest.arrays:
            if not array.per_view and view > 0:
                continue
            data, crcs = encode_shard(self.manifest, array, arrays[array.name])
            write_durable(shard_path(self.path, array, view, shard), data)
            entry[array.name] = len(data), crcs
        self.ledger.commit(view, shard, entry)

    def finish(self, manifest: Manifest) -> None:
        """Seal the split: put the manifest with its results and the digests of the ledger."""
        path = self.path / METADATA
        document = json.loads(path.read_bytes())
        document["attributes"] |= manifest_attributes(manifest)
        write_durable(path, json.dumps(document, indent=2).encode())
        self.manifest = manifest

    def _existing(self) -> Manifest | None:
        if not self.path.exists():
            return None
        try:
            return read_manifest(self.path)
        except (CacheIncomplete, CacheDamaged) as problem:
            raise TargetExists(
                f"{self.path} exists and is not a split that can be continued: {problem.found}",
                "a free place, or the same dump begun before",
                "choose another --out, or remove that folder if you do not need it",
            ) from problem


def check_target(path: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of the split that stands at a target, None where there is none; reads only.

    Raises:
        TargetExists: something else stands there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    attributes = None
    if path.is_dir() and (path / METADATA).exists():
        attributes = read_attributes(path)
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        raise TargetExists(
            f"{path} exists and is not a kdcache cache",
            "a free path, an empty folder, or a cache",
            "choose another --out; nothing was changed",
        )
    split = path / manifest.dataset.split
    if not split.exists():
        return None
    found = read_manifest(split)
    _refuse_other(split, found, manifest)
    return found


def _refuse_other(split_path: Path, found: Manifest, wanted: Manifest) -> None:
    # A finished split is only read, so another version of a package cannot mix two kinds of rows in it.
    ignore = NOT_IDENTITY | ({"versions"} if found.complete else set())
    if None in (found.dataset.labels_sha256, wanted.dataset.labels_sha256):
        ignore |= {"dataset.labels_sha256"}
    if changes := differences(found, wanted, ignore=ignore):
        raise TargetExists(
            f"{split_path} holds another dump: "
            + "; ".join(f"{field} is {old!r} there and {new!r} here" for field, old, new in changes),
            "the same settings to continue or keep it",
            "choose another --out, or give the settings it was made with; nothing was changed",
        )


def _open_root(path: Path) -> None:
    import zarr

    if path.is_dir() and (path / METADATA).exists():
        return
    building = path.with_name(f".{path.name}.creating")
    with storage_errors("create", path):
        shutil.rmtree(building, ignore_errors=True)
        make_folder(path.absolute().parent)
        zarr.create_group(building, zarr_format=3, attributes=ROOT_ATTRIBUTES)
        sync_tree(building)
        building.replace(path)
        sync_folder(path.absolute().parent)


def _create_split(split_path: Path, manifest: Manifest) -> None:
    """Build the split's metadata beside its place and move it there, so that a kill leaves all of it or nothing."""
    import zarr

    building = split_path.with_name(f".{split_path.name}.creating")
    with storage_errors("create", split_path):
        shutil.rmtree(building, ignore_errors=True)
        group = zarr.create_group(building, zarr_format=3, attributes=manifest_attributes(manifest))
        for array in manifest.arrays:
            group.create_array(**zarr_array_options(manifest, array))
        group.create_array(**Ledger.zarr_array_options(manifest))
        sync_tree(building)
        building.replace(split_path)
        sync_folder(split_path.parent)
