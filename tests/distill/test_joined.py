"""Loops that are not ours: a dataset joined with its cache behind any DataLoader."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.transforms import v2

import kdcache
from kdcache import DumpConfig, dump_teacher
from kdcache.core.errors import CacheMismatch, DatasetError, KdcacheError, UsageError
from kdcache.data.map_dataset import as_indexed
from kdcache.data.registry import open_dataset
from kdcache.store.records import Preprocess
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
    assert "kdcache.join(..., transform=...)" in caught.value.remedy


class Varied(Items):
    """Augments by itself, at random."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return torch.randint(0, 256, image.shape, dtype=torch.uint8), label


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda inputs: Items(changed(SAMPLES, inputs=inputs.float() / 255 - 0.5)), CacheMismatch),
        (lambda inputs: Items(changed(SAMPLES, inputs=inputs.repeat(1, 1, 2, 2))), CacheMismatch),
        (lambda inputs: Items(changed(SAMPLES, inputs=255 - inputs)), CacheMismatch),
        (lambda inputs: Varied(SAMPLES), DatasetError),
    ],
    ids=["normalises", "resizes", "inverts", "augments"],
)
def test_a_dataset_that_does_the_students_part_is_shown_where_that_goes(path, make, error):
    with pytest.raises(error) as caught:
        kdcache.join(make(tensors(SAMPLES)[0]), kdcache.open_cache(path))
    assert "kdcache.join(..., transform=...)" in caught.value.remedy


@dataclass
class Prepare:
    """Resizes and normalises a picture, and fails where told to."""

    fails_on: int = -1

    def __call__(self, picture):
        image = v2.functional.to_image(picture)
        if int(image[0, 0, 0]) == self.fails_on:
            raise KeyError("the reason")
        return v2.functional.resize(image, [8, 8], antialias=True).float() / 255 - 0.5


class Pictures:
    """Pictures of several sizes, as folders have them; the first pixel is the sample's index."""

    classes = ("a", "b")

    def __len__(self):
        return 24

    def __getitem__(self, index):
        pixels = np.full((10 + index % 3, 12, 3), 7 * index, np.uint8)
        pixels[0, 0, 0] = index
        return Image.fromarray(pixels), index % 2


class Brightness(nn.Module):
    """Two logits of any picture."""

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A cache of three views of pictures that differ in size."""
    path = tmp_path_factory.mktemp("varied") / "cache.zarr"
    config = DumpConfig(device="cpu", batch_size=8, views=3, augment="resized-crop-flip:10", encoding="float32")
    dump_teacher(Brightness(), as_indexed(Pictures(), name="pictures", split="train"), out=path, config=config)
    return path


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_a_transform_is_applied_to_the_view_of_the_epoch_in_every_kind_of_worker(varied, workers, context):
    cache = kdcache.open_cache(varied)
    joined = kdcache.join(Pictures(), cache, transform=Prepare())
    loader = DataLoader(
        joined, batch_size=5, num_workers=workers, multiprocessing_context=context, persistent_workers=workers > 0
    )
    shared = kdcache.join(Pictures(), cache)
    for epoch in (0, 2, 4):
        joined.set_epoch(epoch)
        shared.set_epoch(epoch)
        batches = list(loader)
        images, labels, logits = (torch.cat([batch[part] for batch in batches]) for part in range(3))
        assert torch.equal(images, torch.stack([Prepare()(image) for image, _, _ in shared]))
        assert labels.tolist() == [0, 1] * 12
        np.testing.assert_array_equal(logits.numpy(), cache.rows(np.arange(24), view=epoch % 3))


def test_pictures_of_several_sizes_are_batched_once_they_are_resized(tmp_path):
    dataset = as_indexed(Pictures(), name="pictures", split="train")
    preprocess = Preprocess(resize=6, crop=6)
    config = DumpConfig(device="cpu", batch_size=8)
    dump_teacher(Brightness(), dataset, out=tmp_path / "cache.zarr", config=config, preprocess=preprocess)
    joined = kdcache.join(Pictures(), kdcache.open_cache(tmp_path / "cache.zarr"), transform=Prepare())
    images, _, logits = next(iter(DataLoader(joined, batch_size=24)))
    assert images.shape == (24, 3, 8, 8)
    assert logits.shape == (24, 2)
    joined = kdcache.join(Pictures(), kdcache.open_cache(tmp_path / "cache.zarr"), transform=Prepare(fails_on=13))
    joined[12]
    with pytest.raises(DatasetError, match=r"fails on sample 13, .*: Prepare raises KeyError: 'the reason'") as caught:
        joined[13]
    assert caught.value.needed
    assert caught.value.remedy


# For the README: the whole loop of one's own.
LOOP = """
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import kdcache

