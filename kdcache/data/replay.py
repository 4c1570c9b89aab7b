"""Randomness that can be replayed: every generator that a transform may draw from, seeded for one (view, sample)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_TORCH_BITS, _NUMPY_BITS = 63, 32


@contextmanager
def generators_kept(*, torch_only: bool) -> Iterator[None]:
    """Give torch's, Python's and numpy's global generators back as they were; compute on one thread meanwhile.

    One thread, because some kernels (the mean of a large float image) sum in another order on several, and the last
    bit of a pixel must not depend on the process that made it.
    """
    threads, kept = torch.get_num_threads(), torch.default_generator.get_state()
    others = None if torch_only else (random.getstate(), np.random.get_state())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.default_generator.set_state(kept)
        if others is not None:
            random.setstate(others[0])
            np.random.set_state(others[1])


def seed_generators(key: int, *, torch_only: bool) -> None:
    """Seed the three, or torch's alone, from a key of 128 bits; for use within `generators_kept`."""
    # Not torch.manual_seed, which seeds the accelerators too and takes a hundred times as long.
    torch.default_generator.manual_seed(key & (2**_TORCH_BITS - 1))
    if not torch_only:
        random.seed(key)
        np.random.seed(key >> (128 - _NUMPY_BITS))
