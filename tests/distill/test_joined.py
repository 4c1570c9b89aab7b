"""Loops that are not ours: a dataset joined with its cache behind any DataLoader."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from torch.utils.data import DataLoader

import kdcache
from kdcache import DumpConfig, dump_teacher
from kdcache.core.errors import CacheMismatch
from tests.helpers import Items, Network, changed, plain_forward, synthetic, tensors

SAMPLES = synthetic(150)


@pytest.fixture(scope="module")
def expected():
    return plain_forward(Network(16, 4), tensors(SAMPLES)[0], batch=32)


@pytest.fixture(scope="module", params=["none", "zstd:5"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("joined") / "cache.zarr"
    config = DumpConfig(device="cpu", batch_size=32, shard_rows=32, encoding="float32", compression=request.param)
    dump_teacher(Network(16, 4), SAMPLES, out=path, config=config)
    return path


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
def test_each_item_meets_its_own_row_in_every_kind_of_worker(path, expected, workers, context):
    joined = kdcache.join(Items(SAMPLES), kdcache.open_cache(path))
    joined[0]  # opened here first, as by someone who looks before they train: workers must not share what is open
    loader = DataLoader(
        joined,
        batch_size=16,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=False,
    )
    inputs, labels = tensors(SAMPLES)
    for _ in range(1 if context == "spawn" else 2):  # each spawned epoch imports torch anew
        seen = []
        for images, answers, logits in loader:
            at = [int((inputs == image).flatten(1).all(1).nonzero()[0]) for image in images]
            np.testing.assert_array_equal(answers, labels[at])
            np.testing.assert_allclose(logits, expected[at], atol=1e-5)
            seen += at
        assert sorted(seen) == list(range(150))


def test_other_samples_are_refused(path):
    inputs, _ = tensors(SAMPLES)
    with pytest.raises(CacheMismatch, match="is not what the teacher saw"):
        kdcache.join(Items(changed(SAMPLES, inputs=inputs + 1)), kdcache.open_cache(path))
    with pytest.raises(CacheMismatch, match="dtype of the shared input 'float32'") as caught:
        kdcache.join(Items(changed(SAMPLES, inputs=inputs / 255)), kdcache.open_cache(path))
    assert "PILToTensor()" in caught.value.remedy


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_several_processes_read_one_store_at_once(path, expected, context):
    cache = kdcache.open_cache(path)
    orders = [np.random.default_rng(seed).permutation(150) for seed in range(6)]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(context)) as pool:
        for order, rows in zip(orders, pool.map(cache.rows, orders), strict=True):
            np.testing.assert_allclose(rows, expected[order], atol=1e-5)
