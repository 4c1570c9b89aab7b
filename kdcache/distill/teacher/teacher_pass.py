"""A teacher's forward pass: logits and the features of chosen layers for a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.batch import Batch
from kdcache.distill.teacher.head import Head
from kdcache.models.device import evaluation_mode, to_host
from kdcache.models.feature_hooks import PENULTIMATE, FeatureHooks, pool_features
from kdcache.models.forward import ForwardPass
from kdcache.store.encodings.base import LOGITS
from kdcache.store.records import FeatureRecord

Rows = dict[str, NDArray[Any]]

HEAD_ERROR = "head_error"


class TeacherPass:
    """A forward pass that also gives features. Within `with` the network is in eval mode and its layers are hooked.

    Args:
        network: The teacher's forward pass.
        features: Layers whose outputs are wanted, and how they are pooled.

    Attributes:
        head: Last linear layer, whose input is given too; None where it is not wanted.
    """

    def __init__(self, network: ForwardPass, features: Sequence[FeatureRecord] = ()) -> None:
        self.network, self.features = network, features
        self.head: Head | None = None
        self._taps: FeatureHooks | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> TeacherPass:
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.network.module))
            layers = [each.layer for each in self.features] + ([PENULTIMATE] if self.head is not None else [])
            self._taps = stack.enter_context(FeatureHooks(self.network.module, list(dict.fromkeys(layers))))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """By name of the array, on the device: logits (batch, classes), and pooled features (batch, ...); with a head
        its input (batch, width) as `penultimate`, and its error (batch,) as `head_error`.

        Raises:
            TeacherOutputError: logits of another shape.
            ModelError: the network or one of the layers fails.
        """
        assert self._taps is not None, "used outside of `with`"
        logits = self.network(batch.inputs, batch.indices)
        outputs = self._taps.take()
        rows = {LOGITS: logits} | {each.array: pool_features(outputs[each.layer], each.pool) for each in self.features}
        if self.head is not None:
            rows |= {PENULTIMATE: outputs[PENULTIMATE], HEAD_ERROR: self.head.error(outputs[PENULTIMATE], logits)}
        return rows

    def rows(self, batch: Batch) -> Callable[[], Rows]:
        """Queue a batch on the device; calling the result waits for its rows, float32 or float64 on the host."""
        waits = {
            name: to_host(values if values.dtype == torch.float64 else values.float())
            for name, values in self(batch).items()
        }
        return lambda: {name: wait() for name, wait in waits.items()}

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Rows]]:
        """Batches with their rows, one batch behind, so that the device computes while the host stores."""
        waiting: tuple[Batch, Callable[[], Rows]] | None = None
        for batch in batches:
            queued = batch, self.rows(batch)
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = queued
        if waiting is not None:
            yield waiting[0], waiting[1]()
