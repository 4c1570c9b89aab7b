"""The join of inputs and soft targets: by view and sample index, and refused where it would be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.feeds import Feed
from kdcache.cache.order import Schedule, always
from kdcache.cache.reader import Cache
from kdcache.consistency import check_deterministic
from kdcache.datasets import Batch, batch_crc32c, fingerprint_labels
from kdcache.devices import memory_errors
from kdcache.errors import CacheMismatch, UsageError
from kdcache.keys import key, keyed_sample
from kdcache.provenance import package_versions
from kdcache.records import brief, differences
from kdcache.views import Views

# Content sources: their name is a place, and their identity is what is read there.
_NAMED_BY_PLACE = ("folder:", "text-folder:", "py:")

# Where a dataset lies; it may move.
_PLACES = frozenset({"data_root"})

# Of a dataset that is not in memory, how many inputs are read before the first step.
SAMPLED_INPUTS = 64
INPUTS_AT_ONCE = 4096


class CachedTargets:
    """Soft targets of a batch, by view and sample index, from one cache or as the weighted mean of several.

    The mean is one of logits: the teachers' distributions are averaged geometrically (Hinton et al., 2015, section 1).

    Args:
        caches: that were checked to be of the views that batches come from, and of one another's.
        feeds: one of each cache's rows.
        weights: one a cache; only their proportions count. Empty for equal ones.
        features: feeds of the first cache's features, by array.
        negatives: how many rows of samples that are not in the batch come with it, by array of features.
        seed: that negatives are drawn from.
        schedule: the view of each epoch.
        device: that holds all rows of the epoch's view, where they are to be held there; None leaves that to the feeds.

    Raises:
        KdcacheError: the rows do not fit into the device's memory.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        feeds: Sequence[Feed],
        *,
        weights: Sequence[float] = (),
        features: Mapping[str, Feed] | None = None,
        negatives: Mapping[str, int] | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._caches, self._feeds, self._schedule, self._device = caches, feeds, schedule or always(0), device
        weights = weights or [1.0] * len(caches)
        self._shares = [weight / sum(weights) for weight in weights]
        self._labels_n = torch.from_numpy(_known(caches[0], "labels"))
        self._features, self._negatives, self._seed = features or {}, negatives or {}, seed
        self._epoch = self._step = 0
        self._view = -1
        self._crcs_n: NDArray[np.int64] | None = None
        self._held_nc: Tensor | None = None

    def start_epoch(self, epoch: int) -> None:
        view = self._schedule(epoch)
        self._epoch, self._step = epoch, 0
        for feed in [*(self._feeds if self._device is None else ()), *self._features.values()]:
            feed.start_epoch(epoch)
        if self._device is not None and view != self._view:
            self._held_nc = None  # before the next one comes, because two may not fit
            with memory_errors(len(self._labels_n), "leave out --cache-on-device"):
                rows = self._mean([cache.column("logits", view) for cache in self._caches])
                self._held_nc = torch.from_numpy(rows).to(self._device)
        if view != self._view:
            self._view, self._crcs_n = view, None

    def __call__(self, batch: Batch) -> Batch:
        """A batch on the host, joined with the teachers' logits, (batch, classes); of one teacher in the stored dtype.

        Raises:
            CacheMismatch: a label or an input of the batch is not the one that the teacher had.
            CacheDamaged: a chunk fails its checksum.
        """
        where = self._caches[0].path
        cached = self._labels_n[batch.indices]
        if not torch.equal(cached, batch.labels):
            raise _label_mismatch(where, batch.indices.numpy(), cached.numpy(), batch.labels.numpy())
        if batch.input_crc32c is not None:
            if self._crcs_n is None:
                self._crcs_n = _known(self._caches[0], "input_crc32c", self._view)
            check_crcs(self._caches[0], self._view, batch.indices.numpy(), batch.input_crc32c.numpy(), self._crcs_n)
        wanted = batch.indices.numpy()
        if self._features:
            features = {name: torch.from_numpy(feed.rows(wanted)) for name, feed in self._features.items()}
            batch = batch._replace(features=features, negatives=self._draw_negatives(wanted))
        if self._held_nc is not None:
            indices = batch.indices.to(self._held_nc.device, non_blocking=True)
            return batch._replace(soft_targets=self._held_nc.index_select(0, indices))
        rows = self._mean([feed.rows(wanted) for feed in self._feeds])
        return batch._replace(soft_targets=torch.from_numpy(rows))

    def _draw_negatives(self, wanted: NDArray[np.int64]) -> dict[str, Tensor] | None:
        """Features of samples drawn from the whole cache, without those of the batch."""
        if not self._negatives:
            return None
        count, samples = max(self._negatives.values()), len(self._labels_n)
        raw = np.random.Philox(key=key(self._seed, "negatives", self._epoch, self._step)).random_raw(2 * count)
        self._step += 1
        drawn = (raw % np.uint64(samples)).astype(np.int64)
        others = drawn[~np.isin(drawn, wanted)][:count]
        if not len(others):
            raise UsageError(
                f"a batch of {len(wanted)} leaves no other sample among {samples} to be told from",
                "negatives that are not in the batch",
                "use a smaller --batch-size",
            )
        return {
            name: torch.from_numpy(self._features[name].rows(others[:wished]))
            for name, wished in self._negatives.items()
        }

    def _mean(self, rows: list[NDArray[Any]]) -> NDArray[Any]:
        if len(rows) == 1:
            return rows[0]
        precise = np.result_type(np.float32, *(each.dtype for each in rows))
        mean = np.zeros(rows[0].shape, precise)
        for share, each in zip(self._shares, rows, strict=True):
            mean += share * each.astype(precise)
        return mean


