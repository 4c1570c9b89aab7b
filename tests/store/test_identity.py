"""What makes two dumps one: the device that computed the rows, and the committed bytes; not the author's paths."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.core.config import DumpConfig
from kdcache.core.errors import CacheDamaged, TargetExists, UsageError
from kdcache.distill.teacher import dump_manifest
from kdcache.distill.teacher.dump import dump_teacher, plan_dump
from kdcache.store.cache import open_cache
from kdcache.store.inspect import inspect_cache
from kdcache.store.local_paths import portable_spec, read_local
from kdcache.store.manifest import (
    METADATA,
    cache_sha256,
    manifest_attributes,
    manifest_sha256,
)
from kdcache.store.storage.local import LocalStorage
from kdcache.store.verify import verify_split
from tests.helpers import (
    Interrupted,
    Network,
    answer,
    kdcache,
    refused,
    stored_digest,
    stored_manifest,
    synthetic,
    tree,
)
from tests.make_fixture import FIXTURE

GPU = {"device": "cuda", "name": "NVIDIA H100", "cudnn": "92600", "matmul_precision": "tf32"}
PROBED = 6  # a batch of two, twice, and one of two with another neighbour


def dump(out, *, teacher=None, dataset=None, config=None, **ways):
    settings = {"device": "cpu", "batch_size": 8, "shard_rows": 16} | (config or {})
    return dump_teacher(
        teacher or Network(16, 4),
        dataset or synthetic(60),
        out=out,
        teacher_name="Network",
        config=DumpConfig(**settings),
        **ways,
    )


def plan(out):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16)
    return plan_dump(Network(16, 4), synthetic(60), out=out, config=config)


def begun(out, **options):
    """Two of four shards of a dump that was stopped."""
    with pytest.raises(Interrupted):
        dump(out, teacher=Network(16, 4, stop_after=PROBED + 40), **options)
    return out


def elsewhere(**facts):
    """A machine whose device and settings are others."""
    here = dump_manifest.compute_facts(torch.device("cpu"))
    return mock.patch.object(dump_manifest, "compute_facts", return_value=here | facts)


def on_gpu():
    return mock.patch.object(dump_manifest, "compute_facts", return_value=GPU)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


class Slightly(Network):
    """The same weights, whose answers come out a little otherwise, as with another number of threads."""

    def forward(self, inputs):
        return super().forward(inputs) * 1.01


# The device.


def test_the_manifest_records_the_device_and_what_changes_its_last_bits(tmp_path):
    found = dump(tmp_path / "c").manifest.compute
    assert found["device"] == "cpu"
    assert found["threads"] == str(torch.get_num_threads())
    assert {"name", "instructions", "matmul_precision"} <= found.keys()


@pytest.mark.parametrize(
    ("machine", "parts"),
    [
        (on_gpu, ["device is 'cpu' there and 'cuda' here", "'tf32' here"]),
        (lambda: elsewhere(threads="77"), ["threads is", "'77' here"]),
        (lambda: elsewhere(name="another processor"), ["name is", "'another processor' here"]),
    ],
    ids=["GPU", "threads", "processor"],
)
def test_a_dump_is_not_continued_on_another_device_unless_the_user_says_so(tmp_path, machine, parts):
    out = begun(tmp_path / "c")
    before = tree(out)
    with machine():
        for attempt in (dump, plan):
            with pytest.raises(TargetExists) as refusal:
                attempt(out)
            for part in (*parts, "2 shards", "--allow-device-change", "one device"):
                assert part in str(refusal.value)
        assert tree(out) == before
        dump(out, allow_device_change=True)
        compute = dump_manifest.compute_facts(torch.device("cpu"))
    manifest = stored_manifest(out / "train")
    (change,) = manifest.history
    assert change.what == "device"
    assert change.before["committed_shards"] == "2"
    assert manifest.compute == compute
    assert all(change.after[name] == compute[name] for name in change.after)
    assert verify_split(LocalStorage(out), "train").problems == []


def test_an_allowed_change_is_asked_for_once_and_the_way_back_again(tmp_path):
    out = begun(tmp_path / "c")
    with on_gpu(), pytest.raises(Interrupted):
        dump(out, teacher=Network(16, 4, stop_after=PROBED + 24), allow_device_change=True)
    with pytest.raises(TargetExists, match="device is 'cuda' there and 'cpu' here"):
        dump(out)
    with on_gpu():
        dump(out)
    assert len(stored_manifest(out / "train").history) == 1


def test_a_finished_dump_is_read_on_any_device_and_extended_on_its_own(tmp_path):
    settings = {"augment": "crop-flip", "views": 1, "view_seed": 1}
    dataset = synthetic(60, shape=(3, 8, 8))
    dump(tmp_path / "c", teacher=Network(192, 4), dataset=dataset, config=settings)
    before = tree(tmp_path / "c")
    with on_gpu():
        assert dump(tmp_path / "c", teacher=Network(192, 4), dataset=dataset, config=settings).computed_rows == 0
        with pytest.raises(TargetExists, match="4 shards that another device"):
            dump(tmp_path / "c", teacher=Network(192, 4), dataset=dataset, config=settings, add_views=1)
    assert tree(tmp_path / "c") == before


def test_a_dump_that_committed_nothing_may_move(tmp_path):
    with pytest.raises(Interrupted):
        dump(tmp_path / "c", teacher=Network(16, 4, stop_after=PROBED + 8))
    with on_gpu():
        dump(tmp_path / "c")
    manifest = stored_manifest(tmp_path / "c" / "train")
    assert (manifest.compute, manifest.history) == (GPU, ())


def test_an_unfinished_dump_of_an_older_version_is_continued_on_its_kind_of_device(tmp_path):
    out = begun(tmp_path / "c")
    rewrite(out / "train", replace(stored_manifest(out / "train"), compute={}))
    with on_gpu(), pytest.raises(TargetExists, match="device is 'cpu' there and 'cuda' here"):
        dump(out)
    assert dump(out).computed_rows == 28
    assert stored_manifest(out / "train").compute == {}


def rewrite(split, manifest):
    document = json.loads((split / METADATA).read_text())
    document["attributes"] = manifest_attributes(manifest)
    (split / METADATA).write_text(json.dumps(document))


# The bytes.


@pytest.fixture
def whole(tmp_path):
    dump(tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


@pytest.mark.parametrize("damage", ["shard", "shard and ledger", "labels"])
def test_a_repair_that_computes_other_bytes_is_refused_and_changes_nothing(whole, damage):
    flip(whole / "train" / ("labels/c/2" if damage == "labels" else "logits/c/0/2/0"))
    if "ledger" in damage:
        flip(whole / "train/ledger/c/0/0/0")
    before = tree(whole)
    with elsewhere(threads="77"), pytest.raises(CacheDamaged) as refusal:
        dump(whole, teacher=Slightly(16, 4), repair=True)
    for part in ("logits, view 0, shard 2 (samples 32 to 47)", "committed, 0x", "--accept-new-bytes", "77 here"):
        assert part in str(refusal.value)
    assert {name: data for name, data in tree(whole).items() if "ledger" not in name} == {
        name: data for name, data in before.items() if "ledger" not in name
    }
    dump(whole, repair=True)
    assert verify_split(LocalStorage(whole), "train").problems == []


def test_what_comes_out_as_committed_is_restored_beside_what_does_not(whole):
    """Two shards are broken, and the teacher answers otherwise for one of them."""

    class Partly(Network):
        def forward(self, inputs):
            answers = super().forward(inputs)
            return answers * (1.01 if self.rows > PROBED + 16 else 1)

    original = tree(whole)
    for shard in (1, 2):
        flip(whole / f"train/logits/c/0/{shard}/0")
    with pytest.raises(CacheDamaged, match="1 part computed again differ"):
        dump(whole, teacher=Partly(16, 4), repair=True)
    assert [name for name, data in tree(whole).items() if original[name] != data] == ["train/logits/c/0/2/0"]
    dump(whole, repair=True)
    assert tree(whole) == original


def test_without_a_ledger_the_manifests_digest_decides(whole):
    """Nothing but the digest of the whole ledger tells what the missing shard was."""
    (whole / "train/ledger/c/0/0/0").unlink()
    (whole / "train/logits/c/0/2/0").unlink()
    before = tree(whole)
    with pytest.raises(CacheDamaged, match=r"view 0: sha256 of its ledger [0-9a-f]{64} committed, [0-9a-f]{64} now"):
        dump(whole, teacher=Slightly(16, 4), repair=True)
    left = tree(whole)
    assert left.pop("train/logits/c/0/2/0", None) is not None
    assert left.pop("train/facts/c/0/2/0") != before.pop("train/facts/c/0/2/0")
    assert left == before
    (whole / "train/logits/c/0/2/0").unlink()
    assert dump(whole, repair=True).computed_rows == 16
    assert verify_split(LocalStorage(whole), "train").problems == []


def test_accepted_bytes_give_the_cache_a_new_identity_that_tells_the_old_one(whole):
    old, old_view = stored_digest(whole / "train"), stored_manifest(whole / "train").view_sha256[0]
    flip(whole / "train/logits/c/0/2/0")
    with elsewhere(threads="77"):
        dump(whole, teacher=Slightly(16, 4), repair=True, accept_new_bytes=True)
    manifest = stored_manifest(whole / "train")
    (change,) = manifest.history
    assert change.what == "bytes"
    assert change.before == {"view 0": old_view, "manifest_sha256": old}
    assert change.after["view 0"] == manifest.view_sha256[0] != old_view
    assert change.after["threads"] == "77"
    assert stored_digest(whole / "train") != old
    assert verify_split(LocalStorage(whole), "train").problems == []


def test_accepting_new_bytes_changes_nothing_where_they_are_the_old_ones(whole):
    original = tree(whole)
    flip(whole / "train/logits/c/0/2/0")
    (whole / "train/ledger/c/0/0/0").unlink()
    dump(whole, repair=True, accept_new_bytes=True)
    assert tree(whole) == original


def test_a_stopped_acceptance_is_no_finished_cache_and_goes_on_only_by_the_same_flag(whole):
    for shard in (1, 2):
        flip(whole / f"train/logits/c/0/{shard}/0")
    with pytest.raises(Interrupted):
        dump(whole, teacher=Slightly(16, 4, stop_after=PROBED + 24), repair=True, accept_new_bytes=True)
    with pytest.raises(CacheDamaged, match="ledger"):
        open_cache(whole)
    with pytest.raises(CacheDamaged, match="--accept-new-bytes"):
        dump(whole, teacher=Slightly(16, 4), repair=True)
    dump(whole, teacher=Slightly(16, 4), repair=True, accept_new_bytes=True)
    assert len(open_cache(whole).manifest.history) == 1
    assert verify_split(LocalStorage(whole), "train").problems == []


def test_an_extension_does_not_seal_other_rows_anew(tmp_path):
    settings = {"augment": "crop-flip", "views": 1}
    dataset = synthetic(60, shape=(3, 8, 8))
    dump(tmp_path / "c", teacher=Network(192, 4), dataset=dataset, config=settings)
    dump(tmp_path / "d", teacher=Slightly(192, 4), dataset=dataset, config=settings)
    for name in ("logits", "ledger"):
        shutil.copytree(tmp_path / "d/train" / name, tmp_path / "c/train" / name, dirs_exist_ok=True)
    with pytest.raises(CacheDamaged, match="view 0: sha256 of its ledger"):
        dump(tmp_path / "c", teacher=Network(192, 4), dataset=dataset, config=settings, add_views=1)


def test_new_bytes_are_accepted_only_in_a_repair(tmp_path):
    with pytest.raises(UsageError, match="without repair"):
        dump(tmp_path / "c", accept_new_bytes=True)
    message = refused(2, "dump-teacher", "--out", tmp_path / "c", "--accept-new-bytes")
    assert "--repair" in message


# Paths, terms and the digest to cite.


@pytest.mark.parametrize(
    ("spec", "portable"),
    [
        ("folder:/home/alice/pets", "folder:pets"),
        ("folder:/home/alice/a:b/pets/", "folder:pets"),
        ("text-folder:data/reviews", "text-folder:reviews"),
        ("hf:/home/alice/model", "hf:model"),
        ("timm:local-dir:~/weights", "timm:local-dir:weights"),
        ("/home/alice/net", "net"),
        ("hf:org/name", "hf:org/name"),
        ("py:my.module:build", "py:my.module:build"),
        ("torchvision:resnet50@IMAGENET1K_V2", "torchvision:resnet50@IMAGENET1K_V2"),
        ("lstm:hidden=128,embedding=64", "lstm:hidden=128,embedding=64"),
        ("cnn", "cnn"),
    ],
)
def test_a_spec_without_the_path_of_a_machine(spec, portable):
    assert portable_spec(spec) == portable
    assert portable_spec(portable) == portable


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A cache of a folder of images, with terms of use."""
    home = tmp_path_factory.mktemp("alice")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (home / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / "pets" / split / name / f"{number}.png")
    source = ("--dataset", f"folder:{home}/pets", "--data-root", home / "data", "--device", "cpu")
    answer("train-teacher", *source, "--model", "cnn", "--epochs", 1, "--size", 12, "--out", home / "teacher")
    teacher = ("--teacher", "cnn", "--checkpoint", home / "teacher/best.pt", "--size", 12)
    command = ("dump-teacher", *source, *teacher, "--split", "train", "--split", "test", "--out", home / "pets.zarr")
    answer(*command, "--license", "CC-BY-4.0", "--citation", "Alice, 2026")
    return home, command


