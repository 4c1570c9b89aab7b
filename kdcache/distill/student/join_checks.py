"""Checks that a cache holds the samples and views of a student's dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import CacheMismatch
from kdcache.core.json_records import brief, differences
from kdcache.core.rng import keyed_sample
from kdcache.data.determinism import OWN_TRANSFORM, check_deterministic
from kdcache.data.raw_input import batch_crc32c
from kdcache.data.registry import fingerprint_labels
from kdcache.data.versions import package_versions
from kdcache.data.views import Views
from kdcache.store.cache import Cache

# Datasets whose name is a place: they are identified by their content.
_NAMED_BY_PLACE = ("folder:", "text-folder:", "csv:", "hf-dataset:", "py:")

_LABELS = {False: "one class", True: "several classes"}

# Location of a dataset, which may change.
_PLACES = frozenset({"data_root"})

# Number of inputs that are compared before the first step, where a dataset is not in memory.
SAMPLED_INPUTS = 64
INPUTS_AT_ONCE = 4096


def known_column(cache: Cache, name: str, view: int = 0) -> NDArray[np.int64]:
    """A column of integers, (samples, *row_shape), as int64; -1, which no row holds, where a partial cache has none."""
    values = np.full((len(cache), *cache.manifest.array(name).row_shape), -1, np.int64)
    samples = cache.samples(view)
    values[samples] = cache.reader.rows(name, view, samples)
    return values


def check_join(
    cache: Cache,
    views: Views,
    *,
    used: Sequence[int] = (0,),
    verify_inputs: str = "sample",
    samples: NDArray[np.int64] | None = None,
) -> None:
    """Refuse a cache whose rows are not of these views of this dataset.

    Args:
        used: the views that will be used, the first of which is looked at before the first step.
        verify_inputs: `off` compares what is recorded, and no inputs.
        samples: the samples that the dataset has, (n,); None for all.

    Raises:
        CacheMismatch: they differ in name, split, length, classes, labels, order, in the augmentation, or in the bytes
            of the inputs; the message shows both values.
    """
    check_recorded(cache, views)
    views.probe(samples)
    _check_recipe(cache, views)
    dataset = views.dataset
    labels = dataset.labels() if cache.complete else None
    if labels is not None and fingerprint_labels(labels) != cache.manifest.dataset.labels_sha256:
        raise label_mismatch(cache.place, np.arange(len(cache)), cache.column("labels"), labels)
    check_deterministic(dataset, samples)
    if verify_inputs != "off":
        _check_inputs(cache, views, used[0], samples)


def check_recorded(cache: Cache, views: Views) -> None:
    """Compare dataset and augmentation with the manifest, without reading an input.

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
        ("labels of", _LABELS[cache.manifest.multi_label], _LABELS[dataset.multi_label]),
        ("dtype of the shared input", record.input_dtype, dataset.input_dtype),
        ("shape of the shared input", record.input_shape, dataset.input_shape),
    ]
    for what, cached, given in facts:
        if cached != given:
            mismatch = _mismatch(cache, f"{what} {_show(cached, given)}", f"{what} {_show(given, cached)}")
            if record.input_dtype == "uint8" and dataset.input_dtype.startswith("float"):
                mismatch.remedy = (
                    "give images as the teacher's dataset did: by PILToTensor(), and not by ToTensor(); scaling and "
                    f"normalising are the student's own: {OWN_TRANSFORM}"
                )
            elif what.startswith("shape"):
                mismatch.remedy += f"; resizing and cropping are the student's own: {OWN_TRANSFORM}"
            raise mismatch
    _check_recipe(cache, views, ignore=frozenset({"input_shape"}))


def _check_recipe(cache: Cache, views: Views, *, ignore: frozenset[str] = frozenset()) -> None:
    if changes := differences(cache.manifest.recipe, views.recipe, ignore=ignore):
        raise CacheMismatch(
            f"{cache.place} was made with other views: "
            + "; ".join(f"{name} is {brief(old)} there and {brief(new)} here" for name, old, new in changes[:8]),
            "the augmentation that the teacher's answers were given for" + _versions_apart(cache),
            "make the transform what it was, or dump the teacher over these views",
        )


def inputs_all_checked(views: Views) -> bool:
    """Whether `check_join` compares every input, so that training need not."""
    return views.dataset.in_memory and views.recipe.is_plain(1)


