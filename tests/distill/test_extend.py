"""Views that are added to a finished cache, what they cost, and which of them an epoch uses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from typer.testing import CliRunner

import kdcache.distill.student.train_student
from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, plan_dump, train_student
from kdcache.cli.app import app
from kdcache.core.errors import CacheBusy, CacheDamaged, CacheIncomplete, CacheNotFound, TargetExists, UsageError
from kdcache.data.views import Views
from kdcache.distill.student.soft_targets import CachedTargets
from kdcache.store.facts import all_facts
from kdcache.store.layout import predicted_bytes
from kdcache.store.ledger import Ledger
from kdcache.store.records import ViewRecipe
from kdcache.store.resume import ResumePolicy
from kdcache.store.row_source import MemorySource, ReadOptions
from kdcache.store.sampler import view_schedule
from kdcache.store.storage.local import LocalStorage
from kdcache.store.storage.registry import open_storage
from kdcache.store.verify import verify_split
from kdcache.store.writer import SplitWriter
from tests.crashes import counting, in_child, place_of
from tests.helpers import COLUMNS, Interrupted, Items, find, logit_source, stored_manifest, synthetic, tree

# Three shards of 16, 16 and 12 rows.
SAMPLES = synthetic(44)
SHARDS, SHARD_ROWS = 3, 16
PROBED = 10  # two batches of two, each twice, and one of two with another neighbour


class Jitter:
    """Another image for every (view, sample)."""

    def __init__(self, most: int = 256) -> None:
        self.most = most

    def __call__(self, image):
        return (image.int() + torch.randint(0, self.most, image.shape)).remainder(256).to(torch.uint8)


class Sums(nn.Module):
    """A teacher whose answers name the input: weighted sums of its pixels."""

    def __init__(self, *, classes: int = 4, seed: int = 0, stop_after: int = 10**9, dtype=torch.float64) -> None:
        super().__init__()
        weights = torch.rand(16, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weights = nn.Parameter(weights.to(dtype))
        self.rows, self.stop_after = 0, stop_after

    def forward(self, inputs):
        if self.rows + len(inputs) > self.stop_after:
            raise Interrupted
        self.rows += len(inputs)
        return inputs.flatten(1) @ self.weights


def dump(out, *, views=2, teacher=None, dataset=SAMPLES, augment=None, add_views=0, repair=False, **settings):
    """A dump of two views, told apart by the pixels."""
    settings = {"device": "cpu", "batch_size": 8, "shard_rows": SHARD_ROWS, "encoding": "float64"} | settings
    return dump_teacher(
        teacher or Sums(),
        dataset,
        out=out,
        augment=augment or Jitter(),
        add_views=add_views,
        repair=repair,
        config=DumpConfig(views=views, **settings),
    )


def student(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()


def learn(cache, *, module=None, augment=None, dataset=SAMPLES, out=None, resume=False, **settings):
    config = StudentConfig(**{"device": "cpu", "batch_size": 8, "epochs": 4} | settings)
    module = module or student()
    augment = augment or Jitter()
    return train_student(module, dataset, cache, augment=augment, config=config, out=out, resume=resume)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of so many views and settings at a path; made once, copied after that."""
    masters = {}

    def put(path, views=2, **settings):
        name = repr((views, settings))
        if name not in masters:
            masters[name] = tmp_path_factory.mktemp("made") / "c.zarr"
            dump(masters[name], views=views, **settings)
        shutil.copytree(masters[name], path)
        return path

    return put


@pytest.fixture(scope="module")
def four(made, tmp_path_factory):
    return made(tmp_path_factory.mktemp("four") / "c.zarr", 4)


@pytest.fixture(scope="module")
def two(made, tmp_path_factory):
    return made(tmp_path_factory.mktemp("two") / "c.zarr", 2)


@pytest.fixture
def halfway(tmp_path, made):
    """Two of four views finished, and two of three shards of the others."""
    out = made(tmp_path / "halfway" / "c.zarr", 2)
    with pytest.raises(Interrupted):
        dump(out, add_views=2, teacher=Sums(stop_after=PROBED + 2 * 32 + 8))
    assert len(pending(out)) == 2
    return out


def pending(out):
    manifest = stored_manifest(out / "train")
    ledger = Ledger(LocalStorage(out / "train"), manifest)
    return [(view, s) for view in range(manifest.views) for s in np.flatnonzero(~ledger.committed(view))]


def assert_readable(out, whole, views):
    """The first views of a cache are those of a whole one, however they are read."""
    cache, expected = open_cache(out), open_cache(whole)
    assert cache.views == views
    assert cache.complete
    group = zarr.open_group(out, mode="r")["train"]
    for view in range(views):
        for name in COLUMNS:
            np.testing.assert_array_equal(cache.column(name, view), expected.column(name, view))
        np.testing.assert_array_equal(group["logits"][view], expected.column("logits", view))
        assert sorted(np.concatenate([i for i, _ in cache.epoch(0, view=view, batch_size=7)])) == list(range(44))
    with pytest.raises(IndexError):
        cache.rows([0], views)
    assert verify_split(LocalStorage(out), "train").problems == []


