import dataclasses
import errno
import os

import google_crc32c
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from kdcache import DumpConfig, dump_teacher, open_cache, plan_dump
from kdcache.core.errors import CacheIncomplete, DatasetError, StorageError, TargetExists, TeacherOutputError
from kdcache.data.dataset import ArrayDataset
from kdcache.store.cache import cache_splits
from kdcache.store.records import Preprocess
from tests.helpers import (
    Interrupted,
    Items,
    Network,
    columns,
    generator_states,
    plain_forward,
    synthetic,
    tensors,
    tree,
)

PROBED = 6  # a batch of two, twice, and one of two with another neighbour
CONFIG = DumpConfig(device="cpu", batch_size=8, shard_rows=16, encoding="float32")
TOLERANCE = {"float16": 2**-11, "float32": 1e-5}


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


class Echo(nn.Module):
    """The inputs are the logits."""

    def forward(self, inputs):
        return inputs


def logits_dataset(logits, classes=None):
    """A dataset that makes `Echo` answer with the given logits."""
    return ArrayDataset(
        torch.as_tensor(logits, dtype=torch.float32),
        np.zeros(len(logits), np.int64),
        name="echo",
        split="train",
        classes=tuple("abcdefgh"[: classes or np.shape(logits)[1]]),
    )


@pytest.mark.parametrize("encoding", ["float16", "float32", "float64"])
def test_what_is_stored_is_a_plain_forward_pass(tmp_path, encoding):
    dataset = synthetic(37, classes=130)
    inputs, labels = tensors(dataset)
    teacher = Network(16, 130, dtype=torch.float64 if encoding == "float64" else torch.float32)
    exact = encoding == "float64"
    mean, std = (0.0, 1.0) if exact else (0.3, 0.4)
    result = dump_teacher(
        teacher,
        dataset,
        out=tmp_path / "c.zarr",
        preprocess=None if exact else Preprocess(mean=(mean,), std=(std,)),
        config=config(encoding=encoding),
    )
    found = columns(tmp_path / "c.zarr")
    expected = plain_forward(teacher, inputs, mean=mean, std=std)
    assert found["logits"].dtype == encoding
    assert found["logits"].shape == (37, 130)
    if exact:
        # The same batches as the dump's, two of eight to a shard, so that not a bit differs.
        expected = plain_forward(teacher, inputs, batch=8)
        np.testing.assert_array_equal(found["logits"], expected)
    else:
        np.testing.assert_allclose(
            found["logits"].astype(np.float64), expected, rtol=TOLERANCE[encoding], atol=TOLERANCE[encoding] / 10
        )
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["input_crc32c"].tolist() == [google_crc32c.value(image.numpy().tobytes()) for image in inputs]
    assert (result.rows, result.computed_rows, result.manifest.shards) == (37, 37, 3)
    assert result.manifest.complete
    assert result.manifest.teacher.accuracy == pytest.approx((expected.argmax(1) == labels).mean(), abs=1e-12)


def test_the_manifest_says_what_was_dumped(tmp_path):
    dataset = synthetic(20)
    teacher = Network(16, 4)
    preprocess = Preprocess(mean=(0.1,), std=(0.2,))
    dump_teacher(
        teacher, dataset, out=tmp_path / "c", teacher_name="mine", preprocess=preprocess, config=config(seed=3)
    )
    manifest = open_cache(tmp_path / "c").manifest
    assert manifest.teacher.spec == "mine"
    assert manifest.teacher.preprocess == preprocess
    assert manifest.teacher.parameters == sum(p.numel() for p in teacher.parameters())
    record = manifest.dataset
    assert (record.name, record.split, record.length, record.classes) == ("synthetic", "train", 20, dataset.classes)
    assert (record.input_dtype, record.input_shape, manifest.seed) == ("uint8", (1, 4, 4), 3)
    assert set(manifest.versions) == {"torch", "torchvision", "numpy", "zarr", "pillow", "kdcache", "python", "cpu"}


@pytest.mark.parametrize("shards_before", [0, 1, 2])
def test_a_stopped_dump_continues_to_the_very_same_files(tmp_path, shards_before):
    dataset = synthetic(45)
    dump_teacher(Network(16, 4), dataset, out=tmp_path / "whole", config=CONFIG)
    # The rows that are tried first, the shards, and one batch of two of the shard that is lost.
    stopping = Network(16, 4, stop_after=PROBED + 16 * shards_before + 8)
    with pytest.raises(Interrupted):
        dump_teacher(stopping, dataset, out=tmp_path / "stopped", config=CONFIG)
    assert stopping.training
    with pytest.raises(CacheIncomplete, match=f"{shards_before} of 3 shards"):
        open_cache(tmp_path / "stopped")
    teacher = Network(16, 4)
    result = dump_teacher(teacher, dataset, out=tmp_path / "stopped", config=CONFIG)
    assert result.computed_rows == teacher.rows - PROBED == 45 - 16 * shards_before
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