def test_no_path_of_the_author_is_in_the_hashed_manifest(published):
    home, _ = published
    for split in ("train", "test"):
        attribute = json.loads((home / "pets.zarr" / split / METADATA).read_text())["attributes"]["kdcache"]
        assert str(home) not in json.dumps(attribute["manifest"])
        assert attribute["manifest"]["dataset"]["name"] == "folder:pets"
        assert attribute["local"] == {"dataset": f"folder:{home}/pets", "data_root": None}


def test_on_the_same_machine_the_data_are_found_and_elsewhere_by_dataset(published, tmp_path, monkeypatch):
    home, _ = published
    monkeypatch.chdir(tmp_path)
    train = ("train-student", "--student", "mlp", "--epochs", 1, "--size", 12, "--device", "cpu")
    answer(*train, "--cache", home / "pets.zarr", "--out", tmp_path / "here")
    shutil.copytree(home / "pets.zarr", tmp_path / "pets.zarr")
    for split in ("train", "test"):
        file = tmp_path / "pets.zarr" / split / METADATA
        document = json.loads(file.read_text())
        digest = document["attributes"]["kdcache"]["sha256"]
        del document["attributes"]["kdcache"]["local"]
        file.write_text(json.dumps(document))
        assert stored_digest(tmp_path / "pets.zarr" / split) == digest
    message = refused(1, *train, "--cache", tmp_path / "pets.zarr", "--out", tmp_path / "there")
    assert "--dataset" in message
    found = ("--dataset", f"folder:{home}/pets")
    answer(*train, "--cache", tmp_path / "pets.zarr", *found, "--out", tmp_path / "there")
    teacher = ("--teacher", "cnn", "--checkpoint", home / "teacher/best.pt", "--size", 12, "--device", "cpu")
    assert answer("verify", home / "pets.zarr", *teacher)["whole"]


