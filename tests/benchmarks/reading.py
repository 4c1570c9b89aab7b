"""Reading 200,000 rows of 1000 float16 logits in shuffled batches of 256: our reader in each way, and what others use.

Every measurement is a process of its own, in turn, so that memory is its own and ratios are of one time.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks.stores import BATCH, CLASSES, ROWS, make_stores

# (way, what its ratio to the raw memory-map is hoped to be)
WAYS = {
    "raw memory-map": "the limit",
    "kdcache memory": "target ≥ 0.9",
    "kdcache streamed": "target ≥ 0.7",
    "kdcache streamed, zstd": "target ≥ 0.45",
    "zarr fancy indexing": "target: ours ≥ 100 ×",
    "h5py": "",
    "LMDB": "",
    "one file a sample": "",
}
SLOW_S = 3.0
Reader = Callable[[np.ndarray], np.ndarray]


def run(*, rounds: int, device: str) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        make_stores(folder)
        measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(min(rounds, 5)):
            for way in WAYS:
                code = f"from tests.benchmarks.reading import measure; measure({str(folder)!r}, {way!r})"
                done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
                measured[way].append(json.loads(done.stdout))
        print(f"{ROWS:,} × {CLASSES} float16, shuffled batches of {BATCH}, second epoch, medians")
        for way, results in measured.items():
            middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
            ratios = [
                own["rows_s"] / limit["rows_s"] for own, limit in zip(results, measured["raw memory-map"], strict=True)
            ]
            print(
                f"  {way:<24} {middle['rows_s']:>11,.0f} rows/s  {middle['cpu_us']:>8.2f} CPU µs a row  "
                f"{middle['memory_mb']:>6.0f} MB over baseline  × {statistics.median(ratios):.4f} "
                f"({min(ratios):.4f} to {max(ratios):.4f})  {WAYS[way]}"
            )
        _open_to_first_batch()
    finally:
        shutil.rmtree(folder)


def measure(folder: str, way: str) -> None:
    """Print rows/s, CPU µs a row and memory over baseline of one way, as JSON."""
    if way.startswith("kdcache"):
        from kdcache.store import cache, row_source  # noqa: F401  # their import is not memory of reading
    baseline = _memory_mb()
    batches, read = _open(Path(folder), way)
    highest = 0.0
    for number, indices in enumerate(batches(0)):
        read(indices)
        if number % 20 == 0:
            highest = max(highest, _memory_mb())
        if way in ("zarr fancy indexing", "one file a sample"):
            break
    rows, began, cpu = 0, time.perf_counter(), time.process_time()
    for indices in batches(1):
        rows += len(read(indices))
        if time.perf_counter() - began > SLOW_S:
            break
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    result = {"rows_s": rows / seconds, "cpu_us": cpu_s / rows * 1e6, "memory_mb": highest - baseline}
    print(json.dumps(result))


def _open(folder: Path, way: str) -> tuple[Callable[[int], Iterator[np.ndarray]], Reader]:
    if way.startswith("kdcache"):
        return _open_ours(folder, way)

    def batches(epoch: int) -> Iterator[np.ndarray]:
        order = np.random.default_rng(epoch).permutation(ROWS)
        return (order[at : at + BATCH] for at in range(0, ROWS, BATCH))

    if way == "raw memory-map":
        raw = np.memmap(folder / "raw", np.float16, "r", shape=(ROWS, CLASSES))
        return batches, lambda indices: raw[indices]
    if way == "zarr fancy indexing":
        import zarr

        array = zarr.open_group(folder / "plain.zarr", mode="r")["train/logits"]
        return batches, lambda indices: array.oindex[0, indices]
    if way == "h5py":
        import h5py

        data = h5py.File(folder / "h5", "r")["logits"]

        def read_h5(indices: np.ndarray) -> np.ndarray:
            order = np.argsort(indices)  # h5py takes ascending indices only
            result = np.empty((len(indices), CLASSES), np.float16)
            result[order] = data[indices[order]]
            return result

        return batches, read_h5
    if way == "LMDB":
        import lmdb

        transaction = lmdb.open(str(folder / "lmdb"), readonly=True, lock=False, readahead=False).begin(buffers=True)

        def read_lmdb(indices: np.ndarray) -> np.ndarray:
            rows = [np.frombuffer(transaction.get(int(i).to_bytes(8, "big")), np.float16) for i in indices]
            return np.stack(rows)

        return batches, read_lmdb
    files = folder / "files"
    count = len(os.listdir(files))
    return batches, lambda indices: np.stack([np.fromfile(files / str(i % count), np.float16) for i in indices])


def _open_ours(folder: Path, way: str) -> tuple[Callable[[int], Iterator[np.ndarray]], Reader]:
    from kdcache.store.cache import open_cache
    from kdcache.store.row_source import ReadOptions, plan_reading
    from kdcache.store.sampler import always, batches_of

    kind, _, compression = way.removeprefix("kdcache ").partition(", ")
    cache = open_cache(folder / (f"{compression or 'plain'}.zarr"))
    part = cache.reader, cache.logit_arrays
    plan = plan_reading([part], ReadOptions(row_source=kind))
    sampler = plan.sampler(cache.samples(), 0)
    source = plan.source(part, always(0), sampler)

    def batches(epoch: int) -> Iterator[np.ndarray]:
        source.start_epoch(epoch)
        return batches_of(sampler, epoch, BATCH)

    return batches, lambda indices: cache.encoding.decode(source.rows(indices))


def _memory_mb() -> float:
    """Resident memory of this process in MB, with the pages of mapped files that it holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def _open_to_first_batch() -> None:
    code = """
import sys, time
from pathlib import Path
from kdcache.store.cache import open_cache
began = time.perf_counter()
next(open_cache(sys.argv[1]).epoch(0, batch_size=256))
print(1000 * (time.perf_counter() - began))
"""
    with tempfile.TemporaryDirectory() as folder:
        from tests.benchmarks.stores import write_cache

        write_cache(Path(folder) / "c.zarr", rows=50_000, classes=100, compression="none")
        command = [sys.executable, "-c", code, str(Path(folder) / "c.zarr")]
        times = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(5)]
    print(f"open to first batch, 50,000 × 100: median {statistics.median(times):.1f} ms  target < 50 ms")
