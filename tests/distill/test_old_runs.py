"""A run folder of the first version is evaluated, compared and continued by every later one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import answer, refused

# `train-student --student mlp --epochs 1 --batch-size 256 --feed mapped` from a cache of digits, by version 0.1.0
# before its packages; `feed` is now `row_source`, and rows are no longer mapped into memory.
FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE / "student", tmp_path / "s")
    shutil.copytree(FIXTURE / "cache.zarr", tmp_path / "c.zarr")
    return tmp_path / "s"


def test_it_is_evaluated_to_the_recorded_accuracy(run):
    recorded = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert answer("evaluate", "--run", run, "--device", "cpu")["test_accuracy"] == pytest.approx(recorded, abs=0.005)
    (compared,) = answer("compare", run)["runs"]
    assert compared["test_accuracy"] == recorded


def test_it_is_continued_and_another_setting_is_still_refused(run):
    before = torch.load(run / "best.pt", weights_only=True)["state_dict"]
    assert "learning_rate was 0.001 and is 0.5" in refused(
        2, "train-student", "--resume", "--out", run, "--learning-rate", "0.5"
    )
    answer("train-student", "--resume", "--out", run, "--epochs", "2")
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((run / "config.json").read_text())["row_source"] == "auto"
    after = torch.load(run / "best.pt", weights_only=True)["state_dict"]
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
