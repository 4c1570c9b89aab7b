"""Size and loss of every encoding for one teacher and dataset, measured on a few samples before a dump."""

from __future__ import annotations

import contextlib

import numpy as np

from kdcache.core.errors import KdcacheError
from kdcache.core.rng import keyed_sample
from kdcache.data.batch import consecutive_batches
from kdcache.data.loader import batch_loader
from kdcache.distill.teacher.plan import EncodingEstimate, PreparedDump
from kdcache.distill.teacher.probe import find_head
from kdcache.distill.teacher.teacher_pass import HEAD_ERROR, Rows
from kdcache.models.feature_hooks import PENULTIMATE
from kdcache.store.encodings.base import LOGITS, Encoding
from kdcache.store.facts import kl, temperatures_of

SAMPLES = 64
CANDIDATES = (
    *("float32", "float16", "quantized:8", "quantized:6", "quantized:4", "head", "head:8"),
    *("topk:100", "topk:20", "topk:10", "topk:5"),
)


def compare_encodings(dump: PreparedDump) -> tuple[EncodingEstimate, ...]:
    """Encode the outputs for a few samples in every way that suits the teacher, largest first.

    The loss of an encoding is measured where each sample has one class.
    """
    if dump.teacher.head is None:
        with contextlib.suppress(KdcacheError):  # a teacher without a linear layer has no head
            dump.teacher.head = find_head(dump.teacher.network, dump.views)
    rows = _outputs(dump)
    estimates = []
    for spec in dict.fromkeys((*CANDIDATES, dump.encoding.spec)):
        with contextlib.suppress(KdcacheError):  # an encoding that cannot hold these logits is not offered
            estimates.append(_estimate(dump, _bound(dump, spec, rows), rows))
    return tuple(sorted(estimates, key=lambda each: -each.bytes_per_row))


def _outputs(dump: PreparedDump) -> Rows:
    network = dump.teacher.network
    indices = keyed_sample(len(dump.views), min(SAMPLES, len(dump.views)), 0, "encodings")
    requests = consecutive_batches(indices, min(dump.batch_size, SAMPLES))
    loader = batch_loader(dump.views, requests, preprocessor=network.preprocessor, device=network.device)
    with dump.teacher:
        parts = [rows for _, rows in dump.teacher.stream(loader)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _bound(dump: PreparedDump, spec: str, rows: Rows) -> Encoding:
    encoding = dump.encoding_named(spec)
    if encoding.source != PENULTIMATE:
        return encoding
    head = dump.teacher.head
    if head is None:
        raise KdcacheError("there is no linear layer", "one", "choose another encoding")
    head.check(rows[HEAD_ERROR], first_sample=0)
    return encoding.with_constants(head.constants)


def _estimate(dump: PreparedDump, encoding: Encoding, rows: Rows) -> EncodingEstimate:
    encoded = encoding.encode(rows[encoding.source], first_sample=0)
    losses = {
        f"{each:g}": float(kl(rows[LOGITS], encoding.decode(encoded, temperature=each), each).mean())
        for each in (temperatures_of(encoding) if dump.manifest.facts else ())
    }
    constants = sum(values.nbytes for values in encoding.constants().values())
    per_row = encoding.bytes_per_row()
    return EncodingEstimate(
        encoding=encoding.spec, bytes_per_row=per_row, bytes=per_row * dump.plan.rows + constants, mean_kl=losses
    )