@pytest.mark.parametrize(
    ("views", "added", "settings"),
    [
        (1, 1, {}),
        (2, 2, {"compression": "zstd:3", "encoding": "float16"}),
        (1, 3, {"plain_view": True, "encoding": "float32"}),
        (3, 1, {"mix": "mixup:0.8"}),
    ],
)
def test_an_extended_cache_is_the_one_that_is_dumped_at_once(tmp_path, made, views, added, settings):
    out = made(tmp_path / "extended" / "c.zarr", views, **settings)
    result = dump(out, views=views, add_views=added, **settings)
    assert (result.computed_rows, result.rows) == (44 * added, 44 * (views + added))
    at_once = made(tmp_path / "at once" / "c.zarr", views + added, **settings)
    assert tree(out) == tree(at_once)
    assert len({open_cache(out).column("logits", view).tobytes() for view in range(views + added)}) == views + added
    assert verify_split(LocalStorage(out), "train").notes == []


def test_an_extended_cache_is_extended_again(tmp_path, made, four):
    out = made(tmp_path / "c.zarr", 2)
    dump(out, add_views=1)
    dump(out, views=3, add_views=1)
    assert tree(out) == tree(four)


@pytest.mark.parametrize("stop_after", [0, 8, 16, 44, 44 + 8, 44 + 16, 44 + 43])
def test_an_interrupted_extension_leaves_the_old_views_and_continues(tmp_path, made, four, stop_after):
    out = made(tmp_path / "c.zarr", 2)
    with pytest.raises(Interrupted):
        dump(out, add_views=2, teacher=Sums(stop_after=PROBED + stop_after))
    assert_readable(out, four, 2)
    rows = {(view, s): min(16, 44 - 16 * s) for view in (2, 3) for s in range(SHARDS)}
    left = pending(out)
    assert set(left) <= rows.keys()
    assert sum(rows[place] for place in rows.keys() - set(left)) <= stop_after
    if stop_after >= 44:
        assert len(left) <= SHARDS + 1
    losses = [entry["loss"] for entry in learn(out).epochs]
    assert losses == [entry["loss"] for entry in learn(out, views=(0, 1)).epochs]
    assert dump(out, add_views=2).computed_rows == sum(rows[place] for place in left)
    assert tree(out) == tree(four)


def extend(out, rows):
    """Add two views to a finished cache of two, without a teacher."""
    manifest = replace(rows["manifest"], views=2, view_sha256=())
    with SplitWriter(out, manifest, ResumePolicy(add_views=2)) as writer:
        for view, shard in writer.pending():
            at = writer.manifest.rows_of(shard)
            part = {name: rows[name][view][at.start : at.stop] for name in COLUMNS}
            writer.commit(view, shard, part, rows["facts"][view][shard])
        digests = tuple(map(writer.ledger.digest, range(4)))
        writer.finish(replace(writer.manifest, view_sha256=digests))


@pytest.fixture(scope="module")
def four_rows(four):
    cache = open_cache(four)
    rows = {name: [cache.column(name, view) for view in range(4)] for name in COLUMNS}
    return rows | {
        "manifest": cache.manifest,
        "facts": all_facts(open_storage(four).below("train"), cache.manifest, range(4)),
    }


@pytest.fixture(scope="module")
def extension_writes(tmp_path_factory, made, four, four_rows):
    """The writes of an extension, in order."""
    out = made(tmp_path_factory.mktemp("writes") / "c.zarr", 2)
    log = out.with_name("writes")

    def act(count, name, arguments):
        target = arguments[0] if arguments else ""
        target = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        with open(log, "a") as file:
            file.write(f"{name} {place_of(target, out)}\n")

    assert in_child(lambda: counting(act, lambda: extend(out, four_rows))) == 0
    assert tree(out) == tree(four)
    return log.read_text().splitlines()


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_an_extension_that_dies_before_any_write_leaves_the_old_views(
    tmp_path, made, four, four_rows, extension_writes, how
):
    def act(count, name, arguments):
        if count == number and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == number:
            raise Interrupted

    seen, final = Counter(), tree(four)
    step = {"killed": 7, "raised": 11}[how]
    for number in range(1, len(extension_writes) + 1, step):
        out = made(tmp_path / str(number) / "c.zarr", 2)
        status = in_child(lambda out=out: counting(act, lambda: extend(out, four_rows)))
        assert status == {"killed": -signal.SIGKILL, "raised": 1}[how]
        where = f"write {number}, {extension_writes[number - 1]}"
        manifest = stored_manifest(out / "train")
        seen[manifest.views, len(manifest.view_sha256)] += 1
        if len(manifest.view_sha256) == 4:
            continue
        cache = open_cache(out)
        assert (cache.views, cache.manifest.view_sha256) == (2, four_rows["manifest"].view_sha256[:2]), where
        for name in COLUMNS:
            for view in range(2):
                np.testing.assert_array_equal(cache.column(name, view), four_rows[name][view], where)
        np.testing.assert_array_equal(zarr.open_array(out / "train" / "logits", mode="r")[:2], four_rows["logits"][:2])
        assert verify_split(LocalStorage(out), "train").problems == [], where
        extend(out, four_rows)
        assert tree(out) == final, where
    assert seen[2, 2] > 0
    assert seen[4, 2] > 2