prepare = v2.Compose([  # the student's own preprocessing; the dataset itself returns the pictures as they are
    v2.ToImage(),
    v2.Resize((64, 64), antialias=True),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
])
cache = kdcache.open_cache("runs/photos.zarr", split="train")
data = kdcache.join(ImageFolder("photos/train"), cache, transform=prepare)
loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=2)
student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, len(cache.classes)))
optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
for epoch in range(3):
    data.set_epoch(epoch)  # of a cache with several views: the one of this epoch
    for images, labels, teacher_logits in loader:
        loss = kdcache.losses.kd_with_labels(student(images), teacher_logits, labels, temperature=4, alpha=0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


@pytest.mark.parametrize("views", [{}, {"views": 2, "augment": "resized-crop-flip:32"}], ids=["plain", "views"])
def test_the_whole_loop_of_ones_own_runs(tmp_path, monkeypatch, views):
    for index in range(8):
        folder = tmp_path / "photos" / "train" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    dump_teacher(
        Brightness(),
        open_dataset("folder:photos", split="train"),
        out="runs/photos.zarr",
        config=DumpConfig(device="cpu", batch_size=4, **views),
        preprocess=Preprocess(resize=16, crop=16),
    )
    variables = {}
    exec(LOOP, variables)
    assert len(LOOP.strip().splitlines()) <= 26
    assert torch.isfinite(variables["loss"])
    assert variables["images"].shape == (8, 3, 64, 64)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_several_processes_read_one_store_at_once(path, expected, context):
    cache = kdcache.open_cache(path)
    orders = [np.random.default_rng(seed).permutation(150) for seed in range(6)]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(context)) as pool:
        for order, rows in zip(orders, pool.map(cache.rows, orders), strict=True):
            np.testing.assert_allclose(rows, expected[order], atol=1e-5)


# ---- items of every kind, and some of the samples


class Dicts:
    """Items as Hugging Face's datasets have them: dicts, with the number of the sample among them."""

    def __init__(self, order=None, labels=None):
        self.inputs, own = tensors(SAMPLES)
        self.labels = own if labels is None else labels
        self.order = np.arange(len(own)) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, position):
        at = int(self.order[position])
        return {"image": self.inputs[at], "label": int(self.labels[at]), "note": f"no. {at}", "idx": at}


class Tuples(Dicts):
    def __getitem__(self, position):
        item = super().__getitem__(position)
        return item["note"], item["image"], item["label"], item["idx"]


KEYS = {"input_key": "image", "label_key": "label"}
ORDER = np.random.default_rng(0).permutation(150)[:40]


def test_dicts_keep_what_they_hold_and_get_the_logits(path, expected):
    cache = kdcache.open_cache(path)
    joined = kdcache.join(Dicts(), cache, **KEYS, transform=lambda image: image / 255)
    item = joined[7]
    assert list(item) == ["image", "label", "note", "idx", "teacher_logits"]
    assert float(item["image"].max()) <= 1
    np.testing.assert_allclose(item["teacher_logits"], expected[7], atol=1e-5)
    tokens = kdcache.join(
        Dicts(), cache, **KEYS, transform=lambda image: {"input_ids": [1, 2], "attention_mask": [1, 1]}
    )
    assert list(tokens[3]) == ["label", "note", "idx", "input_ids", "attention_mask", "teacher_logits"]


def test_longer_tuples_name_their_positions(path, expected):
    joined = kdcache.join(
        Tuples(), kdcache.open_cache(path), input_key=1, label_key=2, transform=lambda image: image + 0.5
    )
    note, image, label, number, logits = joined[9]
    assert (note, number, label) == ("no. 9", 9, int(SAMPLES.labels()[9]))
    assert image.dtype == torch.float32
    np.testing.assert_allclose(logits, expected[9], atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda items: (Subset(items, ORDER.tolist()), {}),
        lambda items: (Subset(Subset(items, ORDER[::-1].tolist()), range(39, -1, -1)), {}),
        lambda items: (ConcatDataset([Subset(items, ORDER[:15].tolist()), Subset(items, ORDER[15:].tolist())]), {}),
        lambda items: ([items[int(at)] for at in ORDER], {"indices": ORDER}),
        lambda items: (Dicts(ORDER), {**KEYS, "indices": ORDER}),
        lambda items: (Dicts(ORDER), {**KEYS, "index_key": "idx"}),
        lambda items: (Tuples(ORDER), {"input_key": 1, "label_key": 2, "index_key": 3}),
    ],
)
def test_some_samples_in_any_order_meet_their_own_rows(path, expected, make):
    dataset, options = make(Items(SAMPLES))
    joined = kdcache.join(dataset, kdcache.open_cache(path), **options)
    assert len(joined) == 40
    items = joined.__getitems__([5, 0, 39])
    for item, sample in zip(items, ORDER[[5, 0, 39]], strict=True):
        logits = item["teacher_logits"] if isinstance(item, dict) else item[-1]
        np.testing.assert_allclose(logits, expected[sample], atol=1e-5)
    wrong = {**options, "indices": ORDER[::-1].copy()}
    wrong.pop("index_key", None)
    with pytest.raises(CacheMismatch):
        kdcache.join(dataset, kdcache.open_cache(path), **wrong)


