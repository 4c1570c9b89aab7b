"""Every seed and every order. A key is a hash of (seed, purpose, numbers), never a sum, so streams do not collide.

The orders come from the raw 64-bit output of Philox, which numpy promises never to change, so that one seed gives one
order on every machine and every version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 128-bit key of (seed, purpose, numbers)."""
    text = "/".join([str(int(seed)), purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A key folded to the 63 bits that torch's generators take."""
    return key(seed, purpose, *numbers) & (2**63 - 1)


def permutation(length: int, seed: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """A random order of `range(length)`, shape (length,), int64."""
    raw = np.random.Philox(key=key(seed, purpose, *numbers)).random_raw(length)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


def keyed_sample(length: int, count: int, seed: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """`count` different indices below `length` (all of them where there are fewer), ascending, int64."""
    return np.sort(permutation(length, seed, purpose, *numbers)[:count])
