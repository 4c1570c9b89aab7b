import gc
import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import TrainConfig
from kdcache.core.errors import TargetExists, TrainingDiverged, UsageError
from kdcache.core.json_records import to_json
from kdcache.core.run_dir import RunFolder
from kdcache.data.batch_sampler import EpochBatches, split_validation
from kdcache.data.dataset import ArrayDataset
from kdcache.distill.objective import label_objective
from kdcache.distill.optim import learning_rate_factor
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.checkpoints import read_checkpoint
from kdcache.models.evaluate import Evaluation
from kdcache.store.records import Preprocess
from kdcache.store.sampler import ExactSampler
from tests.helpers import Interrupted, Network, Watcher, generator_states, synthetic

PLAIN = Preprocess()
OBJECTIVE = label_objective(0.0)


def config(**settings):
    return TrainConfig(**{"device": "cpu", "batch_size": 16, "epochs": 3} | settings)


def run_folder(path, settings, *, resume=False):
    return RunFolder(path, to_json(settings), resume=resume)


def fit(settings, *, module=None, dataset=None, join=None, **options):
    """Train and return (result, the loss of every step)."""
    seen = []
    result = train(
        Network(16, 4) if module is None else module,
        training_data(synthetic(70) if dataset is None else dataset, PLAIN, settings, join=join),
        **{"objective": OBJECTIVE, "config": settings}
        | {"on_step": lambda step, parts: seen.append((step, float(parts["loss"])))}
        | options,
    )
    assert [step for step, _ in seen] == list(range(seen[0][0], seen[0][0] + len(seen)))
    return result, [loss for _, loss in seen]


def without_seconds(entries):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (8, 4, [4, 4]), (3, 4, [3]), (1, 4, [1]), (5, 1, [1, 1, 1, 1, 1])],
)
def test_an_epoch_has_each_sample_once(count, batch_size, sizes):
    indices = np.arange(100, 100 + count)
    batches = EpochBatches(ExactSampler(indices, 0), batch_size)
    epochs = []
    for epoch in range(4):
        batches.epoch = epoch
        parts = [request.indices for request in batches]
        assert [len(part) for part in parts] == sizes
        assert len(batches) == len(sizes)
        epochs.append(np.concatenate(parts).tolist())
        assert sorted(epochs[-1]) == indices.tolist()
        assert epochs[-1] == np.concatenate([request.indices for request in batches]).tolist()
    assert count < 8 or len({tuple(epoch) for epoch in epochs}) == 4
    other_seed = EpochBatches(ExactSampler(indices, 1), batch_size)
    other_seed.epoch = 0
    others = [request.indices for request in other_seed]
    assert count < 8 or np.concatenate(others).tolist() != epochs[0]


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_training_and_validation_part_are_a_partition(fraction):
    indices = np.arange(100, 140)
    train_part, validation = split_validation(indices, fraction, seed=3)
    assert len(validation) == 40 * fraction
    assert sorted([*train_part, *validation]) == indices.tolist()
    assert not fraction or validation.tolist() != split_validation(indices, fraction, seed=4)[1].tolist()


def test_one_seed_gives_one_run_and_leaves_the_global_generators_alone():
    before = generator_states()
    first, losses = fit(config(val_fraction=0.2, seed=5))
    assert generator_states() == before
    torch.rand(3)
    again, losses_again = fit(config(val_fraction=0.2, seed=5))
    assert losses == losses_again
    assert without_seconds(first.epochs) == without_seconds(again.epochs)
    assert_equal_weights(first.module.state_dict(), again.module.state_dict())
    assert losses != fit(config(val_fraction=0.2, seed=6))[1]
    assert len(first.epoch_seconds) == 3
    assert all(seconds > 0 for seconds in first.epoch_seconds)


def test_workers_change_no_loss_and_leave_at_once():
    gc.collect()
    # A loader in a cycle of references keeps its workers until the cycle is collected, and then waits 5 s for each.
    gc.disable()
    try:
        losses = fit(config(epochs=2, workers=2))[1]
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()
    assert losses == fit(config(epochs=2))[1]


