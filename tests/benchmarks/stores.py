"""Logits with the statistics of a trained network's, in our store and in what others use."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from kdcache.store.encodings.registry import encoding_named
from kdcache.store.layout import build_arrays
from kdcache.store.manifest import Manifest
from kdcache.store.records import DatasetRecord, Preprocess, TeacherRecord
from kdcache.store.writer import SplitWriter

ROWS, CLASSES, BATCH = 200_000, 1000, 256
FILES = 20_000


def logits(rows: range, classes: int) -> np.ndarray:
    """(rows, classes) float16: a confident class, classes that go together, and little noise; the same for each row."""
    random = np.random.default_rng([rows.start, classes])
    directions = np.random.default_rng(0).standard_normal((16, classes)).astype(np.float32)
    values = random.standard_normal((len(rows), 16)).astype(np.float32) @ directions * 0.6
    values += random.standard_normal(values.shape, dtype=np.float32) * 0.4
    values[np.arange(len(rows)), random.integers(0, classes, len(rows))] += random.gamma(6, 2, len(rows))
    return values.astype(np.float16)


def manifest_of(rows: int, classes: int, compression: str) -> Manifest:
    """A manifest for a store that no dataset stands behind."""
    shard_rows, arrays = build_arrays(length=rows, encoding=encoding_named("float16", classes), compression=compression)
    names = tuple(map(str, range(classes)))
    return Manifest(
        dataset=DatasetRecord(
            name="made",
            split="train",
            length=rows,
            classes=names,
            input_dtype="uint8",
            input_shape=(1, 1, 1),
            sample_sha256="",
        ),
        teacher=TeacherRecord(spec="made", weights_sha256="", parameters=0, preprocess=Preprocess()),
        arrays=arrays,
        shard_rows=shard_rows,
        seed=0,
        amp="off",
        device="cpu",
        batch_size=BATCH,
        versions={},
    )


def write_cache(path: Path, *, rows: int, classes: int, compression: str) -> float:
    """Write a cache of made logits; the seconds that writing took, making them aside."""
    manifest = manifest_of(rows, classes, compression)
    seconds = 0.0
    with SplitWriter(path, manifest) as writer:
        for view, shard in writer.pending():
            here = manifest.rows_of(shard)
            arrays = {
                "logits": logits(here, classes),
                "labels": np.zeros(len(here), np.int64),
                "input_crc32c": np.zeros(len(here), np.uint32),
            }
            began = time.perf_counter()
            writer.commit(view, shard, arrays)
            seconds += time.perf_counter() - began
        writer.finish(dataclasses.replace(manifest, view_sha256=(writer.ledger.digest(0),)))
    return seconds


def make_stores(folder: Path) -> None:
    """The same rows as a raw file, our store plain and compressed, HDF5, LMDB, and (fewer) one file a sample."""
    import h5py
    import lmdb

    write_cache(folder / "plain.zarr", rows=ROWS, classes=CLASSES, compression="none")
    write_cache(folder / "zstd.zarr", rows=ROWS, classes=CLASSES, compression="zstd")
    (folder / "files").mkdir()
    shard_rows = manifest_of(ROWS, CLASSES, "none").shard_rows
    environment = lmdb.open(str(folder / "lmdb"), map_size=4 * ROWS * CLASSES * 2)
    with h5py.File(folder / "h5", "w") as file, open(folder / "raw", "wb") as raw:
        data = file.create_dataset("logits", (ROWS, CLASSES), np.float16, chunks=(64, CLASSES))
        for start in range(0, ROWS, shard_rows):
            here = range(start, min(start + shard_rows, ROWS))
            values = logits(here, CLASSES)
            raw.write(values.tobytes())
            data[start : here.stop] = values
            with environment.begin(write=True) as transaction:
                for index, row in zip(here, values, strict=True):
                    transaction.put(index.to_bytes(8, "big"), row.tobytes())
            for index, row in zip(here, values, strict=True):
                if index < FILES:
                    row.tofile(folder / "files" / str(index))
    environment.close()
