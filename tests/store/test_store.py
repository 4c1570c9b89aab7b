import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import zarr

from kdcache.core.errors import (
    CacheBusy,
    CacheDamaged,
    CacheIncomplete,
    CacheNotFound,
    KdcacheError,
    StorageError,
    TargetExists,
    TeacherOutputError,
    UsageError,
)
from kdcache.core.file_lock import PathLock
from kdcache.store import ledger as ledger_module
from kdcache.store import row_source
from kdcache.store.cache import cache_splits, open_cache
from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.layout import build_arrays, choose_shard_rows, predicted_bytes, zstd_level
from kdcache.store.ledger import Ledger
from kdcache.store.manifest import manifest_attributes
from kdcache.store.row_source import ReadOptions
from kdcache.store.sampler import ExactSampler, WindowSampler, batch_count, batches_of
from kdcache.store.storage.local import LocalStorage
from kdcache.store.verify import verify_split
from kdcache.store.writer import SplitWriter
from tests.helpers import find, logit_source, shard_file, tree

LAYOUTS = {
    "one sample of one class": {"length": 1, "classes": 1, "shard_rows": None},
    "plain chunks, last not full": {"length": 10, "views": 2},
    "plain chunks, zstd": {"length": 10, "views": 2, "compression": "zstd:3"},
    "one row a shard": {"length": 9, "shard_rows": 1},
    "a shard beyond the samples": {"length": 17, "shard_rows": 1 << 20, "dtype": "float64"},
    # 21 rows in shards of 8, chunks of 2: the last shard has three of its four chunks, the third half full.
    "sharded, last not full": {"length": 21, "shard_rows": 8, "chunk_rows": 2, "views": 3},
    "sharded, zstd": {"length": 21, "shard_rows": 8, "chunk_rows": 2, "views": 3, "compression": "zstd"},
    "sharded by size": {"length": 1025, "classes": 101, "dtype": "float16", "shard_rows": None},
    "sharded by size, zstd": {"length": 2500, "classes": 7, "shard_rows": 2048, "compression": "zstd:1"},
    # 4096 rows in four chunks of 1024, of which the only shard has three.
    "one shard, its last chunk unused": {"length": 2500, "classes": 3, "dtype": "float16", "shard_rows": None},
    "1000 classes": {"length": 7, "classes": 1000, "dtype": "float64", "compression": "zstd:9"},
    "1000 classes in halves": {"length": 1030, "classes": 1000, "dtype": "float16", "shard_rows": 1024},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

FLOATS = ("float16", "float32", "float64")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, make_manifest, make_rows, write_split):
    """Put a finished cache at a path: (manifest, rows). Written once for each layout, copied after that."""
    masters = {}

    def put(path, **layout):
        name = repr(layout)
        if name not in masters:
            manifest = make_manifest(**layout)
            masters[name] = tmp_path_factory.mktemp("finished") / "c.zarr", manifest, make_rows(manifest)
            write_split(*masters[name])
        master, manifest, rows = masters[name]
        shutil.copytree(master, path)
        return manifest, rows

    return put


def expected(rows, array, view):
    return rows[array.name][view if array.per_view else 0]


def same(found, wanted):
    return found.dtype == wanted.dtype and np.array_equal(found, wanted)


@layouts
def test_zarr_reads_every_layout(tmp_path, finished, layout):
    manifest, rows = finished(tmp_path / "c.zarr", **layout)
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")["train"]
    for array in manifest.arrays:
        found = group[array.name]
        assert same(found[:], rows[array.name] if array.per_view else rows[array.name][0])
        names = ("view", "sample", "class")[0 if array.per_view else 1 : 3 if array.name == "logits" else 2]
        assert found.metadata.dimension_names == names
    ledger = Ledger(LocalStorage(tmp_path / "c.zarr" / "train"), manifest)
    assert all(ledger.committed(view).all() for view in range(manifest.views))
    assert same(group["ledger"][:], ledger.entries)


@layouts
def test_the_reader_reads_every_layout(tmp_path, finished, layout):
    manifest, rows = finished(tmp_path / "c.zarr", **layout)
    cache = open_cache(tmp_path / "c.zarr")
    assert (len(cache), cache.views, cache.classes) == (
        manifest.dataset.length,
        manifest.views,
        manifest.dataset.classes,
    )
    random = np.random.default_rng(0)
    for view in range(manifest.views):
        for array in manifest.arrays:
            assert same(cache.column(array.name, view), expected(rows, array, view))
        for size in (0, 1, 3, 64):
            indices = random.integers(0, len(cache), size)
            assert same(cache.rows(indices, view), rows["logits"][view][indices])
        everything = random.permutation(len(cache)).tolist()
        assert same(cache.rows(everything, view), rows["logits"][view][everything])


@pytest.mark.parametrize(
    "layout",
    [each for each in LAYOUTS.values() if "compression" not in each],
    ids=[name for name, each in LAYOUTS.items() if "compression" not in each],
)
def test_the_prediction_is_right_to_the_byte(tmp_path, finished, layout):
    manifest, _ = finished(tmp_path / "c.zarr", **layout)
    files = tree(tmp_path / "c.zarr" / "train")
    data = sum(len(content) for name, content in files.items() if "/c/" in name and not name.startswith("ledger"))
    assert predicted_bytes(manifest) == data


def test_what_is_not_written_reads_as_nan_in_zarr(tmp_path, make_manifest):
    SplitWriter(tmp_path / "c.zarr", make_manifest(chunk_rows=2))
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")["train"]
    assert np.isnan(group["logits"][:]).all()
    assert (group["labels"][:] == -1).all()


