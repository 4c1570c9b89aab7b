"""Randomness that can be replayed: every generator that a transform may draw from, seeded for one (view, sample)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_TORCH_BITS, _NUMPY_BITS = 63, 32


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give torch's, Python's and numpy's global generators back as they were; compute on one thread meanwhile.

    One thread, because some kernels (the convolution of a blur) sum in another order on several, and the last bit of a
    pixel must not depend on the process that made it.
    """
    threads = torch.get_num_threads()
    kept = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.default_generator.set_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


def seed_generators(key: int) -> None:
    """Seed the three from a key of 128 bits; for use within `generators_kept`."""
    # Not torch.manual_seed, which seeds the accelerators too and takes a hundred times as long.
    torch.default_generator.manual_seed(key & (2**_TORCH_BITS - 1))
    random.seed(key)
    np.random.seed(key >> (128 - _NUMPY_BITS))
