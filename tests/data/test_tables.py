"""Datasets that a table lists: csv files, and Hugging Face's datasets from local folders."""

from __future__ import annotations

import csv

import datasets
import numpy as np
import pytest
from PIL import Image

from kdcache import open_cache
from kdcache.core.errors import DatasetError
from kdcache.data.registry import open_dataset
from tests.helpers import answer, refused

ROWS = [("cat", "train"), ("dog", "train"), ("", "train"), ("cat", "test")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    write("images.csv", ("path", "label", "split"), [(f"images/{at}.png", *row) for at, row in enumerate(ROWS)])
    return tmp_path


def write(name, columns, rows):
    with open(name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def test_images_of_a_csv_file(folder):
    train, test = (open_dataset("csv:images.csv", split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels().tolist() == [0, 1, -1]
    assert test.labels().tolist() == [0]
    pixels = np.asarray(Image.open(folder / "images" / "1.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(train.fetch([1])[0][0], pixels)
    assert len(train.default_mean) == 3


def test_texts_of_a_csv_file(folder):
    write("texts.csv", ("label", "text"), [("10", "ten, with a comma"), ("9", 'nine\n"lines"'), ("10", "ünïcode")])
    dataset = open_dataset("csv:texts.csv", split="train")
    assert dataset.is_text
    assert dataset.classes == ("9", "10")  # by value
    assert dataset.labels().tolist() == [1, 0, 1]
    assert bytes(dataset.fetch([1])[0][0].tolist()).decode() == 'nine\n"lines"'
    assert open_dataset("csv:texts.csv", split="train", classes=("10", "9")).labels().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("columns", "rows", "classes", "words"),
    [
        (("name", "label"), [("a", "b")], (), "has the columns name, label"),
        (("path", "label"), [], (), "has no rows"),
        (("path", "label"), [("a.png", "x", "y")], (), "line 2"),
        (("path", "label"), [("a.png",)], (), "line 2"),
        (("path",), [("a.png",)], (), "has no labels"),
        (("path", "label"), [("a.png", "x")], ("y", "z"), "line 2 of bad.csv has the label 'x'"),
        (("path", "label", "split"), [("a.png", "x", "other")], (), "has no split 'train'"),
        (("path", "label"), [("nowhere.png", "x")], (), "nowhere.png cannot be read as an image"),
    ],
)
def test_a_csv_file_that_does_not_do_is_refused(folder, columns, rows, classes, words):
    write("bad.csv", columns, rows)
    with pytest.raises(DatasetError, match=words):
        open_dataset("csv:bad.csv", split="train", classes=classes)


def test_a_csv_file_through_the_pipeline(folder):
    train = ("train-teacher", "--dataset", "csv:images.csv", "--model", "mlp", "--size", "8", "--epochs", "1")
    assert answer(*train, "--out", "t", "--device", "cpu")["test_accuracy"] in (0.0, 1.0)
    dump = ("dump-teacher", "--dataset", "csv:images.csv", "--teacher", "mlp", "--size", "8", "--device", "cpu")
    answer(*dump, "--checkpoint", "t/best.pt", "--out", "c.zarr")
    assert open_cache("c.zarr").manifest.dataset.name == "csv:images.csv"
    learn = (
        "train-student",
        "--cache",
        "c.zarr",
        "--student",
        "mlp",
        "--size",
        "8",
        "--epochs",
        "1",
        "--device",
        "cpu",
    )
    answer(*learn, "--out", "s")
    assert "nowhere.csv is no file" in refused(1, "train-teacher", "--dataset", "csv:nowhere.csv", "--out", "n")
    write("images.csv", ("path", "label", "split"), [(f"images/{at}.png", *row) for at, row in enumerate(ROWS[::-1])])
    refused(4, *learn, "--out", "other")


def hub(folder, **columns):
    """A dataset of Hugging Face, saved in a folder."""
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    made = datasets.Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)
    datasets.DatasetDict({"train": made, "validation": made.select([0])}).save_to_disk(str(folder))


def test_images_and_texts_of_hugging_face(folder):
    kind = datasets.ClassLabel(names=["cat", "dog"])
    files = [str(folder / "images" / f"{at}.png") for at in range(3)]
    hub(folder / "pets", image=(datasets.Image(), files), label=(kind, [1, 0, -1]))
    train = open_dataset("hf-dataset:pets", split="train")
    assert (train.classes, train.labels().tolist()) == (("cat", "dog"), [1, 0, -1])
    pixels = np.asarray(Image.open(folder / "images" / "2.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(train.fetch([2])[0][0], pixels)
    assert len(open_dataset("hf-dataset:pets", split="test")) == 1  # of validation
    text = datasets.Value("string")
    hub(folder / "reviews", text=(text, ["a", "bé"]), label=(datasets.Value("int64"), [0, 1]))
    reviews = open_dataset("hf-dataset:reviews", split="train", classes=("neg", "pos"))
    assert reviews.is_text
    assert bytes(reviews.fetch([1])[0][0].tolist()).decode() == "bé"
    assert reviews.classes == ("neg", "pos")


def test_a_folder_of_images_and_a_parquet_file(folder):
    for number, name in enumerate(("cat", "dog")):
        (folder / "photos" / name).mkdir(parents=True)
        (folder / "images" / f"{number}.png").rename(folder / "photos" / name / "0.png")
    photos = open_dataset("hf-dataset:photos", split="train")
    assert (photos.classes, photos.labels().tolist()) == (("cat", "dog"), [0, 1])
    (folder / "table").mkdir()
    rows = datasets.Dataset.from_dict({"sentence": ["one", "two"], "label": [1, 0]})
    rows.to_parquet(str(folder / "table" / "train.parquet"))
    table = open_dataset("hf-dataset:table", split="train")
    assert (table.classes, table.labels().tolist(), table.is_text) == (("0", "1"), [1, 0], True)


@pytest.mark.parametrize("download", [False, True])
def test_the_network_is_used_only_for_a_download(monkeypatch, download):
    from huggingface_hub import constants

    seen = []

    def load(name):
        seen.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError(name)

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DatasetError, match="cannot be loaded"):
        open_dataset("hf-dataset:nobody/nothing", split="train", download=download)
    assert seen == [before if download else (True, True)]
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_what_hugging_face_cannot_give_is_refused(folder):
    with pytest.raises(DatasetError, match="cannot be loaded"):
        open_dataset("hf-dataset:nobody/nothing", split="train")
    number = datasets.Value("int64")
    hub(folder / "numbers", a=(number, [1]), b=(number, [2]))
    with pytest.raises(DatasetError, match="one column of images or texts"):
        open_dataset("hf-dataset:numbers", split="train")
    with pytest.raises(DatasetError, match="has no split 'other'"):
        open_dataset("hf-dataset:numbers", split="other")
