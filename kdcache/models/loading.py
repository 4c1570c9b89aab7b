"""How many processes should load samples."""

from __future__ import annotations

import time

import numpy as np

from kdcache.core.json_records import counted
from kdcache.core.progress import log
from kdcache.core.system import core_count
from kdcache.data.batch import BatchRequest
from kdcache.data.loader import Fetcher
from kdcache.data.preprocess import Preprocessor
from kdcache.data.views import Views
from kdcache.models.device import evaluation_mode, synchronize
from kdcache.models.forward import ForwardPass
from kdcache.store.storage.object_store import has_done_io

# Loading that takes less time in one process is not worth the start of others.
WORTH_S = 5.0
# Beyond so many, the process that takes their batches is what is slow.
_MOST = 8
_MEASURED = 16


def auto_workers(network: ForwardPass, views: Views, samples: int, *, passes: float = 1.0) -> int:
    """Worker processes for a pass over some samples: one for each core, or none.

    None where this process loads all samples in a few seconds. On the CPU also none where the network takes longer than
    loading, because both need the same cores: with two of them, workers made such a dump slower by a tenth.

    Args:
        network: On its device.
        samples: Samples of the pass, over all views.
        passes: What a sample costs, in forward passes; 3 for training.
    """
    # Workers would have to be started anew, with pickled datasets, which not all can be.
    if has_done_io() or not len(views):
        return 0
    count = min(_MEASURED, len(views))
    request = BatchRequest(np.arange(count), views.typical_view)
    fetcher = Fetcher(views, Preprocessor(network.preprocessor.record, network.preprocessor.tokenizer))
    fetcher.batch(request._replace(indices=request.indices[:1]))
    began = time.perf_counter()
    inputs = fetcher.batch(request).inputs
    loading = (time.perf_counter() - began) / count
    if loading * samples < WORTH_S:
        return 0
    workers, reason = min(core_count(), _MOST), ""
    if network.device.type == "cpu":
        with evaluation_mode(network.module):
            network.raw(inputs)
            began = time.perf_counter()
            network.raw(inputs)
            synchronize(network.device)
        computing = passes * (time.perf_counter() - began) / count
        reason = f", computing {computing * 1e3:.1f} ms"
        workers = workers if loading > computing else 0
    log(
        f"loading takes {loading * 1e3:.1f} ms a sample{reason}: "
        f"{counted(workers, 'worker process', 'worker processes')}"
    )
    return workers
