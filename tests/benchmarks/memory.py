"""Peak memory of a dump at two numbers of samples; the dataset makes each sample when asked, so it holds none."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SIZES = (40_000, 160_000)
CLASSES = 1000


class MadeSamples:
    """Map-style: sample i is four numbers that depend on i."""

    classes = tuple(map(str, range(CLASSES)))

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([index % 251, index % 241, index % 239, 1], dtype=torch.float32), index % CLASSES


def dump_once(length: int) -> None:
    """Dump `length` rows of 1000 classes and print this process's peak memory in kB before and after."""
    from kdcache import DumpConfig, dump_teacher

    torch.manual_seed(0)
    teacher = torch.nn.Linear(4, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        dump_teacher(teacher, MadeSamples(2048), out=Path(folder) / "warm.zarr", config=DumpConfig(device="cpu"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dump_teacher(teacher, MadeSamples(length), out=Path(folder) / "cache.zarr", config=DumpConfig(device="cpu"))
        print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def run(*, rounds: int, device: str) -> None:
    print(f"peak memory of a dump of {CLASSES} classes, over that of a process that has dumped 2,048 rows")
    for length in SIZES:
        command = [sys.executable, "-c", f"from tests.benchmarks.memory import dump_once; dump_once({length})"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        before, after = (int(number) / 1024 for number in done.stdout.split())
        print(f"  {length:>8,} rows ({length * CLASSES * 2 / 2**20:.0f} MiB stored): {after - before:.0f} MiB more")
