"""Checks of a command's settings that need no torch, so that a wrong path or name is refused before its import.

What is checked here is checked again, in full, where it is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kdcache.core.commands import DumpTeacherArgs, TrainStudentArgs, TrainTeacherArgs
from kdcache.core.config import DATASET_NAMES, MODEL_NAMES
from kdcache.core.errors import CheckpointError, DatasetError, ModelError, UsageError
from kdcache.core.options import Settings
from kdcache.core.plugins import did_you_mean
from kdcache.core.specs import parse_bytes, split_spec
from kdcache.core.workers import launched_process, restarts


def check_early(settings: Settings) -> None:
    """Refuse paths, names and sizes that cannot be right.

    Raises:
        KdcacheError: the error that the command itself would raise after importing torch.
    """
    given = {name: value for name, value in vars(settings).items() if value not in (None, "", ())}
    _check_names(given)
    _check_files(given)
    _check_caches(settings, given)
    _check_runs(settings, given)


def _check_names(given: dict[str, Any]) -> None:
    device = given.get("device", "auto")
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu|hpu|mtia)(:\d+)?", device):
        raise UsageError(f"--device is {device!r}", "auto, cpu, cuda, cuda:N or mps")
    for name in ("cache_memory", "cache_disk", "input_memory"):
        parse_bytes(given.get(name, "0"))
    if "encoding" in given:
        from kdcache.store.encodings.registry import encoding_named

        # The number of classes is not known yet.
        encoding_named(given["encoding"], 1 << 31, given.get("temperatures", ()))
    dataset = given.get("dataset", "py:")
    kind, path = split_spec(dataset)
    if kind in ("folder", "text-folder") and not Path(path or "").is_dir():
        raise DatasetError(
            f"{dataset}: {Path(path or '').absolute()} is no folder", "a folder of split folders", "correct the path"
        )
    if kind == "csv" and not Path(path or "").is_file():
        raise DatasetError(f"{dataset}: {Path(path or '').absolute()} is no file", "a csv file", "correct the path")
    if ":" not in dataset and dataset not in DATASET_NAMES:
        raise DatasetError(
            f"there is no dataset {dataset!r}",
            f"{', '.join(DATASET_NAMES)}, folder:PATH, text-folder:PATH, csv:FILE, hf-dataset:NAME or "
            "py:package.module:function",
            did_you_mean(dataset, list(DATASET_NAMES)),
        )
    for name in ("model", "teacher", "student"):
        spec = given.get(name, "py:")
        if ":" not in spec and spec not in MODEL_NAMES:
            raise ModelError(
                f"there is no model {spec!r}",
                f"{', '.join(MODEL_NAMES)}, torchvision:NAME, timm:NAME, hf:NAME or py:package.module:factory",
                did_you_mean(spec, list(MODEL_NAMES)),
            )


def _check_files(given: dict[str, Any]) -> None:
    if "checkpoint" in given and not (path := Path(given["checkpoint"])).is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}", "a .pt, .pth or .safetensors file", "correct the path")
    if "tokenizer" in given and not (path := Path(given["tokenizer"])).is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"{path} {what}", "a tokenizer.json", "correct the path")


def _check_caches(settings: Settings, given: dict[str, Any]) -> None:
    caches = given.get("cache", ())
    if caches:
        from kdcache.store.cache import cache_splits, open_cache

        for path in (caches,) if isinstance(caches, str) else caches:
            if isinstance(settings, TrainStudentArgs):
                open_cache(path, "train", allow_partial=settings.allow_partial)
            else:
                cache_splits(path)
    if isinstance(settings, DumpTeacherArgs) and not settings.list_layers:
        from kdcache.store.resume import check_free
        from kdcache.store.storage.registry import open_storage

        check_free(open_storage(settings.out))


def _check_runs(settings: Settings, given: dict[str, Any]) -> None:
    from kdcache.core.run_dir import RunFolder, read_config

    runs = [given["run"]] if "run" in given else given.get("runs", ())
    for path in runs:
        read_config(Path(path))
    if not isinstance(settings, TrainTeacherArgs | TrainStudentArgs) or settings.resume or restarts():
        return
    if launched_process().index == 0:
        RunFolder(Path(settings.out), {}, resume=False)
