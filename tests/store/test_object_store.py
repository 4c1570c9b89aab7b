"""Caches in object stores: an S3 server, and a server that fails in chosen ways."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.apps.report.runs import CachedTeacher
from kdcache.core.errors import CacheDamaged, MissingExtra, StorageError, UsageError
from kdcache.data.batch import consecutive_batches
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import as_preprocessor
from kdcache.store.records import Preprocess
from kdcache.store.storage.base import KeyExists, MissingKey, WrongSize
from kdcache.store.storage.object_store import ObjectStorage
from kdcache.store.storage.registry import open_storage, storage_options
from kdcache.store.verify import verify_split
from tests.helpers import Interrupted, Network, answer, synthetic
from tests.helpers import kdcache as command

SAMPLES = synthetic(60)
PROBED = 6  # a batch of two, twice, and one of two with another neighbour


def dump(out, *, stop_after=10**9, compression="none", **options):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16, compression=compression)
    return dump_teacher(Network(16, 4, stop_after=stop_after), SAMPLES, out=out, config=config, **options)


def contents(location):
    storage = open_storage(location)
    return {key: storage.read(key) for key, _ in storage.objects()}


def flip(storage, key):
    data = bytearray(storage.read(key))
    data[-40] ^= 1
    storage.write(key, bytes(data))


# ---- bytes by key


def test_the_storage_keeps_what_the_interface_promises(s3):
    storage = open_storage(f"{s3}/a/b")
    assert storage.is_empty()
    assert list(storage.objects()) == []
    storage.write("train/x", memoryview(b"0123456789"))
    storage.write("zarr.json", b"{}")
    assert (storage.read("train/x"), storage.size("train/x"), storage.is_empty()) == (b"0123456789", 10, False)
    assert list(storage.objects()) == [("train/x", 10), ("zarr.json", 2)]
    assert list(storage.objects("train")) == [("train/x", 10)]
    assert storage.folders() == ["train"]
    one, two = bytearray(2), bytearray(3)
    storage.read_range("train/x", 4, memoryview(one), memoryview(two), size=10)
    assert one + two == b"45678"
    for start, size in ((4, 11), (8, 10), (12, 10)):
        with pytest.raises(WrongSize):
            storage.read_range("train/x", start, memoryview(bytearray(5)), size=size)
    for read in (storage.read, storage.size, lambda key: storage.read_range(key, 0, memoryview(one), size=2)):
        with pytest.raises(MissingKey):
            read("train/y")
    storage.delete("train/x")
    storage.delete("train/x")
    assert list(storage.objects()) == [("zarr.json", 2)]
    # Nothing beside the prefix is seen: `a/b` is a folder, not the beginning of a name.
    open_storage(f"{s3}/a/bc").write("x", b"")
    assert list(storage.objects()) == [("zarr.json", 2)]


def test_of_several_creators_of_a_key_one_succeeds(s3):
    storages = [open_storage(f"{s3}/race") for _ in range(8)]
    outcomes = []

    def create(number):
        try:
            storages[number].create("claim", b"the same bytes from all")
            outcomes.append(number)
        except KeyExists:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1


# ---- a cache


@pytest.mark.parametrize("compression", ["none", "zstd:3"])
def test_dump_stop_continue_verify_repair_and_train(s3, tmp_path, compression):
    local, remote = tmp_path / "c.zarr", f"{s3}/runs/c.zarr"
    dump(local, compression=compression)
    with pytest.raises(Interrupted):
        dump(remote, compression=compression, stop_after=PROBED + 40)
    assert 0 < dump(remote, compression=compression).computed_rows < 60
    assert contents(remote) == contents(local)
    cache = open_cache(remote)
    assert np.array_equal(cache.rows([59, 0, 7, 7]), open_cache(local).rows([59, 0, 7, 7]))
    assert verify_split(open_storage(remote), "train").problems == []
    flip(open_storage(remote), "train/logits/c/0/1/0")
    (problem,) = verify_split(open_storage(remote), "train").problems
    assert remote in problem
    with pytest.raises(CacheDamaged):
        open_cache(remote).column("logits")
    assert dump(remote, compression=compression, repair=True).computed_rows == 16
    assert contents(remote) == contents(local)
    losses = [
        [
            epoch["loss"]
            for epoch in train_student(
                Network(16, 4),
                SAMPLES,
                place,
                config=StudentConfig(device="cpu", epochs=2, batch_size=16, row_source=row_source),
            ).epochs
        ]
        for row_source in ("memory", "streamed")
        for place in (local, remote)
    ]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


def test_a_dump_killed_at_random_instants_continues_to_the_same_store(s3):
    # In a process of its own, because dumps are forked from it, and this one has used an object store.
    rounds = f"from tests.crashes import random_kills_at; print(random_kills_at({s3!r}, 1))"
    done = subprocess.run([sys.executable, "-c", rounds], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "killed': " in done.stdout


def test_the_commands_take_urls_and_keep_options_to_themselves(s3, s3_server, tmp_path, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    secret = "only-the-store-may-know"
    options = [
        word
        for pair in (f"endpoint={s3_server}", "region=us-east-1", f"secret_access_key={secret}")
        for word in ("--storage-option", pair)
    ]
    remote = f"{s3}/digits.zarr"
    answer("train-teacher", "--out", tmp_path / "t", "--epochs", "1", "--device", "cpu")
    made = answer("dump-teacher", "--checkpoint", tmp_path / "t/best.pt", "--out", remote, "--device", "cpu", *options)
    assert made["cache"] == remote
    run = tmp_path / "s"
    answer(
        *("train-student", "--cache", remote, "--out", run, "--epochs", "1", "--device", "cpu", *options),
        *("--cache-dir", tmp_path / "kept"),
    )
    assert answer("verify", remote, *options)["whole"]
    assert answer("inspect", remote, *options)["cache"] == remote
    with storage_options({"endpoint": s3_server, "region": "us-east-1", "secret_access_key": secret}):
        assert CachedTeacher([remote]).records[0].spec == "cnn"  # as the report opens it
    storage = open_storage(remote, {"endpoint": s3_server, "region": "us-east-1", "secret_access_key": secret})
    written = [storage.read(key) for key, _ in storage.objects()]
    written += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in data or s3_server.encode() in data for data in written)
    refused = command("inspect", remote, "--storage-option", secret)
    assert refused.exit_code == 2
    assert "KEY=VALUE" in refused.output
    assert secret not in refused.output
    refused = command("inspect", remote, *options, "--storage-option", "nonsense=1")
    assert refused.exit_code == 2
    assert "nonsense" in refused.output
    assert secret not in refused.output


def test_options_are_taken_from_python_too(s3, s3_server, monkeypatch):
    dump(f"{s3}/c.zarr")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    cache = open_cache(f"{s3}/c.zarr", storage_options={"endpoint": s3_server})
    assert np.isfinite(cache.column("logits")).all()
    assert pickle.loads(pickle.dumps(cache)).rows([3]).tolist() == cache.rows([3]).tolist()


def test_plain_zarr_opens_a_cache(s3, s3_server):
    from obstore.fsspec import FsspecStore as FileSystem
    from obstore.store import S3Store
    from zarr.storage import FsspecStore, ObjectStore

    dump(f"{s3}/c.zarr")
    wanted = open_cache(f"{s3}/c.zarr").column("logits")
    client = {"allow_http": True}
    files = FileSystem("s3", client_options=client, asynchronous=True)
    for store in (
        ObjectStore(S3Store.from_url(f"{s3}/c.zarr", client_options=client), read_only=True),
        FsspecStore(files, read_only=True, path=f"{s3.removeprefix('s3://')}/c.zarr"),
    ):
        assert np.array_equal(zarr.open_group(store, mode="r")["train/logits"][0], wanted)


def test_a_cache_is_read_over_http(s3, s3_server):
    remote, name = f"{s3}/c.zarr", s3.removeprefix("s3://")
    dump(remote)
    make_public(s3_server, name, remote)
    cache = open_cache(f"{s3_server}/{name}/c.zarr")
    assert np.array_equal(cache.column("logits"), open_cache(remote).column("logits"))
    with pytest.raises(StorageError, match="http is only read"):
        dump(f"{s3_server}/{name}/new.zarr")
    with pytest.raises(StorageError) as problem:
        list(open_storage(f"{s3_server}/{name}/c.zarr").objects())
    assert "FILE.zip" in problem.value.remedy


def make_public(server, bucket, remote):
    import boto3

    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    for key, _ in open_storage(f"s3://{bucket}").objects():
        client.put_object_acl(Bucket=bucket, Key=key, ACL="public-read")


# ---- forks


def test_a_forked_process_is_refused_with_the_remedy(s3):
    dump(f"{s3}/c.zarr")
    cache = open_cache(f"{s3}/c.zarr")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return cache.rows([index])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(StorageError, match='multiprocessing_context="forkserver"'):
            next(iter(DataLoader(Rows(), num_workers=1, multiprocessing_context="fork")))


def test_loaders_of_kdcache_start_their_workers_anew(s3):
    dump(f"{s3}/c.zarr")
    preprocessor, requests = as_preprocessor(Preprocess()), consecutive_batches(np.arange(8), 4)
    loader = batch_loader(SAMPLES, requests, preprocessor=preprocessor, workers=1, device=torch.device("cpu"))
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


# ---- a server that fails


class FailingServer(BaseHTTPRequestHandler):
    """Objects in a dictionary; `script` has what to do with the next requests instead of answering them well."""

    protocol_version = "HTTP/1.1"
    stored: ClassVar[dict] = {}
    script: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, tuple):
            status, code = step
            text = f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode() if code else b""
            self.answer(status, text)
            return
        path = self.path.partition("?")[0]
        if self.command == "PUT":
            if self.headers.get("If-None-Match") == "*" and path in self.stored:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            writer = {name: value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta")}
            self.stored[path] = body, writer
            if step == "lose the response":
                self.close_connection = True
                self.connection.close()
                return
            self.answer(200, ETag='"1"')
        elif path in self.stored:
            data, writer = self.stored[path]
            self.answer(200, data, ETag='"1"', Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT", **writer)
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_GET = do_PUT = do_HEAD = do_DELETE = handle_one  # noqa: N815


@pytest.fixture
def failing():
    """A storage on a server that does what its script says."""
    FailingServer.stored, FailingServer.script = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FailingServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    options = {
        "endpoint": f"http://127.0.0.1:{server.server_address[1]}",
        "region": "us-east-1",
        "access_key_id": "k",
        "secret_access_key": "very-secret",
    }
    yield ObjectStorage("s3://bucket/c.zarr", options)
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_transient_is_tried_again(failing):
    failing.write("x", b"data")
    FailingServer.script[:] = [(503, "SlowDown"), (500, "InternalError")]
    assert failing.read("x") == b"data"
    FailingServer.script[:] = [(503, "SlowDown")]
    failing.write("x", b"other")
    assert failing.read("x") == b"other"
    assert FailingServer.script == []


def test_ones_own_put_whose_response_was_lost_is_recognised(failing):
    FailingServer.script[:] = ["lose the response"]
    failing.create("claim", b"mine")
    assert failing.read("claim") == b"mine"
    with pytest.raises(KeyExists):
        failing.create("claim", b"mine")


@pytest.mark.parametrize(
    ("status", "code", "needed", "remedy"),
    [
        (404, "NoSuchBucket", "a bucket that exists", "create it"),
        (403, "AccessDenied", "permission", "owner"),
        (301, "PermanentRedirect", "region", "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "region", "AWS_REGION"),
        (400, "ExpiredToken", "expired", "AWS_SESSION_TOKEN"),
        (403, "InvalidAccessKeyId", "valid credentials", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_is_not_transient_is_a_clear_error(failing, status, code, needed, remedy):
    for use in (lambda: failing.read("x"), lambda: failing.write("x", b""), lambda: failing.create("x", b"")):
        FailingServer.script[:] = [(status, code)]
        with pytest.raises(StorageError) as problem:
            use()
        assert "s3://bucket/c.zarr/x" in problem.value.found
        assert ("redirect" if status == 301 else code) in problem.value.found
        assert needed in problem.value.needed
        assert remedy in problem.value.remedy
        assert "what is committed is kept" in problem.value.remedy
        assert "very-secret" not in str(problem.value)


def test_no_server_and_no_extra_are_clear_errors(monkeypatch):
    nowhere = {"endpoint": "http://127.0.0.1:1", "region": "x", "access_key_id": "k", "secret_access_key": "s"}
    with pytest.raises(StorageError) as problem:
        open_cache("s3://bucket/c.zarr", storage_options={**nowhere, "max_retries": 0})
    assert "a server that answers" in problem.value.needed
    with pytest.raises(UsageError, match="storage options nonsense"):
        open_cache("s3://bucket/c.zarr", storage_options={"nonsense": "secret"})
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtra, match=r"c\.zarr needs obstore") as problem:
        open_cache("s3://bucket/c.zarr")
    assert problem.value.remedy == 'pip install "kdcache[cloud]"'


def test_obstore_is_imported_only_for_urls():
    use = "import sys, kdcache; kdcache.open_cache; import kdcache.store.cache; print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
