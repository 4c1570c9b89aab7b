"""Which worker a process is."""

from __future__ import annotations

import pytest

from kdcache.core.errors import UsageError
from kdcache.core.workers import Worker, worker_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "32", "SLURM_ARRAY_TASK_MIN": "0"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, Worker()),
        ("3/32", {}, Worker(index=3, count=32)),
        ("0/1", TORCHRUN, Worker(index=0, count=1, local_index=1)),
        (None, TORCHRUN, Worker(index=3, count=8, local_index=1)),
        (None, TORCHRUN | ARRAY | SRUN, Worker(index=3, count=8, local_index=1)),
        (None, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Worker()),
        (None, {"WORLD_SIZE": "1"}, Worker()),
        (None, ARRAY, Worker(index=5, count=32)),
        (None, ARRAY | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Worker(index=5, count=32)),
        (None, ARRAY | SRUN, Worker(index=22, count=128, local_index=0)),
        (None, SRUN, Worker(index=2, count=4, local_index=0)),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            Worker(index=3, count=4),
        ),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, Worker()),
    ],
)
def test_the_first_source_that_is_there_counts(given, environ, expected):
    assert worker_of(given, environ) == expected


@pytest.mark.parametrize(
    ("given", "environ", "parts"),
    [
        ("3", {}, ["--worker is '3'", "K/N", "3/32"]),
        ("3/3", {}, ["worker 3 of 3", "from 0 to 2"]),
        ("0/0", {}, ["worker 0 of 0", "at least one"]),
        (None, {"RANK": "1"}, ["RANK is set to 1", "WORLD_SIZE is not", "torchrun"]),
        (None, {"WORLD_SIZE": "2"}, ["WORLD_SIZE is set to 2", "RANK is not", "--worker 0/1"]),
        (None, {"SLURM_NTASKS": "4"}, ["SLURM_NTASKS is set to 4", "SLURM_PROCID is not", "srun"]),
        (None, {"SLURM_ARRAY_TASK_ID": "4"}, ["SLURM_ARRAY_TASK_ID is set", "SLURM_ARRAY_TASK_COUNT is not"]),
        (None, TORCHRUN | {"RANK": "three"}, ["RANK is 'three'", "a whole number"]),
        (None, TORCHRUN | {"RANK": "8"}, ["worker 8 of 8", "from 0 to 7"]),
        (None, ARRAY | {"SLURM_ARRAY_TASK_ID": "40"}, ["SLURM_ARRAY_TASK_ID is 40", "consecutive", "--worker K/N"]),
    ],
)
def test_what_cannot_be_is_refused(given, environ, parts):
    with pytest.raises(UsageError) as caught:
        worker_of(given, environ)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 32])
@pytest.mark.parametrize("units", [0, 1, 4, 31, 100])
def test_the_runs_partition_the_units(count, units):
    runs = [Worker(index=index, count=count).run(units) for index in range(count)]
    assert [unit for run in runs for unit in run] == list(range(units))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
