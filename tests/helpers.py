"""Tiny datasets, teachers and looks at a store that several tests share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from kdcache.cli.app import app
from kdcache.data.batch import Batch
from kdcache.data.dataset import ArrayDataset
from kdcache.data.preprocess import as_preprocessor
from kdcache.data.views import Views
from kdcache.distill.teacher.live_teacher import LiveTargets
from kdcache.models.forward import ForwardPass
from kdcache.store.cache import Cache, open_cache
from kdcache.store.layout import shard_key
from kdcache.store.manifest import read_manifest, recorded_sha256
from kdcache.store.resume import ResumePolicy, find_dump
from kdcache.store.row_source import ReadOptions, ReadPlan, RowSource, plan_reading
from kdcache.store.sampler import Sampler, Schedule, always
from kdcache.store.storage.local import LocalStorage

COLUMNS = ("logits", "labels", "input_crc32c")


class Interrupted(BaseException):
    """What Ctrl-C looks like to the library: nothing may catch and translate it."""


def synthetic(
    count: int,
    *,
    shape: tuple[int, ...] = (1, 4, 4),
    classes: int = 4,
    seed: int = 0,
    name: str = "synthetic",
    split: str = "train",
) -> ArrayDataset:
    """uint8 images that can be learnt: one pattern a class, the same for every seed, and noise."""
    patterns = torch.randint(0, 200, (classes, *shape), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = torch.randint(0, 56, (count, *shape), generator=generator)
    return ArrayDataset(
        (patterns[labels] + noise).to(torch.uint8),
        labels.numpy(),
        name=name,
        split=split,
        classes=tuple(f"class {number}" for number in range(classes)),
    )


def tensors(dataset: ArrayDataset) -> tuple[Tensor, np.ndarray]:
    """All inputs and labels, as copies."""
    inputs, labels = dataset.fetch(np.arange(len(dataset)))
    return inputs.clone(), labels.numpy().copy()


def changed(dataset: ArrayDataset, *, inputs: Tensor | None = None, labels: np.ndarray | None = None, **attributes):
    """The same dataset but for what is given."""
    old_inputs, old_labels = tensors(dataset)
    named = {"name": dataset.name, "split": dataset.split, "classes": dataset.classes} | attributes
    return ArrayDataset(old_inputs if inputs is None else inputs, old_labels if labels is None else labels, **named)


def probed_views(dataset, recipe, **options) -> Views:
    """Views that were looked at, as every run does before its first step."""
    views = Views(dataset, recipe, **options)
    views.probe()
    return views


class Items:
    """A map-style dataset that tells no labels before its samples are read."""

    def __init__(self, dataset: ArrayDataset) -> None:
        self.inputs, self.answers = tensors(dataset)
        self.classes = list(dataset.classes)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.answers[index])


class Network(nn.Module):
    """Every layer that answers otherwise in training mode. Counts the rows it answers and stops where told to.

    Args:
        stop_after: rows; the first batch that would go beyond raises `Interrupted`.
    """

    def __init__(
        self, features: int, classes: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, stop_after: int = 10**9
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Flatten(),
                nn.Linear(features, 12),
                nn.BatchNorm1d(12),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(12, classes),
            )
            self.layers[2].running_mean.normal_()
            self.layers[2].running_var.uniform_(0.5, 2)
        self.to(dtype)
        self.rows, self.stop_after = 0, stop_after

    def forward(self, inputs: Tensor) -> Tensor:
        if self.rows + len(inputs) > self.stop_after:
            raise Interrupted
        self.rows += len(inputs)
        return self.layers(inputs)


def plain_forward(
    network: nn.Module, inputs: Tensor, *, mean: float = 0.0, std: float = 1.0, batch: int | None = None
) -> np.ndarray:
    """What a network answers in eval mode to uint8 inputs, without any of kdcache's code."""
    dtype = next(network.parameters()).dtype
    training = [part for part in network.modules() if part.training]
    network.eval()
    with torch.no_grad():
        scaled = (inputs.to(dtype) / 255 - mean) / std
        answers = torch.cat([network(part) for part in scaled.split(batch or len(inputs))]).numpy()
    for part in training:
        part.training = True
    return answers


class Watcher:
    """A join that joins nothing and shows each batch to a function before its step."""

    def __init__(self, look: Callable[[Batch], object]) -> None:
        self.look, self.epochs = look, []

    def start_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __call__(self, batch: Batch) -> Batch:
        self.look(batch)
        return batch


def logit_source(
    cache: Cache, *, seed: int = 0, schedule: Schedule | None = None, options: ReadOptions | None = None
) -> tuple[RowSource, Sampler, ReadPlan]:
    """The row source of a cache's logits, the order that it is read in, and the plan that both come from."""
    part = cache.reader, cache.logit_arrays
    plan = plan_reading([part], options or ReadOptions())
    sampler = plan.sampler(cache.samples(), seed)
    return plan.source(part, schedule or always(0), sampler), sampler, plan


def columns(path: Path, split: str = "train") -> dict[str, np.ndarray]:
    cache = open_cache(path, split)
    return {name: cache.column(name) for name in COLUMNS}


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def generator_states() -> list[bytes]:
    """The states of the generators that belong to the user."""
    return [
        torch.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state()).encode(),
        repr(random.getstate()).encode(),
    ]


def kdcache(*arguments: object, stdin: str = "") -> Result:
    """Run a command in this process. Whatever escapes from it would be a traceback for the user."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin or None)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    assert "error: unexpected " not in result.output, result.output
    return result


def answer(*arguments: object) -> dict[str, Any]:
    """The one JSON object that a command prints with --json."""
    result = kdcache(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    assert result.stdout.count("\n") == 1
    return found


def refused(exit_code: int, *arguments: object) -> str:
    """The message of a command that must fail."""
    result = kdcache(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    return result.stderr


def stored_manifest(split):
    """The manifest in a split's folder."""
    return read_manifest(LocalStorage(split.parent), split.name)


def stored_digest(split):
    """The manifest's sha256 in a split's folder."""
    return recorded_sha256(LocalStorage(split.parent), split.name)


def shard_file(split, array, view, shard):
    """The file of a shard of an array in a split's folder."""
    return split / shard_key(array, view, shard)


def find(path, manifest, **policy):
    """`find_dump` in a folder."""
    return find_dump(LocalStorage(path), manifest, ResumePolicy(**policy))


def live_targets(teacher, preprocess, classes):
    """An online teacher on the device on which it is."""
    device = next(teacher.parameters()).device
    return LiveTargets(ForwardPass(teacher, as_preprocessor(preprocess), device, classes=classes))
