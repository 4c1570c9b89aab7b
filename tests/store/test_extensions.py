"""An encoding and a storage of somebody else's: each is one class and one line in a registry, and everything works."""

import numpy as np
import pytest
from torch import nn

from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.core.errors import CacheDamaged, CacheIncomplete
from kdcache.store.encodings import registry as encodings
from kdcache.store.encodings.base import Encoding, StoredArray
from kdcache.store.storage.base import KeyExists, MissingKey, Storage, WrongSize
from kdcache.store.verify import verify_split
from tests.helpers import Interrupted, Network, synthetic

SAMPLES = synthetic(60)
PROBED = 6  # a batch of two, twice, and one of two with another neighbour


class NegatedFloat32(Encoding):
    """Logits with their sign changed, in an array of another name beside a count of the positive ones."""

    spec = "negated"
    feature_dtype = "float32"

    def __init__(self, classes):
        self.classes = classes

    def arrays(self):
        return (
            StoredArray(name="logits", dtype="float32", row_shape=(self.classes,), row_names=("class",)),
            StoredArray(name="positive", dtype="int32"),
        )

    def encode(self, values_nx, *, first_sample):
        return {"logits": -values_nx.astype(np.float32), "positive": (values_nx > 0).sum(axis=1).astype(np.int32)}

    def decode(self, rows, *, temperature=None):
        return -rows["logits"]


class DictStorage(Storage):
    """Objects in a dictionary."""

    def __init__(self, url="memory"):
        self.url, self.stored = url, {}

    def read(self, key):
        if key not in self.stored:
            raise MissingKey(key)
        return self.stored[key]

    def read_range(self, key, start, *outs, size):
        data = self.read(key)
        if len(data) != size:
            raise WrongSize(f"has {len(data)} bytes, the ledger says {size}")
        for out in outs:
            out.cast("B")[:] = data[start : start + out.nbytes]
            start += out.nbytes

    def write(self, key, data):
        self.stored[key] = bytes(data)

    def create(self, key, data):
        if key in self.stored:
            raise KeyExists(key)
        self.write(key, data)

    def delete(self, key):
        self.stored.pop(key, None)

    def objects(self, prefix=""):
        for key in sorted(self.stored):
            if key.startswith(f"{prefix}/" if prefix else ""):
                yield key, len(self.stored[key])

    def folders(self):
        return sorted({key.split("/")[0] for key in self.stored if "/" in key})


@pytest.fixture
def negated(monkeypatch):
    monkeypatch.setitem(encodings.KINDS, "negated", lambda argument, classes, temperatures: NegatedFloat32(classes))


def dump(out, *, stop_after=10**9, **options):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16, encoding=options.pop("encoding", "float32"))
    return dump_teacher(Network(16, 4, stop_after=stop_after), SAMPLES, out=out, config=config, **options)


def flip(storage, key):
    data = bytearray(storage.read(key))
    data[-40] ^= 1
    storage.write(key, bytes(data))


def test_every_stage_works_with_both(negated):
    plain, storage = DictStorage("memory/plain"), DictStorage("memory/negated")
    dump(plain)
    wanted = open_cache(plain).column("logits")
    with pytest.raises(Interrupted):
        dump(storage, encoding="negated", stop_after=PROBED + 40)
    with pytest.raises(CacheIncomplete):
        open_cache(storage)
    assert 0 < dump(storage, encoding="negated").computed_rows < 60
    cache = open_cache(storage)
    assert cache.manifest.encoding == "negated"
    assert np.array_equal(cache.column("logits"), wanted)
    assert np.array_equal(cache.column("positive"), (wanted > 0).sum(axis=1))
    assert np.array_equal(cache.rows([59, 0, 7, 7]), wanted[[59, 0, 7, 7]])
    assert verify_split(storage, "train").problems == []
    whole = dict(storage.stored)

    key = next(key for key, _ in storage.objects("train/positive/c"))
    flip(storage, key)
    (problem,) = verify_split(storage, "train").problems
    assert "positive" in problem
    assert "memory/negated/train" in problem
    with pytest.raises(CacheDamaged):
        open_cache(storage).column("positive")
    assert dump(storage, encoding="negated", repair=True).computed_rows == 16
    assert storage.stored == whole

    config = StudentConfig(device="cpu", epochs=2, batch_size=16, alpha=1.0)
    losses = [
        [epoch["loss"] for epoch in train_student(student(), SAMPLES, each, config=config).epochs]
        for each in (open_cache(plain), cache)
    ]
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]


def student():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    return network


def test_another_encoding_is_another_dump(negated):
    from kdcache.core.errors import TargetExists

    storage = DictStorage()
    dump(storage)
    with pytest.raises(TargetExists, match="encoding"):
        dump(storage, encoding="negated")
