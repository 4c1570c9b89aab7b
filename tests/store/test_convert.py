"""Conversion of finished caches, old ones included."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.core.config import ConvertConfig
from kdcache.core.errors import TargetExists, TeacherOutputError, UsageError
from kdcache.store.convert import convert_cache
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.manifest import recorded_sha256
from kdcache.store.storage.registry import open_storage
from kdcache.store.verify import verify_split
from kdcache.store.writer import SplitWriter
from tests.helpers import Network, answer, synthetic, tree

OLD = Path(__file__).parents[1] / "fixtures" / "run-1" / "cache.zarr"
IMAGES = synthetic(60, shape=(1, 4, 4))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three views of 60 samples in float32, with features."""
    path = tmp_path_factory.mktemp("source") / "c"
    settings = {"augment": "affine", "views": 3, "features": ("layers.1",), "shard_rows": 16}
    dump_teacher(Network(16, 4), IMAGES, out=path, config=DumpConfig(device="cpu", encoding="float32", **settings))
    return path


def convert(source, out, **settings):
    return convert_cache(source, out, ConvertConfig(**settings))


@pytest.mark.parametrize("encoding", ["quantized:8", "quantized:4", "topk:3", "float32"])
def test_an_old_cache_converts_to_each_kind_and_trains(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, "old.zarr")
    before = tree(Path("old.zarr"))
    found = answer("convert", "old.zarr", "--encoding", encoding, "--out", "new.zarr")
    assert tree(Path("old.zarr")) == before
    old, new = open_cache("old.zarr"), open_cache("new.zarr")
    logits = old.column("logits")
    own = encoding_named(encoding, 10)
    np.testing.assert_array_equal(new.column("logits"), own.decode(own.encode(logits, first_sample=0)))
    np.testing.assert_array_equal(new.column("input_crc32c"), old.column("input_crc32c"))
    assert new.manifest.converted_from.encoding == old.encoding.spec
    assert new.manifest.converted_from.manifest_sha256 == recorded_sha256(open_storage("old.zarr"), "train")
    assert new.manifest.teacher.accuracy == pytest.approx(old.manifest.teacher.accuracy, abs=1e-3)
    assert len(new.manifest.fidelity) == len(found["splits"]["train"]["fidelity"]) == 4
    assert verify_split(open_storage("new.zarr"), "train").problems == []
    if encoding == "topk:3":
        answer("train-student", "--cache", "new.zarr", "--student", "mlp", "--epochs", "1", "--out", "run")


def test_what_is_converted_is_what_a_dump_would_have_stored(tmp_path, source):
    convert(source, tmp_path / "converted", encoding="quantized:6", views=2, drop_features=True, shard_rows=16)
    settings = {"augment": "affine", "views": 2, "shard_rows": 16, "encoding": "quantized:6"}
    dump_teacher(Network(16, 4), IMAGES, out=tmp_path / "dumped", config=DumpConfig(device="cpu", **settings))
    found, wanted = tree(tmp_path / "converted"), tree(tmp_path / "dumped")
    differing = {name for name in found if found[name] != wanted[name]}
    assert found.keys() == wanted.keys()
    assert differing == {"train/zarr.json"}  # where it was made from
    config = StudentConfig(device="cpu", epochs=2, batch_size=16)
    train_student(Network(16, 4, seed=1), IMAGES, tmp_path / "converted", config=config)


class Stopped(Exception):
    """The process is killed."""


@pytest.mark.parametrize("commits", [0, 1, 5, 11])
def test_a_stopped_conversion_continues_to_the_same_bytes(tmp_path, source, monkeypatch, commits):
    convert(source, tmp_path / "whole", encoding="topk:2", shard_rows=16)
    done, commit = [], SplitWriter.commit

    def stopping(self, *arguments):
        if len(done) == commits:
            raise Stopped
        done.append(arguments)
        commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "commit", stopping)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "c", encoding="topk:2", shard_rows=16)
    convert(source, tmp_path / "c", encoding="topk:2", shard_rows=16)
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")
    convert(source, tmp_path / "c", encoding="topk:2", shard_rows=16)
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")


def test_compression_and_layout_change_without_the_rows(tmp_path, source):
    convert(source, tmp_path / "c", compression="zstd:3", shard_rows=8)
    old, new = open_cache(source), open_cache(tmp_path / "c")
    for view in range(3):
        for name in ("logits", "features.layers.1"):
            np.testing.assert_array_equal(new.column(name, view), old.column(name, view))
    assert new.manifest.shard_rows == 8
    assert {array.compression for array in new.manifest.arrays[:2]} == {"zstd:3"}
    assert new.manifest.fidelity == old.manifest.fidelity


@pytest.mark.parametrize(
    ("settings", "error", "found"),
    [
        ({"encoding": "head"}, UsageError, "--encoding is head, and"),
        ({"views": 4}, UsageError, "--views is 4"),
        ({"encoding": "topk:1", "max_kl": 1e-6}, TeacherOutputError, "topk:1 loses a mean KL"),
        ({"encoding": "topk:9"}, UsageError, "there are 4 classes"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, source, settings, error, found):
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "c", **settings)
    assert found in caught.value.found
    assert caught.value.needed


def test_what_top_k_leaves_out_does_not_come_back(tmp_path, source):
    convert(source, tmp_path / "small", encoding="topk:2")
    with pytest.raises(UsageError, match="holds topk:2"):
        convert(tmp_path / "small", tmp_path / "c", encoding="float16")
    with pytest.raises(TargetExists, match="encoding is 'topk:2' there and 'topk:1' here"):
        convert(source, tmp_path / "small", encoding="topk:1")
