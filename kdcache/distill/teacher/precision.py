"""What a narrower precision of the forward pass changes in a teacher's answers, measured before the dump."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.core.progress import log
from kdcache.core.rng import keyed_sample
from kdcache.data.batch import consecutive_batches
from kdcache.data.loader import batch_loader
from kdcache.data.views import Views
from kdcache.models.device import evaluation_mode
from kdcache.models.forward import ForwardPass
from kdcache.store.facts import TEMPERATURES, kl
from kdcache.store.records import FidelityRecord, PrecisionRecord

# Samples that are compared: at most a sixteenth of all, because each is computed twice.
_FEWEST, _MOST, _SHARE = 32, 256, 16


def measure_precision(network: ForwardPass, views: Views, batch_size: int) -> PrecisionRecord:
    """Compare logits under `network.amp` with those in float32, on 32 to 256 samples, and say what differs."""
    count = min(max(len(views) // _SHARE, _FEWEST), _MOST, len(views))
    indices = keyed_sample(len(views), count, 0, "precision")
    batches = consecutive_batches(indices, batch_size)
    requests = [request._replace(view=views.typical_view) for request in batches]
    found: dict[str, list[NDArray[np.float64]]] = {"off": [], network.amp: []}
    amp = network.amp
    with evaluation_mode(network.module):
        for batch in batch_loader(views, requests, preprocessor=network.preprocessor, device=network.device):
            for precision in found:
                network.amp = precision
                try:
                    found[precision].append(network(batch.inputs, batch.indices).double().cpu().numpy())
                finally:
                    network.amp = amp
    exact, narrow = (np.concatenate(found[name]) for name in ("off", amp))
    losses = {temperature: kl(exact, narrow, temperature) for temperature in TEMPERATURES}
    record = PrecisionRecord(
        samples=len(indices),
        changed_predictions=int((exact.argmax(axis=1) != narrow.argmax(axis=1)).sum()),
        fidelity=tuple(
            FidelityRecord(
                temperature=temperature,
                mean_kl=float(loss.mean()),
                p99_kl=float(np.percentile(loss, 99)),
                max_kl=float(loss.max()),
            )
            for temperature, loss in losses.items()
        ),
    )
    means = ", ".join(f"{each.mean_kl:.1e} at T = {each.temperature:g}" for each in record.fidelity)
    log(
        f"--amp {amp} against float32 on {record.samples} samples: mean KL {means} nats; top class changed for "
        f"{record.changed_predictions}"
    )
    return record
