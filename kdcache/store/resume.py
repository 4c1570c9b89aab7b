"""What stands where a split is to be written: the same dump, another one, or what is left of a damaged one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcache.core import file_lock
from kdcache.core.atomic_files import TEMPORARY, check_folder
from kdcache.core.errors import CacheDamaged, CacheIncomplete, CacheNotFound, TargetExists
from kdcache.core.json_records import brief, counted, differences, from_json, to_json
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import portable, portable_spec
from kdcache.store.manifest import (
    ATTRIBUTE,
    METADATA,
    NOT_IDENTITY,
    ChangeRecord,
    Manifest,
    enclosing_cache,
    is_cache,
    manifest_sha256,
    read_manifest,
    recorded_sha256,
)

# Fields that come out of a dump or tell how it was carried out: taken from what is left of a damaged manifest.
_RECORDED = ("views", "view_sha256", "device", "batch_size", "versions")
_RECORDED_IF_THERE = ("encoding", "compute", "license", "citation", "history")


def check_target(
    path: Path,
    manifest: Manifest,
    *,
    repair: bool = False,
    add_views: int = 0,
    allow_device_change: bool = False,
) -> Manifest | None:
    """The manifest of the same dump that stands at a target, None where the place is free; reads only.

    A dump may be asked for fewer views than stand there: it was extended since. What the caller has to write to it
    (more views, an allowed change of device, other terms of use) is in the result already.

    Args:
        repair: take `manifest` itself where the one there is damaged; `SplitWriter.finish` asks for proof.
        add_views: give the manifest that stands there room for so many more than `manifest` has.
        allow_device_change: let another device, or other settings of it, compute what is missing; recorded in the
            manifest's history.

    Raises:
        TargetExists: something else stands there, or rows of another device.
        CacheNotFound, CacheIncomplete: there is nothing to add views to, or its dump has not finished.
        CacheDamaged: a cache stands there that cannot be read.
    """
    split = path / manifest.dataset.split
    found = _same_dump(path, manifest, repair=repair, exact_versions=repair or add_views > 0)
    target = _with_views(split, found, manifest, add_views)
    if target is None or target is manifest:
        return target
    # A finished split is only read, and what repairs it must give the committed bytes.
    if not target.complete or (add_views and target.extending):
        target = _on_device(split, target, manifest, allow_device_change)
    return _with_terms(split, target, manifest)


def _with_views(split: Path, found: Manifest | None, manifest: Manifest, add_views: int) -> Manifest | None:
    """What stands there, if it has the views that are asked for, or with room for those that are to be added."""
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
            f"{split} has not finished its {counted(found.views, 'view')}",
            "a finished dump",
            "run it without --add-views first",
        )
    there, wanted = found.readable_views, views + add_views
    if there == wanted and not found.extending:
        return found
    if there != views or (found.extending and found.views != wanted):
        coming = f", and {found.views - there} more are being added" if found.extending else ""
        advice = f"--views {there} --add-views {found.views - there if found.extending else add_views}"
        raise TargetExists(
            f"{split} has {counted(there, 'view')}{coming}; --views {views} --add-views {add_views} asks for {wanted}",
            f"--views {there}, as many as there are, and --add-views, as many as are to come",
            f"give {advice}; nothing was changed",
        )
    return replace(found, views=wanted)


def _on_device(split: Path, found: Manifest, manifest: Manifest, allowed: bool) -> Manifest:
    """What stands there, to be continued on the device of `manifest`; with the change recorded if it is another one."""
    old, new = found.compute, manifest.compute
    if not old:  # by an older version, which recorded the kind of device alone
        old, new = {"device": _kind(found)}, {"device": _kind(manifest)}
    changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if not changed:
        return found
    ledger = Ledger(split, replace(found, views=max(found.readable_views, 1)), salvage=True)
    shards = sum(int(ledger.committed(view).sum()) for view in range(found.readable_views))
    result = replace(found, compute=manifest.compute, device=manifest.device)
    if not shards:
        return result  # no row of the other device is there
    if not allowed:
        raise TargetExists(
            f"{split} has {counted(shards, 'shard')} that another device or other settings computed: "
            + "; ".join(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here" for name in changed),
            "one device with one set of settings for all rows: others give other last bits",
            "go on where it was begun, or give --allow-device-change, which the manifest records; nothing was changed",
        )
    change = ChangeRecord(
        what="device",
        before={name: old[name] for name in changed if name in old} | {"committed_shards": str(shards)},
        after={name: new[name] for name in changed if name in new},
    )
    return replace(result, history=(*found.history, change))


def _kind(manifest: Manifest) -> str:
    """Such as `cuda`."""
    return manifest.compute.get("device") or manifest.device.partition(":")[0]


def _with_terms(split: Path, found: Manifest, manifest: Manifest) -> Manifest:
    """What stands there under the license and citation that were given; what was not given stays."""
    given = {"license": manifest.license, "citation": manifest.citation}
    after = {name: text for name, text in given.items() if text and text != getattr(found, name)}
    if not after:
        return found
    history = found.history
    if found.complete:
        before = {name: getattr(found, name) for name in after} | {"manifest_sha256": recorded_sha256(split)}
        history = (*history, ChangeRecord(what="terms", before=before, after=after))
    return replace(
        found,
        license=manifest.license or found.license,
        citation=manifest.citation or found.citation,
        history=history,
    )


def check_free(path: Path) -> bool:
    """Whether a path is free for a new cache; False where there is a cache.

    Raises:
        TargetExists: something else stands there.
        CacheDamaged: a cache stands there that cannot be read.
    """
    if (cache := enclosing_cache(path)) is not None:
        raise TargetExists(
            f"{path} lies inside the cache {cache}",
            "the cache itself; a split is a folder in it",
            f"give --out {cache} --split NAME, or choose another --out; nothing was changed",
        )
    check_folder(path)
    if is_cache(path):
        return False
    if os.path.lexists(path) and not (path.is_dir() and _is_free(path)):
        raise TargetExists(
            f"{path} exists and is not a kdcache cache",
            "a free path, an empty folder, or a cache",
            "choose another --out; nothing was changed",
        )
    return True


def _same_dump(path: Path, manifest: Manifest, *, repair: bool, exact_versions: bool) -> Manifest | None:
    if check_free(path):
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
    if changes := differences(portable(found), portable(manifest), ignore=ignore):
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
        results = {name: recorded[name] for name in _RECORDED}
        results |= {name: recorded[name] for name in _RECORDED_IF_THERE if name in recorded}
        own = {name: value for name, value in to_json(manifest).items() if name not in _RECORDED_IF_THERE}
        dataset = {name: recorded["dataset"][name] for name in ("data_root", "labels_sha256")}
        teacher = {"accuracy": recorded["teacher"]["accuracy"]}
        # An older version wrote paths into both.
        for found, part, name in ((dataset, "dataset", "name"), (teacher, "teacher", "spec")):
            if portable_spec(recorded[part][name]) == own[part][name]:
                found[name] = recorded[part][name]
        candidate = from_json(
            Manifest,
            own | results | {"dataset": own["dataset"] | dataset, "teacher": own["teacher"] | teacher},
            where=str(split_path),
            error=CacheDamaged,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return candidate if manifest_sha256(candidate) == attribute.get("sha256") else None


def check_proof(path: Path, attribute: dict[str, Any], problem: CacheDamaged) -> None:
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
    return all(entry.name == file_lock.NAME or entry.name == METADATA + TEMPORARY for entry in folder.iterdir())
