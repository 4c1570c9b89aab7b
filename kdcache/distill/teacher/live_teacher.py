"""An online teacher in the place of a cache: what distillation costs without one, and what a cache must agree with."""

from __future__ import annotations

import torch

from kdcache.data.batch import Batch, BatchRequest
from kdcache.data.loader import Fetcher
from kdcache.data.soft_targets import SoftTargets
from kdcache.models.forward import ForwardPass
from kdcache.store.sampler import Schedule, always


class LiveTargets:
    """Adds logits from an online teacher forward pass.

    The batch comes back with its inputs on the teacher's device, so that teacher and student share one copy of them.

    Args:
        teacher: The teacher's forward pass; the network is put in eval mode at the start of each epoch.
        fetcher: Fetches the samples as the teacher takes them; None where the student's inputs, before normalisation,
            are the teacher's too.
        schedule: View of each epoch, for `fetcher`.
    """

    def __init__(
        self, teacher: ForwardPass, *, fetcher: Fetcher | None = None, schedule: Schedule | None = None
    ) -> None:
        self._teacher, self._fetcher, self._schedule = teacher, fetcher, schedule or always(0)
        self._view = 0

    def start_epoch(self, epoch: int) -> None:
        self._view = self._schedule(epoch)
        self._teacher.module.eval()

    def __call__(self, batch: Batch) -> Batch:
        """A batch with the teacher's logits, (batch, classes), on the teacher's device."""
        if self._fetcher is not None:
            inputs = self._fetcher.batch(BatchRequest(batch.indices.numpy(), self._view)).inputs
        else:
            inputs = batch.inputs.to(self._teacher.device, non_blocking=True)
            batch = batch._replace(inputs=inputs)
        # Not inference mode: what is made there cannot be saved for a backward pass.
        with torch.no_grad():
            return batch._replace(soft_targets=SoftTargets.of(self._teacher(inputs, batch.indices)))
