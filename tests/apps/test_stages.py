"""Where the time of a dump goes."""

from __future__ import annotations

import time

import pytest
import torch

from kdcache import DumpConfig, dump_teacher, open_cache
from kdcache.apps.stages import ADVICE, stage_lines, stage_seconds
from kdcache.data.dataset import WrappedDataset
from kdcache.data.preprocess import Preprocessor
from kdcache.data.views import Views
from kdcache.models.forward import ForwardPass
from kdcache.store.records import Preprocess, ViewRecipe
from tests.helpers import Network, synthetic


class SlowlyRead(WrappedDataset):
    def fetch(self, indices):
        time.sleep(0.02 * len(indices))
        return super().fetch(indices)


class SlowlyAnswered(Network):
    def forward(self, inputs):
        time.sleep(0.02 * len(inputs))
        return super().forward(inputs)


@pytest.mark.parametrize("slow", ["read", "forward"])
def test_the_slow_stage_is_named(tmp_path, slow):
    samples = synthetic(12, shape=(1, 4, 4))
    dataset = SlowlyRead(samples) if slow == "read" else samples
    teacher = SlowlyAnswered(16, 4) if slow == "forward" else Network(16, 4)
    config = DumpConfig(device="cpu", augment="crop-flip", views=2, batch_size=8)
    dump_teacher(teacher, dataset, out=tmp_path / "c.zarr", config=config)
    cache = open_cache(tmp_path / "c.zarr")
    network = ForwardPass(teacher, Preprocessor(Preprocess()), torch.device("cpu"), classes=4)
    found = stage_seconds(network, Views(dataset, ViewRecipe(augment="crop-flip")), cache, tmp_path)
    assert list(found) == ["read", "augment", "prepare", "forward", "encode", "write"] == list(ADVICE)
    assert max(found, key=found.get) == slow
    assert found[slow] >= 0.02
    assert all(seconds >= 0 for seconds in found.values())
    *_, last = stage_lines(found)
    assert last == f"most of it is {slow}: {ADVICE[slow]}"


def test_shares_add_up():
    lines = stage_lines(dict.fromkeys(ADVICE, 0.5) | {"forward": 2.5})
    assert [line.split()[-1] for line in lines[3:9]] == ["10.0%", "10.0%", "10.0%", "50.0%", "10.0%", "10.0%"]
