"""Ways of teaching on a task that is not saturated: 10,000 images of CIFAR-10, a small student, equally many steps.

Needs cifar10-jpeg.tar.xz in KDCACHE_TEST_DATA. The teacher is trained on all 50,000 images, which takes an hour on two
cores; it, and the images, are kept under KDCACHE_BENCH (or a folder that is thrown away).
"""

from __future__ import annotations

import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.core.config import ConvertConfig, DumpConfig, StudentConfig, TrainConfig
from kdcache.core.run_dir import RunFolder
from kdcache.data.dataset import ArrayDataset
from kdcache.data.raw_input import read_image
from kdcache.data.views import Views
from kdcache.distill.objective import distillation_objective, label_objective
from kdcache.distill.student.soft_targets import CachedTargets
from kdcache.distill.student.train_student import train_student
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.checkpoints import load_weights
from kdcache.models.evaluate import evaluate_model
from kdcache.models.registry import build_model
from kdcache.store.cache import open_cache
from kdcache.store.convert import convert_cache
from kdcache.store.records import Preprocess, ViewRecipe
from kdcache.store.sampler import always, view_schedule
from tests.helpers import logit_source

ARCHIVE = "cifar10-jpeg.tar.xz"
SEEDS, SAMPLES, VIEWS = 3, 10_000, 6
SCALE = Preprocess(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
TEACHER = TrainConfig(
    device="cpu",
    epochs=14,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    decay_norm_bias=False,
    schedule="cosine",
    warmup_epochs=1,
    amp="bf16",
    memory_format="channels-last",
)
STUDENT = StudentConfig(
    device="cpu", epochs=40, learning_rate=2e-3, schedule="cosine", temperature=4, alpha=0.9, workers=0
)
KD, LABELS = "kd:temperature=4,weight=0.9", "hard_cross_entropy:weight=0.1"
VECTOR = "layer=penultimate"
# By kind of comparison: (cache, settings); without a cache on labels, and without views on plain images.
ARMS: Mapping[str, Mapping[str, tuple[str, dict[str, Any]]]] = {
    "views": {
        "labels, plain images": ("plain", {"distill": False}),
        "labels, views": ("views", {"distill": False}),
        "cache, plain images": ("plain", {}),
        "the plain image's targets for every view": ("fixed", {}),
        "consistent views": ("views", {}),
        "consistent views, 2 of a sample per batch": ("views", {"views_per_sample": 2, "epochs": 20}),
    },
    "objectives, beside labels, on consistent views": {
        "kd, T = 1": ("views", {"temperature": 1.0}),
        "soft_cross_entropy": ("views", {"objective": ("soft_cross_entropy:temperature=4,weight=0.9", LABELS)}),
        "logit_mse": ("views", {"objective": ("logit_mse:weight=0.9", LABELS)}),
        "decoupled_kd": ("views", {"objective": ("decoupled_kd:temperature=4,warmup=2", LABELS)}),
        "dist": ("views", {"objective": ("dist:temperature=4", LABELS)}),
        "standardized_kd": ("views", {"objective": ("standardized_kd:weight=0.9", LABELS)}),
        "kd + feature_mse": ("views", {"objective": (KD, LABELS, f"feature_mse:{VECTOR}")}),
        "kd + relational_distance": (
            "views",
            {"objective": (KD, LABELS, f"relational_distance:{VECTOR},weight=10")},
        ),
        "kd + contrastive": ("views", {"objective": (KD, LABELS, f"contrastive:{VECTOR},weight=0.1")}),
    },
    "encodings, consistent views": {
        "quantized:8": ("quantized:8", {}),
        "quantized:4": ("quantized:4", {}),
        "topk:5": ("topk:5", {}),
        "topk:3": ("topk:3", {}),
        "topk:3, uniform tail": ("topk:3", {"tail": "uniform"}),
        "head": ("head", {}),
    },
}


def residual_network() -> nn.Module:
    """About 1.6 million parameters."""

    def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

    class Residual(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.a, self.b = convolution(channels, channels), convolution(channels, channels)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + self.b(self.a(inputs))

    return nn.Sequential(
        *(convolution(3, 32), convolution(32, 64, 2), Residual(64), convolution(64, 128, 2), Residual(128)),
        *(convolution(128, 256, 2), Residual(256), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
    )


def _images(split: str, archive: Path, folder: Path) -> ArrayDataset:
    kept = folder / f"{split}.npz"
    if not kept.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "images", filter="data")
        classes = sorted(path.name for path in (folder / "images" / split).iterdir())
        files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / "images" / split / name).iterdir())
        ]
        inputs = np.stack([read_image(path).numpy() for path, _ in files])
        np.savez(kept, inputs=inputs, labels=np.array([label for _, label in files]), classes=np.array(classes))
    with np.load(kept) as found:
        names = tuple(map(str, found["classes"]))
        return ArrayDataset(
            torch.from_numpy(found["inputs"]), found["labels"], name="cifar10", split=split, classes=names
        )


