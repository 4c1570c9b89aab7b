"""Encodings by name."""

from __future__ import annotations

from kdcache.core.errors import UsageError
from kdcache.store.encodings.base import Encoding
from kdcache.store.encodings.floats import LOGITS, FloatEncoding
from kdcache.store.manifest import Manifest

# float64 is for exact comparisons with a live teacher; float16 costs a KL of about 1e-6 and is the default.
KINDS: dict[str, Encoding] = {dtype: FloatEncoding(dtype) for dtype in ("float16", "float32", "float64")}


def encoding_named(spec: str) -> Encoding:
    """The encoding of a spec.

    Raises:
        UsageError: there is no such encoding.
    """
    if spec not in KINDS:
        raise UsageError(f"--encoding is {spec!r}", f"one of {', '.join(KINDS)}")
    return KINDS[spec]


def encoding_of(manifest: Manifest) -> Encoding:
    """The encoding of a cache split."""
    return encoding_named(manifest.encoding or manifest.array(LOGITS).dtype)


def logit_arrays(manifest: Manifest) -> tuple[str, ...]:
    """Names of the arrays that hold the logits of a cache split."""
    return tuple(array.name for array in encoding_of(manifest).arrays(len(manifest.dataset.classes)))
