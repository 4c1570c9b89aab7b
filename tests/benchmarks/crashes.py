"""Kills: at random instants and before every write. Damage: bits flipped and files cut short, all over a store."""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from kdcache.core.errors import KdcacheError
from kdcache.store.cache import open_cache
from kdcache.store.storage.local import LocalStorage
from kdcache.store.verify import verify_split
from tests.crashes import (
    contents,
    dump,
    in_child,
    killed_at_write,
    random_kills,
    random_kills_of_workers,
    writes_of_a_dump,
)

KILLS, ROUNDS, FLIPS, CUTS = 200, 120, 1000, 100
SMALL = {"samples": 40, "shard_rows": 16}


def run(*, rounds: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        counts = random_kills(Path(folder), KILLS)
        print(f"kills at random instants: {counts}; every continued store equals the uninterrupted one to the byte")
    with tempfile.TemporaryDirectory() as folder:
        counts = random_kills_of_workers(folder, ROUNDS)
        print(f"kills of 1, 2, 3 or 5 workers: {counts}; every store equals that of a single process to the byte")
    with tempfile.TemporaryDirectory() as folder:
        names = writes_of_a_dump(Path(folder) / "reference" / "c.zarr", **SMALL)
        expected = contents(Path(folder) / "reference" / "c.zarr")
        for number in range(1, len(names) + 1):
            out = Path(folder) / str(number) / "c.zarr"
            assert killed_at_write(out, number, **SMALL) == -signal.SIGKILL
            assert in_child(lambda out=out: dump(out, **SMALL)) == 0
            assert contents(out) == expected, names[number - 1]
        print(f"kills before each write: {len(names)}; every continued store equals the uninterrupted one to the byte")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "c.zarr"
        assert in_child(lambda: dump(out, samples=300, shard_rows=64)) == 0
        for what, count in (("bits flipped", FLIPS), ("files cut short", CUTS)):
            print(f"{what}: {dict(damage(out, what, count))}")


def damage(out: Path, what: str, count: int, seed: int = 0) -> Counter[str]:
    """Damage a store `count` times, each time undone, and count what reading all of it and verifying it say.

    Raises:
        AssertionError: a value that was read is another one.
    """
    whole = _read(out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    random, outcomes = np.random.default_rng(seed), Counter[str]()
    for number in range(count):
        file = files[number % len(files)]
        content = file.read_bytes()
        changed = bytearray(content)
        if what == "bits flipped":
            bit = int(random.integers(8 * len(content)))
            changed[bit // 8] ^= 1 << bit % 8
        else:
            del changed[int(random.integers(len(content))) :]
        file.write_bytes(changed)
        try:
            read = _read(out)
            assert all(np.array_equal(read[name], whole[name]) for name in whole), f"{file} changed a value"
            report = verify_split(LocalStorage(out), "train")
            seen = "no value changed, seen by verify" if report.problems else "no value changed, not seen by verify"
            outcomes[seen] += 1
        except KdcacheError as problem:
            outcomes[f"refused: {type(problem).__name__}"] += 1
        file.write_bytes(content)
    return outcomes


def _read(out: Path) -> dict[str, np.ndarray]:
    cache = open_cache(out)
    return {array.name: cache.column(array.name) for array in cache.manifest.arrays}
