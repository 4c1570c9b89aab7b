"""Data of which none or only some samples have a label."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import kdcache
from kdcache import DumpConfig, StudentConfig, TrainConfig, dump_teacher, open_cache, train_student
from kdcache.core.errors import DatasetError, UsageError
from kdcache.data.map_dataset import as_indexed
from kdcache.data.registry import open_dataset
from kdcache.distill.objective import label_objective
from kdcache.distill.student.joined_items import ItemKeys
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.evaluate import evaluate_model
from kdcache.store.records import Preprocess
from tests.distill.test_processes import Plain
from tests.helpers import Network, answer, changed, refused, synthetic, tensors
from tests.helpers import kdcache as command
from tests.processes import together

SAMPLES = synthetic(54)
LABELLED = np.arange(54) % 3 == 0
SOME = changed(SAMPLES, labels=np.where(LABELLED, SAMPLES.labels(), -1))
NONE = changed(SAMPLES, labels=np.full(54, -1))


class Inputs:
    """A dataset of inputs alone."""

    classes = ("a", "b", "c", "d")

    def __len__(self):
        return 54

    def __getitem__(self, index):
        return tensors(SAMPLES)[0][index]


def dumped(path, dataset, **settings):
    config = DumpConfig(device="cpu", encoding="float32", **settings)
    return dump_teacher(Network(16, 4), dataset, out=path, config=config)


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    out = tmp_path_factory.mktemp("some") / "c.zarr"
    dumped(out, SOME, features=("layers.3",))
    return out


@pytest.fixture(scope="module")
def none(tmp_path_factory):
    out = tmp_path_factory.mktemp("none") / "c.zarr"
    dumped(out, NONE)
    return out


def config(**settings):
    return StudentConfig(**{"device": "cpu", "batch_size": 13, "epochs": 3, "learning_rate": 0.02} | settings)


# ---- the dump


def test_the_teachers_accuracy_is_that_on_labelled_samples(some, none, capsys):
    whole = open_cache(some)
    right = whole.column("logits").argmax(axis=1) == SAMPLES.labels()
    assert whole.manifest.teacher.accuracy == pytest.approx(right[LABELLED].mean())
    assert open_cache(none).manifest.teacher.accuracy is None
    np.testing.assert_array_equal(whole.column("labels"), SOME.labels())


def test_inputs_alone_are_a_dataset(tmp_path, capsys, none):
    dumped(tmp_path / "c.zarr", Inputs())
    assert "the samples are unlabelled: whether the classes" in capsys.readouterr().err
    np.testing.assert_array_equal(open_cache(tmp_path / "c.zarr").column("logits"), open_cache(none).column("logits"))
    assert as_indexed([(torch.zeros(3), None)], name="x", split="train", classes=("a",)).fetch([0])[1].tolist() == [-1]
    with pytest.raises(DatasetError, match="--classes FILE"):
        as_indexed([torch.zeros(3)], name="x", split="train")
    with pytest.raises(DatasetError, match="-1 without a label"):
        as_indexed([(torch.zeros(3), -2)], name="x", split="train", classes=("a",))


# ---- the student


def test_the_label_loss_is_a_mean_over_the_labelled_samples(some):
    seen = []
    student = Plain()
    settings = config(epochs=1, batch_size=54, alpha=0.3)
    train_student(student, SOME, some, config=settings, on_step=lambda _, parts: seen.append(parts))
    inputs = tensors(SAMPLES)[0].double() / 255
    expected = torch.nn.functional.cross_entropy(
        Plain()(inputs)[torch.from_numpy(LABELLED)], torch.from_numpy(SAMPLES.labels()[LABELLED])
    )
    assert float(seen[0]["cross_entropy"]) == pytest.approx(float(expected.detach()), abs=1e-12)


def test_processes_and_parts_weigh_labelled_samples_alike(tmp_path, some):
    def learn(processes=None, **settings):
        student = Plain()
        result = train_student(student, SOME, some, config=config(alpha=0.3, **settings), processes=processes)
        return student.state_dict(), [(entry["loss"], entry["train_accuracy"]) for entry in result.epochs]

    weights, history = learn()
    for found in [learn(grad_accumulation=3), *together(3, learn, tmp_path)]:
        for name, value in weights.items():
            torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-9)
        assert found[1] == [pytest.approx(each, abs=1e-9) for each in history]


def test_training_on_labels_alone_takes_the_labelled_samples(some):
    sizes = []

    class Watched(Plain):
        def forward(self, inputs):
            sizes.append(len(inputs))
            return super().forward(inputs)

    train_student(Watched(), SOME, some, config=config(distill=False, epochs=1, batch_size=64))
    settings = TrainConfig(device="cpu", epochs=1, batch_size=64)
    train(Watched(), training_data(SOME, Preprocess(), settings), objective=label_objective(0.0), config=settings)
    assert sizes == [18, 18]
    with pytest.raises(DatasetError, match="unlabelled"):
        training_data(NONE, Preprocess(), settings)


def test_without_labels_the_teacher_is_all_there_is(none):
    result = train_student(Plain(), NONE, none, config=config(alpha=1.0, epochs=30))
    assert "train_accuracy" not in result.epochs[-1]
    assert result.epochs[-1]["loss"] < result.epochs[0]["loss"]
    found = evaluate_model(
        result.module,
        NONE,
        preprocess=Preprocess(),
        config=config(),
        indices=np.arange(54),
        teacher=open_cache(none).rows,
    )
    assert found.agreement > 0.5
    assert found.teacher_kl > 0
    assert math.isnan(found.accuracy)
    assert math.isnan(found.nll)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "--alpha 0.5 weighs labels by 0.5"),
        ({"distill": False}, "--no-distill trains on labels alone"),
        ({"objective": ("kd", "hard_cross_entropy")}, "--objective hard_cross_entropy needs labels"),
        ({"objective": ("decoupled_kd",)}, "--objective decoupled_kd needs the label of each"),
        ({"alpha": 1.0, "val_fraction": 0.2}, "holds out no labelled sample"),
    ],
)
def test_what_needs_labels_is_refused(none, settings, words):
    with pytest.raises(UsageError) as refusal:
        train_student(Plain(), NONE, none, config=config(**settings))
    assert words in str(refusal.value)


def test_agreement_with_the_teacher_chooses_the_best_epoch(none, some):
    settings = {"alpha": 1.0, "val_fraction": 0.3, "metric": "agreement", "epochs": 4}
    entries = train_student(Plain(), NONE, none, config=config(**settings)).epochs
    assert all(0 <= entry["val_agreement"] <= 1 and "val_accuracy" not in entry for entry in entries)
    entries = train_student(Plain(), SOME, some, config=config(**settings)).epochs
    assert all({"val_agreement", "val_accuracy"} <= entry.keys() for entry in entries)
    with pytest.raises(UsageError, match="--metric agreement is given with --no-distill"):
        train_student(Plain(), SOME, some, config=config(distill=False, val_fraction=0.3, metric="agreement"))


def test_a_joined_dataset_of_inputs_alone(tmp_path):
    dumped(tmp_path / "c.zarr", Inputs())
    joined = kdcache.join(Inputs(), open_cache(tmp_path / "c.zarr"), transform=lambda image: image / 255)
    image, logits = joined[4]
    assert image.max() <= 1
    assert logits.shape == (4,)
    assert ItemKeys().label_of(torch.zeros(3), "item 0") == -1


# ---- folders


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)

    def save(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)

    for number in range(6):
        save(tmp_path / "photos" / "train" / f"{number}.png")
        save(tmp_path / "photos" / "test" / ("cat" if number % 2 else "dog") / f"{number}.png")
        save(tmp_path / "flat" / "train" / f"{number}.png")
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    return tmp_path


def test_a_flat_folder_is_unlabelled_and_has_the_classes_of_another_split(photos):
    dataset = open_dataset("folder:photos", split="train")
    assert (len(dataset), dataset.classes, set(dataset.labels())) == (6, ("cat", "dog"), {-1})
    with pytest.raises(DatasetError, match="--classes FILE"):
        open_dataset("folder:flat", split="train")
    assert open_dataset("folder:flat", split="train", classes=("x", "y")).classes == ("x", "y")


def test_the_pipeline_on_photographs_without_labels(photos):
    torch.save({"1.weight": torch.randn(2, 192), "1.bias": torch.zeros(2)}, "teacher.pt")
    (photos / "plain.py").write_text(
        "from torch import nn\n"
        "def network(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))\n"
    )
    dump = ("dump-teacher", "--dataset", "folder:flat", "--teacher", "py:plain:network", "--checkpoint", "teacher.pt")
    assert "--classes FILE" in refused(1, *dump, "--out", "c.zarr")
    found = answer(*dump, "--out", "c.zarr", "--classes", "names.txt")
    assert found["splits"]["train"]["teacher_accuracy"] is None
    learn = ("train-student", "--cache", "c.zarr", "--student", "py:plain:network", "--epochs", "2", "--device", "cpu")
    assert "give --alpha 1" in refused(2, *learn, "--out", "s")
    result = answer(*learn, "--out", "s", "--alpha", "1")
    assert result["test_accuracy"] is None
    # Of a test split without labels, what its teacher said is compared with.
    shutil.copytree("flat/train", "flat/test")
    answer(*dump, "--split", "test", "--out", "c.zarr", "--classes", "names.txt")
    result = answer(*learn, "--out", "judged", "--alpha", "1", "--val-fraction", "0.4", "--metric", "agreement")
    assert 0 <= result["test_agreement"] <= 1
    assert result["test_teacher_kl"] >= 0
    assert result["test_accuracy"] is None
    again = command("evaluate", "--run", "judged", "--cache", "c.zarr", "--device", "cpu")
    assert f"agreement with the teacher {result['test_agreement']:.2%}" in again.stdout
    message = refused(2, *dump, "--out", "d.zarr", "--classes", "nowhere.txt")
    assert "nowhere.txt cannot be read" in message


def test_the_classes_are_those_of_the_teachers_checkpoint(photos):
    shutil.copytree("photos/test", "labelled/train")
    common = ("--device", "cpu", "--size", "8")
    answer("train-teacher", "--dataset", "folder:labelled", "--model", "mlp", "--epochs", "1", "--out", "t", *common)
    dump = ("dump-teacher", "--dataset", "folder:flat", "--teacher", "mlp", "--checkpoint", "t/best.pt", *common)
    answer(*dump, "--out", "c.zarr")
    assert open_cache("c.zarr").classes == ("cat", "dog")


def test_texts_without_labels(tmp_path):
    for name, text in (("a.txt", "one"), ("b.txt", "two words")):
        (tmp_path / "texts" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "train" / name).write_text(text)
    dataset = open_dataset(f"text-folder:{tmp_path / 'texts'}", split="train", classes=("neg", "pos"))
    assert (len(dataset), set(dataset.labels()), dataset.classes) == (2, {-1}, ("neg", "pos"))
    assert bytes(dataset.fetch([1])[0][0].tolist()).decode() == "two words"
