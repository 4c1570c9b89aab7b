"""Fixtures that several test files share. Append only; what one file needs stays in that file."""

import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from dataclasses import replace

import hypothesis
import numpy as np
import pytest

from kdcache.store.encodings.registry import encoding_named
from kdcache.store.layout import build_arrays
from kdcache.store.manifest import Manifest
from kdcache.store.records import DatasetRecord, Preprocess, TeacherRecord
from kdcache.store.writer import SplitWriter

# A deadline fails a law because the machine was busy.
hypothesis.settings.register_profile("kdcache", deadline=None)
hypothesis.settings.load_profile("kdcache")


@pytest.fixture(scope="session")
def make_manifest():
    """A manifest of made-up data. `chunk_rows` forces several chunks a shard, which real sizes need 1025 rows for."""

    def make(
        length=10,
        classes=3,
        *,
        dtype="float32",
        compression="none",
        shard_rows=4,
        chunk_rows=None,
        views=1,
        split="train",
    ):
        shard_rows, arrays = build_arrays(
            length=length, encoding=encoding_named(dtype, classes), compression=compression, shard_rows=shard_rows
        )
        if chunk_rows is not None:
            arrays = (replace(arrays[0], chunk_rows=chunk_rows), *arrays[1:])
        return Manifest(
            dataset=DatasetRecord(
                name="made-up",
                split=split,
                length=length,
                classes=tuple(f"class {i}" for i in range(classes)),
                input_dtype="uint8",
                input_shape=(1, 2, 2),
                sample_sha256="00",
            ),
            teacher=TeacherRecord(spec="teacher", weights_sha256="11", parameters=1, preprocess=Preprocess()),
            views=views,
            arrays=arrays,
            encoding=dtype,
            shard_rows=shard_rows,
            seed=0,
            amp="off",
            device="cpu",
            batch_size=2,
            versions={"torch": "1"},
        )

    return make


@pytest.fixture(scope="session")
def make_rows():
    """Every row of a manifest's arrays: name → (views, samples, *row_shape). Labels of later views are wrong on
    purpose: nothing may ever read them."""

    def make(manifest, seed=0):
        random, rows = np.random.default_rng(seed), {}
        for array in manifest.arrays:
            shape = (manifest.views, manifest.dataset.length, *array.row_shape)
            if np.dtype(array.dtype).kind == "f":
                rows[array.name] = random.standard_normal(shape).astype(array.dtype)
            else:
                rows[array.name] = random.integers(0, 2**31, shape).astype(array.dtype)
        return rows

    return make


@pytest.fixture(scope="session")
def commit_shard():
    """Commit one shard of the rows that `make_rows` gave."""

    def commit(writer, rows, view, shard):
        samples = writer.manifest.rows_of(shard)
        writer.commit(view, shard, {name: all_[view, samples.start : samples.stop] for name, all_ in rows.items()})

    return commit


@pytest.fixture(scope="session")
def write_split(commit_shard):
    """Write what is pending of a split, and seal it."""

    def write(path, manifest, rows):
        with SplitWriter(path, manifest) as writer:
            for view, shard in writer.pending():
                commit_shard(writer, rows, view, shard)
            digests = tuple(writer.ledger.digest(view) for view in range(manifest.views))
            writer.finish(replace(manifest, view_sha256=digests))
        return writer

    return write


@pytest.fixture(scope="session")
def s3_server():
    """URL of an S3 server on this machine, without a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/moto-api/", timeout=10):
                    break
            except OSError:
                assert server.poll() is None, "the S3 server ended"
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """URL of an empty bucket. Endpoint and credentials are in the environment, as for any S3 client."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    }.items():
        monkeypatch.setenv(name, value)
    with urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT"), timeout=60):
        pass
    return f"s3://{bucket}"