def test_a_new_view_is_on_disk_before_the_manifest_counts_it(extension_writes):
    names = [line for line in extension_writes if line.startswith("replace")]
    last = max(at for at, line in enumerate(names) if "/unsealed/" not in line)
    assert names[0] == names[last] == "replace train/zarr.json.tmp"
    arrays = ("logits", "input_crc32c", "ledger", "facts")
    assert set(names[1:5]) == {f"replace train/{name}/zarr.json.tmp" for name in arrays}
    assert not [line for line in extension_writes if "c.zarr/train/labels" in line or "train/labels/c" in line]


@pytest.mark.parametrize("number", range(-4, 0))
def test_the_same_command_after_a_kill_at_the_very_end_adds_no_more_views(
    tmp_path, made, four, four_rows, extension_writes, number
):
    def act(count, name, arguments):
        if count == len(extension_writes) + 1 + number:
            os.kill(os.getpid(), signal.SIGKILL)

    out = made(tmp_path / "c.zarr", 2)
    assert in_child(lambda: counting(act, lambda: extend(out, four_rows))) == -signal.SIGKILL
    dump(out, add_views=2)
    assert open_cache(out).views == 4
    assert tree(out) == tree(four)


def test_nothing_but_the_new_shards_is_touched(tmp_path, made):
    out = made(tmp_path / "c.zarr", 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    dump(out, add_views=1)
    touched = {str(p.relative_to(out)) for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert touched == {
        "train/zarr.json",
        *(f"train/{name}/zarr.json" for name in ("logits", "input_crc32c", "ledger", "facts")),
    }


@contextmanager
def versions(**changed):
    from kdcache.distill.teacher import dump_manifest

    there = dump_manifest.package_versions() | changed
    with mock.patch.object(dump_manifest, "package_versions", return_value=there):
        yield


REFUSED = {
    "another teacher": ({"teacher": Sums(seed=1)}, TargetExists, "weights_sha256"),
    "another augmentation": ({"augment": Jitter(200)}, TargetExists, r"200"),
    "another seed of views": ({"view_seed": 1}, TargetExists, r"recipe\.seed is 0 there and 1 here"),
    "another mixing": ({"mix": "mixup:0.8"}, TargetExists, r"recipe\.mix is .none. there and .mixup:0.8. here"),
    "a plain view": ({"plain_view": True}, TargetExists, r"plain_view"),
    "another seed": ({"seed": 1}, TargetExists, r"seed is 0 there and 1 here"),
    "another encoding": ({"encoding": "float16"}, TargetExists, r"float64.* there and .*float16"),
    "another dataset": ({"dataset": synthetic(44, seed=1)}, TargetExists, "sha256"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("state", ["finished", "halfway"])
def test_another_dump_cannot_be_extended(request, two, change, error, message, state):
    out = two if state == "finished" else request.getfixturevalue("halfway")
    before = tree(out)
    for command in (dump, dry_run):
        with pytest.raises(error, match=message) as caught:
            command(out, add_views=2, **change)
        assert "nothing was changed" in caught.value.remedy
    assert tree(out) == before


@pytest.mark.parametrize("state", ["finished", "halfway"])
def test_other_versions_cannot_extend(request, two, state):
    out = two if state == "finished" else request.getfixturevalue("halfway")
    before = tree(out)
    with versions(torchvision="0.0.1"):
        with pytest.raises(TargetExists, match=r"versions\.torchvision is .* there and '0\.0\.1' here"):
            dump(out, add_views=2)
        assert dump(out).computed_rows == 0
    assert tree(out) == before


@pytest.mark.parametrize("added", [1, 3])
def test_one_extension_at_a_time(halfway, added):
    before = tree(halfway)
    with pytest.raises(TargetExists, match=f"2 more are being added; .* asks for {2 + added}") as caught:
        dump(halfway, add_views=added)
    assert "--add-views 2" in caught.value.remedy
    assert tree(halfway) == before


def test_what_is_not_there_or_not_finished_is_not_extended(tmp_path, made):
    with pytest.raises(CacheNotFound, match="to add views to"):
        dump(tmp_path / "c.zarr", add_views=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CacheNotFound, match="test"):
        dump(made(tmp_path / "other.zarr", 2), add_views=1, dataset=synthetic(44, split="test"))
    with pytest.raises(Interrupted):
        dump(tmp_path / "c.zarr", teacher=Sums(stop_after=PROBED + 60))
    before = tree(tmp_path)
    with pytest.raises(CacheIncomplete, match="has not finished its 2 views"):
        dump(tmp_path / "c.zarr", add_views=1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(TargetExists, match="not a kdcache cache"):
        dump(tmp_path / "folder", add_views=1)
    (tmp_path / "folder" / "mine").unlink()
    assert tree(tmp_path) == before


def test_views_that_would_all_be_the_same_are_not_added(tmp_path):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=SHARD_ROWS)
    dump_teacher(Sums(), SAMPLES, out=tmp_path / "c.zarr", config=config)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="2 views are asked for"):
        dump_teacher(Sums(), SAMPLES, out=tmp_path / "c.zarr", config=config, add_views=1)
    assert tree(tmp_path) == before


def test_two_writers_never_extend_at_once(two, four_rows):
    before = tree(two)
    manifest = replace(four_rows["manifest"], views=2, view_sha256=())
    with SplitWriter(two, manifest), pytest.raises(CacheBusy, match="another dump writes"):
        dump(two, add_views=2)
    assert tree(two) == before


def test_the_original_command_does_nothing_and_says_so(tmp_path, made, halfway, four, capsys):
    before = tree(halfway)
    result = dump(halfway)
    assert (result.computed_rows, result.manifest.readable_views) == (0, 2)
    said = capsys.readouterr().err
    assert "already complete; nothing was computed" in said
    assert "; 2 more views are being added: --add-views 2" in said
    assert tree(halfway) == before
    out = made(tmp_path / "c.zarr", 4)
    result = dump(out)
    assert (result.computed_rows, result.manifest.views) == (0, 4)
    assert "already complete; nothing was computed, and" in capsys.readouterr().err
    assert tree(out) == tree(four)


def test_rows_that_are_not_there_are_not_counted(halfway):
    assert dump(halfway).rows == 2 * 44


@pytest.mark.parametrize("state", ["finished", "halfway"])
def test_more_views_than_there_are_need_add_views(request, two, state):
    out = two if state == "finished" else request.getfixturevalue("halfway")
    before = tree(out)
    more = 3 if state == "finished" else 5
    with pytest.raises(TargetExists, match=f"views is . there and {more} here") as caught:
        dump(out, views=more)
    assert ("--add-views 1" if state == "finished" else "--views 2 --add-views 2") in caught.value.remedy
    assert tree(out) == before


def test_more_views_than_there_are_while_some_are_being_added(halfway):
    # Four views are on their way, two can be read: to ask for four is to ask for what is not there yet.
    before = tree(halfway)
    with pytest.raises(TargetExists) as caught:
        dump(halfway, views=4)
    assert "--add-views 2" in caught.value.remedy
    assert tree(halfway) == before


def dry_run(out, *, views=2, teacher=None, dataset=SAMPLES, augment=None, add_views=0, **settings):
    settings = {"device": "cpu", "batch_size": 8, "shard_rows": SHARD_ROWS, "encoding": "float64"} | settings
    return plan_dump(
        teacher or Sums(),
        dataset,
        out=out,
        augment=augment or Jitter(),
        add_views=add_views,
        config=DumpConfig(views=views, **settings),
    )


def data_files(out):
    return {
        name: len(data) for name, data in tree(out).items() if "/c/" in name and not name.startswith("train/ledger")
    }


def test_a_dry_run_predicts_the_bytes_that_are_added(tmp_path, made, two, four):
    added = sum(data_files(four).values()) - sum(data_files(two).values())
    out = made(tmp_path / "c.zarr", 2)
    plan = dry_run(out, add_views=2)
    assert plan.bytes == added
    assert (plan.existing.readable_views, plan.manifest.views) == (2, 4)
    assert tree(out) == tree(two)
    with pytest.raises(Interrupted):
        dump(out, add_views=2, teacher=Sums(stop_after=PROBED + 50))
    assert dry_run(out, add_views=2).bytes == added
    dump(out, add_views=2)
    assert not dry_run(out, add_views=2).existing.extending
    assert tree(out) == tree(four)


def test_a_cache_grows_by_its_views_and_by_nothing_else(tmp_path, made):
    files, ledgers, metadata = {}, {}, {}
    for views in (1, 2, 3, 5):
        out = made(tmp_path / str(views), views)
        found = tree(out)
        files[views] = data_files(out)
        manifest = open_cache(out).manifest
        assert sum(files[views].values()) == predicted_bytes(manifest)
        ledgers[views] = sum(len(data) for name, data in found.items() if name.startswith("train/ledger/c"))
        metadata[views] = sum(len(data) for name, data in found.items() if name.endswith("zarr.json"))
        assert len(found) == len(files[views]) + views + 7  # a ledger file a view, and seven of metadata
    labels = sum(size for name, size in files[1].items() if name.startswith("train/labels"))
    one = sum(files[1].values()) - labels
    for views in files:
        assert sum(files[views].values()) == labels + views * one
        assert ledgers[views] == views * ledgers[1]
        assert 0 <= metadata[views] - metadata[1] <= 90 * (views - 1)


# Repair.


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


DAMAGES = {
    "a shard of an old view": lambda split: flip(split / "logits/c/1/2/0"),
    "a shard of a new view": lambda split: flip(split / "logits/c/2/0/0"),
    "labels": lambda split: flip(split / "labels/c/0"),
    "the ledger of an old view": lambda split: flip(split / "ledger/c/1/0/0"),
    "the ledger of a new view": lambda split: flip(ledger_file(split, 2)),
    "metadata": lambda split: (split / "logits/zarr.json").write_text("{"),
    "metadata that is gone": lambda split: (split / "ledger/zarr.json").unlink(),
    "metadata of other lengths": lambda split: edit(split / "logits/zarr.json", "44", "45"),
    "the manifest": lambda split: edit(split / "zarr.json", '"spec": "Sums"', '"spec": "Sams"'),
}


def ledger_file(split, view):
    """The file with a view's first ledger entries: of a view that is being written, a part."""
    part = split / f"ledger/unsealed/parts/{view}/0"
    return part if part.exists() else split / f"ledger/c/{view}/0/0"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("added", [0, 2], ids=["repair", "repair and add views"])
def test_an_extension_under_way_is_repaired(halfway, four, damage, added):
    damage(halfway / "train")
    assert verify_split(LocalStorage(halfway), "train").problems
    dump(halfway, repair=True, add_views=added)
    if open_cache(halfway).views == 2:
        dump(halfway, add_views=2)
    assert tree(halfway) == tree(four)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_original_command_repairs_an_extended_cache(tmp_path, made, four, damage):
    out = made(tmp_path / "c.zarr", 4)
    damage(out / "train")
    dump(out, repair=True)
    assert json_equal(tree(out), tree(four))


def json_equal(found, expected):
    parse = {name: json.loads(data) if name.endswith("zarr.json") else data for name, data in found.items()}
    return parse == {n: json.loads(data) if n.endswith("zarr.json") else data for n, data in expected.items()}


@pytest.mark.parametrize("views", [1, 2, 5])
def test_a_repair_that_is_refused_changes_nothing(tmp_path, made, views):
    out = made(tmp_path / "c.zarr", 4)
    edit(out / "train" / "zarr.json", '"spec": "Sums"', '"spec": "Sams"')
    before = tree(out)
    try:
        dump(out, views=views, repair=True)
    except (CacheDamaged, TargetExists):
        assert tree(out) == before
    else:
        assert open_cache(out).views == 4


def test_a_refused_repair_by_another_teacher_leaves_the_repair_to_the_right_one(tmp_path, made, two):
    out = made(tmp_path / "c.zarr", 2)
    edit(out / "train" / "zarr.json", '"spec": "Sums"', '"spec": "Sams"')
    flip(out / "train/logits/c/1/2/0")
    with pytest.raises(CacheDamaged, match="nothing proves that they are of this dump"):
        dump(out, repair=True, teacher=Sums(seed=1))
    dump(out, repair=True)
    assert tree(out) == tree(two)


def test_a_repair_names_the_metadata_that_it_writes_again(tmp_path, made, capsys):
    out = made(tmp_path / "c.zarr", 2)
    (out / "train/logits/zarr.json").write_text("{")
    dump(out, repair=True)
    assert "nothing is broken" not in capsys.readouterr().err


def test_a_damaged_ledger_of_a_new_view_leaves_the_old_views_readable(halfway, four):
    flip(ledger_file(halfway / "train", 2))
    cache, expected = open_cache(halfway), open_cache(four)
    for view in range(2):
        np.testing.assert_array_equal(cache.column("logits", view), expected.column("logits", view))


# What the commands say.


def kdcache_json(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_extension_under_way_is_described(halfway, tmp_path, made):
    text = CliRunner().invoke(app, ["inspect", str(halfway)]).stdout
    assert "complete; 2 more views are being added, 10 of 12 shards committed" in text
    assert "2, augment object:Jitter" in text
    split = kdcache_json("inspect", halfway)["splits"]["train"]
    assert (split["complete"], split["committed_shards"], split["shards"]) == (True, 10, 12)
    assert split["manifest"]["views"] == 4
    report = kdcache_json("verify", halfway)
    assert report["whole"]
    assert report["splits"]["train"]["problems"] == []
    dump(halfway, add_views=2)
    text = CliRunner().invoke(app, ["inspect", str(halfway)]).stdout
    assert "being added" not in text
    assert "4, augment object:Jitter" in text
    assert (
        kdcache_json("verify", halfway)["splits"]["train"]
        == (kdcache_json("verify", made(tmp_path / "c.zarr", 4))["splits"]["train"])
    )


def test_text_and_json_count_the_same_rows(halfway):
    split = kdcache_json("inspect", halfway)["splits"]["train"]
    assert split["rows"] == 2 * 44
    assert kdcache_json("verify", halfway)["splits"]["train"]["shards"] == 10


def tiny(split):
    """A dataset that commands find by name."""
    return Items(synthetic({"train": 44, "test": 20}[split], seed=len(split)))


TINY = (
    "--dataset",
    "py:tests.distill.test_extend:tiny",
    "--augment",
    "py:tests.distill.test_extend:Jitter",
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The checkpoint of a teacher, and the command that dumps views with it."""
    from kdcache.models.checkpoints import save_checkpoint
    from kdcache.models.registry import build_model

    root = tmp_path_factory.mktemp("commands")
    built = build_model("mlp", num_classes=4, input_shape=(1, 4, 4), seed=0)
    save_checkpoint(root / "teacher.pt", {"state_dict": built.module.state_dict()})
    options = ["dump-teacher", "--teacher", "mlp", "--checkpoint", root / "teacher.pt"]
    options += [*TINY, "--shard-rows", 16]
    return root, options


@pytest.fixture(scope="module")
def tiny_cache(commands):
    root, options = commands
    kdcache_json(*options, "--split", "test", "--split", "train", "--views", 1, "--out", root / "tiny.zarr")
    return root / "tiny.zarr"


def test_the_command_extends_and_says_what_it_did(tmp_path, commands, tiny_cache):
    out, (_, options) = tmp_path / "c.zarr", commands
    shutil.copytree(tiny_cache, out)
    options = [*options, "--split", "test", "--out", out]
    before = tree(out / "test")
    planned = kdcache_json(*options, "--add-views", 2, "--dry-run")["splits"]["test"]
    assert tree(out / "test") == before
    done = kdcache_json(*options, "--add-views", 2)["splits"]["test"]
    assert (done["rows"], done["computed_rows"], done["complete"]) == (3 * 20, 2 * 20, True)
    grown = {name: data for name, data in tree(out / "test").items() if name not in before and "ledger" not in name}
    assert planned["bytes"] == sum(map(len, grown.values()))
    assert done["bytes"] == predicted_bytes(open_cache(out, "test").manifest)
    again = CliRunner().invoke(app, [*map(str, options), "--views", "1"])
    assert again.exit_code == 0
    assert "already complete; nothing was computed" in again.stderr
    refused = CliRunner().invoke(app, [*map(str, options), "--views", "4"])
    assert (refused.exit_code, "--add-views 1" in refused.stderr) == (1, True)
    assert open_cache(out, "train").views == 1


def test_the_same_command_over_two_splits_continues_after_the_first(tmp_path, commands, tiny_cache):
    out, (_, options) = tmp_path / "c.zarr", commands
    shutil.copytree(tiny_cache, out)
    command = [*map(str, options), "--split", "test", "--split", "train", "--out", str(out), "--add-views", "1"]
    from kdcache.apps import dumping as module

    real = module.dump

    def stopped(teacher, dataset, **arguments):
        if arguments["split"] == "train":
            raise KeyboardInterrupt
        return real(teacher, dataset, **arguments)

    with mock.patch.object(module, "dump", stopped):
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr
    assert CliRunner().invoke(app, command).exit_code == 0
    assert [open_cache(out, split).views for split in ("test", "train")] == [2, 2]


LEARN = ("--student", "mlp", "--device", "cpu", "--batch-size", 16, "--epochs", 2)


def test_a_run_is_resumed_while_views_are_being_added(tmp_path, tiny_cache):
    out = tmp_path / "c.zarr"
    shutil.copytree(tiny_cache, out)
    learn_command = ["train-student", "--cache", out, *LEARN, "--views", 0, "--out", tmp_path / "run"]
    from kdcache.distill.run_state import RunState

    def stopped(self, entry, add=RunState.add, **rest):
        add(self, entry, **rest)
        raise KeyboardInterrupt

    with mock.patch.object(RunState, "add", stopped):
        assert CliRunner().invoke(app, list(map(str, learn_command))).exit_code == 130
    manifest = replace(open_cache(out).manifest, view_sha256=())
    SplitWriter(out, manifest, ResumePolicy(add_views=1)).__exit__()
    assert open_cache(out).manifest.extending
    result = CliRunner().invoke(app, [*map(str, learn_command), "--resume"])
    assert result.exit_code == 0, result.stderr


# Partial caches of several views.


def without(out, *units):
    """A dump of two views that lacks some (view, shard), as workers leave it that were killed."""
    with mock.patch("kdcache.distill.teacher.dump.seal", side_effect=Interrupted), pytest.raises(Interrupted):
        dump(out)
    for view, shard in units:
        LocalStorage(out / "train").delete(f"ledger/unsealed/parts/{view}/{shard}")
    assert pending(out) == list(units)
    return out


@pytest.fixture
def partial(tmp_path):
    """The first of two views, and one of the second's three shards."""
    return without(tmp_path / "partial", (1, 1), (1, 2))


def test_a_partial_cache_gives_the_samples_of_all_views_that_are_used(partial):
    with pytest.raises(CacheIncomplete, match="4 of 6 shards"):
        learn(partial)
    cache = open_cache(partial, allow_partial=True)
    assert [len(cache.samples(view)) for view in range(2)] == [44, 16]
    for views, expected in (((0,), 44), ((1,), 16), ((), 16)):
        seen = watched(partial, allow_partial=True, views=views, epochs=3)
        for epoch in seen:
            assert sorted(epoch.samples) == list(range(expected))
    with pytest.raises(UsageError, match="view 2"):
        learn(partial, allow_partial=True, views=(2,))


def test_a_partial_cache_without_one_view_says_which_views_to_take(tmp_path):
    without(tmp_path / "c", (0, 2), (1, 0), (1, 1), (1, 2))
    with pytest.raises(CacheIncomplete, match="no sample is committed in all of the views 0, 1"):
        learn(tmp_path / "c", allow_partial=True)
    assert sorted(watched(tmp_path / "c", allow_partial=True, views=(0,), epochs=1)[0].samples) == list(range(32))


def test_a_partial_cache_whose_labels_are_missing_gives_no_sample_without_one(partial):
    # As an interrupted repair leaves it: the shard that holds the labels is gone, that of the later view stands.
    with SplitWriter(partial, replace(open_cache(partial, allow_partial=True).manifest)) as writer:
        writer.storage.delete("ledger/unsealed/parts/0/0")
    with pytest.raises(CacheIncomplete):
        learn(partial, allow_partial=True, views=(1,))


# Schedules.


def drawn(kind, epochs, *, views=(), available=5, seed=0):
    schedule = view_schedule(kind, views, available=available, seed=seed)
    return [schedule(epoch) for epoch in range(epochs)]


def test_cycle_takes_the_views_in_turn():
    assert drawn("cycle", 12) == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert drawn("cycle", 3) == [0, 1, 2]
    assert drawn("cycle", 5, views=(3, 1)) == [3, 1, 3, 1, 3]
    assert drawn("cycle", 4, available=1) == [0] * 4


def test_shuffle_takes_each_view_once_a_round_in_new_orders():
    for views in ((), (4, 0, 2)):
        used = sorted(views) or list(range(5))
        found = drawn("shuffle", 40 * len(used), views=views)
        rounds = [tuple(found[at : at + len(used)]) for at in range(0, len(found), len(used))]
        assert all(sorted(each) == used for each in rounds)
        assert len(set(rounds)) > min(math.factorial(len(used)) * 0.7, 25)
        assert found == drawn("shuffle", 40 * len(used), views=views)
        assert found != drawn("shuffle", 40 * len(used), views=views, seed=1)
        assert found[:7] == drawn("shuffle", 7, views=views)


def test_fixed_takes_one_view():
    assert [drawn(f"fixed:{view}", 3) for view in range(5)] == [[view] * 3 for view in range(5)]


@pytest.mark.parametrize(
    ("kind", "views", "message"),
    [
        ("cyclic", (), "--view-schedule is 'cyclic'"),
        ("", (), "--view-schedule is ''"),
        ("cycle:1", (), "--view-schedule is 'cycle:1'"),
        ("fixed", (), "--view-schedule is 'fixed'"),
        ("fixed:", (), "--view-schedule is 'fixed:'"),
        ("fixed:x", (), "--view-schedule is 'fixed:x'"),
        ("fixed:-1", (), "--view-schedule is 'fixed:-1'"),
        ("fixed:1.5", (), "--view-schedule is 'fixed:1.5'"),
        ("fixed:5", (), "view 5 is asked for"),
        ("cycle", (0, 5), "view 5 is asked for"),
        ("shuffle", (-1,), "view -1 is asked for"),
        ("cycle", (1, 2, 1), "name one twice"),
    ],
)
def test_schedules_and_views_that_there_are_not(kind, views, message):
    with pytest.raises(UsageError, match=message):
        view_schedule(kind, views, available=5, seed=0)


def test_views_that_there_are_not_are_refused_before_training(tmp_path, two):
    for settings, message in (
        ({"views": (2,)}, "view 2 is asked for"),
        ({"views": (0, 0)}, "twice"),
        ({"view_schedule": "fixed:2"}, "view 2"),
        ({"view_schedule": "random"}, "'random'"),
        ({"view_schedule": "fixed:0", "views": (7,)}, "7"),
    ):
        with pytest.raises(UsageError, match=message):
            learn(two, out=tmp_path / "run", **settings)
    with pytest.raises(UsageError, match="--views is -1"):
        StudentConfig(views=(-1,))
    assert not (tmp_path / "run").exists()


class Seen:
    def __init__(self):
        self.samples, self.targets, self.expected = [], [], []


def watched(cache, **settings):
    """What each epoch of a training joined: its samples, their soft targets, and the sums of the pixels they had."""
    epochs, teacher = [], Sums()

    class Watched(CachedTargets):
        def start_epoch(self, epoch):
            super().start_epoch(epoch)
            epochs.append(Seen())

        def __call__(self, batch):
            joined = super().__call__(batch)
            epochs[-1].samples += batch.indices.tolist()
            epochs[-1].targets.append(joined.soft_targets.logits().double().numpy())
            pixels = torch.stack(list(batch.inputs)).double() / 255
            epochs[-1].expected.append(teacher(pixels).detach().numpy())
            return joined

    with mock.patch.object(kdcache.distill.student.train_student, "CachedTargets", Watched):
        learn(cache, **settings)
    return epochs


@pytest.mark.parametrize(
    "reading",
    [
        {"row_source": "memory"},
        {"row_source": "streamed"},
        {"row_source": "memory", "shuffle": "window"},
        {"cache_on_device": True},
        {"cache_memory": "3KB"},
        {"row_source": "memory", "workers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["none", "zstd:1"])
def test_every_feed_joins_each_epoch_with_its_own_view(tmp_path, made, reading, compression):
    if compression != "none" and "workers" in reading:
        pytest.skip("said elsewhere")
    out = made(tmp_path / "c.zarr", 4, compression=compression)
    cache = open_cache(out)
    seen = watched(out, view_schedule="shuffle", epochs=6, verify_inputs="all", out=tmp_path / "run", **reading)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    used = drawn("shuffle", 6, available=4)
    assert [entry["view"] for entry in metrics] == used
    for view, epoch in zip(used, seen, strict=True):
        assert sorted(epoch.samples) == list(range(44))
        targets = np.concatenate(epoch.targets)
        np.testing.assert_array_equal(targets, cache.rows(epoch.samples, view))
        np.testing.assert_allclose(targets, np.concatenate(epoch.expected), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cycle", "shuffle"])
@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_goes_on_with_the_right_view(tmp_path, four, schedule, stopped_after):
    from kdcache.distill.run_state import RunState

    settings = {"epochs": 5, "views": (0, 2, 3), "view_schedule": schedule}
    whole = learn(four, out=tmp_path / "whole", **settings)

    def stopped(self, entry, add=RunState.add, **rest):
        add(self, entry, **rest)
        if entry["epoch"] == stopped_after:
            raise Interrupted

    with mock.patch.object(RunState, "add", stopped), pytest.raises(Interrupted):
        learn(four, out=tmp_path / "run", **settings)
    resumed = learn(four, out=tmp_path / "run", resume=True, **settings)
    assert [entry["view"] for entry in resumed.epochs] == drawn(schedule, 5, views=(0, 2, 3))
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])


def test_a_run_of_all_views_is_not_resumed_over_more_of_them_in_silence(tmp_path, made):
    from kdcache.distill.run_state import RunState

    out = made(tmp_path / "c.zarr", 2)

    def stopped(self, entry, add=RunState.add, **rest):
        add(self, entry, **rest)
        if entry["epoch"] == 2:
            raise Interrupted

    with mock.patch.object(RunState, "add", stopped), pytest.raises(Interrupted):
        learn(out, out=tmp_path / "run")
    dump(out, add_views=1)
    try:
        resumed = learn(out, out=tmp_path / "run", resume=True)
    except UsageError:
        return
    assert [entry["view"] for entry in resumed.epochs] == [0, 1, 0, 1]


# Memory.

READINGS = [{"row_source": "memory"}, {"row_source": "streamed"}, {"cache_on_device": True}]


@pytest.fixture
def reads(monkeypatch):
    """Views that the memory source reads, in order."""
    read, seen = MemorySource._read, []

    def counted(self, view):
        seen.append(view)
        return read(self, view)

    monkeypatch.setattr(MemorySource, "_read", counted)
    return seen


def settle(feed):
    if feed._coming is not None:
        feed._coming[1].exception()


def held(feed):
    settle(feed)
    return 1 + (feed._coming is not None)


@pytest.mark.parametrize("kind", ["cycle", "shuffle", "fixed:1"])
def test_memory_holds_two_views_at_most_and_reads_the_next_ahead(four, reads, kind):
    cache, used = open_cache(four), drawn(kind, 9, available=4)
    schedule = view_schedule(kind, (), available=4, seed=0)
    feed, _, plan = logit_source(cache, schedule=schedule)
    assert isinstance(feed, MemorySource)
    assert "row source memory" in str(plan)
    assert reads == []
    for epoch, view in enumerate(used[:8]):
        feed.start_epoch(epoch)
        assert held(feed) <= 2
        assert (feed._coming is None) == (used[epoch + 1] == view)
        assert reads[-1] == used[epoch + 1]
        np.testing.assert_array_equal(feed.rows(np.arange(44))["logits"], cache.column("logits", view))
        feed.start_epoch(epoch)
    assert len(feed._arrays) == 1
    changes = 1 + sum(one != two for one, two in pairwise(used))
    assert len(reads) == changes


def test_memory_of_two_views_is_what_is_compared_with_the_limit(four):
    view_bytes = 44 * 4 * 8
    for memory, row_source in ((2 * view_bytes, "memory"), (2 * view_bytes - 1, "streamed")):
        _, _, plan = logit_source(open_cache(four), options=ReadOptions(memory=str(memory)))
        assert plan.row_source == row_source


def test_an_epoch_out_of_turn_has_its_own_view_and_holds_no_third(four):
    cache, schedule = open_cache(four), view_schedule("cycle", (), available=4, seed=0)
    feed = MemorySource(cache.reader, cache.logit_arrays, schedule)
    for epoch in (0, 2, 7, 3, 3, 1, 0):
        feed.start_epoch(epoch)
        np.testing.assert_array_equal(feed.rows(np.arange(44))["logits"], cache.column("logits", epoch % 4))
        assert feed._coming[0] == (epoch + 1) % 4
        assert held(feed) <= 2


def test_no_view_is_read_ahead_that_no_epoch_will_use(four, reads):
    learn(four, epochs=2)
    assert reads == [0, 1]


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_damage_in_a_later_view_is_refused_when_it_is_reached(tmp_path, made, reading):
    out = made(tmp_path / "c.zarr", 4)
    flip(out / "train/logits/c/2/1/0")
    with pytest.raises(CacheDamaged, match="logits, view 2, shard 1") as caught:
        learn(out, out=tmp_path / "run", verify_inputs="off", **reading)
    assert caught.value.exit_code == 3
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["view"] for line in metrics] == [0, 1]
    learn(out, views=(0, 1, 3), **reading)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_damage_in_the_first_view_is_refused_before_anything_is_written(tmp_path, made, reading):
    out = made(tmp_path / "c.zarr", 4)
    flip(out / "train/logits/c/2/1/0")
    with pytest.raises(CacheDamaged, match="logits, view 2, shard 1"):
        learn(out, out=tmp_path / "run", views=(2, 1), **reading)
    assert not (tmp_path / "run").exists()


def test_a_damaged_later_view_ends_the_command_with_3(tmp_path, commands, tiny_cache):
    out, (_, options) = tmp_path / "c.zarr", commands
    shutil.copytree(tiny_cache, out)
    kdcache_json(*options, "--split", "train", "--out", out, "--add-views", 1)
    flip(out / "train/logits/c/1/2/0")
    result = CliRunner().invoke(app, list(map(str, ["train-student", "--cache", out, *LEARN, "--out", tmp_path / "r"])))
    assert result.exit_code == 3
    assert "logits, view 1, shard 2" in result.stderr
    assert "Traceback" not in result.output


def test_views_replay_apart_from_the_cache(four):
    views = Views(SAMPLES, ViewRecipe(seed=0), transform=Jitter())
    cache = open_cache(four)
    for view in range(4):
        pixels = torch.stack(list(views.fetch(view, np.arange(44)).inputs)).double() / 255
        np.testing.assert_allclose(cache.column("logits", view), Sums()(pixels).detach().numpy(), rtol=1e-6)


def test_a_target_that_stands_is_given_room_only_when_asked(two, four_rows):
    manifest = replace(four_rows["manifest"], views=2, view_sha256=())
    assert find(two, manifest).views == 2
    assert find(two, manifest, add_views=3).views == 5
    assert find(two, manifest, add_views=3).extending
