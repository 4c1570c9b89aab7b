"""Samples that belong to any number of classes: from labels to dump, student, scores and predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

import kdcache
from kdcache import DumpConfig, StudentConfig, TrainConfig, dump_teacher, losses, open_cache, train_student
from kdcache.apps.export_module import metadata
from kdcache.core.errors import CacheMismatch, DatasetError, UsageError
from kdcache.data.map_dataset import as_indexed
from kdcache.data.registry import open_dataset
from kdcache.distill.objective import label_objective
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.evaluate_multi_label import MultiLabelEvaluation, evaluate_multi_label
from kdcache.models.from_run import load_trained
from kdcache.store.inspect import verify_cache
from kdcache.store.records import Preprocess
from tests.helpers import Network, answer, refused, synthetic, tensors
from tests.helpers import kdcache as run_command
from tests.processes import together

CLASSES = ("red", "green", "blue", "grey")
INPUTS = tensors(synthetic(54))[0]
VECTORS = (np.random.default_rng(0).random((54, 4)) < 0.4).astype(np.uint8)


class Items:
    """Items with lists of class indices, or vectors of 0 and 1."""

    classes = CLASSES

    def __init__(self, form=np.flatnonzero, vectors=VECTORS):
        self.form, self.vectors = form, vectors

    def __len__(self):
        return len(self.vectors)

    def __getitem__(self, index):
        return INPUTS[index], self.form(self.vectors[index])


def indices(vector):
    return np.flatnonzero(vector).tolist()


class Plain(nn.Sequential):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        self.double()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("multi") / "c.zarr"
    dump_teacher(
        Network(16, 4), Items(indices), out=out, config=DumpConfig(device="cpu", encoding="float32", shard_rows=16)
    )
    return out


def config(**settings):
    return StudentConfig(**{"device": "cpu", "batch_size": 13, "epochs": 3, "learning_rate": 0.02} | settings)


# ---- losses


def test_the_losses_are_those_of_each_class_alone():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels = torch.from_numpy(VECTORS[:6])
    expected = [
        -(y * s.sigmoid().log() + (1 - y) * (1 - s.sigmoid()).log())
        for s, y in zip(student.flatten(), labels.flatten(), strict=True)
    ]
    assert float(losses.binary_cross_entropy(student, labels)) == pytest.approx(float(torch.stack(expected).mean()))
    p, q = (torch.stack([(x / 3).sigmoid(), 1 - (x / 3).sigmoid()]) for x in (teacher, student))
    kl = 9 * (p * (p / q).log()).sum(dim=0).mean()
    assert float(losses.binary_kd(student, teacher, temperature=3.0)) == pytest.approx(float(kl))
    assert float(losses.binary_kd(teacher, teacher, temperature=2.0)) == pytest.approx(0, abs=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.binary_kd(s, teacher, temperature=2.0), student)
    assert torch.autograd.gradcheck(lambda s: losses.binary_cross_entropy(s, labels, label_smoothing=0.1), student)


def test_binary_kd_of_extreme_logits_is_finite():
    student, teacher = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.tensor([[-1e4, 1e4]])
    loss = losses.binary_kd(student, teacher, temperature=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


# ---- labels


@pytest.mark.parametrize("form", [indices, set, tuple, np.asarray, torch.from_numpy, lambda v: v.astype(bool)])
def test_labels_of_every_form_are_vectors(form):
    make = form if form not in (set, tuple) else (lambda vector: form(indices(vector)))
    dataset = as_indexed(Items(make), name="mine", split="train")
    assert dataset.multi_label
    _, labels = dataset.fetch(np.arange(54))
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(labels, VECTORS)


@pytest.mark.parametrize("label", [[0, 4], [-1], ["red"], np.array([0, 1]), np.array([0, 1, 2, 0]), 1.5])
def test_labels_that_are_none_are_refused(label):
    items = [(INPUTS[0], [0])] * 30 + [(INPUTS[0], label)]
    dataset = as_indexed(items, name="mine", split="train", classes=CLASSES)
    with pytest.raises(DatasetError, match="class indices from 0 to 3"):
        dataset.fetch([30])


def test_a_list_of_vectors_is_known_before_samples_are_read():
    class Known(Items):
        targets = torch.from_numpy(VECTORS)

    np.testing.assert_array_equal(as_indexed(Known(indices), name="x", split="train").labels(), VECTORS)
    wrong = Known(indices, 1 - VECTORS)
    with pytest.raises(DatasetError, match=r"targets or \.labels says"):
        as_indexed(wrong, name="x", split="train").fetch([0])


# ---- dump and student


def test_labels_are_stored_as_bytes_and_verified(cache, tmp_path):
    found = open_cache(cache)
    assert (found.column("labels").dtype, found.manifest.multi_label) == (np.uint8, True)
    np.testing.assert_array_equal(found.column("labels"), VECTORS)
    assert verify_cache(cache).data["whole"]
    other = VECTORS.copy()
    other[3] = 1 - other[3]
    with pytest.raises(CacheMismatch, match="sample 3 has label"):
        train_student(Plain(), Items(indices, other), cache, config=config(verify_inputs="all"))
    single = synthetic(54)
    with pytest.raises(CacheMismatch):
        train_student(Plain(), single, cache, config=config())


def test_the_student_learns_both_losses(cache):
    seen = []
    settings = config(epochs=1, batch_size=54, alpha=0.3, temperature=3.0)
    train_student(Plain(), Items(indices), cache, config=settings, on_step=lambda _, parts: seen.append(parts))
    logits = Plain()(INPUTS.double() / 255)
    teacher = torch.from_numpy(open_cache(cache).column("logits")).double()
    kd = losses.binary_kd(logits, teacher, temperature=3.0)
    hard = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(VECTORS).double())
    assert float(seen[0]["loss"]) == pytest.approx((0.3 * kd + 0.7 * hard).item(), abs=1e-9)


def test_processes_and_parts_follow_the_trajectory_of_one(tmp_path, cache):
    def learn(processes=None, **settings):
        student = Plain()
        result = train_student(
            student, Items(indices), cache, config=config(val_fraction=0.2, **settings), processes=processes
        )
        return student.state_dict(), [entry["val_map"] for entry in result.epochs]

    weights, scores = learn()
    for found in [learn(grad_accumulation=3), *together(2, learn, tmp_path)]:
        for name, value in weights.items():
            torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-9)
        assert found[1] == pytest.approx(scores)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": ("kd",)}, "--objective kd is for samples of one class"),
        ({"objective": ("binary_kd", "decoupled_kd")}, "--objective decoupled_kd is for samples of one class"),
    ],
)
def test_objectives_of_softmax_are_refused(cache, settings, words):
    with pytest.raises(UsageError, match=words):
        train_student(Plain(), Items(indices), cache, config=config(**settings))
    train_student(Plain(), Items(indices), cache, config=config(objective=("binary_kd", "binary_cross_entropy")))


@pytest.mark.parametrize(
    "settings", [{"encoding": "topk:2"}, {"encoding": "quantized:8"}, {"mix": "mixup:1", "views": 2}, {"max_kl": 0.1}]
)
def test_what_supposes_one_class_is_refused_by_the_dump(tmp_path, settings):
    with pytest.raises(UsageError, match="any number of classes"):
        dump_teacher(Network(16, 4), Items(indices), out=tmp_path / "c", config=DumpConfig(device="cpu", **settings))


def test_binary_objectives_are_refused_for_one_class(tmp_path):
    dump_teacher(Network(16, 4), synthetic(54), out=tmp_path / "c.zarr", config=DumpConfig(device="cpu"))
    with pytest.raises(UsageError, match="--objective binary_kd is for samples of any number of classes"):
        train_student(Plain(), synthetic(54), tmp_path / "c.zarr", config=config(objective=("binary_kd",)))


def test_a_joined_dataset_keeps_the_items_own_labels(cache):
    joined = kdcache.join(Items(indices), open_cache(cache))
    _, label, logits = joined[5]
    assert label == indices(VECTORS[5])
    np.testing.assert_array_equal(logits, open_cache(cache).rows([5])[0])


# ---- scores


def test_the_scores_are_scikit_learns(cache):
    logits = np.random.default_rng(1).normal(size=(54, 4)).astype(np.float32)
    labels = VECTORS.copy()
    labels[:, 2] = 0  # a class without a sample has no average precision
    found = MultiLabelEvaluation(true_nc=labels, logits_nc=logits, teacher_nc=-logits)
    expected = [average_precision_score(labels[:, at], logits[:, at]) for at in (0, 1, 3)]
    assert found.scores["map"] == pytest.approx(np.mean(expected))
    assert np.isnan(found.average_precision_c[2])
    right = (labels == 1) & (logits >= 0)
    assert found.scores["micro_f1"] == pytest.approx(2 * right.sum() / (labels.sum() + (logits >= 0).sum()))
    assert found.scores["agreement"] == 0
    assert 0 < found.scores["macro_f1"] < 1


def test_a_network_that_learns_is_scored_higher():
    settings = TrainConfig(device="cpu", epochs=40, batch_size=16, learning_rate=0.02)
    images = torch.from_numpy(np.repeat(VECTORS, 4, axis=1).reshape(54, 1, 4, 4) * 200)
    items = list(zip(images, VECTORS, strict=True))
    dataset = as_indexed(items, name="x", split="train", classes=CLASSES)
    network = Network(16, 4)
    before = evaluate_multi_label(network, dataset, preprocess=Preprocess(), config=settings).scores
    train(network, training_data(dataset, Preprocess(), settings), objective=label_objective(0.0), config=settings)
    after = evaluate_multi_label(network, dataset, preprocess=Preprocess(), config=settings).scores
    assert after["map"] > max(0.9, before["map"])


# ---- the commands


def test_the_pipeline_on_a_csv_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["path,labels,split"]
    for number, (vector, image) in enumerate(zip(VECTORS, np.repeat(VECTORS, 12, axis=1), strict=True)):
        Image.fromarray((image.reshape(4, 4, 3) * 200).astype(np.uint8)).save(f"{number}.png")
        names = ";".join(CLASSES[at] for at in indices(vector))
        lines.append(f"{number}.png,{names},{'test' if number % 3 == 0 else 'train'}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    assert open_dataset("csv:table.csv", split="train").classes == tuple(sorted(CLASSES))
    common = ("--size", "4", "--device", "cpu", "--batch-size", "8")
    learn = ("--epochs", "8", "--learning-rate", "0.01", "--val-fraction", "0.2", *common)
    taught = answer("train-teacher", "--dataset", "csv:table.csv", "--model", "mlp", "--out", "t", *learn)
    assert taught["test_map"] > 0.6
    assert taught["test_accuracy"] is None
    dump = ("dump-teacher", "--dataset", "csv:table.csv", "--teacher", "mlp", "--checkpoint", "t/best.pt")
    found = answer(*dump, "--split", "train", "--split", "test", "--out", "c.zarr", *common)
    assert found["splits"]["test"]["teacher_scores"]["map"] == pytest.approx(taught["test_map"], abs=1e-6)
    result = answer("train-student", "--cache", "c.zarr", "--student", "mlp", "--out", "s", *learn)
    assert {"test_map", "test_micro_f1", "test_macro_f1", "test_nll"} <= result.keys()
    entries = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert all("val_map" in entry for entry in entries)
    evaluated = run_command("evaluate", "--run", "s", "--device", "cpu")
    assert "test mAP" in evaluated.stdout
    assert "lowest average precision by class" in evaluated.stdout or evaluated.stdout.count("\n") == 1
    assert "mAP" in run_command("compare", "t", "s").stdout
    predicted = answer("predict", "--run", "t", "0.png", "1.png", "--device", "cpu", "--threshold", "0.3")
    for each in predicted["predictions"]:
        assert all(found["probability"] >= 0.3 for found in each["answers"])
    assert metadata(load_trained(tmp_path / "s"), torch.zeros(2, 3, 4, 4))["probabilities"] == "sigmoid"
    assert "any number of classes each" in refused(2, "report", "s", "--out", "r.html", "--device", "cpu")
    assert "any number of classes each" in refused(2, "plot-temperature", "c.zarr", "--out", "t.png")
    sweep = ("sweep", "--cache", "c.zarr", "--student", "mlp", "--out", "sweep", "--temperature", "4", "--jobs", "1")
    swept = answer(*sweep, "--epochs", "2", "--val-fraction", "0.2", *common)
    assert all(0 < row["score"] <= 1 for row in swept["settings"])
