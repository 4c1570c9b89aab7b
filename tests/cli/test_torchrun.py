"""Both stages under PyTorch's launcher, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kdcache.models.checkpoints import read_checkpoint
from tests.helpers import answer, kdcache, refused, tree
from tests.processes import launched

# Ends process 1 by SIGKILL at a step, once.
STUDENT = """
import os, signal
from pathlib import Path
from torch import nn

class Student(nn.Sequential):
    steps = 0

    def forward(self, inputs):
        self.steps += self.training
        if str(self.steps) == os.environ.get("KILL_AT_STEP") and os.environ["RANK"] == "1":
            if not Path("marker").exists():
                Path("marker").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs)

def student(num_classes):
    return Student(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
"""


def torchrun(folder, *arguments, restarts=0):
    """`kdcache` in two processes that torchrun starts."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", restarts)
    command = [sys.executable, *map(str, (*launcher, "-m", "kdcache", *arguments))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("torchrun")
    answer("train-teacher", "--out", root / "t", "--model", "mlp", "--epochs", "1", "--device", "cpu")
    answer("dump-teacher", "--teacher", "mlp", "--checkpoint", root / "t/best.pt", "--out", root / "single.zarr")
    return root


@pytest.fixture
def folder(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return root


def test_a_dump_by_torchrun_is_the_dump_of_one_process(folder):
    dump = ("dump-teacher", "--teacher", "mlp", "--checkpoint", "t/best.pt", "--shard-rows", "64", "--device", "cpu")
    torchrun(folder, *dump, "--out", "two.zarr")
    # torchrun gives each process one thread, which is recorded, because last bits depend on it.
    launched(1, lambda rank: answer(*dump, "--out", "one.zarr"), folder)
    assert tree(folder / "two.zarr") == tree(folder / "one.zarr")


def test_a_killed_process_is_restarted_and_the_run_ends_equal(folder, monkeypatch):
    """Process 1 is killed in the second epoch; torchrun starts both again, and they continue from `last.pt`."""
    (folder / "own_student.py").write_text(STUDENT)
    learn = ("train-student", "--cache", "single.zarr", "--student", "py:own_student:student", "--epochs", "3")
    learn = (*learn, "--device", "cpu", "--batch-size", "128", "--json")

    def whole(rank):
        result = kdcache(*learn, "--out", "whole")
        assert result.exit_code == 0, result.stderr

    launched(2, whole, folder / "logs")
    monkeypatch.setenv("KILL_AT_STEP", "20")
    done = torchrun(folder, *learn, "--out", "killed", restarts=1)
    assert "continuing after epoch 1 of 3" in done.stderr
    (line,) = done.stdout.strip().splitlines()  # printed once
    assert json.loads(line)["checkpoint"] == "killed/best.pt"
    assert (folder / "marker").exists()
    killed, whole = (read_checkpoint(folder / name / "best.pt")["state_dict"] for name in ("killed", "whole"))
    for key, value in whole.items():
        assert torch.equal(killed[key], value), key
    alone = [json.loads((folder / name / "result.json").read_text()) for name in ("killed", "whole")]
    assert alone[0]["test_accuracy"] == alone[1]["test_accuracy"]


def test_what_only_one_process_can_do_is_refused(folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(2, "sweep", "--cache", folder / "single.zarr", "--out", folder / "sweep")
    assert "sweep is started as 2 processes" in message
    message = refused(2, "train-student", "--cache", folder / "single.zarr", "--out", folder / "run", "--device", "cpu")
    assert "MASTER_ADDR" in message
    monkeypatch.delenv("RANK")
    message = refused(2, "train-student", "--cache", folder / "single.zarr", "--out", folder / "run", "--device", "cpu")
    assert "RANK is not" in message


def test_synchronised_batch_normalisation_needs_several_gpus(folder):
    message = refused(
        *(2, "train-student", "--cache", folder / "single.zarr", "--out", folder / "run", "--sync-batchnorm"),
        *("--device", "cpu"),
    )
    assert "--sync-batchnorm" in message
    assert not (folder / "run").exists()
