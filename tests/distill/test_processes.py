"""Training by several processes: the trajectory of one, whoever is killed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import DumpConfig, StudentConfig, dump_teacher, train_student
from kdcache.data.batch_sampler import cut_batch
from kdcache.models.distributed import Processes
from tests.helpers import Network, synthetic
from tests.processes import together

# 54 samples in batches of 13: 5 steps an epoch, the last of two samples.
DATA = synthetic(54)
FEATURES = "--features layers.3"


class Plain(nn.Module):
    """A network without BatchNorm and dropout, in float64, of which one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh())
            self.penultimate = nn.Linear(12, 12)
            self.head = nn.Linear(12, 4)
            self.unused = nn.Linear(3, 3)
        self.double()

    def forward(self, inputs):
        return self.head(self.penultimate(self.hidden(inputs)).tanh())


SCENARIOS = {
    "labels": {"distill": False, "val_fraction": 0.2},
    "kd": {"val_fraction": 0.2, "clip_norm": 0.5, "ema": 0.9},
    "streamed": {"row_source": "streamed", "shuffle": "window"},
    "dist": {"objective": ("dist", "hard_cross_entropy")},
    "similarity_preserving": {"objective": ("similarity_preserving",), "student_layer": "hidden"},
    "relational": {"objective": ("kd", "relational_distance:weight=0.5", "relational_angle:weight=2")},
    "contrastive": {"objective": ("kd", "contrastive:weight=0.1,negatives=8")},
    "feature_mse": {"objective": ("kd", "feature_mse:warmup=2")},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp") / "c.zarr"
    config = DumpConfig(device="cpu", features=("layers.3",), shard_rows=16, encoding="float32")
    dump_teacher(Network(16, 4), DATA, out=out, config=config)
    return out


def learn(cache, processes=None, *, epochs=10, out=None, resume=False, **settings):
    """Train a student; its weights and metrics."""
    config = StudentConfig(
        **{"device": "cpu", "batch_size": 13, "epochs": epochs, "workers": 0, "learning_rate": 0.02} | settings
    )
    student = Plain()
    result = train_student(
        student, DATA, cache, config=config, out=out, resume=resume, **({"processes": processes} if processes else {})
    )
    kept = ("loss", "train_accuracy", "val_accuracy", "learning_rate")
    history = [{name: entry[name] for name in kept if name in entry} for entry in result.epochs]
    return result.module.state_dict(), history


def assert_close(found, expected):
    weights, history = found
    for name, value in expected[0].items():
        torch.testing.assert_close(
            weights[name], value, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    for one, other in zip(history, expected[1], strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-9)


@pytest.fixture(scope="module")
def alone(cache):
    return {name: learn(cache, **settings) for name, settings in SCENARIOS.items()}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes_follows_the_trajectory_of_one(tmp_path, cache, alone, count):
    """50 steps in float64; the last batch of an epoch has two samples, which one process computes."""

    def work(processes):
        return {name: learn(cache, processes, **settings) for name, settings in SCENARIOS.items()}

    for rank, found in enumerate(together(count, work, tmp_path)):
        for name, expected in alone.items():
            assert expected[1][0]["loss"] != expected[1][-1]["loss"]
            assert_close(found[name], expected), (rank, name)


def test_a_checkpoint_of_two_processes_continues_on_three(tmp_path, cache, alone):
    settings, out = SCENARIOS["kd"], tmp_path / "run"
    together(2, lambda processes: learn(cache, processes, epochs=4, out=out, **settings), tmp_path / "two")
    found = together(
        3, lambda processes: learn(cache, processes, epochs=10, out=out, resume=True, **settings), tmp_path / "three"
    )
    for each in found:
        assert_close(each, alone["kd"])


@pytest.mark.parametrize("minimum", [1, 2])
def test_the_parts_of_a_batch_partition_it(minimum):
    for count in range(1, 40):
        for size in range(1, 9):
            parts = [cut_batch(count, rank, size, minimum=minimum) for rank in range(size)]
            assert np.concatenate([np.arange(*part) for part in parts]).tolist() == list(range(count))
            lengths = [stop - start for start, stop in parts if stop > start]
            assert max(lengths) - min(lengths) <= 1
            assert min(lengths) >= min(minimum, count)


def test_rows_are_gathered_in_order_and_the_own_ones_keep_their_gradient(tmp_path):
    def work(processes):
        rows = torch.full((4, 2), float(processes.rank + 1), requires_grad=True)
        gathered = processes.gather(rows, processes.rank)  # of the first process none
        (gathered**2).sum().backward()
        return gathered.detach(), rows.grad

    for rank, (gathered, gradient) in enumerate(together(3, work, tmp_path)):
        assert gathered.tolist() == [[2.0, 2.0], [3.0, 3.0], [3.0, 3.0]]
        assert gradient[:rank].tolist() == [[2.0 * (rank + 1)] * 2] * rank
        assert not gradient[rank:].any()


def test_alone_no_collective_does_anything():
    alone = Processes()
    rows = torch.arange(3.0)
    assert alone.alone
    assert alone.first
    assert alone.gather(rows, 2).tolist() == [0, 1]
    assert alone.add_up(rows) is rows
    assert alone.gather_objects("x") == ["x"]
    assert alone.from_first("x") == "x"
