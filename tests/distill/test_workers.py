"""Dumps by several workers: equal to the byte, whoever is killed, on local files and in object stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2  # noqa: F401, so that forked children need not import it

from kdcache import DumpConfig, dump_teacher, open_cache
from kdcache.core.errors import CacheBusy, CacheDamaged, CacheIncomplete, TargetExists, UsageError
from kdcache.core.system import machine_name
from kdcache.core.workers import Worker
from kdcache.distill.teacher import dump_manifest
from kdcache.store import claims, work
from kdcache.store.claims import ClaimRecord, Claims, WorkerRecord
from kdcache.store.inspect import verify_cache
from kdcache.store.seal import seal_splits
from kdcache.store.status import cache_status
from kdcache.store.storage.local import LocalStorage
from kdcache.store.writer import SplitWriter
from tests.crashes import contents, crew, dump, dump_with, in_child, random_kills_of_workers, start, wait
from tests.helpers import Network, answer, refused, synthetic, tree

SAMPLES, SHARDS = 300, 19
ELSEWHERE = "another_machine"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The store of a single process."""
    out = tmp_path_factory.mktemp("single") / "c.zarr"
    assert in_child(lambda: dump(out)) == 0
    return out


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(work, "POLL_S", 0.05)


def split_of(out):
    return LocalStorage(out).below("train")


def claim_elsewhere(out, unit, *, heard_seconds_ago, heartbeat=True):
    """A claim of a worker on another machine that was last heard of so long ago."""
    storage, at = split_of(out), time.time() - heard_seconds_ago
    record = WorkerRecord(
        session="far", worker="9/10", machine=ELSEWHERE, process=1, device="cpu", started=at, heard=at
    )
    if heartbeat:
        storage.write(f"{claims.WORKERS}/far", claims._bytes(record))
    claim = ClaimRecord(session="far", machine=ELSEWHERE, process=1, at=at)
    storage.create(claims._claim_key(unit, 0), claims._bytes(claim))


# ---- equal to the byte


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_makes_the_store_of_one(tmp_path, single, workers):
    out = tmp_path / "c.zarr"
    dump_with(out, workers)
    assert contents(out) == contents(single)
    assert verify_cache(out).data["whole"]


