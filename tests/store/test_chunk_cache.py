"""Chunks of remote caches on the local disk, and packed caches."""

from __future__ import annotations

import io
import threading
import zipfile

import numpy as np
import pytest
import zarr

from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.core.errors import (
    CacheDamaged,
    CacheIncomplete,
    CacheNotFound,
    StorageError,
    TargetExists,
    UsageError,
)
from kdcache.store.chunk_cache import ChunkCache
from kdcache.store.inspect import inspect_cache, verify_cache
from kdcache.store.pack import pack_cache, unpack_cache
from kdcache.store.storage.object_store import ObjectStorage
from kdcache.store.storage.registry import open_storage
from tests.helpers import Interrupted, Network, synthetic

SAMPLES = synthetic(60)


def dump(out, *, stop_after=10**9, compression="none"):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16, compression=compression)
    return dump_teacher(Network(16, 4, stop_after=stop_after), SAMPLES, out=out, config=config)


def contents(storage):
    return {key: storage.read(key) for key, _ in storage.objects()}


@pytest.fixture
def requests(monkeypatch):
    """Keys and bytes of the range reads of object stores."""
    made, original = [], ObjectStorage.read_range

    def read_range(self, key, start, *outs, size):
        made.append((key, sum(out.nbytes for out in outs)))
        original(self, key, start, *outs, size=size)

    monkeypatch.setattr(ObjectStorage, "read_range", read_range)
    return made


@pytest.mark.parametrize("compression", ["none", "zstd:3"])
def test_chunks_are_fetched_once_and_kept_across_openings(s3, tmp_path, requests, compression):
    url = f"{s3}/c.zarr"
    dump(url, compression=compression)
    wanted = open_cache(url).column("logits")
    requests.clear()
    for opening in range(3):
        cache = open_cache(url, cache_dir=tmp_path / "kept")
        assert np.array_equal(cache.column("logits"), wanted)
        if opening == 0:
            assert requests
            requests.clear()
    assert requests == []
    # A damaged copy is dropped and fetched again; it is neither used nor an error.
    for path in (tmp_path / "kept").glob("*.chunk"):
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data if path.name < "8" else data[:7])
    assert np.array_equal(open_cache(url, cache_dir=tmp_path / "kept").column("logits"), wanted)
    assert requests
    requests.clear()
    assert np.array_equal(open_cache(url, cache_dir=tmp_path / "kept").column("logits"), wanted)
    assert requests == []