RECIPES = {
    "adam": {},
    "sgd": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "schedule": "cosine",
        "warmup_epochs": 1.5,
        "ema": 0.9,
        "clip_norm": 0.5,
        "weight_decay": 1e-3,
        "label_smoothing": 0.1,
    },
    "validated": {"optimizer": "adamw", "schedule": "step", "val_fraction": 0.3, "seed": 1},
    "fp16": {"amp": "fp16"},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("finished_epochs", [0, 1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, recipe, finished_epochs):
    settings = config(epochs=4, **RECIPES[recipe])
    objective = label_objective(settings.label_smoothing)
    whole, losses = fit(settings, objective=objective, run=run_folder(tmp_path / "whole", settings))
    finished_steps = finished_epochs * len(losses) // 4
    seen = []

    def stop(step, parts):
        seen.append(float(parts["loss"]))
        if step == finished_steps + 1:  # in the middle of an epoch, which must then be forgotten
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(settings, objective=objective, run=run_folder(tmp_path / "stopped", settings), on_step=stop)
    folder = run_folder(tmp_path / "stopped", settings, resume=True)
    other_start = Network(16, 4, seed=9 if finished_epochs else 0)
    rest, losses_of_rest = fit(settings, module=other_start, objective=objective, run=folder)
    assert seen[:finished_steps] + losses_of_rest == losses
    assert without_seconds(rest.epochs) == without_seconds(whole.epochs)
    assert_equal_weights(rest.module.state_dict(), whole.module.state_dict())
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    entries = [without_seconds(map(json.loads, part)) for part in lines]
    assert entries[0] == entries[1] == without_seconds(whole.epochs)
    best = [read_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "stopped")]
    assert best[0]["epoch"] == best[1]["epoch"]
    assert_equal_weights(best[0]["state_dict"], best[1]["state_dict"])


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    settings = config(epochs=2)
    first, _ = fit(settings, run=run_folder(tmp_path / "run", settings))
    folder = run_folder(tmp_path / "run", settings, resume=True)
    again = train(
        Network(16, 4, seed=9),
        training_data(synthetic(70), PLAIN, settings),
        objective=OBJECTIVE,
        config=settings,
        run=folder,
    )
    assert again.epochs == first.epochs
    assert_equal_weights(again.module.state_dict(), first.module.state_dict())


def test_a_run_is_neither_overwritten_nor_continued_with_other_settings(tmp_path):
    settings = config()
    fit(config(epochs=1), run=run_folder(tmp_path / "run", settings))
    with pytest.raises(TargetExists, match="already holds a run"):
        run_folder(tmp_path / "run", settings)
    with pytest.raises(UsageError) as caught:
        run_folder(tmp_path / "run", config(learning_rate=0.25, seed=7), resume=True)
    assert "learning_rate was 0.001 and is 0.25" in caught.value.found
    assert "seed was 0 and is 7" in caught.value.found
    run_folder(tmp_path / "run", config(workers=3), resume=True)
    with pytest.raises(UsageError, match="no run at"):
        run_folder(tmp_path / "nothing", settings, resume=True)


@pytest.mark.parametrize(
    ("epoch", "step", "count"), [(2, 3, 70), (1, 1, 70), (1, 5, 70), (1, 64, 140), (1, 65, 140), (1, 70, 140)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, epoch, step, count, value):
    settings = config(epochs=3, batch_size=16 if count == 70 else 2)
    steps = -(-count // settings.batch_size)
    calls = 0

    def objective(logits, batch, epochs_done):
        nonlocal calls
        calls += 1
        loss = OBJECTIVE(logits, batch)["loss"]
        return {"loss": loss * value if calls == (epoch - 1) * steps + step else loss}

    with pytest.raises(TrainingDiverged) as caught:
        fit(settings, dataset=synthetic(count), objective=objective, run=run_folder(tmp_path / "run", settings))
    assert f"epoch {epoch}, step {step} of {steps}: loss {value:g}" in caught.value.found
    assert calls <= (epoch - 1) * steps + max(64, step + 63)
    assert (tmp_path / "run" / "last.pt").exists() == (epoch > 1)
    if epoch > 1:
        assert [entry["epoch"] for entry in read_checkpoint(tmp_path / "run" / "last.pt")["history"]] == [1]
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


COSINE = [0.5 * (1 + math.cos(math.pi * part / 6)) for part in range(6)]


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1.0] * 8),
        ({"warmup_epochs": 0.75}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine", "warmup_epochs": 0.5}, [1 / 3, 2 / 3, *COSINE]),
        ({"schedule": "step"}, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "step", "milestones": (0.25,), "gamma": 0.5}, [1, 1, *[0.5] * 6]),
    ],
)
def test_the_learning_rate_that_a_step_is_made_with(settings, factors):
    """One weight of gradient 1, so that each step moves it by the learning rate."""
    settings = config(
        epochs=2, batch_size=4, optimizer="sgd", momentum=0.0, learning_rate=0.5, clip_norm=None, **settings
    )
    module = Single()
    positions = []
    fit(
        settings,
        module=module,
        dataset=synthetic(16),
        objective=lambda logits, batch, epochs_done: {"loss": logits.mean()},
        join=Watcher(lambda batch: positions.append(module.position.item())),
    )
    positions = [*positions, module.position.item()]
    assert -np.diff(positions) == pytest.approx([0.5 * factor for factor in factors], abs=1e-6)
    assert [learning_rate_factor(settings, step, 4) for step in range(8)] == pytest.approx(factors)


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        return self.position.expand(len(inputs), 4)


