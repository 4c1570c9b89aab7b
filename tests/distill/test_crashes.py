"""Kills at random instants and at every write; `python -m tests.benchmarks crashes` is the long form."""

from __future__ import annotations

import signal

import pytest

from tests.crashes import contents, dump, in_child, killed_at_write, random_kills, writes_of_a_dump

SMALL = {"samples": 40, "shard_rows": 16}


def test_killed_at_random_instants_a_dump_continues_to_the_same_store(tmp_path):
    assert random_kills(tmp_path, 12)["killed"] >= 12


@pytest.fixture(scope="module")
def writes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writes")
    return writes_of_a_dump(folder / "c.zarr", **SMALL), contents(folder / "c.zarr")


# Every write in the long form; every fourth is enough to meet each kind of it.
@pytest.mark.parametrize("first", range(2))
def test_killed_before_any_write_a_dump_continues_to_the_same_store(tmp_path, writes, first):
    names, expected = writes
    for number in range(1 + first * 4, len(names) + 1, 8):
        out = tmp_path / str(number) / "c.zarr"
        assert killed_at_write(out, number, **SMALL) == -signal.SIGKILL
        assert in_child(lambda out=out: dump(out, **SMALL)) == 0
        assert contents(out) == expected, names[number - 1]


def test_data_is_durable_before_its_ledger_entry(writes):
    names, _ = writes
    shards = [f"c.zarr/train/{name}" for name in ("logits/c/0/1", "input_crc32c/c/0", "labels/c")]
    part = "c.zarr/train/ledger/unsealed/parts/0"
    commit = names.index(f"link {part}/1.new.tmp")
    for shard in shards:
        file = f"{shard}/0.tmp" if "logits" in shard else f"{shard}/1.tmp"
        steps = [f"fsync {file}", f"replace {file}", f"fsync {shard}"]
        at = names.index(steps[0])
        assert [name for name in names[at:commit] if name in steps] == steps, names[at:commit]
    assert f"fsync {part}/1.new.tmp.tmp" in names[commit - 3 : commit]
    assert f"fsync {part}" in names[commit + 1 : commit + 5]
    # The parts are removed once the manifest says that the split is sealed.
    sealed = names.index("replace c.zarr/train/zarr.json.tmp", commit)
    removed = [at for at, name in enumerate(names) if name.startswith("rmdir")]
    assert names.index("fsync c.zarr/train/ledger/c/0/0/0.tmp") < sealed < min(removed)