def test_a_finished_dump_is_left_as_it_is(tmp_path):
    dataset = synthetic(37)
    first = dump_teacher(Network(16, 4), dataset, out=tmp_path / "c", config=CONFIG)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    teacher = Network(16, 4, stop_after=6)
    again = dump_teacher(teacher, dataset, out=tmp_path / "c", config=CONFIG)
    assert (again.computed_rows, again.rows, again.manifest) == (0, 37, first.manifest)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("teacher.weights_sha256", {"teacher": Network(16, 4, seed=1)}),
        ("teacher.preprocess.mean", {"preprocess": Preprocess(mean=(0.5,), std=(1.0,))}),
        ("teacher.spec", {"teacher_name": "another"}),
        ("arrays", {"config": config(encoding="float16")}),
        ("shard_rows", {"config": config(shard_rows=32)}),
        ("seed", {"config": config(seed=1)}),
        ("amp", {"config": config(amp="bf16")}),
        ("dataset.sample_sha256", {"dataset": synthetic(37, seed=1)}),
        ("dataset.length", {"dataset": synthetic(36)}),
    ],
)
def test_another_dump_onto_the_same_place_is_refused(tmp_path, finished, field, arguments):
    given = {"teacher": Network(16, 4), "dataset": synthetic(37), "config": CONFIG, "out": tmp_path / "c"}
    if finished:
        dump_teacher(**given)
    else:
        with pytest.raises(Interrupted):
            dump_teacher(**given | {"teacher": Network(16, 4, stop_after=20)})
    before = tree(tmp_path)
    with pytest.raises(TargetExists) as caught:
        dump_teacher(**given | arguments)
    assert field in caught.value.found
    assert " there and " in caught.value.found
    assert tree(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TargetExists, match="not a kdcache cache"):
        dump_teacher(Network(16, 4), synthetic(8), out=tmp_path, config=CONFIG)
    assert tree(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("sample", [0, 21])
@pytest.mark.parametrize(
    ("value", "encoding", "parts"),
    [
        (np.nan, "float32", ["is nan", "finite logits"]),
        (-np.inf, "float32", ["is -inf", "finite logits"]),
        (70000.0, "float16", ["70000", "65504", "--encoding float32"]),
    ],
)
def test_logits_that_must_not_be_stored(tmp_path, sample, value, encoding, parts):
    logits = np.zeros((37, 5), np.float32)
    logits[sample, 3] = value
    with pytest.raises(TeacherOutputError) as caught:
        dump_teacher(Echo(), logits_dataset(logits), out=tmp_path / "c", config=config(encoding=encoding))
    for part in [f"sample {sample}, class 3", *parts]:
        assert part in str(caught.value)
    # Sample 0 is seen before anything is written; sample 21 lies in the second shard.
    assert (tmp_path / "c").exists() == (sample > 0)
    if value == 70000.0:
        dump_teacher(Echo(), logits_dataset(logits), out=tmp_path / "d", config=config(encoding="float32"))
        np.testing.assert_array_equal(columns(tmp_path / "d")["logits"], logits)


class Augmenting(Items):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.randint(0, 9, image.shape, dtype=torch.uint8), label


class Stream(IterableDataset):
    classes = ("a", "b")

    def __iter__(self):
        yield torch.zeros(1, 4, 4, dtype=torch.uint8), 0


@pytest.mark.parametrize(
    ("dataset", "error", "parts"),
    [
        (logits_dataset(np.zeros((20, 5)), classes=4), TeacherOutputError, ["(2, 5)", "(2, 4)"]),
        (Stream(), DatasetError, ["read in order and not by index", "map-style"]),
        (Augmenting(synthetic(20)), DatasetError, ["two reads of sample", "augments at random"]),
    ],
)
def test_data_or_teachers_that_do_not_suit(tmp_path, dataset, error, parts):
    with pytest.raises(error) as caught:
        dump_teacher(Echo(), dataset, out=tmp_path / "c", config=CONFIG)
    for part in parts:
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def full_disk_at(monkeypatch, wanted):
    def refusing(act):
        def refuse(source, target):
            if wanted in str(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            act(source, target)

        return refuse

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize("wanted", ["logits/c/0/1/0", "labels/c/1", "ledger/unsealed/parts", "ledger/c"])
def test_a_full_disk_stops_the_dump_and_keeps_what_is_committed(tmp_path, monkeypatch, wanted):
    dataset = synthetic(100)
    dump_teacher(Network(16, 4), dataset, out=tmp_path / "whole", config=CONFIG)
    with monkeypatch.context() as patch:
        full_disk_at(patch, wanted)
        with pytest.raises(StorageError) as caught:
            dump_teacher(Network(16, 4), dataset, out=tmp_path / "c", config=CONFIG)
    assert wanted in caught.value.found
    assert "No space left" in caught.value.found
    assert "make room" in caught.value.remedy
    assert isinstance(caught.value.__cause__, OSError)
    result = dump_teacher(Network(16, 4), dataset, out=tmp_path / "c", config=CONFIG)
    expected = {"ledger/unsealed/parts": range(100, 101), "ledger/c": range(1)}
    assert result.computed_rows in expected.get(wanted, range(1, 100))
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")


def test_a_writer_that_fails_stops_a_long_dump_soon(tmp_path, monkeypatch):
    full_disk_at(monkeypatch, "logits/c/0/0")
    teacher = Network(16, 4)
    with pytest.raises(StorageError):
        dump_teacher(teacher, synthetic(1600), out=tmp_path / "c", config=CONFIG)
    assert teacher.rows < 160


def test_modes_and_global_generators_are_given_back(tmp_path):
    teacher = Network(16, 4)
    teacher.layers[2].eval()
    modes = [part.training for part in teacher.modules()]
    assert len(set(modes)) == 2
    buffers = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = generator_states()
    dump_teacher(teacher, synthetic(37), out=tmp_path / "c", config=CONFIG)
    assert generator_states() == before
    assert [part.training for part in teacher.modules()] == modes
    assert all(torch.equal(buffers[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("count", "classes", "shard_rows"), [(37, 130, 16), (4200, 4, 2048)])
def test_a_dry_run_writes_nothing_and_knows_the_bytes(tmp_path, count, classes, shard_rows):
    settings = config(encoding="float16", shard_rows=shard_rows, batch_size=512)
    arguments = {"dataset": synthetic(count, classes=classes), "out": tmp_path / "c", "config": settings}
    plan = plan_dump(Network(16, classes), **arguments)
    assert list(tmp_path.iterdir()) == []
    assert (plan.rows, plan.shards, plan.existing) == (count, 3, None)
    dump_teacher(Network(16, classes), **arguments)
    stored = sum(
        file.stat().st_size
        for name in ("logits", "labels", "input_crc32c", "facts")
        for file in (tmp_path / "c" / "train" / name / "c").rglob("*")
        if file.is_file()
    )
    assert plan.bytes == stored
    assert plan_dump(Network(16, classes), **arguments).existing.complete


def test_splits_lie_side_by_side(tmp_path):
    parts = {"train": synthetic(37), "test": synthetic(9, seed=1, split="test")}
    teacher = Network(16, 4)
    for split, dataset in parts.items():
        dump_teacher(teacher, dataset, out=tmp_path / "c", split=split, config=CONFIG)
    assert cache_splits(tmp_path / "c") == ["test", "train"]
    for split, dataset in parts.items():
        expected = plain_forward(teacher, tensors(dataset)[0])
        np.testing.assert_allclose(columns(tmp_path / "c", split)["logits"], expected, rtol=1e-5, atol=1e-6)


def test_workers_change_nothing(tmp_path):
    dataset = Items(synthetic(37))
    for workers in (0, 2):
        dump_teacher(Network(16, 4), dataset, out=tmp_path / str(workers), config=config(workers=workers))
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


def test_labels_that_only_the_samples_tell_are_recorded(tmp_path):
    plain = synthetic(37)
    known = dump_teacher(Network(16, 4), plain, out=tmp_path / "known", config=CONFIG)
    stopping = Network(16, 4, stop_after=6 + 16)
    with pytest.raises(Interrupted):
        dump_teacher(stopping, Items(plain), out=tmp_path / "items", config=CONFIG)
    items = dump_teacher(Network(16, 4), Items(plain), out=tmp_path / "items", config=CONFIG)
    assert items.manifest.dataset.labels_sha256 == known.manifest.dataset.labels_sha256
    assert items.manifest.teacher.accuracy == known.manifest.teacher.accuracy


def test_amp_is_close_to_full_precision(tmp_path):
    dataset, teacher = synthetic(37), Network(16, 4)
    dump_teacher(teacher, dataset, out=tmp_path / "c", config=config(amp="bf16"))
    found = columns(tmp_path / "c")["logits"]
    expected = plain_forward(teacher, tensors(dataset)[0])
    assert 0 < np.abs(found - expected).max() < 0.05