def _check_inputs(cache: Cache, views: Views, view: int, samples: NDArray[np.int64] | None) -> None:
    """Compare checksums of inputs: of all where they are plain and in memory, else of a keyed sample."""
    if samples is not None:
        samples = np.unique(samples)
        samples = samples[keyed_sample(len(samples), SAMPLED_INPUTS, 0, "join")]
    else:
        samples = cache.samples(view)
        if not inputs_all_checked(views):
            samples = np.intersect1d(samples, keyed_sample(len(views), SAMPLED_INPUTS, 0, "join"))
    crcs, labels = known_column(cache, "input_crc32c", view), known_column(cache, "labels")
    for at in range(0, len(samples), INPUTS_AT_ONCE):
        indices = samples[at : at + INPUTS_AT_ONCE]
        shared = views.fetch(view, indices)
        if cache.complete and (labels[indices] != shared.labels.numpy()).any():
            raise label_mismatch(cache.place, indices, labels[indices], shared.labels.numpy())
        check_crcs(cache, view, indices, np.array(batch_crc32c(shared.inputs), np.int64), crcs)


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
                f"{first.place} and {other.place} are not of the same inputs: {name} is {brief(value)} in the first "
                f"and {brief(other_value)} in the second",
                "caches of several teachers over the same views of the same dataset",
                "dump both teachers with the same --dataset, --split, --augment, --mix and --view-seed",
            )
        for view in used:
            one_crcs, two_crcs = (known_column(cache, "input_crc32c", view) for cache in (first, other))
            both = np.intersect1d(first.samples(view), other.samples(view))
            if len(apart := both[one_crcs[both] != two_crcs[both]]):
                raise CacheMismatch(
                    f"{first.place} and {other.place} saw different inputs of sample {apart[0]} in view {view} "
                    f"({len(apart)} of {len(first)} differ)",
                    "caches of several teachers over the same views of the same dataset",
                    "dump both teachers with the same versions over the same data",
                )


def _mismatch(cache: Cache, cached: str, given: str) -> CacheMismatch:
    return CacheMismatch(
        f"{cache.place} is a cache of {cached}; the student's data has {given}",
        "the samples that the teacher answered for, in the same order",
        "point --data-root or --dataset at the teacher's data, or dump the teacher over this data",
    )


def label_mismatch(
    where: str, indices: NDArray[np.int64], cached: NDArray[np.int64], given: NDArray[np.int64]
) -> CacheMismatch:
    apart = (cached != given).reshape(len(cached), -1).any(axis=1)
    at = int(np.flatnonzero(apart)[0])
    reordered = len(cached) > 1 and np.array_equal(np.sort(cached, axis=0), np.sort(given, axis=0))
    there, here = (_shown_label(values[at]) for values in (cached, given))
    kind = "the same labels in another order" if reordered else "other labels"
    return CacheMismatch(
        f"the student's data has {kind}: sample {indices[at]} has label {here}, in {where} it has {there} "
        f"({int(apart.sum())} of {len(cached)} differ)",
        "the samples that the teacher answered for, in the same order",
        "give the dataset in the teacher's order and with its labels, or dump the teacher over this data",
    )


def _shown_label(label: Any) -> Any:
    return label if np.ndim(label) == 0 else np.flatnonzero(label).tolist()


def check_crcs(
    cache: Cache, view: int, indices: NDArray[np.int64], found: NDArray[np.int64], crcs_n: NDArray[np.int64]
) -> None:
    """Compare checksums of some samples' shared inputs with those in the cache.

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
        f"{why}; crc32c {crc:#010x} here, {crcs_n[sample]:#010x} in {cache.place}",
        "the samples that the teacher answered for, in the same order and untouched" + _versions_apart(cache),
        f"give the dataset as the teacher saw it (what the student needs beside, by {OWN_TRANSFORM}), or dump the "
        "teacher over this data",
    )


def _versions_apart(cache: Cache) -> str:
    """Differences between recorded and installed versions, for a message."""
    here = package_versions()
    apart = [
        f"{name} {version} there and {here[name]} here"
        for name, version in cache.manifest.versions.items()
        if name in here and here[name] != version
    ]
    return f" (versions that differ: {', '.join(apart)})" if apart else ""


def _show(value: Any, other: Any) -> str:
    """A value for a message; of two long tuples, the first difference."""
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) > 12:
        at = next(
            (i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other))
        )
        return f"of {len(value)} with {value[at] if at < len(value) else 'nothing'!r} at position {at}"
    return repr(value)