def test_clipping_bounds_the_gradient_and_the_average_is_what_best_holds(tmp_path):
    settings = config(
        epochs=2, batch_size=4, optimizer="sgd", momentum=0.0, learning_rate=1.0, clip_norm=0.25, ema=0.75
    )
    module = Single()
    result = train(
        module,
        training_data(synthetic(16), PLAIN, settings),
        objective=lambda logits, batch, epochs_done: {"loss": logits.mean()},
        config=settings,
        run=run_folder(tmp_path / "run", settings),
    )
    assert module.position.item() == pytest.approx(-0.25 * 8, abs=1e-5)
    average = -0.25
    for step in range(2, 9):
        average = 0.75 * average + 0.25 * (-0.25 * step)
    assert result.module.position.item() == pytest.approx(average, abs=1e-5)
    assert read_checkpoint(tmp_path / "run" / "best.pt")["state_dict"]["position"].item() == pytest.approx(
        average, abs=1e-5
    )


def test_validation_chooses_the_best_and_trains_on_no_sample_of_its_own(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.9, 0.7])
    judged, trained, weights = [], [], []

    def judge(module, dataset, *, indices, **others):
        judged.append(indices.tolist())
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
        right = np.arange(10) < 10 * next(accuracies)
        return Evaluation(true_n=right * 1, predicted_n=np.ones(10, np.int64), top_n=right * 1.0, nll_n=right * 0.0)

    monkeypatch.setattr("kdcache.distill.trainer.evaluator_of", lambda _: judge)
    settings = config(epochs=4, val_fraction=0.3)
    result, _ = fit(
        settings,
        run=run_folder(tmp_path / "run", settings),
        join=Watcher(lambda batch: trained.extend(batch.indices.tolist())),
    )
    assert [entry["val_accuracy"] for entry in result.epochs] == [0.5, 0.9, 0.9, 0.7]
    assert [len(part) for part in judged] == [21] * 4
    assert judged[0] == judged[3]
    assert sorted(trained) == [index for index in range(70) if index not in judged[0] for _ in range(4)]
    best = read_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == 2
    assert_equal_weights(best["state_dict"], weights[1])


def test_without_validation_the_last_epoch_is_best(tmp_path):
    settings = config(epochs=2)
    result, _ = fit(settings, run=run_folder(tmp_path / "run", settings))
    best = read_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == 2
    assert_equal_weights(best["state_dict"], result.module.state_dict())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_on_the_cpu_learns_nearly_the_same(amp):
    _, losses = fit(config())
    mixed, losses_mixed = fit(config(amp=amp))
    assert losses_mixed != losses
    np.testing.assert_allclose(losses_mixed, losses, rtol=0.1)
    assert next(mixed.module.parameters()).dtype == torch.float32


def test_float_inputs_and_labels_train(tmp_path):
    """A check on the numbers that an epoch reports, against a network that cannot change."""
    dataset = ArrayDataset(
        torch.eye(4)[torch.arange(40) % 4],
        np.arange(40) % 4 * (np.arange(40) < 30),
        name="eye",
        split="train",
        classes=tuple("abcd"),
    )
    module = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4))
    result, losses = fit(config(epochs=1, learning_rate=1e-12), module=module, dataset=dataset)
    right = math.log(math.e + 3) - 1
    assert result.epochs[0]["train_accuracy"] == pytest.approx(1 - np.count_nonzero(np.arange(30, 40) % 4) / 40)
    wrong = math.log(math.e + 3)
    share = np.count_nonzero(np.arange(30, 40) % 4) / 40
    weighted = sum(loss * size for loss, size in zip(losses, [16, 16, 8], strict=True)) / 40
    assert weighted == pytest.approx(share * wrong + (1 - share) * right, rel=1e-5)
