"""Samples that cannot be read: refused, or left out in both stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import kdcache
from kdcache import DumpConfig, dump_teacher, open_cache
from kdcache.core.errors import CacheMismatch, DatasetError, UnreadableSample
from kdcache.core.workers import Worker
from kdcache.data.map_dataset import as_indexed
from kdcache.data.readable import ReadableDataset, find_unreadable
from kdcache.data.registry import open_dataset
from kdcache.store.manifest import read_manifest
from kdcache.store.storage.registry import open_storage
from tests.helpers import Network, answer, changed, refused, synthetic, tree
from tests.helpers import kdcache as command

DAMAGED = (0, 7, 19)


@pytest.fixture
def images(tmp_path):
    """Folders of two classes, in each split the samples 0, 7 and 19 damaged, each in a way of its own."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(20):
            folder = tmp_path / "images" / split / ("a" if number < 10 else "b")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number:02}.png"
            Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
            if number in DAMAGED:
                content = path.read_bytes()
                path.write_bytes({0: b"", 7: content[: len(content) // 2], 19: b"no image"}[number])
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_they_are_found_by_reading_everything(images, workers):
    dataset = open_dataset(f"folder:{images}", split="train")
    assert find_unreadable(dataset, workers) == DAMAGED
    kept = ReadableDataset(dataset, DAMAGED)
    assert (len(kept), kept.excluded) == (17, DAMAGED)
    np.testing.assert_array_equal(kept.labels(), [0] * 8 + [1] * 9)
    (first, last), labels = kept.fetch([0, 16])
    (second, eighteenth), _ = dataset.fetch([1, 18])
    assert torch.equal(first, second)
    assert torch.equal(last, eighteenth)
    assert labels.tolist() == [0, 1]
    with pytest.raises(UnreadableSample):
        dataset.fetch([7])


def test_other_faults_are_not_passed_over():
    class Wrong:
        classes = ("a", "b")

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.zeros(3), 9 if index == 33 else 0

    with pytest.raises(DatasetError, match="label of sample 33"):
        find_unreadable(as_indexed(Wrong(), name="wrong", split="train"))


def test_nothing_is_left_of_none():
    class Broken:
        classes = ("a", "b")

        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise OSError("gone")

    with pytest.raises(UnreadableSample, match="gone"):
        as_indexed(Broken(), name="broken", split="train")
    assert find_unreadable(synthetic(20)) == ()


def test_both_stages_agree(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("--device", "cpu", "--batch-size", "8")
    readable = tmp_path / "readable"
    for path in sorted(images.rglob("*.png")):
        if int(path.stem) not in DAMAGED:
            (target := readable / path.relative_to(images)).parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    answer("train-teacher", "--dataset", "folder:readable", "--model", "mlp", "--epochs", "2", "--out", "t", *common)
    dump = ("dump-teacher", "--dataset", "folder:images", "--teacher", "mlp", "--checkpoint", "t/best.pt", *common)
    splits = ("--split", "train", "--split", "test", "--out", "c.zarr")
    assert "cannot be read as an image" in refused(DatasetError.exit_code, *dump, *splits)
    made = command(*dump, *splits, "--skip-unreadable")
    assert made.exit_code == 0, made.output
    assert "3 samples of 20 left out as unreadable" in made.stderr
    record = open_cache("c.zarr").manifest.dataset
    assert (record.length, record.excluded) == (17, DAMAGED)
    again = answer(*dump, *splits, "--skip-unreadable")
    assert again["splits"]["train"]["computed_rows"] == 0
    result = answer("train-student", "--cache", "c.zarr", "--student", "mlp", "--epochs", "1", "--out", "s", *common)
    assert result["test_accuracy"] is not None
    assert "test_agreement" in result
    verified = command("verify", "c.zarr", "--teacher", "mlp", "--checkpoint", "t/best.pt", "--device", "cpu")
    assert verified.exit_code == 0, verified.output
    assert "0, 7, 19" in command("inspect", "c.zarr").stdout
    (reported,) = answer("report", "s", "--out", "r.html", "--device", "cpu")["runs"]
    assert [reported["agreement"][split]["samples"] for split in ("test", "train")] == [17, 17]
    cache = open_cache("c.zarr")
    for data in (ImageFolder("images/train"), ImageFolder("readable/train")):
        joined = kdcache.join(data, cache)
        assert len(joined) == 17
        np.testing.assert_array_equal(joined[16][2], cache.rows([16])[0])
    with pytest.raises(CacheMismatch):
        kdcache.join(Subset(ImageFolder("images/train"), range(10)), cache)


def test_a_list_that_was_recorded_is_not_made_again(images, tmp_path, monkeypatch):
    """Later workers, and a dump that continues, leave out what the first worker did."""
    dataset = open_dataset(f"folder:{images}", split="train")
    config = DumpConfig(device="cpu", batch_size=4, shard_rows=4, skip_unreadable=True)

    def dump(out, worker=None):
        dump_teacher(Network(48, 2), dataset, out=out, config=config, worker=worker, steal=False)

    dump(tmp_path / "one.zarr")
    dump(tmp_path / "two.zarr", Worker(index=0, count=2))
    monkeypatch.setattr("kdcache.distill.teacher.request.find_unreadable", None)
    dump(tmp_path / "two.zarr", Worker(index=1, count=2))
    one, two = (read_manifest(open_storage(tmp_path / f"{name}.zarr"), "train") for name in ("one", "two"))
    assert one == two
    other = DumpConfig(device="cpu", batch_size=4, shard_rows=4)
    with pytest.raises(DatasetError, match="cannot be read as an image"):
        dump_teacher(Network(48, 2), dataset, out=tmp_path / "one.zarr", config=other)


def test_a_cache_without_damage_is_the_same_with_and_without(tmp_path):
    samples = changed(synthetic(30))
    for name, skip in (("with", True), ("without", False)):
        config = DumpConfig(device="cpu", skip_unreadable=skip)
        dump_teacher(Network(16, 4), samples, out=tmp_path / name, config=config)
    assert tree(tmp_path / "with") == tree(tmp_path / "without")
