"""Soft targets of a batch: the teachers' logits as they are stored, decoded on the device of the student."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdcache.store.encodings.base import Encoding
from kdcache.store.encodings.floats import LOGITS, FloatEncoding

# An encoding, and stored rows by the name of their array, (batch, *row_shape).
Part = tuple[Encoding, Mapping[str, Tensor]]


class SoftTargets:
    """The teachers' logits of a batch.

    Args:
        parts: Encoding and stored rows of each teacher. All rows are of the same samples, in the same order.
        weights: Weight of each teacher, of which only the proportions count; empty for equal ones.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float] = ()) -> None:
        self._parts, self._weights = parts, weights

    @classmethod
    def of(cls, logits_bc: Tensor) -> SoftTargets:
        """Soft targets of one teacher whose logits, (batch, classes), are at hand."""
        return cls([(FloatEncoding(str(logits_bc.dtype).removeprefix("torch.")), {LOGITS: logits_bc})])

    def logits(self) -> Tensor:
        """Weighted mean of the teachers' logits, (batch, classes); one teacher's keep the dtype they are decoded to.

        The mean is one of logits: the teachers' distributions are averaged geometrically (Hinton et al., 2015,
        section 1).
        """
        return mean_logits([encoding.decode(rows) for encoding, rows in self._parts], self._weights)

    def map(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        """The same soft targets, each stored tensor changed, such as by a copy to a device."""
        parts = [(encoding, {name: change(rows[name]) for name in rows}) for encoding, rows in self._parts]
        return SoftTargets(parts, self._weights)


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """Weighted mean of teachers' logits, (n, classes), in float32 or wider; one teacher's logits keep their dtype.

    Args:
        logits: Logits of each teacher for the same samples, (n, classes).
        weights: Weight of each teacher, of which only the proportions count; empty for equal ones.
    """
    if len(logits) == 1:
        return logits[0]
    weights = weights or [1.0] * len(logits)
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in logits), torch.float32)
    parts = [weight / sum(weights) * each.to(dtype) for weight, each in zip(weights, logits, strict=True)]
    return torch.stack(parts).sum(dim=0)
