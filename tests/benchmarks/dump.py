"""What a dump costs beyond the teacher's bare forward pass over the same loader."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from kdcache.core.config import DumpConfig
from kdcache.data.loader import batch_loader, consecutive_batches
from kdcache.data.preprocess import Preprocessor
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.models.device import evaluation_mode, floating_dtype, resolve_device, synchronize
from tests.benchmarks.data import IMAGE, images, network
from tests.benchmarks.stores import BATCH, logits, write_cache
from tests.benchmarks.timing import side_by_side

SAMPLES = 60_000


def run(*, rounds: int, device: str) -> None:
    dataset, teacher = images(SAMPLES), network("cnn")
    config = DumpConfig(device=device)
    target_device = resolve_device(device)
    preprocessor = Preprocessor(IMAGE)
    batches = consecutive_batches(np.arange(SAMPLES), config.batch_size)

    def bare() -> float:
        began = time.perf_counter()
        module = teacher.to(target_device)
        with evaluation_mode(module):
            for batch in batch_loader(dataset, batches, preprocessor=preprocessor, device=target_device):
                module(preprocessor.per_batch(batch.to(target_device).inputs, floating_dtype(module)))
        synchronize(target_device)
        return time.perf_counter() - began

    def dumped() -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.zarr"
            return dump_teacher(teacher, dataset, out=path, preprocess=IMAGE, config=config).seconds

    side_by_side(
        {"bare forward pass": bare, "dump": dumped},
        rounds=rounds,
        what=f"a cnn teacher over {SAMPLES:,} MNIST-shaped samples, batch {config.batch_size}, {target_device}",
        target={"dump": "target ≤ 1.05"},
    )
    _appends()


def _appends() -> None:
    """Whole shards against what a loop that writes each batch as it comes would do to the same layout."""
    import zarr

    rows, classes = 32_768, 1000
    with tempfile.TemporaryDirectory() as folder:
        buffered = rows / write_cache(Path(folder) / "buffered.zarr", rows=rows, classes=classes, compression="none")
        some = 4096
        write_cache(Path(folder) / "appended.zarr", rows=rows, classes=classes, compression="none")
        array = zarr.open_group(Path(folder) / "appended.zarr", mode="r+")["train/logits"]
        values = logits(range(some), classes)
        began = time.perf_counter()
        for start in range(0, some, BATCH):
            array[0, start : start + BATCH] = values[start : start + BATCH]
        appended = some / (time.perf_counter() - began)
    print(
        f"writing {classes} classes: whole shards, flushed, {buffered:,.0f} rows/s; batches of {BATCH} into the same "
        f"layout {appended:,.0f} rows/s: × {buffered / appended:.0f}  target ≥ 40"
    )
