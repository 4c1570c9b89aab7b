"""Batches: what a loader is asked for, and what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.soft_targets import SoftTargets


class Share(NamedTuple):
    """One process's part of a batch that several train on.

    Attributes:
        indices: Indices of the whole batch's samples, (n,) int64.
        start: Position of this process's first sample.
        stop: Position after its last one.
        counted: Samples that the loss counts; 0 for a process that has one only to take part in the step.
    """

    indices: NDArray[np.int64]
    start: int
    stop: int
    counted: int


class BatchRequest(NamedTuple):
    """What a loader is asked for.

    Attributes:
        indices: Indices of the samples, (B,) int64.
        checksums: Whether to compute `Batch.input_crc32c`, at about 0.3 µs per small sample.
        more_views: Further views of the same samples, each a batch of its own after that of `view`.
        share: Place of the samples in the batch of all processes; None for a process alone.
    """

    indices: NDArray[np.int64]
    view: int = 0
    checksums: bool = False
    share: Share | None = None
    more_views: tuple[int, ...] = ()


class Batch(NamedTuple):
    """Samples as a loader yields them.

    Attributes:
        inputs: Inputs (B, ...) after `Preprocessor.per_sample`; token ids are (B, longest).
        labels: Labels of the samples, (B,) int64.
        indices: Indices of the samples, (B,) int64.
        input_crc32c: (B,) int64 holding uint32, of the shared inputs before any preprocessing; None unless asked for.
        partner_labels: Labels of the mixed-in samples, (B,) int64; None without mixing.
        mix_lambda: Weight of the sample in its mixed input, (B,) float32 from 0 to 1; None without mixing.
        soft_targets: The teachers' logits of the samples, if a cache was joined.
        features: The teacher's features (B, ...) by array name, if an objective needs them.
        negatives: The teacher's features of other samples, (negatives, ...), by array name, likewise.
        share: Place of the samples in the batch of all processes; None for a process alone.
        labelled: Number of samples of the batch of all processes that have a label; None where all have.
    """

    inputs: Tensor
    labels: Tensor
    indices: Tensor
    input_crc32c: Tensor | None = None
    partner_labels: Tensor | None = None
    mix_lambda: Tensor | None = None
    soft_targets: SoftTargets | None = None
    features: dict[str, Tensor] | None = None
    negatives: dict[str, Tensor] | None = None
    share: Share | None = None
    labelled: int | None = None

    @classmethod
    def concatenated(cls, batches: Sequence[Batch]) -> Batch:
        """Several batches of this process as one, with the negatives of the first."""
        first = batches[0]
        if len(batches) == 1:
            return first
        joined: dict[str, Any] = {}
        for name in ("inputs", "labels", "indices", "partner_labels", "mix_lambda"):
            if getattr(first, name) is not None:
                joined[name] = torch.cat([getattr(batch, name) for batch in batches])
        if first.features is not None:
            parts = [batch.features or {} for batch in batches]
            joined["features"] = {name: torch.cat([part[name] for part in parts]) for name in first.features}
        if first.soft_targets is not None:
            joined["soft_targets"] = SoftTargets.concatenated([b.soft_targets for b in batches if b.soft_targets])
        if first.labelled is not None:
            joined["labelled"] = sum(batch.labelled or 0 for batch in batches)
        return first._replace(input_crc32c=None, **joined)

    @property
    def counted(self) -> int:
        """Number of samples that the loss counts."""
        return len(self.labels) if self.share is None else self.share.counted

    @property
    def whole_size(self) -> int:
        """Number of samples of the batch over all processes."""
        return len(self.labels) if self.share is None else len(self.share.indices)

    @property
    def main_labels(self) -> Tensor:
        """Label with the larger weight in each input, (B,) int64."""
        if self.partner_labels is None or self.mix_lambda is None:
            return self.labels
        return torch.where(self.mix_lambda >= 0.5, self.labels, self.partner_labels)

    def part(self, start: int, stop: int) -> Batch:
        """Some samples of the batch, which know their place in the batch of all processes."""
        whole = self.share or Share(self.indices.numpy(), 0, len(self.labels), len(self.labels))
        counted = min(stop, whole.counted) - min(start, whole.counted)
        share = Share(whole.indices, whole.start + start, whole.start + stop, counted)
        part = self._map(lambda tensor: tensor[start:stop])
        return part._replace(indices=self.indices[start:stop], negatives=self.negatives, share=share)

    def to(self, device: torch.device) -> Batch:
        """The batch with what a step computes with on a device; the indices stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory: a copy from pageable memory waits for all that the device was asked to do before.

        What is on a device already, such as the logits of an online teacher, stays there.
        """
        return self._map(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed that a step computes with."""
        changed: dict[str, Any] = {}
        for name in ("inputs", "labels", "partner_labels", "mix_lambda"):
            if (tensor := getattr(self, name)) is not None:
                changed[name] = change(tensor)
        for name in ("features", "negatives"):
            if (tensors := getattr(self, name)) is not None:
                changed[name] = {key: change(tensor) for key, tensor in tensors.items()}
        if self.soft_targets is not None:
            changed["soft_targets"] = self.soft_targets.map(change)
        return self._replace(**changed)


class Batches(Protocol):
    """The batches of one epoch: a list of requests, or an object that orders each epoch anew."""

    def __iter__(self) -> Iterator[BatchRequest]: ...

    def __len__(self) -> int: ...


def consecutive_batches(indices: NDArray[np.int64], batch_size: int) -> list[BatchRequest]:
    """Plain samples in the order given."""
    return [BatchRequest(part) for part in np.split(indices, range(batch_size, len(indices), batch_size))]
