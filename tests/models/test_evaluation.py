"""Evaluation of many classes, and what it reports beside the accuracy."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.analysis.calibration import reliability
from kdcache.analysis.confusion import confusion_matrix
from kdcache.analysis.distributions import negative_log_likelihood, softmax
from kdcache.apps.report.metrics import evaluate_logits
from kdcache.apps.report.sections import errors
from kdcache.apps.scores import measured, per_class, plot_matrix, worst
from kdcache.core.config import RuntimeConfig
from kdcache.core.errors import UsageError
from kdcache.data.dataset import ArrayDataset, WrappedDataset
from kdcache.data.taught import EmbeddingDataset
from kdcache.models.evaluate import Evaluation, evaluate_model
from kdcache.models.evaluators import chosen_metric
from kdcache.store.records import Preprocess
from tests.helpers import refused, synthetic

MANY = 60_000


def test_memory_grows_with_classes_and_not_with_their_square(tmp_path, capfd):
    classes = tuple(map(str, range(MANY)))
    labels = np.array([0, 59_999, 7, 7])
    dataset = ArrayDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels, name="m", split="test", classes=classes)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, MANY))
    tracemalloc.start()
    found = evaluate_model(network, dataset, preprocess=Preprocess(), config=RuntimeConfig(device="cpu"))
    answers = evaluate_logits("a", np.zeros((4, MANY), np.float32), labels, 0)
    assert tracemalloc.get_traced_memory()[1] < 200e6  # a matrix takes 28.8e9
    tracemalloc.stop()
    section = errors([answers], classes)
    assert found.accuracy in (0, 0.25, 0.5)
    assert answers.confusion_cc is None
    assert "No confusion matrix is drawn of 60,000 classes" in section.figures[0].caption
    assert plot_matrix(found, dataset, tmp_path) == {}
    assert "more than 1,000" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert len(per_class(found, dataset)) == MANY
    with pytest.raises(ValueError, match="at most 1000"):
        confusion_matrix(found.true_n, found.predicted_n, MANY)


def test_examples_are_spread_over_a_sorted_split():
    true = np.repeat(np.arange(5), 100)
    shown = Evaluation(true_n=true, predicted_n=true, top_n=true * 1.0, nll_n=true * 0.0).shown
    assert true[shown].tolist() == [0, 1, 2, 3, 4]
    assert Evaluation(true_n=true[:2], predicted_n=true[:2], top_n=true[:2], nll_n=true[:2]).shown == [0, 1]


def test_nll_ece_and_class_accuracy_are_those_of_the_logits():
    dataset = synthetic(60)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    inputs, labels = dataset.fetch(np.arange(60))
    with torch.no_grad():
        logits = network(inputs.float() / 255).numpy()
    true = labels.numpy()
    found = evaluate_model(network, dataset, preprocess=Preprocess(), config=RuntimeConfig(device="cpu", batch_size=7))
    data = measured(found, dataset)
    assert data["train_nll"] == pytest.approx(negative_log_likelihood(logits, true).mean(), rel=1e-5)
    assert data["train_ece"] == pytest.approx(reliability(softmax(logits), true).ece, abs=1e-6)
    assert data["train_accuracy"] == (logits.argmax(1) == true).mean()
    for at, each in enumerate(per_class(found, dataset)):
        assert each["class"] == f"class {at}"
        assert each["samples"] == (true == at).sum()
        assert each["accuracy"] == pytest.approx((logits.argmax(1) == true)[true == at].mean())
    shares = [{"class": "a", "samples": 4, "accuracy": 0.5}, {"class": "b", "samples": 0, "accuracy": None}]
    assert worst(shares) == "lowest accuracy by class: a 50.0% of 4"
    assert worst([{"class": "a", "samples": 4, "accuracy": 1.0}]) == ""


@pytest.mark.parametrize(
    ("kind", "asked", "taught", "found"),
    [
        ("one class", "accuracy", False, "accuracy"),
        ("one class", "agreement", True, "agreement"),
        ("one class", "agreement", False, "without a teacher"),
        ("one class", "cosine", True, "one of accuracy, nll, agreement"),
        ("one class", "map", True, "one of accuracy, nll, agreement"),
        ("several", "accuracy", False, "map"),
        ("several", "nll", False, "nll"),
        ("several", "retrieval", False, "one of map, nll"),
        ("vector", "accuracy", True, "cosine"),
        ("vector", "retrieval", True, "retrieval"),
        ("vector", "nll", True, "one of cosine, retrieval"),
    ],
)
def test_the_metric_is_one_that_the_samples_have(kind, asked, taught, found):
    dataset = WrappedDataset(synthetic(6))
    dataset.multi_label = kind == "several"
    dataset = EmbeddingDataset(dataset, 3) if kind == "vector" else dataset
    if " " not in found:
        assert chosen_metric(dataset, asked, taught=taught) == found
        return
    with pytest.raises(UsageError, match=f"--metric is {asked}") as caught:
        chosen_metric(dataset, asked, taught=taught)
    assert found in str(caught.value)


def test_a_metric_that_is_not_there_is_refused_before_the_training(tmp_path):
    common = ("--epochs", "1", "--val-fraction", "0.1", "--device", "cpu", "--out", tmp_path / "run")
    for metric in ("agreement", "cosine", "map"):
        assert f"--metric is {metric}" in refused(2, "train-teacher", "--metric", metric, *common)
    assert not (tmp_path / "run").exists()
