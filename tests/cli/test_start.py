"""What a command imports before its first step."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.core.config import TrainConfig
from kdcache.distill.optim import build_optimizer

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

USE = """
import sys, torch
from kdcache.core.config import TrainConfig
from kdcache.distill.optim import build_optimizer
for name in ("adam", "adamw", "sgd"):
    module = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(module.parameters(), TrainConfig(optimizer=name))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(module(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
print([name for name in ("torch._dynamo", "sympy", "torch._inductor") if name in sys.modules])
"""


def test_a_training_step_does_not_import_torchs_compiler():
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


RUN = """
import atexit, sys
heavy = ("torchvision", "torch._dynamo", "torch._inductor", "sympy", "matplotlib", "transformers", "timm")
atexit.register(lambda: print([name for name in heavy if name in sys.modules]))
from kdcache.cli.app import main
main()
"""


def test_a_student_of_our_own_is_trained_without_torchvision_and_torchs_compiler(tmp_path):
    cache = Path(__file__).parents[1] / "fixtures" / "run-1" / "cache.zarr"
    arguments = ["--cache", cache, "--student", "mlp", "--epochs", "1", "--device", "cpu", "--out", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train-student", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (tmp_path / "run" / "best.pt").exists()
    assert done.stdout.splitlines()[-1] == "[]"


def steps(optimizer, module):
    for step in range(4):
        optimizer.zero_grad()
        (module(torch.full((3, 4), 1.0 + step)) ** 2).sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_of_torchs_own_optimizer(name):
    config = TrainConfig(optimizer=name, learning_rate=0.01, weight_decay=0.1)
    modules = [nn.Linear(4, 2), nn.Linear(4, 2)]
    modules[1].load_state_dict(modules[0].state_dict())
    options = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    own = build_optimizer(modules[0].parameters(), config)
    torchs = OPTIMIZERS[name](modules[1].parameters(), lr=0.01, weight_decay=0.1, fused=True, **options)
    for one, other in zip(steps(own, modules[0]), steps(torchs, modules[1]), strict=True):
        assert torch.equal(one, other)
    assert own.state_dict().keys() == torchs.state_dict().keys()
    own.load_state_dict(copy.deepcopy(torchs.state_dict()))  # the state of a run that was stopped before
    for one, other in zip(steps(own, modules[0]), steps(torchs, modules[1]), strict=True):
        assert torch.equal(one, other)
    assert all(parameter.requires_grad for parameter in modules[0].parameters())
