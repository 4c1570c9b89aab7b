"""How many processes should load samples."""

from __future__ import annotations

import time

import numpy as np
import torch

from kdcache.core.progress import log
from kdcache.core.system import core_count
from kdcache.data.loader import BatchRequest, Fetcher
from kdcache.data.preprocess import Preprocessor
from kdcache.data.views import Views
from kdcache.store.storage.object_store import has_done_io

# Loading that takes less time in one process is not worth the start of others.
WORTH_S = 5.0
# Beyond so many, the process that takes their batches is what is slow.
_MOST = 8
_MEASURED = 16


def auto_workers(views: Views, preprocessor: Preprocessor, samples: int, device: torch.device) -> int:
    """Worker processes for a pass over some samples; 0 where this process loads them all in a few seconds.

    On the CPU, where the network needs the cores too, half of them, and one for each core beside an accelerator.

    Args:
        samples: Samples of the pass, which may be those of several views.
    """
    # Workers would have to be started anew, with pickled datasets, which not all can be.
    if has_done_io() or not len(views):
        return 0
    count = min(_MEASURED, len(views))
    request = BatchRequest(np.arange(count), 0 if views.recipe.is_plain(1) else 1)
    fetcher = Fetcher(views, Preprocessor(preprocessor.record, preprocessor.tokenizer))
    fetcher.batch(request._replace(indices=request.indices[:1]))
    began = time.perf_counter()
    fetcher.batch(request)
    seconds = (time.perf_counter() - began) / count
    if seconds * samples < WORTH_S:
        return 0
    workers = min(core_count() if device.type != "cpu" else max(core_count() // 2, 1), _MOST)
    log(f"loading takes {seconds * 1e3:.1f} ms a sample: {workers} worker process{'es' if workers > 1 else ''}")
    return workers