class _Scene:
    """Data, teacher and caches, which forked workers find."""

    def __init__(self, folder: Path, archive: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        whole, self.test = (_images(split, archive, folder) for split in ("train", "test"))
        few = np.sort(np.random.default_rng(0).permutation(len(whole))[:SAMPLES])
        inputs, labels = whole.fetch(few)
        self.data = ArrayDataset(inputs, labels.numpy(), name="cifar10", split="train", classes=whole.classes)
        teacher = self._teacher(folder / "teacher", whole)
        common = DumpConfig(device="cpu", batch_size=256)
        self.paths = {name: folder / f"{name}.zarr" for name in ("plain", "views")}
        dump_teacher(teacher, self.data, out=self.paths["plain"], preprocess=SCALE, config=common)
        views = replace(common, views=VIEWS, augment="crop-flip", features=("penultimate",))
        dump_teacher(teacher, self.data, out=self.paths["views"], preprocess=SCALE, config=views)
        for encoding, _ in ARMS["encodings, consistent views"].values():
            path = self.paths[encoding] = folder / f"{encoding.replace(':', '-')}.zarr"
            if encoding == "head":  # which only the teacher itself can give
                config = replace(views, features=(), encoding=encoding)
                dump_teacher(teacher, self.data, out=path, preprocess=SCALE, config=config)
            else:
                convert_cache(self.paths["views"], path, ConvertConfig(encoding=encoding, drop_features=True))

    def _teacher(self, folder: Path, whole: ArrayDataset) -> nn.Module:
        torch.manual_seed(0)
        module = residual_network()
        if not (folder / "best.pt").exists():
            run = RunFolder(folder, {}, resume=(folder / "config.json").exists())
            views = Views(whole, ViewRecipe(augment="crop-flip"))
            data = training_data(views, SCALE, TEACHER, schedule=lambda epoch: epoch)
            train(module, data, objective=label_objective(0.0), config=TEACHER, run=run)
        load_weights(module, folder / "best.pt")
        print(f"teacher: {self.accuracy(module):.2%} of CIFAR-10's test images", flush=True)
        return module

    def accuracy(self, module: nn.Module) -> float:
        return evaluate_model(module, self.test, preprocess=SCALE, config=STUDENT).accuracy

    def student(self, kind: str, settings: dict[str, Any], seed: int) -> float:
        torch.set_num_threads(1)
        config = replace(STUDENT, seed=seed, **settings)
        module = build_model("cnn", num_classes=10, input_shape=(3, 32, 32), seed=seed, default=SCALE).module
        if kind == "fixed":
            schedule = view_schedule("cycle", (), available=VIEWS, seed=seed)
            cache = open_cache(self.paths["plain"])
            source, _, _ = logit_source(cache, seed=seed, schedule=always(0))
            join = CachedTargets([cache], [source], schedule=always(0))
            views = Views(self.data, open_cache(self.paths["views"]).manifest.recipe)
            data = training_data(views, SCALE, config, schedule=schedule, join=join)
            train(module, data, objective=distillation_objective(config), config=config)
        else:
            train_student(module, self.data, self.paths[kind], preprocess=SCALE, config=config)
        return self.accuracy(module)


_SCENES: list[_Scene] = []


def _run(kind: str, settings: dict[str, Any], seed: int) -> float:
    return _SCENES[-1].student(kind, settings, seed)


def run(*, rounds: int, device: str) -> None:
    archive = Path(os.environ.get("KDCACHE_TEST_DATA", "")) / ARCHIVE
    if not archive.is_file():
        print(f"cifar: needs {ARCHIVE}; set KDCACHE_TEST_DATA to a folder that holds it")
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        _SCENES.append(_Scene(Path(os.environ.get("KDCACHE_BENCH", thrown_away)), archive))
        began = time.perf_counter()
        print(f"cnn student, {SAMPLES:,} images, {VIEWS} crop-flip views, {STUDENT.epochs} epochs, {SEEDS} seeds")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
            found = {
                (group, arm): [pool.submit(_run, *what, seed) for seed in range(SEEDS)]
                for group, arms in ARMS.items()
                for arm, what in arms.items()
            }
            said = ""
            for (group, arm), futures in found.items():
                if group != said:
                    print(f" {group}:", flush=True)
                said, values = group, [future.result() for future in futures]
                each = ", ".join(f"{value:.2%}" for value in values)
                print(
                    f"  {arm:<42} {statistics.mean(values):.2%} ± {statistics.stdev(values):.2%}   ({each})", flush=True
                )
        print(f"{time.perf_counter() - began:.0f} s of students")
