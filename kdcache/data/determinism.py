"""Whether a dataset gives the same sample at every read, and says of it what its list of labels says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core import rng
from kdcache.core.errors import DatasetError
from kdcache.data.dataset import IndexedDataset
from kdcache.data.raw_input import batch_crc32c
from kdcache.data.views import Views, unreplayable

# Where a student's own preprocessing goes, which the dataset must leave undone.
OWN_TRANSFORM = "--size, --mean and --std, or kdcache.join(..., transform=...)"


def check_deterministic(dataset: IndexedDataset, samples: NDArray[np.int64] | None = None, count: int = 8) -> None:
    """Read some samples twice.

    Args:
        samples: Samples that there are, (n,); None for all.

    Raises:
        DatasetError: two reads of one differ.
    """
    indices = rng.keyed_sample(len(dataset) if samples is None else len(samples), count, 0, "determinism")
    if samples is not None:
        indices = samples[indices]
    (first, first_labels), (second, second_labels) = dataset.fetch(indices), dataset.fetch(indices)
    before, after = batch_crc32c(first), batch_crc32c(second)
    for at, index in enumerate(indices):
        same_labels = bool((first_labels[at] == second_labels[at]).all())
        if before[at] != after[at] or first[at].shape != second[at].shape or not same_labels:
            raise changing_sample(dataset, int(index))


def changing_sample(dataset: IndexedDataset, sample: int) -> DatasetError:
    """The error for a dataset whose sample is not the same at every read."""
    return DatasetError(
        f"two reads of sample {sample} of {dataset.name} differ: the dataset augments at random",
        "the plain sample: the student must see the pixels that the teacher saw",
        f"take the random transforms out of the dataset; a student has its own by {OWN_TRANSFORM}",
    )


def sampled_crc32c(views: Views, of: Sequence[int], count: int = 64) -> dict[int, dict[int, int]]:
    """crc32c of the shared inputs of a keyed sample, by view and index."""
    indices = rng.keyed_sample(len(views), count, 0, "fingerprint")
    return {
        view: dict(zip(indices.tolist(), batch_crc32c(shared.inputs), strict=True))
        for view, shared in zip(of, views.fetch_several(of, indices), strict=True)
    }


def check_rows(
    views: Views, view: int, rows: range, labels: NDArray[np.int64], crcs: NDArray[Any], sampled: dict[int, int]
) -> None:
    """Hold samples as they were dumped against the dataset's list of labels and against an earlier look.

    Args:
        rows: Sample indices.
        labels: Labels of the samples, (rows,).
        crcs: Checksums (crc32c) of their shared inputs, (rows,).
        sampled: Checksums by index from `sampled_crc32c`, which show occasional changes.

    Raises:
        DatasetError: a label or an input is another one.
    """
    dataset = views.dataset
    listed = dataset.labels()
    apart = None if listed is None else (listed[rows.start : rows.stop] != labels).reshape(len(labels), -1).any(axis=1)
    if listed is not None and apart is not None and len(wrong := np.flatnonzero(apart)):
        sample = rows[int(wrong[0])]
        raise DatasetError(
            f"sample {sample} of {dataset.name} has label {labels[wrong[0]]}",
            f"{listed[sample]}, as the dataset's own list of labels (targets) says",
            "make the list agree with the samples",
        )
    for sample, crc in sampled.items():
        if sample in rows and crcs[sample - rows.start] != crc:
            plain = views.recipe.is_plain(view)
            raise changing_sample(dataset, sample) if plain else unreplayable(views, view, sample)
