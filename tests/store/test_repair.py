"""A damaged store is found by verify, mended by --repair, and then the one that was written first, to the byte."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from kdcache.cli.app import app
from kdcache.core.config import DumpConfig
from kdcache.core.errors import CacheDamaged, CacheIncomplete, TargetExists
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.store.cache import open_cache
from kdcache.store.storage.local import LocalStorage
from kdcache.store.verify import verify_split
from tests.crashes import contents
from tests.helpers import Interrupted, Network, synthetic

CONFIG = DumpConfig(device="cpu", batch_size=8, shard_rows=16)


def dump(out, *, repair=False, compression="none", teacher=None):
    config = DumpConfig(**{**vars(CONFIG), "compression": compression})
    return dump_teacher(teacher or Network(16, 4), synthetic(60), out=out, config=config, repair=repair)


@pytest.fixture(scope="module", params=["none", "zstd"])
def whole(tmp_path_factory, request):
    out = tmp_path_factory.mktemp("whole") / "c.zarr"
    dump(out, compression=request.param)
    return out, request.param


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


GONE = ("ledger/c/0/0/0", "logits/c/0/2/0")
DAMAGES = {
    "a shard": (lambda split: flip(split / "logits/c/0/2/0"), 16),
    "a shard of labels": (lambda split: flip(split / "labels/c/1"), 16),
    "a shard cut short": (lambda split: (split / "input_crc32c/c/0/0").write_bytes(b""), 16),
    "a shard gone": (lambda split: (split / "logits/c/0/3/0").unlink(), 12),
    "the ledger": (lambda split: flip(split / "ledger/c/0/0/0"), 0),
    "the ledger gone": (lambda split: (split / "ledger/c/0/0/0").unlink(), 0),
    "the ledger gone, and a shard": (lambda split: [(split / each).unlink() for each in GONE], 16),
    "the manifest": (lambda split: edit(split / "zarr.json", '"spec": "Network"', '"spec": "Netwark"'), 0),
    "the manifest's hash": (lambda split: edit(split / "zarr.json", '"sha256": "', '"sha256": "0'), 0),
    "the manifest beyond JSON": (lambda split: edit(split / "zarr.json", '"seed": 0', '"seed" 0'), 0),
}


def edit(path, old, new):
    text = path.read_text()
    at = text.rindex(old)
    path.write_text(text[:at] + new + text[at + len(old) :])


@pytest.mark.parametrize(("damage", "recomputed"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_broken_and_nothing_else_is_computed_again(tmp_path, whole, damage, recomputed):
    original, compression = whole
    out = tmp_path / "c.zarr"
    shutil.copytree(original, out)
    damage(out / "train")
    assert verify_split(LocalStorage(out), "train").problems
    assert dump(out, repair=True, compression=compression).computed_rows == recomputed
    assert verify_split(LocalStorage(out), "train").problems == []
    found, expected = contents(out), contents(original)
    for name in {**found, **expected}:
        if name.endswith("zarr.json"):
            assert json.loads(found[name]) == json.loads(expected[name]), name
        else:
            assert found[name] == expected[name], name


def test_a_whole_store_is_left_as_it_is(tmp_path, whole):
    original, compression = whole
    out = tmp_path / "c.zarr"
    shutil.copytree(original, out)
    assert dump(out, repair=True, compression=compression).computed_rows == 0
    assert contents(out) == contents(original)


def test_another_teacher_cannot_repair(tmp_path, whole):
    original, compression = whole
    out = tmp_path / "c.zarr"
    shutil.copytree(original, out)
    with pytest.raises(TargetExists, match="weights_sha256"):
        dump(out, repair=True, compression=compression, teacher=Network(16, 4, seed=1))
    edit(out / "train" / "zarr.json", '"spec": "Network"', '"spec": "Netwark"')
    with pytest.raises(CacheDamaged, match="another one"):
        dump(out, repair=True, compression=compression, teacher=Network(16, 4, seed=1))


def test_an_interrupted_repair_is_not_mistaken_for_a_finished_dump(tmp_path, whole):
    original, compression = whole
    out = tmp_path / "c.zarr"
    shutil.copytree(original, out)
    flip(out / "train/logits/c/0/2/0")
    with pytest.raises(Interrupted):
        dump(out, repair=True, compression=compression, teacher=Network(16, 4, stop_after=8))
    assert "samples 32 to 47" in verify_split(LocalStorage(out), "train").problems[0]
    with pytest.raises(CacheDamaged, match="samples 32 to 47"):
        open_cache(out).rows([40])
    assert dump(out, repair=True, compression=compression).computed_rows == 16
    assert contents(out) == contents(original)


def test_a_partial_cache_gives_what_is_committed_and_nothing_else(tmp_path, whole):
    original, compression = whole
    out = tmp_path / "c.zarr"
    with pytest.raises(Interrupted):
        dump(out, compression=compression, teacher=Network(16, 4, stop_after=6 + 40))
    with pytest.raises(CacheIncomplete, match="2 of 4 shards"):
        open_cache(out)
    cache, full = open_cache(out, allow_partial=True), open_cache(original)
    assert cache.samples().tolist() == list(range(32))
    seen = []
    for indices, rows in cache.epoch(0, batch_size=7):
        assert (rows == full.rows(indices)).all()
        seen += indices.tolist()
    assert sorted(seen) == list(range(32))
    with pytest.raises(CacheIncomplete, match="shard 3"):
        cache.rows([50])


def test_verify_says_what_is_wrong_and_exits_with_3(tmp_path, whole):
    original, _ = whole
    out = tmp_path / "c.zarr"
    shutil.copytree(original, out)
    done = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["whole"]) == (0, True)
    flip(out / "train/logits/c/0/2/0")
    edit(out / "train/labels/zarr.json", "60", "61")
    done = CliRunner().invoke(app, ["verify", str(out), "--json"])
    report = json.loads(done.stdout)
    assert (done.exit_code, report["whole"]) == (3, False)
    shard, metadata = report["splits"]["train"]["problems"]
    assert "logits, view 0, shard 2 (samples 32 to 47)" in shard
    assert "labels/zarr.json: shape" in metadata
    assert "--repair" in CliRunner().invoke(app, ["verify", str(out)]).stdout
