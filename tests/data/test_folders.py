"""Folders as real ones are: which files are samples, in which order, and what is said of the others."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from kdcache.apps.predict import _files_in
from kdcache.core.errors import DatasetError
from kdcache.data.folders import IMAGES, TEXTS, LeftOut, find_files
from kdcache.data.registry import open_dataset


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path, format={".jfif": "JPEG", ".jpe": "JPEG", ".pnm": "PPM", ".pbm": "PPM"}.get(path.suffix.lower()))


def text(path, content="some words"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def plain(tmp_path):
    """Two splits of two classes, with names and folders that several orders would sort apart."""
    names = ["b.png", "a.JPG", "a b/1.png", "a.b/1.png", "a/2.png", "a/b/0.png", "10.png", "9.bmp", "z.tif"]
    for split in ("train", "val"):
        for label, name in enumerate(("dog", "cat")):
            for at, file in enumerate(names):
                picture(tmp_path / split / name / file, seed=10 * at + label)
    return tmp_path


def test_plain_folders_are_in_the_order_of_image_folder(plain):
    """Caches of earlier versions, which read by it, are joined by this order."""
    ours, theirs = open_dataset(f"folder:{plain}", split="train"), ImageFolder(str(plain / "train"))
    assert ours.classes == tuple(theirs.classes)
    assert ours.labels().tolist() == theirs.targets
    for image, (other, _) in zip(ours.shared_inputs(range(len(theirs))), theirs, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(other))


def test_texts_are_ordered_by_class_folder_and_name(tmp_path):
    for name in ("pos", "neg"):
        for file in ("b.txt", "a.TXT", "10.txt", "9.txt", "more/0.txt", "a/5.txt"):
            text(tmp_path / "train" / name / file, f"{name} {file}")
    dataset = open_dataset(f"text-folder:{tmp_path}", split="train")
    order = ["10.txt", "9.txt", "a.TXT", "b.txt", "a/5.txt", "more/0.txt"]
    found = [bytes(value.numpy()).decode() for value in dataset.shared_inputs(range(len(dataset)))]
    assert found == [f"{name} {file}" for name in ("neg", "pos") for file in order]


HIDDEN = ["cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png", ".ipynb_checkpoints/1.png", "cat/@eaDir/thumb.jpg"]
TAKEN = ["cat/a.gif", "cat/b.jfif", "cat/c.avif", "cat/d.webp", "cat/e.PNG", "dog/deep/er/f.jpe", "dog/g.pnm"]
OTHER = ["cat/notes.md", "cat/h.heic", "dog/README"]


def test_what_is_no_sample_is_left_out_with_a_line_for_each_reason(tmp_path, capsys):
    for split in ("train", "test"):
        for file in (*HIDDEN, *TAKEN):
            picture(tmp_path / split / file)
        for file in (*OTHER, "labels.csv"):
            text(tmp_path / split / file)
    dataset = open_dataset(f"folder:{tmp_path}", split="train")
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels().tolist() == [0] * 5 + [1] * 2
    assert all(image.shape == (3, 6, 5) for image in dataset.shared_inputs(range(7)))
    lines = [line.partition("left out: ")[2] for line in capsys.readouterr().err.splitlines() if "left out" in line]
    train = tmp_path / "train"
    assert lines == [
        f"hidden files and folders (4), such as {train}/.ipynb_checkpoints",
        f"files beside the class folders (1), such as {train}/labels.csv",
        f"files that are no images by their suffix (3: .heic, .md, no suffix), such as {train}/cat/h.heic",
    ]


@pytest.mark.parametrize(("kind", "spec"), [(IMAGES, "folder"), (TEXTS, "text-folder")])
def test_datasets_and_predict_take_the_same_files(tmp_path, kind, spec):
    texts = ["a/0.txt", "a/SHOUTING.TXT", "b/deep/1.txt", "a/.hidden.txt", "a/.git/2.txt", "b/3.text"]
    for file in (*[name.replace("cat/", "a/").replace("dog/", "b/") for name in (*HIDDEN, *TAKEN)],):
        picture(tmp_path / "train" / file)
    for file in texts:
        text(tmp_path / "train" / file)
    given = [item.name for item in _files_in(tmp_path / "train", kind)]
    assert len(open_dataset(f"{spec}:{tmp_path}", split="train")) == len(given) == {"folder": 7, "text-folder": 3}[spec]
    assert not [name for name in given if "/." in name.removeprefix(str(tmp_path))]


def test_without_anything_to_leave_out_nothing_is_said(plain, capsys):
    open_dataset(f"folder:{plain}", split="train")
    assert capsys.readouterr().err == ""


def test_links_that_lead_back_are_left_out_and_others_followed(tmp_path, capsys):
    picture(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "cat" / "circle").symlink_to(tmp_path / "train" / "cat")
    assert len(open_dataset(f"folder:{tmp_path}", split="train")) == 1
    assert "links that lead back to a folder above them (1), such as" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_named(plain, monkeypatch):
    scan = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("a.b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DatasetError, match=r"cat/a\.b cannot be read: Permission denied"):
        open_dataset(f"folder:{plain}", split="train")


def test_a_class_without_files_of_its_kind_is_named_with_what_was_left_out(plain, capsys):
    for split in ("train", "val"):
        text(plain / split / "emu" / "0.heic")
    with pytest.raises(DatasetError, match="has no images of emu in its split 'train'") as caught:
        open_dataset(f"folder:{plain}", split="train")
    assert "train/emu/IMAGE" in caught.value.needed
    assert ".jpeg" in caught.value.needed
    assert "(1: .heic)" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["folder", "text-folder"])
def test_val_takes_the_place_of_a_flat_test_which_is_else_unlabelled(tmp_path, capsys, spec):
    """As competitions ship it: without labels."""
    make, suffix = (picture, "png") if spec == "folder" else (text, "txt")
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for at in range(count):
                make(tmp_path / split / name / f"{at}.{suffix}")
    make(tmp_path / "test" / f"0001.{suffix}")
    make(tmp_path / "test" / ".ipynb_checkpoints" / f"0001.{suffix}")
    spec = f"{spec}:{tmp_path}"
    assert len(open_dataset(spec, split="train")) == 6
    assert len(open_dataset(spec, split="val")) == 4
    assert "read from val/" not in capsys.readouterr().err
    assert len(open_dataset(spec, split="test")) == 4
    assert "the split test is read from val/: test/ holds no class folders" in capsys.readouterr().err
    (tmp_path / "val").rename(tmp_path / "validation")
    assert len(open_dataset(spec, split="train")) == 6
    unlabelled = open_dataset(spec, split="test")
    assert (unlabelled.labels().tolist(), unlabelled.classes) == ([-1], ("cat", "dog"))


def test_val_takes_the_place_of_a_missing_test_and_that_is_said(plain, capsys):
    assert len(open_dataset(f"folder:{plain}", split="test")) == 18
    assert "the split test is read from val/: there is no test/" in capsys.readouterr().err


def test_every_type_of_the_table_is_read(tmp_path):
    for suffix in IMAGES.suffixes:
        picture(tmp_path / f"image{suffix}")
    (tmp_path / "animated.gif").unlink(missing_ok=True)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    from kdcache.data.raw_input import read_image

    found = find_files(str(tmp_path), IMAGES, LeftOut())
    assert len(found) == len(IMAGES.suffixes) + 1
    assert all(read_image(path).dtype == torch.uint8 for path in found)
    first = read_image(tmp_path / "animated.gif")
    assert first[0].float().mean() > 250
    assert first[2].float().mean() < 5


def test_a_folder_beside_the_splits_is_looked_at_only_where_it_is_asked_for(plain, monkeypatch):
    (plain / "lost+found").mkdir()
    scan = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert len(open_dataset(f"folder:{plain}", split="train")) == 18
    with pytest.raises(DatasetError, match=r"lost\+found cannot be read: Permission denied"):
        open_dataset(f"folder:{plain}", split="lost+found")
