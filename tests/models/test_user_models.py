"""Networks of the user's own: what they raise is quoted, and what a first forward pass completes can be trained."""

import pytest
import torch
from torch import nn

from kdcache.core.config import RuntimeConfig
from kdcache.core.errors import KdcacheError, ModelError
from kdcache.models.checkpoints import load_weights
from kdcache.models.evaluate import evaluate_model
from kdcache.models.registry import weights_sha256
from kdcache.store.records import Preprocess
from tests.helpers import Interrupted, answer, refused, synthetic

MODELS = """
import torch
from torch import nn

class FailsOnFullBatches(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(64, classes)
    def forward(self, inputs):
        if len(inputs) > 2:
            raise KeyError("expected at most two samples")
        return self.fc(inputs.flatten(1))

class KeepsATensor(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc, self.table = nn.Linear(64, classes), None
    def forward(self, inputs):
        logits = self.fc(inputs.flatten(1))
        if self.table is None:
            self.table = torch.linspace(0.9, 1.1, logits.shape[1])
        return logits * self.table

class LazyLayers(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.norm, self.fc = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(classes)
    def forward(self, inputs):
        return self.fc(self.norm(self.conv(inputs)).relu().flatten(1))

class Raises(nn.Module):
    def __init__(self, classes):
        raise AttributeError("no such setting")

def fails_on_full_batches(num_classes): return FailsOnFullBatches(num_classes)
def keeps_a_tensor(num_classes): return KeepsATensor(num_classes)
def lazy_layers(num_classes): return LazyLayers(num_classes)
def raises(num_classes): return Raises(num_classes)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "kd_odd_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


DIGITS = ("--dataset", "digits", "--device", "cpu")


@pytest.mark.parametrize("name", ["keeps_a_tensor", "lazy_layers"])
def test_networks_that_are_completed_by_their_first_forward_pass(models, name):
    spec = f"py:kd_odd_models:{name}"
    brief = (*DIGITS, "--epochs", 1, "--ema", 0.5)
    found = answer("train-teacher", "--model", spec, "--out", "t", *brief)
    again = answer("train-teacher", "--model", spec, "--out", "u", *brief)
    assert found["test_accuracy"] == again["test_accuracy"] > 0.2
    assert answer("evaluate", "--run", "t", "--device", "cpu")["test_accuracy"] == found["test_accuracy"]
    answer("dump-teacher", "--teacher", spec, "--checkpoint", "t/best.pt", "--out", "c", *DIGITS)
    student = ("train-student", "--cache", "c", "--student", spec, "--epochs", 1, "--out", "s", "--device", "cpu")
    assert answer(*student)["parameters"] > 600


def test_lazy_layers_take_a_checkpoint_before_their_first_forward_pass(tmp_path):
    def network():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))

    saved, module = network(), network()
    inputs = torch.randn(2, 3)
    logits = saved(inputs)
    torch.save({"net": saved.state_dict()}, tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    assert torch.equal(module(inputs), logits)
    assert weights_sha256(module) == weights_sha256(saved)


def test_an_exception_of_the_network_is_quoted(models):
    spec = "py:kd_odd_models:fails_on_full_batches"
    torch.save(nn.Module().state_dict() | {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}, "w.pt")
    message = refused(1, "dump-teacher", "--teacher", spec, "--checkpoint", "w.pt", "--out", "c", *DIGITS)
    for part in (
        "FailsOnFullBatches fails on a batch of shape (256, 1, 8, 8) (samples 0 to 255)",
        "KeyError: 'expected at most two samples'",
        "kd_odd_models.py, line 11",
        "needed",
        "to do",
    ):
        assert part in message


def test_a_constructor_that_raises_is_quoted(models):
    message = refused(1, "train-teacher", "--model", "py:kd_odd_models:raises", "--out", "t", *DIGITS)
    assert "AttributeError: no such setting" in message
    assert not (models / "t").exists()


@pytest.mark.parametrize(
    ("spec", "extra", "size"),
    [
        ("torchvision:vit_b_16", "torchvision", 224),
        ("timm:vit_tiny_patch16_224", "timm", 224),
        ("timm:swin_tiny_patch4_window7_224", "timm", 224),
    ],
)
def test_the_size_that_a_network_needs_is_said(models, spec, extra, size):
    pytest.importorskip(extra)
    message = refused(1, "train-teacher", "--model", spec, "--out", "t", *DIGITS)
    assert "fails on a batch of shape (2, 3, 8, 8)" in message
    assert f"give --size {size}: the network is made for {size} × {size} pixels, and these are 8 × 8 pixels" in message
    assert not (models / "t").exists()


class Raising(nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self, inputs):
        raise self.problem


@pytest.mark.parametrize(
    "problem", [ValueError("odd"), AssertionError("odd"), RuntimeError("odd"), StopIteration("odd")]
)
def test_every_exception_of_a_network_is_quoted_in_an_evaluation(problem):
    with pytest.raises(
        ModelError, match=rf"Raising fails on a batch .* \(samples 0 to 3\): {type(problem).__name__}: odd"
    ):
        evaluate_model(Raising(problem), synthetic(4), preprocess=Preprocess(), config=RuntimeConfig(device="cpu"))


@pytest.mark.parametrize("problem", [Interrupted(), torch.OutOfMemoryError("full"), ModelError("mine")])
def test_what_is_not_the_networks_mistake_is_not_called_so(problem):
    with pytest.raises((KdcacheError, Interrupted)) as caught:
        evaluate_model(Raising(problem), synthetic(4), preprocess=Preprocess(), config=RuntimeConfig(device="cpu"))
    assert "fails on a batch" not in str(caught.value)
