"""Run a teacher once, keep its logits in a chunked Zarr store, train any number of students from them.

Names are imported when they are first used, so that opening a cache needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.core.config import DumpConfig, StudentConfig, TrainConfig
    from kdcache.core.errors import KdcacheError
    from kdcache.distill import losses
    from kdcache.distill.student.joined_dataset import join
    from kdcache.distill.student.train_student import train_student
    from kdcache.distill.teacher.dump import DumpResult, dump_teacher, plan_dump
    from kdcache.distill.trainer import TrainResult
    from kdcache.store.cache import Cache, cache_splits, open_cache
    from kdcache.store.manifest import Manifest
    from kdcache.store.records import Preprocess
    from kdcache.store.row_source import ReadOptions

_HOMES = {
    "Cache": "kdcache.store.cache",
    "DumpConfig": "kdcache.core.config",
    "DumpResult": "kdcache.distill.teacher.dump",
    "KdcacheError": "kdcache.core.errors",
    "Manifest": "kdcache.store.manifest",
    "Preprocess": "kdcache.store.records",
    "ReadOptions": "kdcache.store.row_source",
    "StudentConfig": "kdcache.core.config",
    "TrainConfig": "kdcache.core.config",
    "TrainResult": "kdcache.distill.trainer",
    "cache_splits": "kdcache.store.cache",
    "dump_teacher": "kdcache.distill.teacher.dump",
    "join": "kdcache.distill.student.joined_dataset",
    "losses": "kdcache.distill.losses",
    "open_cache": "kdcache.store.cache",
    "plan_dump": "kdcache.distill.teacher.dump",
    "train_student": "kdcache.distill.student.train_student",
}

# Public names that are modules themselves.
_MODULES = frozenset({"losses"})

__all__ = [
    "Cache",
    "DumpConfig",
    "DumpResult",
    "KdcacheError",
    "Manifest",
    "Preprocess",
    "ReadOptions",
    "StudentConfig",
    "TrainConfig",
    "TrainResult",
    "cache_splits",
    "dump_teacher",
    "join",
    "losses",
    "open_cache",
    "plan_dump",
    "train_student",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name in _MODULES else getattr(module, name)