def test_a_subset_has_the_views_of_its_samples(tmp_path):
    config = DumpConfig(device="cpu", batch_size=32, views=3, augment="affine", encoding="float32")
    dump_teacher(Network(16, 4), SAMPLES, out=tmp_path / "c.zarr", config=config)
    cache = kdcache.open_cache(tmp_path / "c.zarr")
    whole, some = kdcache.join(Items(SAMPLES), cache), kdcache.join(Subset(Items(SAMPLES), ORDER.tolist()), cache)
    named = kdcache.join(Dicts(ORDER), cache, **KEYS, indices=ORDER)
    for each in (whole, some, named):
        each.set_epoch(2)
    for at, sample in enumerate(ORDER[:10]):
        for one, other in zip(whole[int(sample)], some[at], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        assert torch.equal(named[at]["image"], some[at][0])
        assert list(named[at]) == ["image", "label", "teacher_logits"]
    with pytest.raises(UsageError, match="augmented views"):
        kdcache.join(Dicts(), cache, **KEYS, index_key="idx")
    with pytest.raises(UsageError, match="augmented views"):
        kdcache.join(Items(SAMPLES), cache, verify_inputs="labels")


def test_a_dataset_that_augments_by_itself_is_held_against_its_labels(path, expected):
    class Augmented(Items):
        def __getitem__(self, index):
            _, label = super().__getitem__(index)
            return torch.rand(3, 5, 5), label

    cache = kdcache.open_cache(path)
    with pytest.raises(KdcacheError):
        kdcache.join(Augmented(SAMPLES), cache)
    image, _, logits = kdcache.join(Augmented(SAMPLES), cache, verify_inputs="labels")[11]
    assert image.shape == (3, 5, 5)
    np.testing.assert_allclose(logits, expected[11], atol=1e-5)
    shifted = changed(SAMPLES, labels=np.roll(SAMPLES.labels(), 1))
    joined = kdcache.join(Augmented(shifted), cache, verify_inputs="labels")
    with pytest.raises(CacheMismatch, match="has label"):
        joined.__getitems__(list(range(20)))
    assert len(kdcache.join(Augmented(shifted), cache, verify_inputs="off").__getitems__(list(range(20)))) == 20


@pytest.mark.parametrize(
    ("dataset", "options", "error", "words"),
    [
        (Dicts(), {}, DatasetError, "keys image, label, note, idx"),
        (Dicts(), {**KEYS, "input_key": "picture"}, DatasetError, "input_key is 'picture'"),
        (Dicts(), {**KEYS, "index_key": "note"}, DatasetError, "the index in item"),
        (Tuples(), {}, DatasetError, "tuple of 4"),
        (Tuples(), {"input_key": 1, "label_key": 9}, DatasetError, "label_key is 9"),
        (Items(SAMPLES), {"input_key": "image", "label_key": "label"}, DatasetError, "position"),
        (Dicts(ORDER), KEYS, CacheMismatch, "40 samples and the cache 150"),
        (Dicts(ORDER), {**KEYS, "indices": ORDER[:3]}, CacheMismatch, r"\(3,\)"),
        (Dicts(ORDER), {**KEYS, "indices": ORDER + 120}, CacheMismatch, "numbers from 0 to 149"),
        (Dicts(ORDER), {**KEYS, "indices": ORDER, "index_key": "idx"}, UsageError, "both"),
        (Dicts(labels=np.zeros(150, int)), KEYS, CacheMismatch, "label"),
        (Items(SAMPLES), {"verify_inputs": "some"}, UsageError, "one of sample, labels, off"),
    ],
)
def test_what_does_not_fit_is_refused(path, dataset, options, error, words):
    with pytest.raises(error, match=words):
        kdcache.join(dataset, kdcache.open_cache(path), **options)