def test_a_ledger_of_several_blocks(tmp_path, make_manifest, make_rows, write_split, monkeypatch):
    # Real blocks hold 256 shards. Five shards in blocks of two: the last block is not full.
    monkeypatch.setattr(ledger_module, "BLOCK_SHARDS", 2)
    manifest = make_manifest(18, views=2)
    rows = make_rows(manifest)
    writer = write_split(tmp_path / "c.zarr", manifest, rows)
    assert len([name for name in tree(Path(writer.storage.url)) if name.startswith("ledger/c/")]) == 6
    assert same(open_cache(tmp_path / "c.zarr").column("logits", 1), rows["logits"][1])
    assert same(zarr.open_group(tmp_path / "c.zarr", mode="r")["train/ledger"][:], writer.ledger.entries)


def test_labels_are_those_of_view_0(tmp_path, finished):
    _, rows = finished(tmp_path / "c.zarr", views=3)
    cache = open_cache(tmp_path / "c.zarr")
    assert not np.array_equal(rows["labels"][0], rows["labels"][2])
    assert [same(cache.column("labels", view), rows["labels"][0]) for view in range(3)] == [True] * 3


def test_splits_stand_side_by_side(tmp_path, finished, make_manifest, make_rows, write_split):
    _, rows = finished(tmp_path / "c.zarr", views=2)
    test = make_manifest(5, split="test", dtype="float16")
    others = make_rows(test, seed=1)
    write_split(tmp_path / "c.zarr", test, others)
    assert cache_splits(tmp_path / "c.zarr") == ["test", "train"]
    assert same(open_cache(str(tmp_path / "c.zarr")).column("logits", 1), rows["logits"][1])
    assert same(open_cache(tmp_path / "c.zarr", "test").column("logits"), others["logits"][0])


@pytest.mark.parametrize(("indices", "view"), [([-1], 0), ([10], 0), ([0, 99], 0), ([0], 2), ([0], -1)])
def test_out_of_range_is_an_index_error(tmp_path, finished, indices, view):
    finished(tmp_path / "c.zarr", views=2)
    with pytest.raises(IndexError, match=r"the cache has (10|2)"):
        open_cache(tmp_path / "c.zarr").rows(indices, view)


@pytest.mark.parametrize(
    "indices",
    [[1.9], np.array([True, False]), [[0, 1, 2]], 3, ["1"]],
    ids=["floats", "a mask", "two dimensions", "one number", "text"],
)
def test_indices_are_integers_in_one_dimension(tmp_path, finished, indices):
    # numpy would round the float down, and read samples 1 and 0 for the mask.
    finished(tmp_path / "c.zarr")
    with pytest.raises(TypeError, match="integers in one dimension"):
        open_cache(tmp_path / "c.zarr").rows(indices)


CHOICES = {
    "auto": ReadOptions(),
    "memory": ReadOptions(row_source="memory"),
    "memory in windows": ReadOptions(row_source="memory", shuffle="window"),
    "streamed": ReadOptions(row_source="streamed"),
    "no memory": ReadOptions(memory="1"),
}


@layouts
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_every_row_source_gives_every_sample_once_with_its_own_rows(tmp_path, finished, layout, choice, request):
    manifest, rows = finished(tmp_path / "c.zarr", **layout)
    cache, view = open_cache(tmp_path / "c.zarr"), manifest.views - 1
    orders = []
    for epoch in (0, 1, 1):
        order = []
        for indices, soft_targets in cache.epoch(epoch, batch_size=33, seed=5, view=view, options=choice):
            assert same(soft_targets, rows["logits"][view][indices])
            order += indices.tolist()
        assert sorted(order) == list(range(len(cache)))
        orders.append(order)
    assert orders[1] == orders[2]
    assert orders[0] != orders[1] or len(cache) < 9


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_no_row_source_gives_damaged_rows(tmp_path, finished, choice):
    manifest, rows = finished(tmp_path / "c.zarr", length=21, shard_rows=8, chunk_rows=2)
    flip(shard_file(tmp_path / "c.zarr" / "train", manifest.arrays[0], 0, 1), 0)

    def epoch():
        for indices, soft_targets in open_cache(tmp_path / "c.zarr").epoch(batch_size=2, options=choice):
            assert same(soft_targets, rows["logits"][0][indices])

    with pytest.raises(CacheDamaged, match=r"view 0, shard 1 \(samples 8 to 15\)"):
        epoch()


def test_a_stream_over_many_windows(tmp_path, finished, monkeypatch):
    # A window of real size holds every chunk of a small cache; of these there are eight, and three are held.
    monkeypatch.setattr(row_source, "WINDOW_BYTES", 1)
    _, rows = finished(tmp_path / "c.zarr", length=59, shard_rows=16, chunk_rows=2)
    feed, order, _ = logit_source(open_cache(tmp_path / "c.zarr"), options=ReadOptions(row_source="streamed"))
    first_windows = set()
    for epoch in (0, 1, 0):
        feed.start_epoch(epoch)
        assert len(list(order.windows(epoch))) == 8
        first_windows.add(tuple(sorted(next(order.windows(epoch)).chunks)))
        for indices in batches_of(order, epoch, 7):
            assert same(feed.rows(indices)["logits"], rows["logits"][0][indices])
    assert len(first_windows) == 2
    # Left in the middle, begun anew, and then asked for what its slots no longer hold.
    feed.start_epoch(0)
    batches = list(batches_of(order, 0, 7))
    for indices in batches[:6]:
        assert same(feed.rows(indices)["logits"], rows["logits"][0][indices])
    with pytest.raises(IndexError, match="not next in the epoch's order"):
        feed.rows(batches[0])


