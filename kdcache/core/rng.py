"""Every seed and every order. A key is a hash of (seed, purpose, numbers), never a sum, so streams do not collide.

The orders come from the raw 64-bit output of Philox, which numpy promises never to change, so that one seed gives one
order on every machine and every version.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kdcache.core.json_records import canonical_json


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 128-bit key of (seed, purpose, numbers)."""
    content = canonical_json([operator.index(seed), purpose, *(operator.index(number) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")


def key_series(seed: int, purpose: str, *numbers: int) -> Callable[[int], int]:
    """`key(seed, purpose, *numbers, last)` as a function of the last number: 1 µs each where `key` takes 5."""
    content = canonical_json([operator.index(seed), purpose, *(operator.index(number) for number in numbers)])
    begun = hashlib.blake2b(content[:-1] + b",", digest_size=16)

    def last_key(last: int) -> int:
        digest = begun.copy()
        digest.update(b"%d]" % last)
        return int.from_bytes(digest.digest(), "little")

    return last_key


def generator_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A key folded to the 63 bits that torch's generators take."""
    return key(seed, purpose, *numbers) & (2**63 - 1)


def permutation(length: int, seed: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """A random order of `range(length)`, shape (length,), int64."""
    raw = np.random.Philox(key=key(seed, purpose, *numbers)).random_raw(length)
    # Sorting numbers that carry their position in their lowest bits takes half the time of an argsort.
    bits = np.uint64(max(length - 1, 0).bit_length())
    position = (np.uint64(1) << bits) - np.uint64(1)
    packed = np.sort((raw & ~position) | np.arange(length, dtype=np.uint64))
    drawn = packed >> bits
    if (drawn[1:] == drawn[:-1]).any():
        # What tells two numbers apart was cut off.
        return np.argsort(raw, kind="stable").astype(np.int64, copy=False)
    return (packed & position).view(np.int64)


def keyed_sample(length: int, count: int, seed: int, purpose: str, *numbers: int) -> NDArray[np.int64]:
    """`count` different indices below `length` (all of them where there are fewer), ascending, int64."""
    return np.sort(permutation(length, seed, purpose, *numbers)[: max(count, 0)])
