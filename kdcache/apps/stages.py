"""Where the time of a dump goes: each stage alone, over the same samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.core.atomic_files import write_durable
from kdcache.core.text_table import text_table
from kdcache.data.batch import consecutive_batches
from kdcache.data.loader import Fetcher
from kdcache.data.preprocess import Preprocessor
from kdcache.data.views import Views
from kdcache.models.device import evaluation_mode, synchronize
from kdcache.models.forward import ForwardPass
from kdcache.store.cache import Cache
from kdcache.store.encodings.base import LOGITS
from kdcache.store.shard_codec import encode_shard

READ, AUGMENT, PREPARE, FORWARD, ENCODE, WRITE = "read", "augment", "prepare", "forward", "encode", "write"
SAMPLES = 128
_ROUNDS = 3

# What helps most where a stage takes most of the time.
ADVICE = {
    READ: "start --workers that read samples; several views of a sample are read once, and --input-memory keeps what a "
    "student has read",
    AUGMENT: "start --workers that augment samples",
    PREPARE: "start --workers that resize samples",
    FORWARD: "leave --batch-size and --memory-format on auto; try --amp bf16 or --compile, or a GPU",
    ENCODE: "take another --encoding: float16 is the fastest",
    WRITE: "take --compression none, or a faster disk for --out",
}


def stage_seconds(network: ForwardPass, views: Views, cache: Cache, folder: Path) -> dict[str, float]:
    """Seconds per sample of each stage of a dump, the shortest of three rounds.

    Args:
        network: The teacher's, as the dump ran it.
        views: Views that it answered for; view 1 is looked at where there are several.
        cache: What the dump wrote.
        folder: On the disk that is to be measured.
    """
    indices = np.arange(min(SAMPLES, len(views)))
    view = views.typical_view
    batch_size, manifest = cache.manifest.batch_size, cache.manifest
    fetcher = Fetcher(views, Preprocessor(network.preprocessor.record, network.preprocessor.tokenizer))
    # As many rows as a shard has: writing a few would mostly measure the flush to disk.
    shard = min(manifest.shard_rows, len(views))
    requests = [request._replace(view=view) for request in consecutive_batches(indices, batch_size)]
    inputs = [fetcher.batch(request).inputs for request in requests]

    def forward() -> Any:
        answers = [network(each) for each in inputs]
        synchronize(network.device)
        return torch.cat(answers).float().cpu().numpy()

    def write() -> None:
        for name, values in rows.items():
            filled = np.resize(values, (shard, *values.shape[1:]))
            write_durable(folder / "rows", encode_shard(manifest, manifest.array(name), filled)[0])

    with evaluation_mode(network.module):
        answers = forward()
        rows = cache.encoding.encode(answers, first_sample=0) if cache.encoding.source == LOGITS else {}
        stages: dict[str, Callable[[], object]] = {
            READ: lambda: [views.dataset.fetch(request.indices) for request in requests],
            AUGMENT: lambda: [views.fetch(view, request.indices) for request in requests],
            PREPARE: lambda: [fetcher.batch(request) for request in requests],
            FORWARD: forward,
            ENCODE: lambda: cache.encoding.encode(answers, first_sample=0) if rows else None,
            WRITE: write,
        }
        found = {name: min(_timed(work) for _ in range(_ROUNDS)) / len(indices) for name, work in stages.items()}
    found[WRITE] *= len(indices) / shard
    # Each of these includes the one before it.
    prepare, augment, read = found[PREPARE], found[AUGMENT], found[READ]
    return found | {PREPARE: max(prepare - augment, 0.0), AUGMENT: max(augment - read, 0.0)}


def stage_lines(seconds: dict[str, float]) -> list[str]:
    """A table of the stages with their shares, and what would help most."""
    total = sum(seconds.values())
    rows = [[name, f"{each * 1e3:.3f}", f"{each / total:.1%}"] for name, each in seconds.items()]
    largest = max(seconds, key=lambda name: seconds[name])
    return [
        "a dump by its stages, each measured alone and on one process:",
        *text_table(["stage", "ms a sample", "share"], rows, numbers=["ms a sample", "share"]),
        f"most of it is {largest}: {ADVICE[largest]}",
    ]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
