"""Measurements of each shard, taken while the teacher's own logits are at hand: accuracy, and the encoding's loss.

They are kept in an array `facts`, (view, shard, column), float64, one chunk per shard, and summed up in the manifest
when the split is sealed. Nothing that a student reads depends on them, so the ledger does not cover them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from kdcache.store.encodings.base import Encoding
from kdcache.store.manifest import Manifest
from kdcache.store.records import FidelityRecord
from kdcache.store.shard_codec import CRC_BYTES
from kdcache.store.storage.base import MissingKey, Storage

NAME = "facts"
COUNTS = ("rows", "correct", "changed")
# Where an encoding can be decoded at any temperature.
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
# Rows whose KL is computed at once, so that no copy of a shard in float64 is held.
ROWS_AT_ONCE = 1024


def fact_names(encoding: Encoding) -> tuple[str, ...]:
    """Columns of the facts about rows of an encoding: counts, then the loss at each temperature in nats."""
    return (
        *COUNTS,
        *(f"{what}_kl_t{each:g}" for each in temperatures_of(encoding) for what in ("mean", "p99", "max")),
    )


def temperatures_of(encoding: Encoding) -> tuple[float, ...]:
    """Temperatures at which the loss of an encoding is measured."""
    return encoding.temperatures or TEMPERATURES


def measure_shard(
    encoding: Encoding, logits_nc: NDArray[Any], rows: Mapping[str, NDArray[Any]], labels_n: NDArray[Any]
) -> NDArray[np.float64]:
    """The facts about one shard, (columns,), as `fact_names` orders them.

    Args:
        logits_nc: The teacher's logits, (rows, classes).
        rows: The same logits as the encoding stores them, by array.
        labels_n: Labels, (rows,).
    """
    correct = changed = 0
    measured = temperatures_of(encoding)
    kl_tn = np.empty((len(measured), len(logits_nc)))
    for start in range(0, len(logits_nc), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        given, stored = logits_nc[part], {name: values[part] for name, values in rows.items()}
        decoded = encoding.decode(stored)
        predicted = decoded.argmax(axis=1)
        for at, temperature in enumerate(measured):
            if encoding.temperatures:
                decoded = encoding.decode(stored, temperature=temperature)
            kl_tn[at, part] = kl(given, decoded, temperature)
        correct += int((predicted == labels_n[part]).sum())
        changed += int((predicted != given.argmax(axis=1)).sum())
    losses = [(each.mean(), np.percentile(each, 99), each.max()) for each in kl_tn]
    return np.array([len(logits_nc), correct, changed, *np.ravel(losses)], np.float64)


def kl(teacher_nc: NDArray[Any], decoded_nc: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """KL(softmax(teacher / T) ‖ softmax(decoded / T)) of each row in nats, (rows,), float64."""
    if np.array_equal(teacher_nc, decoded_nc):
        return np.zeros(len(teacher_nc))
    p, q = _log_softmax(teacher_nc, temperature), _log_softmax(decoded_nc, temperature)
    # Rounding may leave a sum just below 0.
    losses: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
    return losses


def _log_softmax(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return scaled


def write_facts(storage: Storage, view: int, shard: int, facts: NDArray[np.float64]) -> None:
    """Store the facts about a shard, durably."""
    payload = facts.astype("<f8").tobytes()
    storage.write(facts_key(view, shard), payload + crc32c(payload).to_bytes(CRC_BYTES, "little"))


def read_facts(storage: Storage, manifest: Manifest, view: int, shard: int) -> NDArray[np.float64] | None:
    """The facts about a shard, (columns,); None where they are missing or damaged."""
    try:
        data = storage.read(facts_key(view, shard))
    except MissingKey:
        return None
    payload = data[:-CRC_BYTES]
    if len(payload) != 8 * len(manifest.facts) or crc32c(payload).to_bytes(CRC_BYTES, "little") != data[-CRC_BYTES:]:
        return None
    return np.frombuffer(payload, "<f8")


def all_facts(storage: Storage, manifest: Manifest, views: range) -> NDArray[np.float64] | None:
    """The facts about every shard of some views, (views, shards, columns); None where any are missing or damaged."""
    if not manifest.facts:
        return None
    found = [read_facts(storage, manifest, view, shard) for view in views for shard in range(manifest.shards)]
    if any(each is None for each in found):
        return None
    return np.array(found).reshape(len(views), manifest.shards, len(manifest.facts))


def fidelity_of(facts_vsx: NDArray[np.float64], encoding: Encoding) -> tuple[FidelityRecord, ...]:
    """The loss of an encoding over all shards, from facts (views, shards, columns)."""
    rows = facts_vsx[:, :, 0]
    records = []
    for at, temperature in enumerate(temperatures_of(encoding)):
        mean, p99, largest = np.moveaxis(facts_vsx[:, :, len(COUNTS) + 3 * at : len(COUNTS) + 3 * at + 3], 2, 0)
        records.append(
            FidelityRecord(
                temperature=temperature,
                mean_kl=float((mean * rows).sum() / rows.sum()),
                p99_kl=float(p99.max()),
                max_kl=float(largest.max()),
            )
        )
    return tuple(records)


def zarr_facts_options(manifest: Manifest) -> dict[str, Any]:
    """Arguments of `zarr.Group.create_array` for the facts."""
    from zarr.codecs import Crc32cCodec

    return {
        "name": NAME,
        "shape": (manifest.views, manifest.shards, len(manifest.facts)),
        "dtype": "float64",
        "chunks": (1, 1, len(manifest.facts)),
        "compressors": [Crc32cCodec()],
        "fill_value": np.nan,
        "dimension_names": ["view", "shard", "fact"],
    }


def facts_key(view: int, shard: int) -> str:
    """Key of the facts about a shard, below its split."""
    return f"{NAME}/c/{view}/{shard}/0"
