"""Every objective on one small student on MNIST, and what features of a convolution cost to store and to train with.

The table needs the real MNIST in KDCACHE_TEST_DATA; the costs are measured on noise of its shape.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.core.config import DumpConfig, StudentConfig, TrainConfig
from kdcache.data.dataset import IndexedDataset
from kdcache.data.registry import open_dataset
from kdcache.distill.objective import label_objective
from kdcache.distill.student.train_student import train_student
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.evaluate import evaluate_model
from kdcache.models.registry import build_model, count_parameters
from kdcache.store.layout import predicted_bytes
from kdcache.store.records import Preprocess
from tests.benchmarks.data import IMAGE, images, network
from tests.benchmarks.timing import side_by_side

SEEDS, TEACHER_EPOCHS = 3, 8
STUDENT = StudentConfig(
    device="cpu", epochs=6, batch_size=128, learning_rate=3e-3, schedule="cosine", warmup_epochs=0.5, alpha=1.0
)
TEACHER = TrainConfig(device="cpu", epochs=TEACHER_EPOCHS, learning_rate=2e-3, schedule="cosine", ema=0.999)
# The teacher's last maps, (32, 7, 7), and what its logits are made from, (128,).
MAPS, VECTOR = "features", "penultimate"
KD = "kd:temperature=4"
ARMS: dict[str, tuple[str, ...]] = {
    "labels only": (),
    "kd": (KD,),
    "kd and labels": (f"{KD},weight=0.9", "hard_cross_entropy:weight=0.1"),
    "soft_cross_entropy": ("soft_cross_entropy",),
    "logit_mse": ("logit_mse",),
    "decoupled_kd": ("decoupled_kd:temperature=4,warmup=2",),
    "dist": ("dist:temperature=4",),
    "standardized_kd": ("standardized_kd",),
    "kd + feature_mse": (KD, f"feature_mse:layer={VECTOR}"),
    "kd + attention_transfer": (KD, f"attention_transfer:layer={MAPS},student-layer=features,weight=100"),
    "kd + similarity_preserving": (KD, f"similarity_preserving:layer={VECTOR},weight=100"),
    "kd + relational_distance": (KD, f"relational_distance:layer={VECTOR},weight=10"),
    "kd + relational_angle": (KD, f"relational_angle:layer={VECTOR},weight=20"),
    "kd + contrastive": (KD, f"contrastive:layer={VECTOR},weight=0.2"),
}


class SlimCNN(nn.Module):
    """The teacher's shape with a quarter of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(392, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, inputs_bchw: Tensor) -> Tensor:
        return self.classifier(self.features(inputs_bchw))


def run(*, rounds: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _costs(Path(folder), rounds, device)
        if "KDCACHE_TEST_DATA" in os.environ:
            _table(Path(folder))
        else:
            print("objectives: the table needs the real MNIST; set KDCACHE_TEST_DATA to a folder that holds it")


def _costs(folder: Path, rounds: int, device: str) -> None:
    """Dump and epoch with logits only, with pooled and with whole maps of a convolution."""
    dataset, teacher, student = images(16_384), network("cnn"), network("mlp")
    kinds: dict[str, DumpConfig] = {
        "logits only": DumpConfig(device=device),
        "maps pooled (32)": DumpConfig(device=device, features=(MAPS,), pool="avg"),
        "maps whole (32×7×7)": DumpConfig(device=device, features=(MAPS,), pool="none"),
    }
    turn = iter(range(10**6))

    def dump(config: DumpConfig) -> float:
        return dump_teacher(teacher, dataset, out=folder / f"{next(turn)}", preprocess=IMAGE, config=config).seconds

    side_by_side(
        {name: lambda config=config: dump(config) for name, config in kinds.items()},
        rounds=rounds,
        what=f"dump of a cnn over {len(dataset):,} samples",
        target={},
    )
    caches = {}
    for name, config in kinds.items():
        result = dump_teacher(teacher, dataset, out=folder / name, preprocess=IMAGE, config=config)
        files = [file for file in (folder / name).rglob("c/**/*") if file.is_file() and "ledger" not in file.parts]
        stored = sum(file.stat().st_size for file in files)
        print(f"  {name:<28} predicted {predicted_bytes(result.manifest):,} bytes, stored {stored:,}")
        caches[name] = folder / name

    def epoch(name: str) -> float:
        extra = () if name == "logits only" else ("feature_mse" if "pooled" in name else "similarity_preserving",)
        config = StudentConfig(device=device, epochs=1, objective=("kd", *extra))
        return train_student(student, dataset, caches[name], preprocess=IMAGE, config=config).epoch_seconds[0]

    side_by_side(
        {name: lambda name=name: epoch(name) for name in caches},
        rounds=rounds,
        what="one epoch of an mlp student: kd; kd and feature_mse; kd and similarity_preserving",
        target={},
    )


class _Scene:
    """Data and a cache with both features, for forked workers."""

    def __init__(self, folder: Path) -> None:
        root = os.environ["KDCACHE_TEST_DATA"]
        self.data: dict[str, IndexedDataset] = {
            split: open_dataset("mnist", split=split, data_root=root) for split in ("train", "test")
        }
        dataset = self.data["train"]
        self.preprocess = Preprocess(mean=dataset.default_mean, std=dataset.default_std)
        teacher = build_model(
            "cnn", num_classes=10, input_shape=dataset.input_shape, seed=0, default=self.preprocess
        ).module
        data = training_data(dataset, self.preprocess, TEACHER)
        teacher = train(teacher, data, objective=label_objective(0.0), config=TEACHER).module
        print(f"teacher, cnn: {self.accuracy(teacher):.2%}, {count_parameters(teacher):,} parameters", flush=True)
        self.cache = folder / "mnist.zarr"
        config = DumpConfig(device="cpu", features=(VECTOR, MAPS), pool="none")
        dump_teacher(teacher, dataset, out=self.cache, preprocess=self.preprocess, config=config)

    def accuracy(self, module: nn.Module) -> float:
        return evaluate_model(module, self.data["test"], preprocess=self.preprocess, config=STUDENT).accuracy

    def student(self, arm: str, seed: int) -> tuple[float, float]:
        """Test accuracy of one student after its last epoch, and seconds an epoch."""
        torch.set_num_threads(1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            student = SlimCNN()
        config = replace(STUDENT, seed=seed, distill=bool(ARMS[arm]), objective=ARMS[arm])
        result = train_student(student, self.data["train"], self.cache, preprocess=self.preprocess, config=config)
        return self.accuracy(result.module), statistics.median(result.epoch_seconds)


# What forked workers find.
_SCENES: list[_Scene] = []


def _student(arm: str, seed: int) -> tuple[float, float]:
    return _SCENES[-1].student(arm, seed)


def _table(folder: Path) -> None:
    _SCENES.append(_Scene(folder))
    began = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        futures = {arm: [pool.submit(_student, arm, seed) for seed in range(SEEDS)] for arm in ARMS}
        found = {arm: [future.result() for future in each] for arm, each in futures.items()}
    print(
        f"students of {count_parameters(SlimCNN()):,} parameters, {STUDENT.epochs} epochs, {SEEDS} seeds, "
        f"{time.perf_counter() - began:.0f} s; test accuracy on MNIST"
    )
    for arm, values in found.items():
        accuracies = [accuracy for accuracy, _ in values]
        each = ", ".join(f"{value:.2%}" for value in accuracies)
        print(
            f"  {arm:<28} {statistics.mean(accuracies):.2%} ± {statistics.stdev(accuracies):.2%}   ({each}); "
            f"{statistics.median(seconds for _, seconds in values):.1f} s an epoch"
        )
