"""Size, loss and reading speed of the encodings, on made logits with the statistics of a trained network's."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kdcache.core.config import ConvertConfig
from kdcache.core.progress import muted
from kdcache.store.cache import Cache, open_cache
from kdcache.store.convert import convert_cache
from kdcache.store.encodings.base import LOGITS
from kdcache.store.row_source import ReadOptions, plan_reading
from kdcache.store.sampler import always, batches_of
from tests.benchmarks.stores import BATCH, write_cache

SPECS = (
    "float16",
    "quantized:8",
    "quantized:6",
    "quantized:5",
    "quantized:4",
    "topk:100",
    "topk:20",
    "topk:10",
    "topk:5",
)
SIZES = {10: 8192, 100: 8192, 1000: 4096, 21_841: 256}
READ_ROWS, READ_CLASSES = 49_152, 1000
READ = ("float16", "quantized:8", "quantized:4", "topk:20")


def run(*, rounds: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for classes, rows in SIZES.items():
            _sizes(Path(folder) / str(classes), classes, rows)
        _speed(Path(folder), min(rounds, 5))


def _sizes(folder: Path, classes: int, rows: int) -> None:
    """Bytes per row on disk in the default compression, and mean KL to float16."""
    folder.mkdir()
    write_cache(folder / "float16", rows=rows, classes=classes, compression="none")
    print(f"{classes:,} classes, {rows:,} rows: bytes per row on disk; mean KL in nats at T = 1, 2, 4, 8")
    for spec in SPECS:
        if spec.startswith("topk") and int(spec.split(":")[1]) >= classes:
            continue
        path = _converted(folder, spec)
        manifest = open_cache(path).manifest
        own = [array.name for array in manifest.arrays if array.name.startswith(LOGITS)]
        stored = sum(
            file.stat().st_size for name in own for file in (path / "train" / name / "c").rglob("*") if file.is_file()
        )
        losses = ", ".join(f"{each.mean_kl:.1e}" for each in manifest.fidelity) or "0 (the source)"
        print(f"  {spec:<12} {stored / rows:>10,.0f}   {losses}", flush=True)


def _converted(folder: Path, spec: str) -> Path:
    path = folder / spec.replace(":", "-")
    if not path.exists():
        with muted():
            convert_cache(folder / "float16", path, ConvertConfig(encoding=spec))
    return path


def _speed(folder: Path, rounds: int) -> None:
    """Rows per second of one epoch, in turn: what a training step on the CPU gets, and decoding alone."""
    write_cache(folder / "float16", rows=READ_ROWS, classes=READ_CLASSES, compression="none")
    ways: dict[str, Callable[[], tuple[float, float]]] = {}
    for spec in READ:
        cache = open_cache(_converted(folder, spec))
        for source in ("memory", "streamed"):
            ways[f"{spec}, {source}, as stored"] = lambda cache=cache, source=source: _epoch(cache, source, False)
            ways[f"{spec}, {source}, decoded"] = lambda cache=cache, source=source: _epoch(cache, source, True)
        ways[f"{spec}, decoded by torch"] = lambda cache=cache: _torch(cache)
    measured: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, once in ways.items():
            result = once()
            if turn:  # the first one does not count
                measured[way].append(result)
    threads = torch.get_num_threads()
    print(f"{READ_ROWS:,} × {READ_CLASSES}, shuffled batches of {BATCH}, {rounds} rounds, medians, {threads} threads")
    base = measured["float16, streamed, decoded"]
    for way, results in measured.items():
        ratios = [own / reference for (own, _), (reference, _) in zip(results, base, strict=True)]
        rate, cpu = (statistics.median(each) for each in zip(*results, strict=True))
        print(
            f"  {way:<34} {rate:>11,.0f} rows/s  {cpu:>7.2f} CPU µs per row  × float16 streamed "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def _epoch(cache: Cache, source: str, decode: bool) -> tuple[float, float]:
    part = cache.reader, cache.logit_arrays
    plan = plan_reading([part], ReadOptions(row_source=source))
    sampler = plan.sampler(cache.samples(), 0)
    rows = plan.source(part, always(0), sampler)
    began, cpu = time.perf_counter(), time.process_time()
    rows.start_epoch(0)
    for indices in batches_of(sampler, 0, BATCH):
        stored = rows.rows(indices)
        if decode:
            cache.encoding.decode(stored)
    return len(cache) / (time.perf_counter() - began), 1e6 * (time.process_time() - cpu) / len(cache)


def _torch(cache: Cache) -> tuple[float, float]:
    """Decoding alone, of batches in memory, as on the device of a student."""
    stored = {name: torch.from_numpy(cache.reader.rows(name, 0, np.arange(BATCH))) for name in cache.logit_arrays}
    count = 64
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        cache.encoding.decode(stored)
    rows = count * BATCH
    return rows / (time.perf_counter() - began), 1e6 * (time.process_time() - cpu) / rows