def test_damage_in_the_store_is_never_kept(s3, tmp_path):
    url, key = f"{s3}/c.zarr", "train/logits/c/0/1/0"
    dump(url)
    storage = open_storage(url)
    whole = storage.read(key)
    storage.write(key, whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    with pytest.raises(CacheDamaged):
        open_cache(url, cache_dir=tmp_path / "kept").column("logits")
    storage.write(key, whole)
    assert np.isfinite(open_cache(url, cache_dir=tmp_path / "kept").column("logits")).all()


def test_training_uses_the_disk_in_later_epochs_and_runs(s3, tmp_path, requests):
    url = f"{s3}/c.zarr"
    dump(url)
    config = StudentConfig(
        device="cpu",
        epochs=3,
        batch_size=16,
        row_source="streamed",
        cache_dir=str(tmp_path / "kept"),
        cache_disk="1MiB",
    )
    train_student(Network(16, 4), SAMPLES, url, config=config)
    read = [key for key, _ in requests if "/logits/" in key]
    assert len(read) == len(set(read)) == 4
    requests.clear()
    train_student(Network(16, 4), SAMPLES, url, config=config)
    assert requests == []


def test_the_limit_holds_and_the_least_recently_used_go_first(tmp_path):
    kept = ChunkCache(tmp_path, 1000)
    paths = [kept.path_of("chunk", number) for number in range(20)]
    for number in range(10):
        kept.write(paths[number], bytes([number]) * 100)
    assert kept.read(paths[0]) == b"\0" * 100
    kept.write(paths[10], b"x" * 60, b"y" * 40)
    assert kept.read(paths[0]) is not None, "just used"
    assert kept.read(paths[1]) is None, "used least recently"
    assert kept.read(paths[10]) == b"x" * 60 + b"y" * 40
    kept.write(paths[11], b"z" * 1001)
    assert kept.read(paths[11]) is None, "larger than the limit"
    # Two openings of one folder count together, as several processes do.
    others = [ChunkCache(tmp_path, 1000) for _ in range(4)]
    sizes = []

    def write(cache, offset):
        for number in range(15):
            cache.write(cache.path_of("more", offset, number), bytes(90))
            with cache._locked():  # else files come and go during the count
                sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.chunk")))

    threads = [threading.Thread(target=write, args=(cache, at)) for at, cache in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 60
    assert max(sizes) <= 1000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.chunk")) > 0
    assert not list(tmp_path.glob("*.tmp"))
    ChunkCache(tmp_path, 200)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.chunk")) <= 200
    with pytest.raises(UsageError, match="cache-disk"):
        ChunkCache(tmp_path, 0)


# ---- one file


@pytest.mark.parametrize("compression", ["none", "zstd:3"])
def test_a_packed_cache_is_read_as_it_is_and_unpacks_to_the_same_bytes(s3, tmp_path, compression):
    folder = tmp_path / "c.zarr"
    dump(folder, compression=compression)
    wanted = open_cache(folder).column("logits")
    digest = inspect_cache(folder).data["sha256"]
    for out in (str(tmp_path / "c.zip"), f"{s3}/published/c.zip"):
        assert pack_cache(folder, out).data["sha256"] == digest
        assert verify_cache(out).data["whole"]
        assert inspect_cache(out).data["sha256"] == digest
        assert np.array_equal(open_cache(out).column("logits"), wanted)
        config = StudentConfig(device="cpu", epochs=1, batch_size=16)
        losses = [train_student(Network(16, 4), SAMPLES, each, config=config).epochs for each in (folder, out)]
        assert losses[0][0]["loss"] == losses[1][0]["loss"]
        with pytest.raises(TargetExists, match="exists already"):
            pack_cache(folder, out)
        with pytest.raises(StorageError, match="only read"):
            dump(out)
        for target in (tmp_path / f"unpacked-{out[:2].strip('/')}", f"{s3}/unpacked-{out[:2].strip('/')}"):
            unpack_cache(out, target)
            assert contents(open_storage(target)) == contents(open_storage(folder))
            with pytest.raises(TargetExists, match="not empty"):
                unpack_cache(out, target)
    stored = open_storage(f"{s3}/published").read("c.zip")
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
    group = zarr.open_group(zarr.storage.ZipStore(tmp_path / "c.zip", mode="r"), mode="r")
    assert np.array_equal(group["train/logits"][0], wanted)


def test_a_stopped_pack_leaves_nothing_and_a_stopped_unpack_continues(s3, tmp_path, monkeypatch):
    folder = tmp_path / "c.zarr"
    dump(folder)
    root = open_storage(folder)
    original, left = type(root).read, [6]

    def stopping(self, key):
        left[0] -= 1
        if left[0] < 0 and "logits" in key and "/c/" in key:
            raise Interrupted
        return original(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(type(root), "read", stopping)
        for out in (tmp_path / "c.zip", f"{s3}/c.zip"):
            with pytest.raises(Interrupted):
                pack_cache(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr"]
    assert list(open_storage(s3).objects()) == []

    pack_cache(folder, tmp_path / "c.zip")
    packed = open_storage(tmp_path / "c.zip")
    original_read, count = type(packed).read, [0]

    def stopping_read(self, key):
        count[0] += 1
        if count[0] == 8:
            raise Interrupted
        return original_read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(type(packed), "read", stopping_read)
        with pytest.raises(Interrupted):
            unpack_cache(tmp_path / "c.zip", tmp_path / "new.zarr")
    with pytest.raises(CacheNotFound):
        open_cache(tmp_path / "new.zarr")
    unpack_cache(tmp_path / "c.zip", tmp_path / "new.zarr")
    assert contents(open_storage(tmp_path / "new.zarr")) == contents(root)


def test_what_is_no_packed_cache_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        dump(tmp_path / "half.zarr", stop_after=40)
    with pytest.raises(CacheIncomplete, match="not finished"):
        pack_cache(tmp_path / "half.zarr", tmp_path / "half.zip")
    dump(tmp_path / "c.zarr")
    with pytest.raises(UsageError, match="--out is"):
        pack_cache(tmp_path / "c.zarr", tmp_path / "c.tar")
    pack_cache(tmp_path / "c.zarr", tmp_path / "c.zip")
    with pytest.raises(UsageError, match="not the name of a packed cache"):
        unpack_cache(tmp_path / "c.zarr", tmp_path / "d")
    with pytest.raises(CacheNotFound, match="nothing is there"):
        open_cache(tmp_path / "none.zip")
    whole = (tmp_path / "c.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-300])
    with pytest.raises(CacheDamaged, match="no whole zip file"):
        open_cache(tmp_path / "cut.zip")
    place = whole.index(open_storage(tmp_path / "c.zarr").read("train/logits/c/0/1/0"))
    (tmp_path / "flipped.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CacheDamaged, match="flipped"):
        open_cache(tmp_path / "flipped.zip").column("logits")
    assert verify_cache(tmp_path / "flipped.zip").exit_code == 3
    for name, key, kind in (("a", "zarr.json", zipfile.ZIP_DEFLATED), ("b", "../up", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", kind) as archive:
            archive.writestr(key, b"{}" * 50)
        with pytest.raises((StorageError, CacheDamaged), match=key):
            open_cache(tmp_path / f"{name}.zip")
