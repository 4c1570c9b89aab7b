"""Check of a teacher on a few samples, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcache.core.errors import ModelError
from kdcache.data.batch import Batch, BatchRequest
from kdcache.data.loader import batch_loader
from kdcache.data.views import Views
from kdcache.distill.teacher.head import Head
from kdcache.distill.teacher.teacher_pass import HEAD_ERROR, Rows, TeacherPass
from kdcache.models.device import evaluation_mode
from kdcache.models.feature_hooks import PENULTIMATE
from kdcache.models.forward import ForwardPass
from kdcache.models.teacher_outputs import check_kind, check_same, to_logits
from kdcache.store.encodings.base import LOGITS, Encoding
from kdcache.store.encodings.floats import as_floats

_PROBED_SAMPLES = 2  # batch norm refuses a single one where it computes on a batch


def find_head(network: ForwardPass, views: Views) -> Head:
    """The last linear layer of a teacher, found on the first samples.

    Raises:
        ModelError, TeacherOutputError: as for `Head`.
    """
    request = BatchRequest(np.arange(min(_PROBED_SAMPLES, len(views))))
    (batch,) = batch_loader(views, [request], preprocessor=network.preprocessor, device=network.device)
    with evaluation_mode(network.module):
        return Head(network, batch.inputs)


class TeacherProbe:
    """Runs a teacher on a few samples and checks its outputs.

    Args:
        teacher: Entered already.
        views: Views of the dataset, probed already.
        encoding: Encoding that must hold the teacher's outputs.
    """

    def __init__(self, teacher: TeacherPass, views: Views, encoding: Encoding) -> None:
        self._teacher, self._views, self._encoding = teacher, views, encoding

    def run(self) -> dict[str, tuple[int, ...]]:
        """Check the outputs for the first samples of one plain and one augmented view, where there are both.

        Returns:
            By name of the array the shape of one row of the logits and of each feature.

        Raises:
            TeacherOutputError: outputs of the wrong shape or kind, that the encoding cannot hold, or that depend on
                chance or on the other samples of the batch.
            ModelError: the network fails, or a layer does not give one row for each sample.
        """
        network = self._teacher.network
        shapes: dict[str, tuple[int, ...]] = {}
        indices = np.arange(min(_PROBED_SAMPLES, len(self._views)))
        views = (0,) if self._views.recipe.is_plain(1) else (0, 1)
        requests = [BatchRequest(indices, view) for view in views]
        for request, batch in zip(requests, self._batches(requests), strict=True):
            rows, raw = self._teacher.rows(batch)(), network.raw(batch.inputs)
            check_kind(raw.cpu().double().numpy(), network.outputs, narrow=network.narrow)
            shapes = self._checked_shapes(rows, len(indices))
            again = to_logits(raw, network.outputs).cpu().double().numpy()
            check_same(rows[LOGITS], again, sample=0, narrow=network.narrow, other_batch=False)
            if request.view == 0:
                self._check_beside_another(rows)
        return shapes

    def _batches(self, requests: Sequence[BatchRequest]) -> list[Batch]:
        network = self._teacher.network
        return list(batch_loader(self._views, requests, preprocessor=network.preprocessor, device=network.device))

    def _checked_shapes(self, rows: Rows, samples: int) -> dict[str, tuple[int, ...]]:
        for name, values in rows.items():
            if name == HEAD_ERROR:
                assert self._teacher.head is not None, "else there is no error"
                self._teacher.head.check(values, first_sample=0)
                continue
            if name == self._encoding.source:
                self._encoding.encode(values, first_sample=0)
            elif name not in (LOGITS, PENULTIMATE):
                as_floats(values, self._encoding.feature_dtype, first_sample=0, name=name)
            if len(values) != samples:
                raise ModelError(
                    f"{name} has shape {values.shape} for a batch of {samples}",
                    "a layer whose output has a row for each sample",
                    "choose another; see --list-layers",
                )
        return {name: values.shape[1:] for name, values in rows.items()}

    def _check_beside_another(self, rows: Rows) -> None:
        """Refuse a teacher whose output for a sample depends on the other samples of the batch."""
        last = len(self._views) - 1
        (batch,) = self._batches([BatchRequest(np.array([0, last if last > 1 else 0]))])
        beside = self._teacher.rows(batch)()[LOGITS]
        check_same(rows[LOGITS][:1], beside[:1], sample=0, narrow=self._teacher.network.narrow, other_batch=True)
