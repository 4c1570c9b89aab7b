"""Dumps in child processes that are killed: at a random instant, or at a chosen one of their writes."""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache.core.config import DumpConfig
from kdcache.core.workers import Worker
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.store.storage.registry import open_storage
from tests.helpers import Network, synthetic

CLASSES = 4
# What must be in order on the disk for a kill or a loss of power to leave a store that continues.
WRITES = (
    *((os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"), (os, "rmdir")),
    *((pathlib.Path, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "mkdir")),
)


def dump(out: Path | str, samples: int = 300, shard_rows: int = 16, **options: Any) -> None:
    """A small dump of many shards."""
    torch.set_num_threads(1)
    teacher = Network(16, CLASSES)
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=shard_rows)
    dump_teacher(teacher, synthetic(samples), out=out, config=config, **options)


def dump_with(out: Path | str, workers: int, **options: Any) -> None:
    """The same dump by several processes; returns when all have ended well."""
    children = [start(lambda each=each: dump(out, worker=each, **options)) for each in crew(workers)]
    statuses = [wait(child) for child in children]
    assert statuses == [0] * workers, statuses


def crew(count: int) -> list[Worker]:
    return [Worker(index=index, count=count) for index in range(count)]


def in_child(work: Callable[[], None], *, kill_after_s: float | None = None) -> int:
    """Do something in a forked process; 0 for success, -9 for killed, else its exit status."""
    child = start(work)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return wait(child)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(work: Callable[[], None]) -> int:
    """Begin something in a forked process; its number."""
    with warnings.catch_warnings():
        # Newer Pythons warn of forking with threads about; the child makes its own and uses none of ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child


def counting(act: Callable[[int, str, tuple[object, ...]], None], work: Callable[[], None]) -> None:
    """Run `work` with `act(number, name, arguments)` called before each of its writes; only for a child process."""
    count = 0

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            act(count, name, arguments)
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    for owner, name in WRITES:
        wrap(owner, name)
    work()


def killed_at_write(out: Path, number: int, **size: int) -> int:
    """A dump that is killed just before its write of this number."""

    def act(count: int, name: str, arguments: tuple[object, ...]) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child(lambda: counting(act, lambda: dump(out, **size)))


def writes_of_a_dump(out: Path, **size: int) -> list[str]:
    """The writes of an uninterrupted dump, in order: name and what it was done to."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_name("writes")

    def act(count: int, name: str, arguments: tuple[object, ...]) -> None:
        first = arguments[0] if arguments else ""
        target = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        with open(log, "a") as file:
            file.write(f"{name} {place_of(target, out.parent)}\n")

    assert in_child(lambda: counting(act, lambda: dump(out, **size))) == 0
    return log.read_text().splitlines()


def place_of(target: str | Path, root: Path) -> str:
    """A path below a root, without the process in the names of unfinished files."""
    return re.sub(r"\.\w+-\d+(?=\.tmp)", "", os.path.relpath(target, root))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a store, and of what a killed dump might leave beside it."""
    files = [path for path in out.parent.rglob("*") if path.is_file() and path.name != "writes"]
    return {str(path.relative_to(out.parent)): path.read_bytes() for path in files}


def random_kills(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill dumps at random instants, continue each until it ends, and count how it went.

    Raises:
        AssertionError: a continued store is not the uninterrupted one, to the byte.
    """
    reference = folder / "reference" / "c.zarr"
    began = time.perf_counter()
    assert in_child(lambda: dump(reference)) == 0
    length_s = time.perf_counter() - began
    expected = contents(reference)
    instants = random.Random(seed)
    counts = {"killed": 0, "had ended": 0}
    while counts["killed"] < kills:
        out = folder / f"{sum(counts.values())}" / "c.zarr"
        while True:
            status = in_child(lambda out=out: dump(out), kill_after_s=instants.uniform(0, 1.1 * length_s))
            counts["had ended" if status == 0 else "killed"] += 1
            assert status in (0, -signal.SIGKILL), status
            if status == 0 or instants.random() < 0.5:
                break
        assert in_child(lambda out=out: dump(out)) == 0
        found = contents(out)
        different = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
        assert not different, f"{out} is not the uninterrupted store: {different}"
    return counts


def random_kills_of_workers(place: str, rounds: int, seed: int = 0, samples: int = 300) -> dict[str, int]:
    """Rounds of dumps by 1, 2, 3 or 5 workers, some of which are killed at random instants, until stores are whole.

    Only for a process that has used no object store, if `place` is a URL.

    Returns:
        Number of rounds, of workers killed, and of stores that were compared.

    Raises:
        AssertionError: a finished store is not that of a single process, to the byte.
    """
    reference = f"{place}/reference.zarr"
    began = time.perf_counter()
    assert in_child(lambda: dump(reference, samples=samples)) == 0
    length_s = time.perf_counter() - began
    draw, counts = random.Random(seed), {"rounds": 0, "killed": 0, "stores": 0}
    while counts["rounds"] < rounds:
        out = f"{place}/{counts['stores']}.zarr"
        while counts["rounds"] < rounds:
            workers = draw.choice([1, 2, 3, 5])
            children = [
                start(lambda out=out, each=each: dump(out, samples=samples, worker=each)) for each in crew(workers)
            ]
            doomed = set(draw.sample(children, draw.randint(1, workers)))
            for child in draw.sample(sorted(doomed), len(doomed)):
                time.sleep(draw.uniform(0, length_s / len(doomed)))
                os.kill(child, signal.SIGKILL)
            statuses = {child: wait(child) for child in children}
            assert all(status == 0 or child in doomed for child, status in statuses.items()), statuses
            counts["rounds"] += 1
            counts["killed"] += sum(status == -signal.SIGKILL for status in statuses.values())
            if 0 in statuses.values():
                break
        assert in_child(lambda out=out: dump(out, samples=samples)) == 0
        assert in_child(lambda out=out: expect_same(out, reference)) == 0, f"{out} is not the single process's store"
        counts["stores"] += 1
    return counts


def expect_same(one: str, other: str) -> None:
    """Compare two stores, object by object."""
    found, wanted = ({key: s.read(key) for key, _ in s.objects()} for s in (open_storage(one), open_storage(other)))
    assert found == wanted, set(found) ^ set(wanted)


def random_kills_at(url: str, kills: int, seed: int = 0) -> dict[str, int]:
    """Like `random_kills`, for an object store. Only for a process that has used none: each dump is a fork of it.

    Returns:
        Number of kills, of dumps that had ended before, and of stores that were compared.
    """
    began = time.perf_counter()
    assert in_child(lambda: dump(f"{url}/reference.zarr")) == 0
    length_s = time.perf_counter() - began
    instants, counts = random.Random(seed), {"killed": 0, "had ended": 0, "stores": 0}
    while counts["killed"] < kills:
        out = f"{url}/{counts['stores']}.zarr"
        while True:
            status = in_child(lambda out=out: dump(out), kill_after_s=instants.uniform(0.1 * length_s, length_s))
            counts["had ended" if status == 0 else "killed"] += 1
            assert status in (0, -signal.SIGKILL), status
            if status == 0 or instants.random() < 0.3:
                break
        assert in_child(lambda out=out: dump(out)) == 0
        same = in_child(lambda out=out: expect_same(out, f"{url}/reference.zarr"))
        assert same == 0, f"{out} is not the uninterrupted store"
        counts["stores"] += 1
    return counts