def test_a_hint_that_is_not_of_the_dataset_is_not_followed(published, tmp_path):
    home, _ = published
    shutil.copytree(home / "pets.zarr", tmp_path / "c.zarr")
    file = tmp_path / "c.zarr/train" / METADATA
    manifest = stored_manifest(file.parent)
    for local in ({"dataset": "py:other:data"}, {"dataset": 7, "data_root": []}, "text", None):
        document = json.loads(file.read_text())
        document["attributes"]["kdcache"]["local"] = local
        file.write_text(json.dumps(document))
        found = read_local(LocalStorage(file.parent), manifest)
        assert (found.dataset, found.data_root) == ("folder:pets", None)


def test_inspect_prints_terms_and_the_digest_to_cite(published):
    home, _ = published
    data, text = inspect_cache(home / "pets.zarr").data, kdcache("inspect", home / "pets.zarr").stdout
    splits = {name: split["sha256"] for name, split in data["splits"].items()}
    assert splits == {name: stored_digest(home / "pets.zarr" / name) for name in ("train", "test")}
    assert data["sha256"] == cache_sha256(splits)
    for part in (data["sha256"], *splits.values(), "CC-BY-4.0", "Alice, 2026"):
        assert part in text


def test_an_unfinished_cache_has_nothing_to_cite(tmp_path):
    report = inspect_cache(begun(tmp_path / "c"))
    assert report.data["sha256"] is None
    assert "once every split is complete" in report.text


