"""What is already stored where a split is to be written: the same dump, another one, or the rest of a damaged one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from kdcache.core.errors import CacheDamaged, CacheIncomplete, CacheNotFound, TargetExists, UsageError
from kdcache.core.json_records import brief, counted, differences, from_json, to_json
from kdcache.store.claims import is_worked_on
from kdcache.store.ledger import NAME as LEDGER
from kdcache.store.ledger import Ledger
from kdcache.store.local_paths import portable, portable_spec
from kdcache.store.manifest import (
    ATTRIBUTE,
    METADATA,
    NOT_IDENTITY,
    Manifest,
    enclosing_cache,
    is_cache,
    manifest_sha256,
    read_manifest,
    recorded_sha256,
)
from kdcache.store.records import ChangeRecord
from kdcache.store.storage.base import MissingKey, Storage

_TERMS = ("license", "citation")
# Fields that come out of a dump or tell how it was carried out: taken from what is left of a damaged manifest.
_RECORDED = ("views", "view_sha256", "device", "batch_size", "versions")
_RECORDED_IF_THERE = (
    "encoding",
    "compute",
    "history",
    "facts",
    "fidelity",
    "changed_predictions",
    "precision",
    "memory_format",
    *_TERMS,
)

# Key in the record of a change of device: how many shards were committed before.
COMMITTED = "committed_shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePolicy:
    """How a dump treats what is already stored.

    Attributes:
        repair: Check everything, and compute again what is broken or missing.
        add_views: Number of views to add to a finished split.
        allow_device_change: Let another device, or other settings of it, compute what is missing.
        accept_new_bytes: With `repair`, replace committed rows by recomputed ones that differ.
        shared: Other workers write to the split too.
    """

    repair: bool = False
    add_views: int = 0
    allow_device_change: bool = False
    accept_new_bytes: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if self.shared and self.repair:
            raise UsageError(
                "--repair is given to one of several workers", "one process", "repair without --worker and launcher"
            )
        if self.accept_new_bytes and not self.repair:
            raise UsageError("accept_new_bytes is given without repair", "both, or neither", "give repair=True")


def find_dump(root: Storage, manifest: Manifest, policy: ResumePolicy) -> Manifest | None:
    """The manifest of the same dump that is already stored, None where the place is free; reads only.

    A dump may ask for fewer views than are stored: it was extended since. What the caller has to write (more views, an
    allowed change of device, other terms of use) is in the result already. With `policy.repair` a damaged manifest
    gives `manifest` itself, for which `SplitWriter.finish` asks for proof.

    Raises:
        TargetExists: something else is stored, or rows of another device.
        CacheNotFound, CacheIncomplete: there is nothing to add views to, or its dump has not finished.
        CacheDamaged: what is stored cannot be read.
    """
    split = manifest.dataset.split
    place = root.place(split)
    found = _same_dump(root, manifest, policy)
    target = _with_views(place, found, manifest, policy.add_views)
    if target is None or target is manifest:
        return target
    # A finished split is only read, and what repairs it must give the committed bytes.
    if not target.complete or (policy.add_views and target.extending):
        target = _on_device(root, target, manifest, policy)
    return _with_terms(root, target, manifest)


def _with_views(split: str, found: Manifest | None, manifest: Manifest, add_views: int) -> Manifest | None:
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


def _with_room(split: str, found: Manifest | None, views: int, add_views: int) -> Manifest:
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


def _on_device(root: Storage, found: Manifest, manifest: Manifest, policy: ResumePolicy) -> Manifest:
    """The stored manifest, to be continued on the device of `manifest`; with the change recorded if it is another.

    Several workers do not change the manifest: their devices are in the parts of the ledger, and recorded by the seal.
    """
    storage = root.below(found.dataset.split)
    old, new = found.compute, manifest.compute
    if not old:  # by an older version, which recorded the kind of device alone
        old, new = {"device": _kind(found)}, {"device": _kind(manifest)}
    changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if not changed:
        return found
    ledger = Ledger(storage, replace(found, views=max(found.readable_views, 1)), salvage=True)
    shards = sum(int(ledger.committed(view).sum()) for view in range(found.readable_views))
    result = replace(found, compute=manifest.compute, device=manifest.device)
    if not shards and not policy.shared and not is_worked_on(storage):
        return result  # no row of the other device is there
    if policy.allow_device_change and policy.shared:
        return found
    if not policy.allow_device_change:
        begun = f"has {counted(shards, 'shard')} that another device or other settings computed"
        raise TargetExists(
            f"{storage.url} {begun if shards else 'is being dumped on another device or with other settings'}: "
            + "; ".join(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here" for name in changed),
            "one device with one set of settings for all rows: others give other last bits",
            "go on where it was begun, or give --allow-device-change, which the manifest records; nothing was changed",
        )
    change = ChangeRecord(
        what="device",
        before={name: old[name] for name in changed if name in old} | {COMMITTED: str(shards)},
        after={name: new[name] for name in changed if name in new},
    )
    return replace(result, history=(*found.history, change))


def _kind(manifest: Manifest) -> str:
    """Such as `cuda`."""
    return manifest.compute.get("device") or manifest.device.partition(":")[0]


def _with_terms(root: Storage, found: Manifest, manifest: Manifest) -> Manifest:
    """The stored manifest with the license and citation that were given; what was not given stays."""
    given = {name: getattr(manifest, name) for name in _TERMS}
    after = {name: text for name, text in given.items() if text and text != getattr(found, name)}
    if not after:
        return found
    history = found.history
    if found.complete:
        before = {name: getattr(found, name) for name in after} | {
            "manifest_sha256": recorded_sha256(root, found.dataset.split)
        }
        history = (*history, ChangeRecord(what="terms", before=before, after=after))
    return replace(found, history=history, **after)


def check_free(root: Storage) -> bool:
    """Whether a storage is free for a new cache; False where it holds a cache.

    Raises:
        TargetExists: it holds something else.
        CacheDamaged: it holds a cache that cannot be read.
    """
    if (cache := enclosing_cache(root)) is not None:
        raise TargetExists(
            f"{root.url} lies inside the cache {cache}",
            "the cache itself; a split is a folder in it",
            f"give --out {cache} --split NAME, or choose another --out; nothing was changed",
        )
    root.check_root()
    if root.is_empty():
        return True
    # Asked for last: another worker may make it at any moment.
    if is_cache(root):
        return False
    raise TargetExists(
        f"{root.url} exists and is not a kdcache cache",
        "a free path, an empty folder, or a cache",
        "choose another --out; nothing was changed",
    )


def _same_dump(root: Storage, manifest: Manifest, policy: ResumePolicy) -> Manifest | None:
    if check_free(root):
        return None
    split = manifest.dataset.split
    if only_created(root.below(split)):
        return None
    try:
        found = read_manifest(root, split)
    except CacheDamaged:
        if policy.repair:
            return recorded_manifest(root.below(split), manifest) or manifest
        raise
    # A finished split is only read, so another version of a package cannot mix two kinds of rows in it.
    exact_versions = policy.repair or policy.add_views > 0 or not found.complete
    ignore = NOT_IDENTITY | (set() if exact_versions else {"versions"})
    if policy.shared and not found.complete:
        ignore -= {"batch_size"}  # on which the last bits depend
    if None in (found.dataset.labels_sha256, manifest.dataset.labels_sha256):
        ignore |= {"dataset.labels_sha256"}
    if changes := differences(portable(found), portable(manifest), ignore=ignore):
        raise TargetExists(
            f"{root.place(split)} holds another dump: "
            + "; ".join(f"{field} is {brief(old)} there and {brief(new)} here" for field, old, new in changes[:8]),
            "the same settings to continue or keep it",
            "choose another --out, or give the settings it was made with; nothing was changed",
        )
    return found


def recorded_manifest(group: Storage, manifest: Manifest) -> Manifest | None:
    """The manifest that a damaged one was, if what is left of it proves that it was of this dump; None if nothing does.

    What a dump is of is known from the dump; what came out of it is taken from what is recorded. Together they are it
    if they have the recorded sha256, or if the recorded settings are those of this dump.
    """
    try:
        attribute = json.loads(group.read(METADATA))["attributes"][ATTRIBUTE]
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
            where=group.url,
            error=CacheDamaged,
        )
    except (MissingKey, ValueError, KeyError, TypeError, AttributeError):
        return None
    return candidate if manifest_sha256(candidate) == attribute.get("sha256") else None


def check_proof(group: Storage, attribute: dict[str, Any], problem: CacheDamaged) -> None:
    """Let a manifest replace a damaged one only if it is the same: by its sha256, or by what is left of it."""
    try:
        recorded = group.read(METADATA)
        if attribute["sha256"].encode() in recorded:
            return
        if json.loads(recorded)["attributes"][ATTRIBUTE]["manifest"] == attribute["manifest"]:
            return
    except (MissingKey, ValueError, KeyError, TypeError):
        pass
    raise CacheDamaged(
        f"{problem.found}; the manifest that this dump would write is another one",
        "proof that the split is of this dump: the recorded sha256, or the recorded manifest",
        "give the very command and versions that made it, or dump again into another folder",
    ) from problem


def only_created(group: Storage) -> bool:
    """Whether a split is not stored, or was being created when the process was killed: it has no rows and no manifest.

    A split's manifest is the last object of its creation, and its ledger is written with the first rows.
    """
    keys = [key for key, _ in group.objects()]
    return METADATA not in keys and not any(key.startswith(f"{LEDGER}/c/") for key in keys)
