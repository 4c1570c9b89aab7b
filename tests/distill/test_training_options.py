"""Options of the loop: accumulation, memory format, compilation, decay groups, early stopping, logs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdcache import DumpConfig, StudentConfig, TrainConfig, dump_teacher, train_student
from kdcache.core.errors import UsageError
from kdcache.distill import trainer as loop
from kdcache.distill.objective import label_objective
from kdcache.distill.optim import build_optimizer
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.checkpoints import read_checkpoint
from kdcache.store.records import Preprocess
from tests.distill.test_processes import Plain
from tests.helpers import Network, answer, refused, synthetic
from tests.processes import together

DATA = synthetic(54)


def config(**settings):
    return TrainConfig(**{"device": "cpu", "batch_size": 13, "epochs": 3, "learning_rate": 0.02} | settings)


def fit(module, settings, **options):
    return train(
        module, training_data(DATA, Preprocess(), settings), objective=label_objective(0.0), config=settings, **options
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("options") / "c.zarr"
    dump_config = DumpConfig(device="cpu", features=("layers.3",), encoding="float32")
    dump_teacher(Network(16, 4), DATA, out=out, config=dump_config)
    return out


# ---- accumulation


@pytest.mark.parametrize("parts", [2, 3, 20])
@pytest.mark.parametrize("settings", [{}, {"objective": ("kd", "feature_mse"), "student_layer": "penultimate"}])
def test_a_batch_in_parts_is_the_whole_batch(cache, parts, settings):
    found = []
    for count in (1, parts):
        student = Plain()
        learn = StudentConfig(
            device="cpu", batch_size=13, epochs=3, learning_rate=0.02, grad_accumulation=count, **settings
        )
        result = train_student(student, DATA, cache, config=learn)
        found.append((student.state_dict(), [(entry["loss"], entry["train_accuracy"]) for entry in result.epochs]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=0, atol=1e-9)
    assert found[1][1] == [pytest.approx(each, abs=1e-9) for each in found[0][1]]


def test_parts_and_processes_together_follow_the_trajectory_of_one(tmp_path):
    expected = Plain()
    fit(expected, config())

    def work(processes):
        student = Plain()
        fit(student, config(grad_accumulation=2), processes=processes)
        return student.state_dict()

    for found in together(2, work, tmp_path):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


def test_a_part_has_fewer_samples_than_the_batch():
    seen = []

    class Watched(Plain):
        def forward(self, inputs):
            if self.training:
                seen.append(len(inputs))
            return super().forward(inputs)

    fit(Watched(), config(grad_accumulation=3, epochs=1))
    assert seen == [4, 4, 5] * 4 + [2]


def test_an_objective_across_the_batch_is_refused_in_parts(cache):
    settings = StudentConfig(device="cpu", grad_accumulation=2, objective=("kd", "dist"))
    with pytest.raises(UsageError, match="--objective dist compares"):
        train_student(Plain(), DATA, cache, config=settings)


# ---- how it computes


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.formats = set()

    def forward(self, inputs):
        hidden = self.norm(self.convolution(inputs))
        self.formats.add(hidden.is_contiguous(memory_format=torch.channels_last))
        return self.head(hidden.relu().mean(dim=(2, 3)))


def test_channels_last_computes_the_same_in_its_format():
    plain, other = Convolution(), Convolution()
    first = fit(plain, config())
    second = fit(other, config(memory_format="channels-last"))
    assert (plain.formats, other.formats) == ({False}, {True})
    assert second.epochs[-1]["loss"] == pytest.approx(first.epochs[-1]["loss"], abs=1e-4)


class Compiler:
    """In the place of torch.compile, which takes a minute."""

    def __init__(self, problem=None, after=0):
        self.calls, self.problem, self.after = 0, problem, after

    def __call__(self, module):
        def run(inputs):
            self.calls += 1
            if self.problem is not None and self.calls > self.after:
                raise self.problem
            return module(inputs)

        return run


def test_a_compiled_network_trains_alike(monkeypatch):
    expected = fit(Plain(), config()).epochs[-1]["loss"]
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    assert fit(Plain(), config(compile=True)).epochs[-1]["loss"] == expected
    assert compiler.calls == 15


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, capsys):
    expected = fit(Plain(), config()).epochs[-1]["loss"]
    compiler = Compiler(problem=RuntimeError("no C++ compiler"))
    monkeypatch.setattr(torch, "compile", compiler)
    assert fit(Plain(), config(compile=True)).epochs[-1]["loss"] == expected
    assert compiler.calls == 1
    assert "torch.compile fails on Plain, which runs as it is: RuntimeError: no C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "decayed"), [("sgd", 3), ("adam", 3), ("adamw", 3)])
def test_no_decay_for_biases_and_norms(optimizer, decayed):
    module = Convolution()
    weights, vectors = build_optimizer(
        module.parameters(), config(optimizer=optimizer, weight_decay=0.1, decay_norm_bias=False)
    ).param_groups
    assert [len(weights["params"]), len(vectors["params"])] == [2, 4]
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    (alone,) = build_optimizer(module.parameters(), config(optimizer=optimizer, weight_decay=0.1)).param_groups
    assert len(alone["params"]) == 6


# ---- early stopping, and what is kept and printed


def scripted(monkeypatch, accuracies, nlls=None):
    """Validation results, in turn."""
    results = iter(zip(accuracies, nlls or [1.0] * len(accuracies), strict=True))

    def found(*_, **__):
        accuracy, nll = next(results)
        return SimpleNamespace(scores={"accuracy": accuracy, "nll": nll})

    monkeypatch.setattr(loop, "evaluator_of", lambda _: found)


def test_training_stops_when_nothing_gets_better(monkeypatch, capsys):
    scripted(monkeypatch, [0.5, 0.6, 0.6, 0.4, 0.9])
    result = fit(Plain(), config(epochs=9, val_fraction=0.2, patience=2))
    assert len(result.epochs) == 4
    assert "stopped after epoch 4 of 9: 2 epochs without a better validation accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("nll", 3)])
def test_the_metric_chooses_the_best_epoch(tmp_path, monkeypatch, metric, best):
    from kdcache.core.json_records import to_json
    from kdcache.core.run_dir import RunFolder

    settings = config(epochs=4, val_fraction=0.2, metric=metric)
    scripted(monkeypatch, [0.5, 0.7, 0.6, 0.7], [1.0, 0.9, 0.8, 0.85])
    fit(Plain(), settings, run=RunFolder(tmp_path / "run", to_json(settings), resume=False))
    assert read_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == best


def test_a_stopped_run_is_finished_and_more_patience_is_another_setting(tmp_path):
    run = ("train-teacher", "--out", tmp_path / "t", "--model", "mlp", "--device", "cpu", "--val-fraction", "0.1")
    run = (*run, "--learning-rate", "1e-9", "--epochs", "9", "--patience", "1")
    answer(*run)
    before = (tmp_path / "t" / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 2
    answer(*run, "--resume")
    assert (tmp_path / "t" / "metrics.jsonl").read_text() == before
    assert "patience was 1 and is 2" in refused(2, *run[:-1], "2", "--resume")


def test_weights_of_some_epochs_are_kept_and_steps_are_printed(tmp_path, capsys):
    run = ("train-teacher", "--out", tmp_path / "t", "--model", "mlp", "--device", "cpu", "--epochs", "4")
    answer(*run, "--save-every", "2", "--log-every", "5", "--tensorboard", "--batch-size", "128")
    assert sorted(path.name for path in (tmp_path / "t").glob("epoch-*.pt")) == ["epoch-0002.pt", "epoch-0004.pt"]
    last, best = (read_checkpoint(tmp_path / "t" / name)["state_dict"] for name in ("epoch-0004.pt", "best.pt"))
    assert all(torch.equal(last[name], best[name]) for name in best)
    metrics = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4


def test_a_line_of_steps_has_the_means_since_the_last_one(capsys):
    losses = []
    fit(Plain(), config(epochs=1, log_every=2), on_step=lambda step, parts: losses.append(float(parts["loss"])))
    lines = [line for line in capsys.readouterr().err.splitlines() if ", step " in line]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/1, step 2/5", "epoch 1/1, step 4/5"]
    assert f"loss {(losses[2] + losses[3]) / 2:.4g}" in lines[1]
    assert "learning_rate 0.02, samples_per_s" in lines[1]


@pytest.mark.parametrize("option", [("--patience", "3"), ("--metric", "nll")])
def test_validation_options_need_a_validation_part(tmp_path, option):
    message = refused(2, "train-teacher", "--out", tmp_path / "t", *option)
    assert "is given without --val-fraction" in message