def test_terms_change_without_another_dump_and_the_history_tells(published, tmp_path):
    home, command = published
    shutil.copytree(home / "pets.zarr", tmp_path / "pets.zarr")
    command = (*command[:-1], tmp_path / "pets.zarr")
    before = tree(tmp_path / "pets.zarr")
    assert answer(*command)["splits"]["train"]["computed_rows"] == 0
    assert answer(*command, "--license", "CC-BY-4.0")["splits"]["train"]["computed_rows"] == 0
    assert tree(tmp_path / "pets.zarr") == before
    assert answer(*command, "--license", "MIT")["splits"]["train"]["computed_rows"] == 0
    manifest = stored_manifest(tmp_path / "pets.zarr/train")
    (change,) = manifest.history
    assert (manifest.license, manifest.citation) == ("MIT", "Alice, 2026")
    digest = stored_digest(home / "pets.zarr/train")
    assert change.before == {"license": "CC-BY-4.0", "manifest_sha256": digest}
    assert change.after == {"license": "MIT"}
    assert [name for name, data in tree(tmp_path / "pets.zarr").items() if before[name] != data] == [
        "test/zarr.json",
        "train/zarr.json",
    ]


def as_older_version(out):
    """Write a split's manifest as versions did that kept paths in it and recorded no device settings."""
    for split in ("train", "test"):
        file = out / split / METADATA
        document = json.loads(file.read_text())
        attribute = document["attributes"]["kdcache"]
        local = attribute.pop("local")
        manifest = {name: value for name, value in attribute["manifest"].items() if name != "compute"}
        manifest["dataset"] |= {"name": local["dataset"], "data_root": "data"}
        attribute["manifest"] = manifest
        attribute["sha256"] = provenance_sha256(manifest)
        file.write_text(json.dumps(document))


