"""Reading a cache from an S3 server on this machine against local files: rows per second, requests, bytes moved.

Before that, dumps to the server are killed at random instants and continued.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import numpy as np

from kdcache.store.cache import Cache, open_cache
from kdcache.store.encodings.registry import KINDS
from kdcache.store.layout import build_arrays
from kdcache.store.manifest import Manifest
from kdcache.store.records import DatasetRecord, Preprocess, TeacherRecord
from kdcache.store.row_source import ReadOptions
from kdcache.store.storage.object_store import ObjectStorage
from kdcache.store.storage.registry import open_storage
from kdcache.store.writer import SplitWriter

ROWS, CLASSES, KILLS = 65_536, 1000, 20
BUCKET = "benchmark"


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server with one bucket, its address and credentials in the environment; the bucket's URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert server.poll() is None, "the S3 server ended"
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=10).close()
                break
            except OSError:
                time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=10).close()
        os.environ |= {
            "AWS_ENDPOINT_URL": address,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        yield f"s3://{BUCKET}"
    finally:
        server.kill()
        server.wait()


def run(*, rounds: int, device: str) -> None:
    with s3_server() as bucket, tempfile.TemporaryDirectory() as folder:
        work = f"random_kills_at({bucket!r}, {KILLS})"
        kills = f"import json; from tests.crashes import random_kills_at; print(json.dumps({work}))"
        done = subprocess.run([sys.executable, "-c", kills], check=True, capture_output=True, text=True)
        print(f"dumps to S3, killed at random instants and continued: {done.stdout.strip()}, all equal to the byte")
        print(f"{ROWS:,} × {CLASSES} float16, shuffled batches of 256, local S3 server (moto), medians", flush=True)
        for compression in ("none", "zstd:1"):
            local, remote = f"{folder}/{compression[:4]}.zarr", f"{bucket}/{compression[:4]}.zarr"
            for place in (local, remote):
                _write(place, compression)
            for row_source in ("streamed", "memory"):
                _compare(local, remote, row_source, min(rounds, 5), compression)
        _kept_on_disk(f"{bucket}/none.zarr", f"{folder}/kept")


def _write(place: str, compression: str) -> None:
    """A cache of random rows."""
    shard_rows, arrays = build_arrays(
        length=ROWS, encoding=KINDS["float16"], classes=CLASSES, compression=compression, shard_rows=None
    )
    manifest = Manifest(
        dataset=DatasetRecord(
            name="random",
            split="train",
            length=ROWS,
            classes=tuple(map(str, range(CLASSES))),
            input_dtype="uint8",
            input_shape=(1, 2, 2),
            sample_sha256="00",
        ),
        teacher=TeacherRecord(spec="teacher", weights_sha256="11", parameters=1, preprocess=Preprocess()),
        views=1,
        arrays=arrays,
        encoding="float16",
        shard_rows=shard_rows,
        seed=0,
        amp="off",
        device="cpu",
        batch_size=2,
        versions={},
    )
    with SplitWriter(place, manifest) as writer:
        for view, shard in writer.pending():
            rows, random = len(manifest.rows_of(shard)), np.random.default_rng(shard)
            shapes = {array.name: ((rows, *array.row_shape), array.dtype) for array in arrays}
            parts = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
            parts["logits"] = random.standard_normal(shapes["logits"][0]).astype("float16")
            writer.commit(view, shard, parts)
        writer.finish(replace(manifest, view_sha256=(writer.ledger.digest(0),)))


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes of each range read of object stores."""
    made: list[int] = []
    original = ObjectStorage.read_range

    def read_range(self: ObjectStorage, key: str, start: int, *outs: memoryview, size: int) -> None:
        made.append(sum(out.nbytes for out in outs))
        original(self, key, start, *outs, size=size)

    ObjectStorage.read_range = read_range  # type: ignore[method-assign]
    try:
        yield made
    finally:
        ObjectStorage.read_range = original  # type: ignore[method-assign]


def _epoch_s(cache: Cache, row_source: str, epoch: int) -> float:
    began = time.perf_counter()
    rows = sum(len(targets) for _, targets in cache.epoch(epoch, options=ReadOptions(row_source=row_source)))
    assert rows == ROWS
    return time.perf_counter() - began


def _compare(local: str, remote: str, row_source: str, rounds: int, compression: str) -> None:
    caches = {"local": open_cache(local), "S3": open_cache(remote)}
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    with _counted() as made:
        for epoch in range(rounds):
            for name, cache in caches.items():
                seconds[name].append(_epoch_s(cache, row_source, epoch))
    ratios = [there / here for here, there in zip(seconds["local"], seconds["S3"], strict=True)]
    stored = sum(size for _, size in open_storage(remote).objects("train/logits/c"))
    print(
        f"  {row_source:<9} {compression:<7} local {ROWS / median(seconds['local']):>10,.0f} rows/s  "
        f"S3 {ROWS / median(seconds['S3']):>9,.0f} rows/s  S3 takes × {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})  {len(made) / rounds:,.0f} requests an epoch  "
        f"bytes moved / stored {sum(made) / rounds / stored:.4f}",
        flush=True,
    )


def _kept_on_disk(remote: str, folder: str) -> None:
    cache = open_cache(remote, cache_dir=folder)
    with _counted() as made:
        first = _epoch_s(cache, "streamed", 0)
        requests = len(made)
        second = _epoch_s(open_cache(remote, cache_dir=folder), "streamed", 1)
    print(
        f"  with a cache_dir: first epoch {ROWS / first:,.0f} rows/s and {requests} requests, then "
        f"{ROWS / second:,.0f} rows/s and {len(made) - requests} requests"
    )
