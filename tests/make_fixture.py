"""Writes the cache that later versions must still open. Run once for each schema; never overwrite an old one.

python -m tests.make_fixture
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kdcache.core.config import DumpConfig
from kdcache.distill.teacher.dump import dump_teacher
from tests.helpers import synthetic

FIXTURE = Path(__file__).parent / "fixtures" / "schema-1.zarr"


class Sums(nn.Module):
    """A teacher whose answers can be worked out by hand: class c gets c plus the mean of the pixels in 0 … 1."""

    def forward(self, inputs_bchw: torch.Tensor) -> torch.Tensor:
        return inputs_bchw.mean(dim=(1, 2, 3), keepdim=False)[:, None] + torch.arange(3)


if __name__ == "__main__":
    for split, compression in (("train", "none"), ("test", "zstd:5")):
        dump_teacher(
            Sums(),
            synthetic(21, classes=3, split=split, seed=len(split)),
            out=FIXTURE,
            split=split,
            config=DumpConfig(device="cpu", batch_size=4, shard_rows=8, compression=compression),
        )
