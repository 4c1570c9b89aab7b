"""Recomputation of a sample of rows, to check that a cache was made by a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.core.config import RuntimeConfig
from kdcache.core.errors import TeacherOutputError
from kdcache.core.rng import keyed_sample
from kdcache.data.batch import consecutive_batches
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.data.tokenizer import Tokenizer
from kdcache.data.views import Views
from kdcache.distill.teacher.teacher_pass import TeacherPass
from kdcache.models.device import move_to, resolve_device
from kdcache.models.forward import ForwardPass
from kdcache.models.registry import weights_sha256
from kdcache.store.cache import Cache
from kdcache.store.encodings.base import LOGITS
from kdcache.store.encodings.floats import FloatEncoding
from kdcache.store.facts import kl, temperatures_of


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Comparison of recomputed logits with the stored ones.

    Attributes:
        largest_difference: of all logits and features x, as a part of 1 + |x|.
        array: where it was met, `logits` or that of a feature.
        sample: of it.
        view: of it.
        same_weights: whether the teacher's weights have the manifest's hash.
        max_kl: Largest KL between a row's recomputed and stored logits, in nats, by temperature; empty for
            encodings without loss.
    """

    rows: int
    largest_difference: float
    array: str
    sample: int
    view: int
    same_weights: bool
    max_kl: dict[str, float] = field(default_factory=dict)


def recompute_rows(
    teacher: nn.Module,
    views: Views,
    cache: Cache,
    *,
    rows: int,
    execution: RuntimeConfig,
    tokenizer: Tokenizer | None = None,
) -> Recomputed:
    """Recompute a keyed sample of a cache's rows with the teacher, as in the dump.

    Args:
        teacher: with its weights.
        views: of the dataset, checked to be those of the cache.
        rows: how many, of all views together; all of them where there are fewer.
        execution: device, batch size (None for the dump's), workers, and the seed that draws the sample.
        tokenizer: of the teacher, if it reads text.
    """
    manifest = cache.manifest
    drawn = keyed_sample(len(cache) * cache.views, rows, execution.seed, "recompute")
    device = resolve_device(execution.device)
    module = move_to(teacher, device)
    preprocessor = Preprocessor(manifest.teacher.preprocess, tokenizer)
    requests = [
        request._replace(view=view)
        for view in range(cache.views)
        for request in consecutive_batches(
            drawn[drawn // len(cache) == view] % len(cache), execution.batch_size or manifest.batch_size
        )
        if len(request.indices)
    ]
    worst = Recomputed(
        rows=len(drawn),
        largest_difference=0.0,
        array=LOGITS,
        sample=0,
        view=0,
        same_weights=weights_sha256(module) == manifest.teacher.weights_sha256,
    )
    network = ForwardPass(
        module,
        preprocessor,
        device,
        classes=len(cache.classes),
        amp=manifest.amp,
        outputs=manifest.teacher.outputs,
        error=TeacherOutputError,
    )
    network.use_memory_format(manifest.memory_format)
    loader = batch_loader(views, requests, preprocessor=preprocessor, workers=execution.workers or 0, device=device)
    with TeacherPass(network, manifest.features) as teacher_pass:
        for request, batch in zip(requests, loader, strict=True):
            for array, output in teacher_pass(batch).items():
                indices, view = request.indices, request.view
                if array == LOGITS and not isinstance(cache.encoding, FloatEncoding):
                    worst = _with_loss(worst, cache, indices, view, output)
                    continue
                stored = cache.rows(indices, view) if array == LOGITS else cache.reader.rows(array, view, indices)
                differences = _differences(output, stored, array)
                if not differences.max() <= worst.largest_difference:  # a NaN too
                    worst = replace(
                        worst,
                        largest_difference=float(differences.max()),
                        array=array,
                        sample=int(request.indices[differences.argmax()]),
                        view=request.view,
                    )
    return worst


def _with_loss(worst: Recomputed, cache: Cache, indices: NDArray[np.int64], view: int, output: Tensor) -> Recomputed:
    """The comparison so far, with the loss of the encoding on some rows."""
    logits, losses = output.double().cpu().numpy(), dict(worst.max_kl)
    for temperature in temperatures_of(cache.encoding):
        stored = cache.rows(indices, view, temperature=temperature if cache.encoding.temperatures else None)
        name = f"{temperature:g}"
        losses[name] = max(losses.get(name, 0.0), float(kl(logits, stored, temperature).max()))
    return replace(worst, max_kl=losses)


def _differences(output: Tensor, stored: NDArray[Any], array: str) -> NDArray[np.float64]:
    """Largest difference of each row, relative to 1 + |x|."""
    if output.shape != stored.shape:
        raise TeacherOutputError(
            f"the teacher gives {array} of shape {tuple(output.shape)}",
            f"{stored.shape}, as stored",
            "give the teacher that the cache was made with",
        )
    wanted = stored.astype(np.float64)
    found = np.abs(output.double().cpu().numpy() - wanted) / (1 + np.abs(wanted))
    largest: NDArray[np.float64] = found.reshape(len(found), -1).max(axis=1)
    return largest