def provenance_sha256(manifest):
    import hashlib

    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_cache_with_paths_inside_still_opens_trains_and_is_repaired_to_the_byte(published, tmp_path):
    home, command = published
    out = tmp_path / "old.zarr"
    shutil.copytree(home / "pets.zarr", out)
    as_older_version(out)
    original = tree(out)
    manifest = open_cache(out).manifest
    assert manifest_sha256(manifest) == stored_digest(out / "train")
    assert kdcache("verify", out).exit_code == 0
    train = ("train-student", "--student", "mlp", "--epochs", 1, "--size", 12, "--device", "cpu")
    answer(*train, "--cache", out, "--out", tmp_path / "run")
    command = (*command[:-1], out)
    assert answer(*command)["splits"]["train"]["computed_rows"] == 0
    assert tree(out) == original
    flip(out / "train/logits/c/0/0/0")
    answer(*command, "--repair")
    assert tree(out) == original
    text = (out / "train" / METADATA).read_text()
    (out / "train" / METADATA).write_text(text.replace('"length": 12', '"length": 13'))
    answer(*command, "--repair")
    repaired = tree(out)
    found, expected = (
        json.loads(files.pop("train/zarr.json"))["attributes"]["kdcache"] for files in (repaired, original)
    )
    assert {name: found[name] for name in expected} == expected
    assert repaired == original


def test_the_digest_of_the_first_version_is_the_recorded_one():
    data = inspect_cache(FIXTURE).data
    for split in ("train", "test"):
        recorded = json.loads((FIXTURE / split / METADATA).read_text())["attributes"]["kdcache"]["sha256"]
        assert data["splits"][split]["sha256"] == recorded
