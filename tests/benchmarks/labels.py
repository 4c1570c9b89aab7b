"""What a cache gives where labels are few or several: MNIST with 1 % of its labels, and two digits on one canvas.

Needs the real MNIST in KDCACHE_TEST_DATA.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.core.config import DumpConfig, StudentConfig, TrainConfig
from kdcache.data.dataset import ArrayDataset, IndexedDataset
from kdcache.data.map_dataset import as_indexed
from kdcache.data.registry import open_dataset
from kdcache.data.views import Views
from kdcache.distill.objective import label_objective
from kdcache.distill.student.train_student import train_student
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.evaluate import evaluate_model
from kdcache.models.evaluate_multi_label import evaluate_multi_label
from kdcache.models.registry import build_model
from kdcache.store.records import UNLABELLED, Preprocess, ViewRecipe

SEEDS, LABELLED, CANVASES = 3, 600, {"train": 10_000, "test": 4_000}
TEACHER = TrainConfig(device="cpu", epochs=4, learning_rate=2e-3, schedule="cosine")
STUDENT = StudentConfig(device="cpu", epochs=6, learning_rate=3e-3, schedule="cosine", temperature=4, alpha=0.9)
SCALE = Preprocess(mean=(0.13,), std=(0.31,))


def run(*, rounds: int, device: str) -> None:
    if "KDCACHE_TEST_DATA" not in os.environ:
        print("labels: needs the real MNIST; set KDCACHE_TEST_DATA to a folder that holds it")
        return
    digits = {
        split: open_dataset("mnist", split=split, data_root=os.environ["KDCACHE_TEST_DATA"])
        for split in ("train", "test")
    }
    with tempfile.TemporaryDirectory() as folder:
        _few_labels(digits, Path(folder))
        _several_classes(digits, Path(folder))


def _network(name: str, dataset: IndexedDataset, seed: int) -> nn.Module:
    return build_model(name, num_classes=10, input_shape=dataset.input_shape, seed=seed, default=SCALE).module


def _taught(name: str, dataset: IndexedDataset, config: TrainConfig, seed: int = 0) -> nn.Module:
    # On augmented samples, because what a teacher learns from these reaches a student that sees plain ones.
    views = Views(dataset, ViewRecipe(augment="affine", seed=seed))
    data = training_data(views, SCALE, config, schedule=lambda epoch: epoch)
    return train(_network(name, dataset, seed), data, objective=label_objective(0.0), config=config).module


def _print(arm: str, scores: list[float]) -> None:
    each = ", ".join(f"{score:.2%}" for score in scores)
    print(f"  {arm:<44} {statistics.mean(scores):.2%} ± {statistics.stdev(scores):.2%}   ({each})", flush=True)


def _few_labels(digits: dict[str, IndexedDataset], folder: Path) -> None:
    """A teacher of all labels, and students of a split of which 1 % is labelled; steps are equal."""
    whole = digits["train"]
    labels = whole.labels()
    assert labels is not None, "MNIST is in memory"
    known = np.random.default_rng(0).permutation(len(whole))[:LABELLED]
    few = np.full(len(whole), UNLABELLED)
    few[known] = labels[known]
    inputs = whole.shared_inputs(np.arange(len(whole)))
    assert isinstance(inputs, torch.Tensor), "likewise"
    data = ArrayDataset(inputs, few, name="mnist", split="train", classes=whole.classes)

    def accuracy(module: nn.Module) -> float:
        return evaluate_model(module, digits["test"], preprocess=SCALE, config=STUDENT).accuracy

    teacher = _taught("cnn", whole, TEACHER)
    print(
        f"MNIST with {LABELLED} of {len(whole):,} labels, mlp student; test accuracy; teacher {accuracy(teacher):.2%}"
    )
    dump_teacher(teacher, data, out=folder / "few.zarr", preprocess=SCALE, config=DumpConfig(device="cpu"))
    # As many steps as on all samples.
    alone = replace(STUDENT, distill=False, epochs=STUDENT.epochs * len(whole) // LABELLED)
    arms = {
        f"{LABELLED} labels alone": alone,
        "cache, all samples, 1 % labelled": STUDENT,
        "cache, all samples, no labels": replace(STUDENT, alpha=1.0),
    }
    for arm, config in arms.items():
        _print(arm, [accuracy(_student(data, folder / "few.zarr", config, seed)) for seed in range(SEEDS)])


def _student(dataset: IndexedDataset, cache: Path, config: StudentConfig, seed: int) -> nn.Module:
    student = _network("mlp", dataset, seed)
    return train_student(student, dataset, cache, preprocess=SCALE, config=replace(config, seed=seed)).module


def _canvases(digits: IndexedDataset, count: int) -> IndexedDataset:
    """Canvases of 28 × 56 pixels with no, one or two digits; a label is 0 and 1 for each of ten classes."""
    random = np.random.default_rng(count)
    labels = digits.labels()
    assert labels is not None, "MNIST is in memory"
    images = torch.zeros(count, 1, 28, 56, dtype=torch.uint8)
    vectors = np.zeros((count, 10), np.uint8)
    for at in range(count):
        for side in range(2):
            if random.random() < 2 / 3:
                sample = int(random.integers(len(digits)))
                images[at, :, :, 28 * side : 28 * side + 28] = digits.shared_inputs([sample])[0]
                vectors[at, labels[sample]] = 1
    items: Any = _Canvases(images, vectors)
    return as_indexed(items, name="canvases", split=digits.split)


class _Canvases:
    classes = tuple("0123456789")

    def __init__(self, images: torch.Tensor, targets: np.ndarray[Any, Any]) -> None:
        self._images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        return self._images[index], self.targets[index]


def _several_classes(digits: dict[str, IndexedDataset], folder: Path) -> None:
    data = {split: _canvases(digits[split], count) for split, count in CANVASES.items()}

    def score(module: nn.Module) -> float:
        return evaluate_multi_label(module, data["test"], preprocess=SCALE, config=STUDENT).scores["map"]

    teacher = _taught("cnn", data["train"], replace(TEACHER, epochs=20))
    print(f"two digits on one canvas, {CANVASES['train']:,} samples, mlp student; mAP; teacher {score(teacher):.2%}")
    dump_teacher(teacher, data["train"], out=folder / "two.zarr", preprocess=SCALE, config=DumpConfig(device="cpu"))
    longer = replace(STUDENT, epochs=12)
    for arm, config in {
        "labels alone": replace(longer, distill=False),
        "cache, T = 2, alpha 0.9": replace(longer, temperature=2),
        "cache, T = 1, alpha 0.9": replace(longer, temperature=1),
    }.items():
        _print(arm, [score(_student(data["train"], folder / "two.zarr", config, seed)) for seed in range(SEEDS)])
