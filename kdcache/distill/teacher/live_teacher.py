"""A live teacher in the place of a cache: what distillation costs without one, and what a cache must agree with."""

from __future__ import annotations

from torch import nn

from kdcache.data.loader import Batch, BatchRequest, Fetcher
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.models.device import evaluation_mode
from kdcache.models.forward import answer
from kdcache.store.manifest import Preprocess
from kdcache.store.sampler import Schedule, always


class LiveTargets:
    """Puts to each batch what the teacher says of it at that moment.

    Args:
        teacher: on the device that trains.
        preprocess: of the teacher.
        classes: that it answers for.
        fetcher: of the samples as the teacher takes them; None where the student's inputs, before any normalising, are
            the teacher's too.
        schedule: the view of each epoch, for `fetcher`.
        amp: precision of the teacher's forward pass.
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
    ) -> None:
        self._teacher, self._preprocessor, self._classes = teacher, as_preprocessor(preprocess), classes
        self._fetcher, self._schedule, self._amp = fetcher, schedule or always(0), amp
        self._view = 0

    def start_epoch(self, epoch: int) -> None:
        self._view = self._schedule(epoch)

    def __call__(self, batch: Batch) -> Batch:
        """A batch with the teacher's logits, (batch, classes), on the teacher's device."""
        inputs = batch.inputs
        if self._fetcher is not None:
            inputs = self._fetcher.batch(BatchRequest(batch.indices.numpy(), self._view)).inputs
        with evaluation_mode(self._teacher):
            answers = answer(
                self._teacher,
                inputs,
                preprocessor=self._preprocessor,
                device=next(self._teacher.parameters()).device,
                amp=self._amp,
                classes=self._classes,
            )
        return batch._replace(soft_targets=answers)