def test_a_partial_cache_gives_what_is_committed(tmp_path, make_manifest, make_rows, commit_shard):
    manifest = make_manifest(10, views=2)
    rows = make_rows(manifest)
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer:
        for shard in (0, 2):
            commit_shard(writer, rows, 1, shard)
    cache = open_cache(tmp_path / "c.zarr", allow_partial=True)
    assert not cache.complete
    assert cache.samples(0).tolist() == []
    assert cache.samples(1).tolist() == [0, 1, 2, 3, 8, 9]
    assert same(cache.rows([9, 0, 9], 1), rows["logits"][1][[9, 0, 9]])
    order = []
    for indices, soft_targets in cache.epoch(batch_size=4, view=1):
        assert same(soft_targets, rows["logits"][1][indices])
        order += indices.tolist()
    assert sorted(order) == cache.samples(1).tolist()
    with pytest.raises(CacheIncomplete, match=r"view 1, shard 1 \(samples 4 to 7\)"):
        cache.rows([0, 5], 1)
    with pytest.raises(CacheIncomplete, match="2 of 6 shards"):
        cache.column("labels")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 50])
def test_batches_are_full_but_for_the_end_and_none_is_a_single_sample(batch_size):
    for samples in range(42):
        for order in (
            ExactSampler(np.arange(samples), 0),
            WindowSampler(np.arange(samples), 0, chunk_rows=4, window_chunks=2),
        ):
            sizes = [len(batch) for batch in batches_of(order, 0, batch_size)]
            assert sum(sizes) == samples
            assert len(sizes) == batch_count(samples, batch_size)
            assert all(size == batch_size for size in sizes[:-1])
            assert max(sizes, default=0) <= batch_size + 1
            if samples > 1 < batch_size:
                assert min(sizes) > 1


# ---- writing, stopping and continuing


@contextmanager
def refusing(number, *, after=0):
    """The disk takes `after` files and then no more."""
    calls, real = iter(range(10**6)), os.replace

    def replace_file(*paths):
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        real(*paths)

    with mock.patch.object(os, "replace", replace_file):
        yield


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_ends_in_the_same_store(tmp_path, make_manifest, make_rows, write_split, commit_shard, seed):
    random = np.random.default_rng(seed)
    manifest = make_manifest(
        int(random.integers(9, 60)),
        int(random.integers(1, 5)),
        dtype=FLOATS[seed % 3],
        compression=["none", "zstd:1"][seed % 2],
        shard_rows=8,
        chunk_rows=int(random.choice([1, 2, 8])),
        views=int(random.integers(1, 4)),
    )
    rows = make_rows(manifest, seed)
    path, committed = tmp_path / "c.zarr", {}
    every = {(view, shard) for view in range(manifest.views) for shard in range(manifest.shards)}
    stack = ExitStack()
    writer = stack.enter_context(SplitWriter(path, manifest))
    while len(committed) < len(every):
        step = random.choice(["commit", "refused", "reopen", "read"])
        view, shard = random.permutation(sorted(every - committed.keys()))[0].tolist()
        if step == "commit":
            commit_shard(writer, rows, view, shard)
            committed[view, shard] = manifest.rows_of(shard)
        elif step == "refused":
            with refusing(errno.ENOSPC, after=int(random.integers(0, 2))), pytest.raises(StorageError):
                commit_shard(writer, rows, view, shard)
        elif step == "reopen":
            # What a kill in the middle of a write leaves behind.
            shard_file(Path(writer.storage.url), manifest.arrays[0], view, shard).parent.mkdir(
                parents=True, exist_ok=True
            )
            shard_file(Path(writer.storage.url), manifest.arrays[0], view, shard).with_suffix(".tmp").write_bytes(
                b"half"
            )
            stack.close()
            writer = stack.enter_context(SplitWriter(path, replace(manifest, batch_size=99, device="cpu:0")))
            assert not list(Path(writer.storage.url).rglob("*.tmp"))
            with pytest.raises(CacheIncomplete):
                open_cache(path)
        elif committed:
            view, shard = list(committed)[random.integers(len(committed))]
            found = ChunkReader(writer.storage, manifest, writer.ledger).span("logits", view, committed[view, shard])
            wanted = rows["logits"][view, committed[view, shard].start : committed[view, shard].stop]
            assert same(found, wanted)
        assert set(writer.pending()) == every - committed.keys()
    stack.close()
    write_split(path, manifest, rows)
    write_split(tmp_path / "uninterrupted.zarr", manifest, rows)
    assert tree(path) == tree(tmp_path / "uninterrupted.zarr")


# A process that is killed at its n-th call to the disk, for every n until it gets through.
KILLED = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr

from kdcache.store.manifest import Manifest
from kdcache.store.writer import SplitWriter
from kdcache.core.errors import KdcacheError
from kdcache.core.json_records import from_json

root = Path(sys.argv[1])
manifest = from_json(Manifest, json.loads((root / "manifest.json").read_bytes()), where="", error=KdcacheError)
rows = dict(np.load(root / "rows.npz"))


def kill_at(point):
    calls = iter(range(1, 10**6))

    def counted(function):
        def call(*arguments, **options):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def write(path):
    with SplitWriter(path, manifest) as writer:
        for view, shard in writer.pending():
            at = manifest.rows_of(shard)
            writer.commit(view, shard, {name: all_[view, at.start : at.stop] for name, all_ in rows.items()})
        writer.finish(replace(manifest, view_sha256=tuple(map(writer.ledger.digest, range(manifest.views)))))


