"""A live teacher in the place of a cache: what distillation costs without one, and what a cache must agree with."""

from __future__ import annotations

import torch
from torch import nn

from kdcache.data.loader import Batch, BatchRequest, Fetcher
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.models.forward import answer
from kdcache.store.manifest import OutputRecord, Preprocess
from kdcache.store.sampler import Schedule, always


class LiveTargets:
    """Puts to each batch what the teacher says of it at that moment.

    The batch comes back with its inputs on the teacher's device, so that teacher and student share one copy of them.

    Args:
        teacher: on the device that trains; is put in eval mode at each epoch's start, and stays in it.
        preprocess: of the teacher.
        classes: that it answers for.
        fetcher: of the samples as the teacher takes them; None where the student's inputs, before any normalising, are
            the teacher's too.
        schedule: the view of each epoch, for `fetcher`.
        amp: precision of the teacher's forward pass.
        outputs: how logits are made of what the teacher returns; None takes these for logits.
    """

    def __init__(
        self,
        teacher: nn.Module,
        preprocess: Preprocess | Preprocessor,
        *,
        classes: int,
        fetcher: Fetcher | None = None,
        schedule: Schedule | None = None,
        amp: str = "off",
        outputs: OutputRecord | None = None,
    ) -> None:
        self._outputs = outputs
        self._device = next(teacher.parameters()).device
        self._teacher, self._preprocessor, self._classes = teacher, as_preprocessor(preprocess), classes
        self._fetcher, self._schedule, self._amp = fetcher, schedule or always(0), amp
        self._view = 0

    def start_epoch(self, epoch: int) -> None:
        self._view = self._schedule(epoch)
        self._teacher.eval()

    def __call__(self, batch: Batch) -> Batch:
        """A batch with the teacher's logits, (batch, classes), on the teacher's device."""
        if self._fetcher is not None:
            inputs = self._fetcher.batch(BatchRequest(batch.indices.numpy(), self._view)).inputs
        else:
            inputs = batch.inputs.to(self._device, non_blocking=True)
            batch = batch._replace(inputs=inputs)
        with torch.inference_mode():
            answers = answer(
                self._teacher,
                inputs,
                preprocessor=self._preprocessor,
                device=self._device,
                amp=self._amp,
                classes=self._classes,
                outputs=self._outputs,
            )
        return batch._replace(soft_targets=answers)