def _known(cache: Cache, name: str, view: int = 0) -> NDArray[np.int64]:
    """A column of integers, (samples,), as int64; -1, which no row holds, where a partial cache has none."""
    values = np.full(len(cache), -1, np.int64)
    samples = cache.samples(view)
    values[samples] = cache.reader.rows(name, view, samples)
    return values


def check_join(cache: Cache, views: Views, *, used: Sequence[int] = (0,), verify_inputs: str = "sample") -> None:
    """Refuse a cache whose rows are not the teacher's answers to these views of this dataset.

    Args:
        used: the views that will be used, the first of which is looked at before the first step.
        verify_inputs: `off` compares what is recorded, and no inputs.

    Raises:
        CacheMismatch: they differ in name, split, length, classes, labels, order, in the augmentation, or in the bytes
            of the inputs; the message shows both values.
    """
    check_recorded(cache, views)
    views.probe()
    _check_recipe(cache, views)
    dataset = views.dataset
    labels = dataset.labels() if cache.complete else None
    if labels is not None and fingerprint_labels(labels) != cache.manifest.dataset.labels_sha256:
        raise _label_mismatch(cache.path, np.arange(len(cache)), cache.column("labels"), labels)
    check_deterministic(dataset)
    if verify_inputs != "off":
        _check_inputs(cache, views, used[0])


def check_recorded(cache: Cache, views: Views) -> None:
    """Compare what the manifest records of dataset and augmentation, without looking at one input.

    Raises:
        CacheMismatch: something differs; the message shows both values.
    """
    record, dataset = cache.manifest.dataset, views.dataset
    by_place = record.name.startswith(_NAMED_BY_PLACE) and dataset.name.startswith(_NAMED_BY_PLACE)
    facts: list[tuple[str, Any, Any]] = [
        ("dataset", record.name, record.name if by_place else dataset.name),
        ("split", record.split, dataset.split),
        ("length", record.length, len(dataset)),
        ("class list", record.classes, dataset.classes),
        ("dtype of the shared input", record.input_dtype, dataset.input_dtype),
        ("shape of the shared input", record.input_shape, dataset.input_shape),
    ]
    for what, cached, given in facts:
        if cached != given:
            raise _mismatch(cache, f"{what} {_show(cached, given)}", f"{what} {_show(given, cached)}")
    _check_recipe(cache, views, ignore=frozenset({"input_shape"}))


def _check_recipe(cache: Cache, views: Views, *, ignore: frozenset[str] = frozenset()) -> None:
    if changes := differences(cache.manifest.recipe, views.recipe, ignore=ignore):
        raise CacheMismatch(
            f"{cache.path} was made with other views: "
            + "; ".join(f"{name} is {brief(old)} there and {brief(new)} here" for name, old, new in changes[:8]),
            "the augmentation that the teacher's answers were given for" + _versions_apart(cache),
            "make the transform what it was, or dump the teacher over these views",
        )


def inputs_all_checked(views: Views) -> bool:
    """Whether `check_join` compares every input that there is, so that none need be compared while training."""
    return views.dataset.in_memory and views.recipe.is_plain(1)


def _check_inputs(cache: Cache, views: Views, view: int) -> None:
    """Compare inputs with what the teacher saw: all that are in memory and plain, else a keyed sample."""
    samples = cache.samples(view)
    if not inputs_all_checked(views):
        samples = np.intersect1d(samples, keyed_sample(len(views), SAMPLED_INPUTS, 0, "join"))
    crcs = _known(cache, "input_crc32c", view)
    for at in range(0, len(samples), INPUTS_AT_ONCE):
        indices = samples[at : at + INPUTS_AT_ONCE]
        found = np.array(batch_crc32c(views.fetch(view, indices).inputs), np.int64)
        check_crcs(cache, view, indices, found, crcs)