status, point = -signal.SIGKILL, 0
while status == -signal.SIGKILL:
    point += 1
    (root / str(point)).mkdir()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kill_at(point)
            write(root / str(point) / "c.zarr")
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status)
"""


def test_a_kill_at_any_point_leaves_what_the_next_run_continues(tmp_path, make_manifest, make_rows, write_split):
    manifest = make_manifest(6, shard_rows=4, chunk_rows=2)
    rows = make_rows(manifest)
    write_split(tmp_path / "whole" / "c.zarr", manifest, rows)
    whole = tree(tmp_path / "whole")
    kills = tmp_path / "kills"
    kills.mkdir()
    attributes = manifest_attributes(manifest)["kdcache"]
    (kills / "manifest.json").write_text(json.dumps(attributes["manifest"]))
    np.savez(kills / "rows.npz", **rows)
    subprocess.run([sys.executable, "-c", KILLED, kills], check=True, timeout=120)
    points = sorted(int(each.name) for each in kills.iterdir() if each.is_dir())
    assert len(points) > 40
    committed = set()
    for point in points:
        path = kills / str(point) / "c.zarr"
        with SplitWriter(path, manifest) as writer:
            committed.add(2 - len(writer.pending()))
        reader = ChunkReader(writer.storage, manifest, writer.ledger)
        for shard in np.flatnonzero(writer.ledger.committed(0)):
            at = manifest.rows_of(shard)
            for array in manifest.arrays:
                assert same(reader.span(array.name, 0, at), rows[array.name][0, at.start : at.stop])
        write_split(path, manifest, rows)
        assert tree(path.parent) == whole
    assert committed == {0, 1, 2}


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EROFS, "remount"), (errno.EACCES, "permission"), (errno.EIO, "look at")],
)
def test_a_disk_that_refuses_is_named_and_nothing_is_lost(
    tmp_path, make_manifest, make_rows, write_split, commit_shard, number, advice
):
    manifest = make_manifest()
    rows = make_rows(manifest)
    with refusing(number), pytest.raises(StorageError) as caught:
        SplitWriter(tmp_path / "c.zarr", manifest)
    assert advice in caught.value.remedy
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer:
        commit_shard(writer, rows, 0, 0)
        before = tree(tmp_path)
        # The data of shard 1 is written, and its ledger entry refused.
        with refusing(number, after=3), pytest.raises(StorageError) as caught:
            commit_shard(writer, rows, 0, 1)
        after = tree(tmp_path)
        assert writer.pending() == [(0, 1), (0, 2)]
    assert writer.storage.url in caught.value.found
    assert os.strerror(number) in caught.value.found
    assert advice in caught.value.remedy
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.endswith(".tmp")]
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer:
        assert writer.pending() == [(0, 1), (0, 2)]
    write_split(tmp_path / "c.zarr", manifest, rows)
    assert same(open_cache(tmp_path / "c.zarr").column("logits"), rows["logits"][0])


def test_a_finished_split_has_nothing_pending_and_is_sealed_once(tmp_path, finished, make_rows, write_split):
    manifest, _ = finished(tmp_path / "c.zarr", views=2)
    before = tree(tmp_path)
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer:
        assert writer.pending() == []
    write_split(tmp_path / "c.zarr", manifest, make_rows(manifest, seed=1))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("cut", [np.s_[:0], np.s_[:3], np.s_[:5], np.s_[:4, :2]], ids=str)
def test_a_shard_of_another_shape_is_not_committed(tmp_path, make_manifest, make_rows, cut):
    # Missing rows would be committed as the padding that they read as: NaN.
    manifest = make_manifest()
    rows = {name: all_[0, :4] for name, all_ in make_rows(manifest).items()}
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer:
        with pytest.raises(ValueError, match=r"logits of shard 0 .* \(4, 3\)"):
            writer.commit(0, 0, rows | {"logits": make_rows(manifest)["logits"][0][cut]})
        assert len(writer.pending()) == 3


def dataset(manifest, **changes):
    return replace(manifest, dataset=replace(manifest.dataset, **changes))


def teacher(manifest, **changes):
    return replace(manifest, teacher=replace(manifest.teacher, **changes))


@pytest.fixture(scope="session")
def begun(tmp_path_factory, make_manifest, make_rows, write_split):
    """Put a dump with known labels at a path, not one row of it written or all of it sealed: its manifest."""
    manifest = dataset(make_manifest(views=2), labels_sha256="aa")
    masters = tmp_path_factory.mktemp("begun")
    with SplitWriter(masters / "False", manifest):
        pass
    write_split(masters / "True", manifest, make_rows(manifest))

    def put(path, complete):
        shutil.copytree(masters / str(complete), path)
        return manifest

    return put


OTHER_DUMPS = {
    "seed": (lambda m: replace(m, seed=7), "seed is 0 there and 7 here"),
    "amp": (lambda m: replace(m, amp="bf16"), "amp is 'off' there and 'bf16' here"),
    "views": (lambda m: replace(m, views=3), "views is 2 there and 3 here"),
    "shard_rows": (lambda m: replace(m, shard_rows=8), "shard_rows is 4 there and 8 here"),
    "versions": (lambda m: replace(m, versions={"torch": "2"}), "versions.torch is '1' there and '2' here"),
    "length": (lambda m: dataset(m, length=11), "dataset.length is 10 there and 11 here"),
    "inputs": (lambda m: dataset(m, sample_sha256="ff"), "dataset.sample_sha256 is '00' there and 'ff' here"),
    "labels": (lambda m: dataset(m, labels_sha256="bb"), "dataset.labels_sha256 is 'aa' there and 'bb' here"),
    "classes": (
        lambda m: dataset(m, classes=m.dataset.classes[::-1]),
        "dataset.classes[0] is 'class 0' there and 'class 2' here",
    ),
    "weights": (lambda m: teacher(m, weights_sha256="22"), "teacher.weights_sha256 is '11' there and '22' here"),
    "preprocess": (
        lambda m: teacher(m, preprocess=replace(m.teacher.preprocess, resize=8)),
        "teacher.preprocess.resize is None there and 8 here",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHER_DUMPS.values(), ids=OTHER_DUMPS.keys())
@pytest.mark.parametrize("door", [SplitWriter, find])
@pytest.mark.parametrize("complete", [False, True])
def test_another_dump_is_refused_with_both_values(tmp_path, begun, change, message, door, complete):
    manifest = begun(tmp_path / "c.zarr", complete)
    before = tree(tmp_path)
    if complete and "versions" in message:
        # No row will be added, so other packages cannot mix two kinds of rows.
        assert find(tmp_path / "c.zarr", change(manifest)).complete
        return
    with pytest.raises(TargetExists) as caught:
        door(tmp_path / "c.zarr", change(manifest))
    assert message in caught.value.found
    assert str(tmp_path / "c.zarr" / "train") in caught.value.found
    assert "--out" in caught.value.remedy
    assert tree(tmp_path) == before


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"compression": "zstd:3"}])
def test_another_encoding_is_another_dump(tmp_path, make_manifest, change):
    with SplitWriter(tmp_path / "c.zarr", make_manifest()):
        pass
    with pytest.raises(TargetExists, match=next(iter(change.values()))):
        SplitWriter(tmp_path / "c.zarr", make_manifest(**change))


def test_circumstances_and_labels_not_known_yet_are_the_same_dump(tmp_path, make_manifest):
    manifest = dataset(make_manifest(), labels_sha256="aa", data_root="/here")
    with SplitWriter(tmp_path / "c.zarr", manifest):
        pass
    later = dataset(replace(manifest, device="cpu:0", batch_size=64), data_root="/there", labels_sha256=None)
    assert find(tmp_path / "c.zarr", later) == manifest
    with SplitWriter(tmp_path / "c.zarr", later) as writer:
        assert writer.manifest == manifest


def test_one_writer_at_a_time(tmp_path, make_manifest):
    with SplitWriter(tmp_path / "c.zarr", make_manifest()):
        for split in ("train", "test"):
            with pytest.raises(CacheBusy, match=r"another dump writes to .*c\.zarr") as caught:
                SplitWriter(tmp_path / "c.zarr", make_manifest(split=split))
            assert "another --out" in caught.value.remedy
        # Its file belongs to no Zarr array, and readers pass over it.
        assert cache_splits(tmp_path / "c.zarr") == ["train"]
    with pytest.raises(TargetExists):
        SplitWriter(tmp_path / "c.zarr", make_manifest(11))
    (tmp_path / "c.zarr" / ".lock").write_text("1")  # of a process that was killed
    with SplitWriter(tmp_path / "c.zarr", make_manifest()):
        pass
    assert not (tmp_path / "c.zarr" / ".lock").exists()


# ---- what stands at a path


def foreign(path, kind):
    if kind == "a folder":
        path.mkdir()
        (path / "thesis.txt").write_text("years of work")
    elif kind == "a file":
        path.write_text("years of work")
    elif kind == "a Zarr group":
        zarr.create_group(path, attributes={"mine": 1})
    elif kind == "a Zarr array":
        zarr.create_array(path, shape=(2,), dtype="float32")
    elif kind == "a zarr.json of another kind":
        path.mkdir()
        (path / "zarr.json").write_text("[]")


FOREIGN = ["a folder", "a file", "a Zarr group", "a Zarr array", "a zarr.json of another kind"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_check_target_refuses_what_is_foreign(tmp_path, make_manifest, kind):
    foreign(tmp_path / "x", kind)
    before = tree(tmp_path)
    with pytest.raises(TargetExists) as caught:
        find(tmp_path / "x", make_manifest())
    assert str(tmp_path / "x") in caught.value.found
    assert "--out" in caught.value.remedy
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_writer_refuses_what_is_foreign(tmp_path, make_manifest, kind):
    foreign(tmp_path / "x", kind)
    before = tree(tmp_path)
    try:
        with pytest.raises(TargetExists):
            SplitWriter(tmp_path / "x", make_manifest())
    finally:
        assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_opening_what_is_foreign_finds_no_cache(tmp_path, kind):
    foreign(tmp_path / "x", kind)
    with pytest.raises(CacheNotFound) as caught:
        open_cache(tmp_path / "x")
    assert "something else" in caught.value.found
    assert str(tmp_path / "x") in caught.value.found


def test_opening_nothing(tmp_path, make_manifest):
    with pytest.raises(CacheNotFound) as caught:
        open_cache(tmp_path / "nothing")
    assert "nothing is there" in caught.value.found
    assert "dump-teacher --out" in caught.value.remedy
    assert isinstance(caught.value, FileNotFoundError)
    assert find(tmp_path / "nothing", make_manifest()) is None
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("kind", ["a folder", "a link", "here"])
def test_an_empty_folder_is_a_free_place(tmp_path, make_manifest, monkeypatch, kind):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    path = {"a folder": tmp_path / "empty", "a link": tmp_path / "link", "here": Path(".")}[kind]
    assert find(path, make_manifest()) is None
    with SplitWriter(path, make_manifest()):
        pass
    assert cache_splits(tmp_path / "empty") == ["train"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "link"]


def test_a_split_that_is_not_there_and_one_not_finished(tmp_path, make_manifest, make_rows, commit_shard):
    manifest = make_manifest(views=2)
    writer = SplitWriter(tmp_path / "c.zarr", manifest)
    commit_shard(writer, make_rows(manifest), 1, 2)
    with pytest.raises(CacheNotFound, match="no split 'test'") as caught:
        open_cache(tmp_path / "c.zarr", "test")
    assert "train" in caught.value.needed
    assert "--split test" in caught.value.remedy
    with pytest.raises(CacheIncomplete, match="1 of 6 shards") as caught:
        open_cache(tmp_path / "c.zarr")
    assert caught.value.exit_code == 3
    assert "same dump-teacher command again" in caught.value.remedy


# ---- damage


def flip(path, at=-40, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def swap(one, other):
    contents = one.read_bytes(), other.read_bytes()
    assert contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


SHARD_DAMAGE = {
    "a flipped bit": lambda shard, other: flip(shard, 0),
    "a missing byte": lambda shard, other: truncate(shard),
    "an added byte": lambda shard, other: shard.write_bytes(shard.read_bytes() + b"\0"),
    "zero bytes": lambda shard, other: shard.write_bytes(b""),
    "zeros": lambda shard, other: shard.write_bytes(bytes(shard.stat().st_size)),
    "a deleted file": lambda shard, other: shard.unlink(),
    "a swapped shard": swap,
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE.values(), ids=SHARD_DAMAGE.keys())
@pytest.mark.parametrize(
    ("column", "layout"),
    [
        ("logits", {}),
        ("logits", {"chunk_rows": 2}),
        ("logits", {"compression": "zstd:3"}),
        ("logits", {"chunk_rows": 2, "compression": "zstd:3"}),
        ("labels", {}),
        ("input_crc32c", {}),
    ],
    ids=str,
)
def test_a_damaged_shard_is_named(tmp_path, finished, column, layout, damage):
    manifest, rows = finished(tmp_path / "c.zarr", length=14, views=2, **layout)
    split, array = tmp_path / "c.zarr" / "train", manifest.array(column)
    damage(shard_file(split, array, 1, 1), shard_file(split, array, 1, 2))
    cache = open_cache(tmp_path / "c.zarr")
    reads = [lambda: cache.column(column, 1)]
    if column == "logits":
        reads.append(lambda: cache.rows([0, 4, 13], 1))
    for read in reads:
        with pytest.raises(CacheDamaged) as caught:
            read()
        assert caught.value.exit_code == 3
        assert f"{column}, view 1, shard 1 (samples 4 to 7) of {split} is damaged" in caught.value.found
        assert "restore the cache from a copy" in caught.value.remedy
    # What is whole can still be read.
    whole = [0, 3, 12, 13]
    assert same(cache.rows(whole, 1), rows["logits"][1][whole])
    assert same(cache.column("logits", 0), rows["logits"][0])


def test_a_chunk_that_disagrees_with_the_checksum_beside_it_is_damaged(tmp_path, finished):
    # Two rows of three float32, then their crc32c: another Zarr reader would refuse the chunk, so this one does too.
    manifest, _ = finished(tmp_path / "c.zarr", chunk_rows=2)
    flip(shard_file(tmp_path / "c.zarr" / "train", manifest.arrays[0], 0, 0), 24)
    with pytest.raises(CacheDamaged, match="shard 0"):
        open_cache(tmp_path / "c.zarr").rows([0])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_verify_finds_nothing_in_a_whole_split(tmp_path, finished, layout):
    manifest, _ = finished(tmp_path / "c.zarr", **layout)
    report = verify_split(LocalStorage(tmp_path / "c.zarr"), "train")
    assert (report.problems, report.notes) == ([], [])
    assert report.shards == manifest.shards * manifest.views
    if "compression" not in layout:
        assert report.bytes == predicted_bytes(manifest)


@pytest.mark.parametrize("damage", SHARD_DAMAGE.values(), ids=SHARD_DAMAGE.keys())
@pytest.mark.parametrize("column", ["logits", "labels", "input_crc32c"])
def test_verify_names_every_damaged_shard(tmp_path, finished, column, damage):
    manifest, _ = finished(tmp_path / "c.zarr", length=14, views=2, chunk_rows=2)
    split, array = tmp_path / "c.zarr" / "train", manifest.array(column)
    damage(shard_file(split, array, 1, 1), shard_file(split, array, 1, 2))
    found = verify_split(LocalStorage(split.parent), split.name).problems
    view = 1 if array.per_view else 0
    assert f"{column}, view {view}, shard 1 (samples 4 to 7) of {split} is damaged" in found[0]
    assert len(found) == (2 if damage is swap else 1)


def test_verify_finds_every_flipped_bit_of_a_shard(tmp_path, finished):
    # Also in the index, by which only other Zarr readers go where nothing is compressed.
    manifest, _ = finished(tmp_path / "c.zarr", length=7, chunk_rows=2)
    file = shard_file(tmp_path / "c.zarr" / "train", manifest.arrays[0], 0, 1)
    for at in range(0, file.stat().st_size, 5):
        flip(file, at, at % 8)
        assert len(verify_split(LocalStorage(tmp_path / "c.zarr"), "train").problems) == 1
        flip(file, at, at % 8)
    assert verify_split(LocalStorage(tmp_path / "c.zarr"), "train").problems == []


def test_the_last_shard_is_named_by_the_samples_it_has(tmp_path, finished):
    manifest, _ = finished(tmp_path / "c.zarr")
    shard_file(tmp_path / "c.zarr" / "train", manifest.arrays[0], 0, 2).unlink()
    with pytest.raises(CacheDamaged, match=r"shard 2 \(samples 8 to 9\).*missing"):
        open_cache(tmp_path / "c.zarr").column("logits")


def test_a_damaged_index_is_not_believed(tmp_path, finished):
    manifest, _ = finished(tmp_path / "c.zarr", chunk_rows=1, compression="zstd:3")
    flip(shard_file(tmp_path / "c.zarr" / "train", manifest.arrays[0], 0, 0), -30)
    with pytest.raises(CacheDamaged, match=r"shard 0.*index fails its crc32c"):
        open_cache(tmp_path / "c.zarr").rows([3])


def edit(old, new):
    def apply(path):
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit('"spec": "teacher"', '"spec": "preacher"'), "manifest's sha256"),
        (edit('"amp": "off"', '"amp": "bf16"'), "manifest's sha256"),
        (edit('"amp": "off"', '"amp": "off", "new": 1'), "manifest's sha256"),
        (edit('"sha256": "', '"sha256": "0'), "manifest's sha256"),
        (edit('"sha256": "', '"sha255": "'), "not a manifest with its sha256"),
        (edit('"node_type": "group"', '"node_type": "array"'), "not the metadata of a Zarr group"),
        (truncate, "not the metadata of a Zarr group"),
        (lambda path: path.write_bytes(b""), "not the metadata of a Zarr group"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not the metadata of a Zarr group"),
        (lambda path: path.unlink(), ""),
        (edit('"accuracy": null', '"accuracy": NaN'), "it holds NaN"),
    ],
)
def test_a_damaged_manifest(tmp_path, finished, damage, message):
    finished(tmp_path / "c.zarr")
    damage(tmp_path / "c.zarr" / "train" / "zarr.json")
    with pytest.raises(CacheDamaged) as caught:
        open_cache(tmp_path / "c.zarr")
    assert caught.value.exit_code == 3
    assert message in caught.value.found
    assert str(tmp_path / "c.zarr" / "train") in caught.value.found
    assert "from a copy" in caught.value.remedy


def test_a_cache_of_a_later_version_is_refused(tmp_path, finished, make_manifest):
    finished(tmp_path / "c.zarr")
    edit('"cache": 1', '"cache": 2')(tmp_path / "c.zarr" / "zarr.json")
    for door in (open_cache, lambda path: find(path, make_manifest())):
        with pytest.raises(CacheDamaged, match=r"\{'cache': 2\}") as caught:
            door(tmp_path / "c.zarr")
        assert "{'cache': 1}" in caught.value.needed


@pytest.mark.parametrize(
    "damage",
    [
        lambda one, other: flip(one),
        lambda one, other: truncate(one),
        lambda one, other: one.write_bytes(b""),
        lambda one, other: one.write_bytes(bytes(one.stat().st_size)),
        lambda one, other: one.unlink(),
        swap,
        lambda one, other: shutil.copy(other, one),
    ],
    ids=["flipped", "truncated", "zero bytes", "zeros", "deleted", "swapped", "another view's"],
)
def test_a_damaged_ledger(tmp_path, finished, damage):
    finished(tmp_path / "c.zarr", views=2)
    split = tmp_path / "c.zarr" / "train"
    damage(split / "ledger/c/0/0/0", split / "ledger/c/1/0/0")
    with pytest.raises(CacheDamaged, match="ledger") as caught:
        open_cache(tmp_path / "c.zarr")
    assert caught.value.exit_code == 3
    assert str(split) in caught.value.found
    assert caught.value.needed
    assert "from a copy" in caught.value.remedy


def test_a_damaged_ledger_is_not_continued(tmp_path, make_manifest, make_rows, commit_shard):
    manifest = make_manifest()
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer:
        commit_shard(writer, make_rows(manifest), 0, 0)
    flip(Path(writer.storage.url) / "ledger/unsealed/parts/0/0")
    with pytest.raises(CacheDamaged, match="ledger"):
        SplitWriter(tmp_path / "c.zarr", manifest)


@pytest.mark.parametrize("compression", ["none", "zstd:3"])
def test_no_flipped_bit_ever_changes_what_is_read(tmp_path, finished, compression):
    manifest, rows = finished(
        tmp_path / "c.zarr", length=7, shard_rows=4, chunk_rows=2, views=2, compression=compression
    )
    # The metadata of the arrays is for other Zarr readers.
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    files = [file for file in files if file.name != "zarr.json" or file.parent.name in ("c.zarr", "train")]
    random, outcomes = np.random.default_rng(0), Counter()
    for flipped in range(200):
        file = files[flipped % len(files)]
        content = file.read_bytes()
        bit = int(random.integers(len(content) * 8))
        flip(file, bit // 8, bit % 8)
        try:
            cache = open_cache(tmp_path / "c.zarr")
            for view in range(2):
                assert all(same(cache.column(a.name, view), expected(rows, a, view)) for a in manifest.arrays)
            outcomes["nothing wrong"] += 1
        except KdcacheError as problem:
            outcomes[type(problem)] += 1
        finally:
            file.write_bytes(content)
    assert outcomes.keys() <= {"nothing wrong", CacheDamaged, CacheIncomplete, CacheNotFound}
    assert outcomes[CacheDamaged] > 130


@pytest.mark.parametrize("compression", ["none", "zstd:3"])
def test_a_disk_that_cannot_read_is_a_storage_error(tmp_path, finished, monkeypatch, compression):
    finished(tmp_path / "c.zarr", compression=compression)
    cache = open_cache(tmp_path / "c.zarr")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        cache.rows([0])
    assert "train/logits" in caught.value.found


# ---- settings and values that are refused


@pytest.mark.parametrize(
    ("encoding", "value", "found", "needed", "remedy"),
    [
        ("float32", np.nan, "sample 102, class 1 is nan", "finite", "check the checkpoint"),
        ("float16", -np.inf, "sample 102, class 1 is -inf", "finite", "check the checkpoint"),
        ("float16", 65520.0, "sample 102, class 1 is 65520", "65504 in size for float16", "--encoding float32"),
        ("float16", -1e30, "sample 102, class 1 is -1e+30", "65504 in size for float16", "--encoding float32"),
        ("float32", 1e39, "sample 102, class 1 is 1e+39", "3.40282e+38 in size for float32", "--encoding float64"),
    ],
)
def test_logits_that_cannot_be_stored_are_refused(encoding, value, found, needed, remedy):
    logits = np.zeros((4, 3))
    logits[2:, 1:] = value
    with pytest.raises(TeacherOutputError) as caught:
        encoding_named(encoding, 3).encode(logits, first_sample=100)
    assert found in caught.value.found
    assert needed in caught.value.needed
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("encoding", FLOATS)
def test_logits_are_stored_to_the_precision_of_the_encoding(encoding):
    logits = np.random.default_rng(0).standard_normal((5, 7)) * 1000
    logits[0, 0] = 65519.0 if encoding == "float16" else np.finfo(encoding).max
    stored = encoding_named(encoding, 7).encode(logits, first_sample=0)["logits"]
    assert stored.dtype == encoding
    np.testing.assert_allclose(stored.astype(np.float64), logits, rtol=np.finfo(encoding).eps)
    assert stored[0, 0] == np.finfo(encoding).max


@pytest.mark.parametrize("split", ["../outside", "/tmp/outside", "a/b", ".hidden", "", "a\n"])
def test_a_split_is_one_plain_name(make_manifest, split):
    with pytest.raises(UsageError, match="the split is named"):
        make_manifest(split=split)


@pytest.mark.parametrize(("requested", "advice"), [(0, "try 1"), (-4, "try 1"), (3, "try 2"), (1023, "try 512")])
def test_shards_are_powers_of_two(requested, advice):
    with pytest.raises(UsageError, match=f"--shard-rows is {requested}\n") as caught:
        choose_shard_rows(10**6, 20, requested)
    assert caught.value.remedy == advice


@pytest.mark.parametrize("length", [1, 2, 3, 1000, 1024, 1025, 16384, 50_000, 1_281_167])
@pytest.mark.parametrize("classes", [1, 10, 1000, 21_841, 5_000_000])
def test_the_chosen_layout_stays_within_its_bounds(length, classes):
    shard_rows, (logits, *_) = build_arrays(length=length, encoding=encoding_named("float16", classes))
    row = 2 * classes
    assert shard_rows % logits.chunk_rows == 0
    assert logits.chunk_rows <= 1024
    assert logits.chunk_rows == 1 or logits.chunk_rows * row <= 2 << 20
    assert shard_rows <= 16384
    assert shard_rows <= max(2 * length - 1, 1)
    assert shard_rows == logits.chunk_rows or shard_rows * row <= 64 << 20


@pytest.mark.parametrize(("compression", "level"), [("none", None), ("zstd", 5), ("zstd:1", 1), ("zstd:9", 9)])
def test_compressions(compression, level):
    assert zstd_level(compression) == level


@pytest.mark.parametrize("compression", ["", "zstd:0", "zstd:10", "zstd:-1", "zstd:x", "gzip", "none:3", "lz4:1"])
def test_another_compression_is_refused(compression):
    with pytest.raises(UsageError, match="zstd:LEVEL") as caught:
        zstd_level(compression)
    assert repr(compression) in caught.value.found


# ---- faults that stand


@pytest.mark.parametrize("choice", [{"row_source": "memroy"}, {"shuffle": "exakt"}])
def test_a_choice_is_one_of_those_there_are(tmp_path, finished, choice):
    finished(tmp_path / "c.zarr")
    with pytest.raises(UsageError):
        next(open_cache(tmp_path / "c.zarr").epoch(options=ReadOptions(**choice)))


def test_a_ledger_that_cannot_be_read_is_a_kdcache_error(tmp_path, finished):
    finished(tmp_path / "c.zarr")
    ledger = tmp_path / "c.zarr" / "train" / "ledger/c/0/0/0"
    ledger.unlink()
    ledger.mkdir()
    with pytest.raises(KdcacheError):
        open_cache(tmp_path / "c.zarr")


def test_rows_of_another_dtype_are_not_committed(tmp_path, make_manifest, make_rows):
    manifest = make_manifest(dtype="float16")
    rows = {name: all_[0, :4] for name, all_ in make_rows(manifest).items()}
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer, pytest.raises((TypeError, ValueError)):
        writer.commit(0, 0, rows | {"logits": rows["logits"].astype(np.float64)})


def test_a_split_is_not_sealed_before_its_last_shard(tmp_path, make_manifest):
    manifest = make_manifest()
    with SplitWriter(tmp_path / "c.zarr", manifest) as writer, pytest.raises((KdcacheError, ValueError)):
        writer.finish(replace(manifest, view_sha256=(writer.ledger.digest(0),)))


def test_a_full_disk_refuses_the_lock_and_leaves_none(tmp_path, make_manifest):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("filelock._unix.os.open", side_effect=full), pytest.raises(StorageError):
        SplitWriter(tmp_path / "c.zarr", make_manifest())
    with SplitWriter(tmp_path / "c.zarr", make_manifest()):
        pass


def test_a_killed_dump_gives_the_lock_free_while_its_workers_still_live(tmp_path):
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from kdcache.core.file_lock import PathLock\n"
        "PathLock(Path(sys.argv[1]))\n"
        "if worker := os.fork():\n"
        "    print(worker, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.close(1)\n"
        "time.sleep(60)\n"
    )
    dump = subprocess.run([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, check=False)
    try:
        PathLock(tmp_path).release()
    finally:
        os.kill(int(dump.stdout), signal.SIGKILL)


@pytest.mark.parametrize("method", ["write", "create"])
@pytest.mark.parametrize("number", range(16))
def test_an_object_is_written_whose_folder_another_worker_removes_meanwhile(tmp_path, monkeypatch, method, number):
    storage, calls = LocalStorage(tmp_path), []

    def vanishing(original):
        def act(*arguments, **options):
            calls.append(original.__name__)
            if len(calls) == number + 1:
                with monkeypatch.context() as quiet:
                    for name, real in originals.items():
                        quiet.setattr(os, name, real)
                    storage.delete_below("unsealed")
            return original(*arguments, **options)

        return act

    originals = {name: getattr(os, name) for name in ("open", "fsync", "replace", "link", "mkdir")}
    for name, original in originals.items():
        monkeypatch.setattr(os, name, vanishing(original))
    getattr(storage, method)("unsealed/workers/one", b"alive")
    monkeypatch.undo()
    # Where the folder goes before the last step, in which its names are flushed, it goes with what was written.
    if number != len(calls) - 1:
        assert storage.read("unsealed/workers/one") == b"alive"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"one"}


def test_a_folder_that_cannot_be_made_is_not_tried_for_ever(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "fsync", missing)
    with pytest.raises(StorageError, match="No such file"):
        LocalStorage(tmp_path).write("one", b"")