def test_a_thousand_classes_by_three_workers(tmp_path):
    """1,000 × 1,000 random rows, several views."""
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32))

    class Table(torch.nn.Module):
        """Random logits of a sample, by the number that its pixels spell; the last bits depend on the batch."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(logits)

        def forward(self, inputs):
            number = (inputs.flatten(1).mean(dim=1) * 255).round().long() % 1000
            return self.table[number] @ torch.eye(1000)

    config = DumpConfig(device="cpu", batch_size=100, shard_rows=128, views=2, augment="affine")
    data = synthetic(1000, classes=1000, shape=(1, 8, 8))

    def table(out, worker=None):
        torch.set_num_threads(1)
        dump_teacher(Table(), data, out=out, config=config, worker=worker)

    assert in_child(lambda: table(tmp_path / "one.zarr")) == 0
    children = [start(lambda each=each: table(tmp_path / "three.zarr", each)) for each in crew(3)]
    assert [wait(child) for child in children] == [0] * 3
    assert tree(tmp_path / "one.zarr") == tree(tmp_path / "three.zarr")


def test_workers_killed_at_random_are_continued_by_any_number(tmp_path):
    counts = random_kills_of_workers(str(tmp_path), rounds=8)
    assert counts["rounds"] == 8
    assert counts["killed"] >= 8


def test_workers_with_a_bucket(s3):
    # In a process of its own, because dumps are forked from it, and this one may have used an object store.
    rounds = (
        "from tests.crashes import *; "
        f"print(random_kills_of_workers({s3!r}, 2, samples=100)); "
        f"dump_with({s3!r} + '/five.zarr', 5, samples=100); "
        f"assert in_child(lambda: expect_same({s3!r} + '/five.zarr', {s3!r} + '/reference.zarr')) == 0; "
        # A bucket has no lock: two that do not know of each other divide the work.
        f"pair = [start(lambda: dump({s3!r} + '/pair.zarr', samples=100)) for _ in range(2)]; "
        "assert [wait(each) for each in pair] == [0, 0]; "
        f"assert in_child(lambda: expect_same({s3!r} + '/pair.zarr', {s3!r} + '/reference.zarr')) == 0"
    )
    done = subprocess.run([sys.executable, "-c", rounds], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "'rounds': 2" in done.stdout


def test_views_are_added_by_workers(tmp_path):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16, views=2, augment="affine")

    def add(out, views, worker=None):
        torch.set_num_threads(1)
        dump_teacher(Network(16, 4), synthetic(60), out=out, config=config, add_views=views, worker=worker)

    out, other = tmp_path / "c.zarr", tmp_path / "other.zarr"
    for path in (out, other):
        assert in_child(lambda path=path: add(path, 0)) == 0
    assert in_child(lambda: add(other, 2)) == 0
    children = [start(lambda each=each: add(out, 2, each)) for each in crew(3)]
    assert [wait(child) for child in children] == [0] * 3
    assert tree(out) == tree(other)


# ---- two configurations


@pytest.mark.parametrize("attempt", range(3))
def test_of_two_configurations_that_race_for_a_path_one_wins_and_nothing_is_mixed(tmp_path, single, attempt):
    def other(out, worker):
        torch.set_num_threads(1)
        config = DumpConfig(device="cpu", batch_size=8, shard_rows=32)
        dump_teacher(Network(16, 4, seed=7), synthetic(SAMPLES), out=out, config=config, worker=worker)

    out, alone = tmp_path / "c.zarr", tmp_path / "alone.zarr"
    teams = [
        [start(lambda each=each: dump(out, worker=each)) for each in crew(2)],
        [start(lambda each=each: other(out, each)) for each in crew(2)],
    ]
    first, second = ([wait(child) for child in team] for team in teams)
    assert sorted([first, second]) == [[0, 0], [1, 1]]
    if second == [0, 0]:
        assert in_child(lambda: other(alone, None)) == 0
        assert tree(out) == tree(alone)
    else:
        assert tree(out) == tree(single)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"batch_size": 4}, "batch_size is 8 there and 4 here"),
        ({"shard_rows": 32}, "shard_rows is 16 there and 32 here"),
        ({"encoding": "float32"}, "encoding is 'float16' there and 'float32' here"),
    ],
)
def test_a_worker_with_other_settings_is_refused_and_the_setting_named(tmp_path, change, part):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16)
    worker = Worker(index=0, count=2)
    dump_teacher(Network(16, 4), synthetic(60), out=tmp_path / "c", config=config, worker=worker, steal=False)
    before = tree(tmp_path / "c")
    with pytest.raises(TargetExists, match=part):
        dump_teacher(
            Network(16, 4),
            synthetic(60),
            out=tmp_path / "c",
            config=replace(config, **change),
            worker=Worker(index=1, count=2),
        )
    assert tree(tmp_path / "c") == before


def on_another_processor(monkeypatch):
    real = dump_manifest.compute_facts
    monkeypatch.setattr(dump_manifest, "compute_facts", lambda device: real(device) | {"name": "another processor"})


def test_another_device_is_refused_or_recorded_by_the_seal(tmp_path, monkeypatch):
    out = tmp_path / "c.zarr"
    dump(out, samples=60, worker=Worker(index=0, count=2), steal=False)
    on_another_processor(monkeypatch)
    with pytest.raises(TargetExists, match=r"name is .* there and 'another processor' here"):
        dump(out, samples=60, worker=Worker(index=1, count=2))
    dump(out, samples=60, worker=Worker(index=1, count=2), allow_device_change=True)
    (change,) = open_cache(out).manifest.history
    assert change.what == "device"
    assert change.after == {"name": "another processor"}
    assert set(change.before) == {"name"}


# ---- who takes what


def test_without_stealing_a_worker_leaves_the_rest(tmp_path, single):
    out = tmp_path / "c.zarr"
    assert in_child(lambda: dump(out, worker=Worker(index=1, count=3), steal=False)) == 0
    state = cache_status(out).data["splits"]["train"]
    assert (state["committed_shards"], state["shards"], state["complete"]) == (6, SHARDS, False)
    with pytest.raises(CacheIncomplete, match="13 of 19 shards are not committed"):
        seal_splits(out)
    for index in (0, 2):
        assert in_child(lambda index=index: dump(out, worker=Worker(index=index, count=3), steal=False)) == 0
    assert contents(out) == contents(single)


def test_a_worker_takes_the_shards_of_those_that_never_came(tmp_path, single):
    out = tmp_path / "c.zarr"
    assert in_child(lambda: dump(out, worker=Worker(index=31, count=32))) == 0
    assert contents(out) == contents(single)


@pytest.mark.parametrize(
    ("heard_seconds_ago", "heartbeat"), [(claims.STALE_S + 1, True), (0, False)], ids=["stale", "ended"]
)
def test_the_shards_of_a_worker_that_is_gone_are_taken(tmp_path, heard_seconds_ago, heartbeat):
    out = tmp_path / "c.zarr"
    dump(out, samples=60, worker=Worker(index=0, count=2), steal=False)
    claim_elsewhere(out, (0, 3), heard_seconds_ago=heard_seconds_ago, heartbeat=heartbeat)
    dump(out, samples=60, worker=Worker(index=1, count=2))
    assert open_cache(out).complete


def test_a_worker_waits_for_one_that_is_alive_until_it_is_not(tmp_path, quick, monkeypatch):
    """By the clock of the one that waits: the clock of the other machine may be wrong."""
    out = tmp_path / "c.zarr"
    dump(out, samples=60, worker=Worker(index=0, count=2), steal=False)
    claim_elsewhere(out, (0, 3), heard_seconds_ago=-10_000)
    monkeypatch.setattr(claims, "STALE_S", 0.5)
    began = time.monotonic()
    dump(out, samples=60, worker=Worker(index=1, count=2))
    assert time.monotonic() - began > 0.5
    assert open_cache(out).complete


def test_a_worker_that_is_killed_holds_nobody_up(tmp_path, single):
    """Its number is gone from this machine, whatever its heartbeat says."""
    out = tmp_path / "c.zarr"

    class Dying(Network):
        def forward(self, inputs):
            if self.rows > 60:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(inputs)

    def die():
        torch.set_num_threads(1)
        config = DumpConfig(device="cpu", batch_size=8, shard_rows=16)
        dump_teacher(Dying(16, 4), synthetic(SAMPLES), out=out, config=config, worker=Worker(index=0, count=2))

    Dying.__name__ = "Network"  # as the manifest names the teacher
    assert in_child(die) == -signal.SIGKILL
    assert cache_status(out).data["splits"]["train"]["workers"][0]["state"] == "gone"
    assert in_child(lambda: dump(out, worker=Worker(index=1, count=2))) == 0
    assert contents(out) == contents(single)


def test_the_heartbeat_is_rewritten_and_ends_with_the_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    storage = LocalStorage(tmp_path)
    with Claims(storage, Worker(), "cpu") as own:
        (first,) = claims.read_workers(storage)
        assert first.machine == machine_name()
        while claims.read_workers(storage) == [first]:
            time.sleep(0.01)
        assert own.claim((0, 1), claims.latest_claims(storage))
        assert not own.claim((0, 1), {})
        assert not own.claim((0, 1), claims.latest_claims(storage))
    assert claims.read_workers(storage) == []
    with Claims(storage, Worker(), "cpu") as later:
        assert claims.latest_claims(storage) == {(0, 1): 0}
        assert later.claim((0, 1), claims.latest_claims(storage))
        assert claims.latest_claims(storage) == {(0, 1): 1}


# ---- sealing


def finished_but_not_sealed(out):
    """All shards committed; the last worker was killed before it sealed the split."""
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr("kdcache.distill.teacher.dump.seal", killed)
        with pytest.raises(KeyboardInterrupt):
            dump(out, worker=Worker(index=0, count=2))


def test_seal_by_hand(tmp_path, single):
    out = tmp_path / "c.zarr"
    finished_but_not_sealed(out)
    with pytest.raises(CacheIncomplete):
        open_cache(out)
    assert "not sealed yet" in cache_status(out).text
    assert answer("seal", out)["splits"]["train"]["sealed_now"]
    assert contents(out) == contents(single)
    assert not answer("seal", out)["splits"]["train"]["sealed_now"]
    assert contents(out) == contents(single)


def test_several_sealers_at_once_do_no_harm(tmp_path, single):
    out = tmp_path / "c.zarr"
    finished_but_not_sealed(out)
    children = [start(lambda: seal_splits(out)) for _ in range(6)]
    assert [wait(child) for child in children] == [0] * 6
    assert contents(out) == contents(single)


def late_commit(out, change):
    """A shard that a worker which was taken for dead writes after the split was sealed."""
    dump(out, samples=60, worker=Worker(index=0, count=2), steal=False)
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16)

    class Late(Network):
        def forward(self, inputs):
            if self.rows == 6:  # the probe is over: another worker does all, and seals
                assert in_child(lambda: dump(out, samples=60, worker=Worker(index=0, count=2))) == 0
            return change(super().forward(inputs))

    Late.__name__ = "Network"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims.Liveness, "is_gone", lambda *_: True)
        patch.setattr("kdcache.store.ledger.has_part", lambda *_: False)
        dump_teacher(Late(16, 4), synthetic(60), out=out, config=config, worker=Worker(index=1, count=2))


def test_a_worker_that_comes_back_after_the_seal_leaves_nothing(tmp_path):
    reference, out = tmp_path / "one" / "c.zarr", tmp_path / "two" / "c.zarr"
    dump(reference, samples=60)
    late_commit(out, lambda logits: logits)
    assert contents(out) == contents(reference)


def test_a_worker_that_comes_back_with_other_bytes_says_so(tmp_path):
    out, calls = tmp_path / "c.zarr", []

    def change(logits):
        calls.append(len(logits))
        return logits * (1.0 if sum(calls) <= 6 else 1.01)

    with pytest.raises(CacheDamaged, match=r"was computed by two workers with different results"):
        late_commit(out, change)
    assert not verify_cache(out).data["whole"]


# ---- with repair, locks and status


def test_a_repair_is_for_one_process_alone(tmp_path):
    with pytest.raises(UsageError, match="--repair is given to one of several workers"):
        dump(tmp_path / "c", samples=60, worker=Worker(index=0, count=2), repair=True)
    dump(tmp_path / "c", samples=60, worker=Worker(index=0, count=2), steal=False)
    claim_elsewhere(tmp_path / "c", (0, 3), heard_seconds_ago=0)
    with pytest.raises(CacheBusy, match="other workers write to"):
        dump(tmp_path / "c", samples=60, repair=True)


def test_a_single_process_still_locks_a_local_cache(tmp_path):
    out = tmp_path / "c.zarr"
    dump(out, samples=60, worker=Worker(index=0, count=2), steal=False)
    manifest = open_cache(out, allow_partial=True).manifest
    with SplitWriter(out, manifest), pytest.raises(CacheBusy, match="another dump writes"):
        dump(out, samples=60)


def test_status_says_who_does_what(tmp_path):
    out = tmp_path / "c.zarr"
    dump(out, samples=60, worker=Worker(index=0, count=2), steal=False)
    claim_elsewhere(out, (0, 3), heard_seconds_ago=5)
    report = cache_status(out)
    state = report.data["splits"]["train"]
    ended, far = sorted(state["workers"], key=lambda each: each["worker"])
    assert (ended["worker"], ended["state"], ended["committed_shards"]) == ("0/2", "ended", 2)
    assert (far["worker"], far["state"], far["in_flight"]) == ("9/10", "running", [[0, 3]])
    assert 5 <= far["heard_seconds_ago"] < 60
    assert (state["rows_left"], state["unclaimed_shards"]) == (28, 1)
    for part in ("2 of 4 shards committed", "9/10", "running", "(0, 3)", "5 s ago"):
        assert part in report.text
    json.dumps(report.data)
    split_of(out).write(
        f"{claims.WORKERS}/far",
        claims._bytes(replace(claims.read_workers(split_of(out))[0], heard=time.time() - claims.STALE_S - 1)),
    )
    gone = cache_status(out).data["splits"]["train"]["workers"]
    assert {each["worker"]: each["state"] for each in gone} == {"0/2": "ended", "9/10": "gone"}


def test_status_measures_the_rate_of_workers_that_run(tmp_path, monkeypatch):
    out, seen = tmp_path / "c.zarr", []

    class Slow(Network):
        def forward(self, inputs):
            if self.rows == 6 + 3 * 16:
                time.sleep(0.2)
                seen.append(cache_status(out).data["splits"]["train"])
            return super().forward(inputs)

    config = DumpConfig(device="cpu", batch_size=16, shard_rows=16)
    dump_teacher(Slow(16, 4), synthetic(100), out=out, config=config)
    (state,) = seen
    (worker,) = state["workers"]
    assert (worker["worker"], worker["state"]) == ("0/1", "running")
    assert worker["rows_per_second"] > 0
    assert state["seconds_left"] == pytest.approx(state["rows_left"] / worker["rows_per_second"])
    assert worker["in_flight"]


# ---- the command


def test_slurm_and_torchrun_variables_reach_the_command(tmp_path, monkeypatch):
    teacher, out = tmp_path / "t", tmp_path / "c.zarr"
    answer("train-teacher", "--epochs", "1", "--out", teacher)
    arguments = ("dump-teacher", "--checkpoint", teacher / "best.pt", "--shard-rows", "64")
    answer(*arguments, "--out", tmp_path / "one.zarr")
    for name, value in {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}.items():
        monkeypatch.setenv(name, value)
    result = answer(*arguments, "--no-steal", "--out", out)["splits"]["train"]
    assert result["pending_shards"] == 11
    assert not result["complete"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert answer(*arguments, "--no-steal", "--out", out)["splits"]["train"]["complete"]
    assert tree(out) == tree(tmp_path / "one.zarr")
    monkeypatch.setenv("RANK", "0")
    assert "WORLD_SIZE is not" in refused(2, *arguments, "--out", tmp_path / "x.zarr")