def check_ensemble(caches: Sequence[Cache], used: Sequence[int]) -> None:
    """Refuse caches that are not of the same views of the same samples.

    Raises:
        CacheMismatch: they differ; the message shows both values.
    """
    first = caches[0]
    for other in caches[1:]:
        one, two = first.manifest.dataset, other.manifest.dataset
        by_place = one.name.startswith(_NAMED_BY_PLACE) and two.name.startswith(_NAMED_BY_PLACE)
        ignore = _PLACES | ({"name"} if by_place else set())
        if None in (one.labels_sha256, two.labels_sha256):  # of a partial cache
            ignore |= {"labels_sha256"}
        changes = differences(one, two, ignore=ignore)
        changes += differences(first.manifest.recipe, other.manifest.recipe)
        if changes:
            name, value, other_value = changes[0]
            raise CacheMismatch(
                f"{first.path} and {other.path} are not of the same inputs: {name} is {brief(value)} in the first and "
                f"{brief(other_value)} in the second",
                "caches of several teachers over the same views of the same dataset",
                "dump both teachers with the same --dataset, --split, --augment, --mix and --view-seed",
            )
        for view in used:
            one_crcs, two_crcs = (_known(cache, "input_crc32c", view) for cache in (first, other))
            both = np.intersect1d(first.samples(view), other.samples(view))
            if len(apart := both[one_crcs[both] != two_crcs[both]]):
                raise CacheMismatch(
                    f"{first.path} and {other.path} saw different inputs of sample {apart[0]} in view {view} "
                    f"({len(apart)} of {len(first)} differ)",
                    "caches of several teachers over the same views of the same dataset",
                    "dump both teachers with the same versions over the same data",
                )


def _mismatch(cache: Cache, cached: str, given: str) -> CacheMismatch:
    return CacheMismatch(
        f"{cache.path} is a cache of {cached}; the student's data has {given}",
        "the samples that the teacher answered for, in the same order",
        "point --data-root or --dataset at the teacher's data, or dump the teacher over this data",
    )


def _label_mismatch(
    where: Path, indices: NDArray[np.int64], cached: NDArray[np.int64], given: NDArray[np.int64]
) -> CacheMismatch:
    at = int(np.flatnonzero(cached != given)[0])
    reordered = len(cached) > 1 and np.array_equal(np.sort(cached), np.sort(given))
    kind = "the same labels in another order" if reordered else "other labels"
    return CacheMismatch(
        f"the student's data has {kind}: sample {indices[at]} has label {given[at]}, in {where} it has {cached[at]} "
        f"({int((cached != given).sum())} of {len(cached)} differ)",
        "the samples that the teacher answered for, in the same order",
        "give the dataset in the teacher's order and with its labels, or dump the teacher over this data",
    )


def check_crcs(
    cache: Cache, view: int, indices: NDArray[np.int64], found: NDArray[np.int64], crcs_n: NDArray[np.int64]
) -> None:
    """Compare the checksums of some samples' shared inputs with those of what the teacher saw.

    Args:
        indices: of the samples, (n,).
        found: crc32c of their shared inputs, (n,).
        crcs_n: of all samples in the view, (samples,), as the cache has them.

    Raises:
        CacheMismatch: one differs; tells where the cache knows its pixels, if it does, and which versions differ.
    """
    wrong = np.flatnonzero(crcs_n[indices] != found)
    if not len(wrong):
        return
    sample, crc = int(indices[wrong[0]]), int(found[wrong[0]])
    elsewhere = np.flatnonzero(crcs_n == crc)
    if len(elsewhere):
        why = f"the samples are in another order: the pixels of sample {sample} are those of sample {elsewhere[0]}"
    else:
        why = f"the shared input of sample {sample} is not what the teacher saw (another preprocessing, or other data)"
    if not cache.manifest.recipe.is_plain(view):
        why += f", in view {view}"
    raise CacheMismatch(
        f"{why}; crc32c {crc:#010x} here, {crcs_n[sample]:#010x} in {cache.path}",
        "the samples that the teacher answered for, in the same order and untouched" + _versions_apart(cache),
        "give the dataset as the teacher saw it, or dump the teacher over this data",
    )


def _versions_apart(cache: Cache) -> str:
    """Where the versions recorded in a cache differ from those that are here, for a message."""
    here = package_versions()
    apart = [
        f"{name} {version} there and {here[name]} here"
        for name, version in cache.manifest.versions.items()
        if name in here and here[name] != version
    ]
    return f" (versions that differ: {', '.join(apart)})" if apart else ""


def _show(value: Any, other: Any) -> str:
    """A value for a message; of two long tuples, where they part."""
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) > 12:
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return f"of {len(value)} with {value[at] if at < len(value) else 'nothing'!r} at position {at}"
    return repr(value)
