"""Letting a teacher answer again for rows that a cache holds, to see whether it is the cache of this teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from kdcache.cache.reader import Cache
from kdcache.config import Execution
from kdcache.datasets import batch_loader, consecutive_batches
from kdcache.devices import evaluation_mode, resolve_device
from kdcache.errors import TeacherOutputError
from kdcache.evaluate import answer
from kdcache.keys import keyed_sample
from kdcache.models import weights_sha256
from kdcache.preprocess import Preprocessor
from kdcache.tokenizing import Tokenizer
from kdcache.views import Views


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """How a teacher's answers compare with the stored ones.

    Attributes:
        largest_difference: of all logits x, as a part of 1 + |x|.
        sample: where it was met.
        view: of it.
        same_weights: whether the teacher's weights have the manifest's hash.
    """

    rows: int
    largest_difference: float
    sample: int
    view: int
    same_weights: bool


def recompute_rows(
    teacher: nn.Module,
    views: Views,
    cache: Cache,
    *,
    rows: int,
    execution: Execution,
    tokenizer: Tokenizer | None = None,
) -> Recomputed:
    """Let the teacher answer for a keyed sample of a cache's rows, as it did for the dump.

    Args:
        teacher: with its weights.
        views: of the dataset, checked to be those of the cache.
        rows: how many, of all views together; all of them where there are fewer.
        execution: device, batch size, workers, and the seed that draws the sample.
        tokenizer: of the teacher, if it reads text.
    """
    manifest = cache.manifest
    drawn = keyed_sample(len(cache) * cache.views, rows, execution.seed, "recompute")
    device = resolve_device(execution.device)
    module = teacher.to(device)
    preprocessor = Preprocessor(manifest.teacher.preprocess, tokenizer)
    requests = [
        request._replace(view=view)
        for view in range(cache.views)
        for request in consecutive_batches(drawn[drawn // len(cache) == view] % len(cache), execution.batch_size)
        if len(request.indices)
    ]
    worst, where = 0.0, (0, 0)
    loader = batch_loader(views, requests, preprocessor=preprocessor, workers=execution.workers, device=device)
    with evaluation_mode(module):
        for request, batch in zip(requests, loader, strict=True):
            logits = answer(
                module,
                batch.inputs,
                preprocessor=preprocessor,
                device=device,
                amp=manifest.amp,
                classes=len(cache.classes),
                error=TeacherOutputError,
            )
            stored = cache.rows(request.indices, request.view).astype(np.float64)
            differences = (np.abs(logits.double().cpu().numpy() - stored) / (1 + np.abs(stored))).max(axis=1)
            if differences.max() > worst:
                worst, where = float(differences.max()), (request.view, int(request.indices[differences.argmax()]))
    same_weights = weights_sha256(module) == manifest.teacher.weights_sha256
    return Recomputed(
        rows=len(drawn), largest_difference=worst, view=where[0], sample=where[1], same_weights=same_weights
    )
