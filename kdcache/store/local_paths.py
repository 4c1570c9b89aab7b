"""Paths of the machine that made a cache, kept beside the manifest and not part of its hash."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.store.encodings.registry import encoding_of
from kdcache.store.manifest import Manifest, group_attribute
from kdcache.store.storage.base import Storage

LOCAL = "local"
_FOLDERS = ("folder", "text-folder", "csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPaths:
    """Location of a split's dataset at the time of the dump.

    Attributes:
        dataset: spec of the dataset, with the path of a folder.
        data_root: folder of the named datasets; None where there was none.
    """

    dataset: str
    data_root: str | None = None

    def attribute(self) -> dict[str, Any]:
        """Entry beside the manifest in the group's attribute."""
        return {LOCAL: {"dataset": self.dataset, "data_root": self.data_root}}


def portable_spec(spec: str) -> str:
    """A dataset's or a model's spec without the path of a machine: a folder is named by its last component.

    `folder:/home/me/pets/` gives `folder:pets`; names, `py:` functions and names on a hub stay as they are.
    """
    kind, colon, path = spec.partition(":")
    if kind not in _FOLDERS or not colon:
        kind, colon, path = spec.rpartition(":")
        if not path.startswith((os.sep, "~", "./", "../")):
            return spec
    return f"{kind}{colon}{Path(os.path.abspath(os.path.expanduser(path))).name}"


def portable(manifest: Manifest) -> Manifest:
    """A manifest in the current form: without paths, and with the name of its encoding."""
    return replace(
        manifest,
        encoding=encoding_of(manifest).spec,
        dataset=replace(manifest.dataset, name=portable_spec(manifest.dataset.name), data_root=None),
        teacher=replace(manifest.teacher, spec=portable_spec(manifest.teacher.spec)),
    )


def read_local(group: Storage, manifest: Manifest) -> LocalPaths:
    """Recorded location of a split's dataset: beside the manifest, or inside one by an older version.

    Nothing checks these paths, so a recorded spec counts only where it is one of the manifest's dataset.
    """
    record = manifest.dataset
    recorded = group_attribute(group).get(LOCAL)
    found = recorded if isinstance(recorded, dict) else {}
    dataset, data_root = found.get("dataset"), found.get("data_root")
    if not isinstance(dataset, str) or portable_spec(dataset) != portable_spec(record.name):
        dataset = record.name
    return LocalPaths(dataset=dataset, data_root=data_root if isinstance(data_root, str) else record.data_root)
