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
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import kdcache
from kdcache import DumpConfig, dump_teacher
from kdcache.core.errors import CacheMismatch, DatasetError
from kdcache.data.dataset import as_indexed
from kdcache.data.registry import open_dataset
from kdcache.store.manifest import Preprocess
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
from torch.utils.data import DataLoader
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
