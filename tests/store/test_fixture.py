"""A cache written by the first version opens, with every value, in every later one."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from kdcache.store.cache import cache_splits, open_cache
from kdcache.store.storage.local import LocalStorage
from kdcache.store.verify import verify_split
from tests.helpers import synthetic
from tests.make_fixture import FIXTURE


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_cache_of_schema_1_opens(split):
    assert cache_splits(FIXTURE) == ["test", "train"]
    cache = open_cache(FIXTURE, split)
    inputs, labels = synthetic(21, classes=3, split=split, seed=len(split)).fetch(np.arange(21))
    expected = inputs.double().mean(dim=(1, 2, 3)).numpy()[:, None] / 255 + np.arange(3)
    np.testing.assert_allclose(cache.column("logits"), expected, atol=1e-3)
    np.testing.assert_array_equal(cache.column("labels"), labels)
    np.testing.assert_array_equal(cache.rows([20, 3, 3]), cache.column("logits")[[20, 3, 3]])
    np.testing.assert_array_equal(zarr.open_group(FIXTURE, mode="r")[split]["logits"][0], cache.column("logits"))
    assert cache.manifest.teacher.accuracy == (expected.argmax(axis=1) == labels.numpy()).mean()
    assert cache.classes == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_cache_of_schema_1_verifies(split):
    report = verify_split(LocalStorage(FIXTURE), split)
    assert (report.problems, report.notes, report.shards) == ([], [], 3)
