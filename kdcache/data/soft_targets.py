"""Soft targets of a batch: the teachers' logits as they are stored, decoded on the device of the student."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdcache.store.encodings.base import LOGITS, Encoding
from kdcache.store.encodings.floats import FloatEncoding
from kdcache.store.encodings.topk import TopKEncoding

# An encoding, and stored rows by the name of their array, (batch, *row_shape).
Part = tuple[Encoding, Mapping[str, Tensor]]


class SoftTargets:
    """The teachers' logits of a batch.

    Args:
        parts: Encoding and stored rows of each teacher. All rows are of the same samples, in the same order.
        weights: Weight of each teacher, of which only the proportions count; empty for equal ones.

    Attributes:
        tail: How `kd` treats classes whose logits are not stored: `other` or `uniform`.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float] = (), *, tail: str = "other") -> None:
        self._parts, self._weights, self.tail = parts, weights, tail
        self._decoded: dict[float | None, Tensor] = {}

    @classmethod
    def of(cls, logits_bc: Tensor) -> SoftTargets:
        """Soft targets of one teacher whose logits, (batch, classes), are at hand."""
        encoding = FloatEncoding(str(logits_bc.dtype).removeprefix("torch."), logits_bc.shape[1])
        return cls([(encoding, {LOGITS: logits_bc})])

    @property
    def sparse(self) -> TopKEncoding | None:
        """The encoding, if it leaves out all but the largest logits of one teacher."""
        encoding = self._parts[0][0]
        return encoding if isinstance(encoding, TopKEncoding) and len(self._parts) == 1 else None

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """Stored rows of the first teacher, by array."""
        return self._parts[0][1]

    def logits(self, temperature: float | None = None) -> Tensor:
        """Weighted mean of the teachers' logits, (batch, classes); one teacher's keep the dtype they are decoded to.

        Args:
            temperature: Temperature that the logits are to be exact for, where the encoding leaves some out.

        The mean is one of logits: the teachers' distributions are averaged geometrically (Hinton et al., 2015,
        section 1).
        """
        if not any(encoding.temperatures for encoding, _ in self._parts):
            temperature = None
        if temperature not in self._decoded:
            decoded = [encoding.decode(rows, temperature=temperature) for encoding, rows in self._parts]
            self._decoded[temperature] = mean_logits(decoded, self._weights)
        return self._decoded[temperature]

    @classmethod
    def concatenated(cls, parts: Sequence[SoftTargets]) -> SoftTargets:
        """Soft targets of several batches, one after the other."""
        first = parts[0]
        encodings = [encoding for encoding, _ in first._parts]
        rows = [
            {name: torch.cat([each._parts[at][1][name] for each in parts]) for name in first._parts[at][1]}
            for at in range(len(encodings))
        ]
        return cls(list(zip(encodings, rows, strict=True)), first._weights, tail=first.tail)

    def map(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        """The same soft targets, each stored tensor changed, such as by a copy to a device."""
        parts = [(encoding, {name: change(rows[name]) for name in rows}) for encoding, rows in self._parts]
        return SoftTargets(parts, self._weights, tail=self.tail)


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
