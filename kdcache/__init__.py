"""Run a teacher once, keep its logits in a chunked Zarr store, train any number of students from them.

Names are imported when they are first used, so that opening a cache needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache import losses
    from kdcache.cache.feeds import FeedChoice
    from kdcache.cache.manifest import Manifest, Preprocess
    from kdcache.cache.reader import Cache, cache_splits, open_cache
    from kdcache.config import DumpConfig, StudentConfig, TrainConfig
    from kdcache.dump import DumpResult, dump_teacher, plan_dump
    from kdcache.errors import KdcacheError
    from kdcache.joined import join
    from kdcache.student import train_student
    from kdcache.training import TrainResult

_HOMES = {
    "Cache": "kdcache.cache.reader",
    "DumpConfig": "kdcache.config",
    "DumpResult": "kdcache.dump",
    "FeedChoice": "kdcache.cache.feeds",
    "KdcacheError": "kdcache.errors",
    "Manifest": "kdcache.cache.manifest",
    "Preprocess": "kdcache.cache.manifest",
    "StudentConfig": "kdcache.config",
    "TrainConfig": "kdcache.config",
    "TrainResult": "kdcache.training",
    "cache_splits": "kdcache.cache.reader",
    "dump_teacher": "kdcache.dump",
    "join": "kdcache.joined",
    "losses": "kdcache",
    "open_cache": "kdcache.cache.reader",
    "plan_dump": "kdcache.dump",
    "train_student": "kdcache.student",
}

__all__ = [
    "Cache",
    "DumpConfig",
    "DumpResult",
    "FeedChoice",
    "KdcacheError",
    "Manifest",
    "Preprocess",
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
    if _HOMES[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)
