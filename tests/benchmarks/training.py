"""What an epoch of a student costs: with labels only, from the cache, with the live teacher."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.core.config import DumpConfig, StudentConfig
from kdcache.data.dataset import IndexedDataset
from kdcache.data.registry import open_dataset
from kdcache.distill.objective import distillation_objective, label_objective
from kdcache.distill.student.train_student import train_student
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import TrainResult, train
from kdcache.distill.training_data import training_data
from kdcache.models.device import resolve_device
from kdcache.models.registry import build_model
from kdcache.store.records import Preprocess
from tests.benchmarks.data import IMAGE, images, network
from tests.benchmarks.dump import make_photographs
from tests.benchmarks.timing import side_by_side
from tests.helpers import live_targets

# Students of MNIST-shaped samples with steps of about 1, 17 and 50 ms on two cores: samples of an epoch, of a batch.
STUDENTS = {"mlp": (30_000, 128), "cnn": (12_000, 128), "resnet20": (1_440, 24)}
PHOTOGRAPHS, SMALL = 256, Preprocess(resize=64, crop=64, mean=(0.5,) * 3, std=(0.25,) * 3)


def run(*, rounds: int, device: str) -> None:
    for name, (samples, batch) in STUDENTS.items():
        config = StudentConfig(epochs=1, device=device, batch_size=batch)
        _epochs(network(name), network("cnn"), images(samples), IMAGE, name, config, rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), PHOTOGRAPHS)
        dataset = open_dataset(f"folder:{folder}", split="train")

        def built(name: str) -> nn.Module:
            return build_model(name, num_classes=1, input_shape=(3, 64, 64), seed=0, default=SMALL).module

        config = StudentConfig(epochs=1, device=device)
        _epochs(built("cnn"), built("resnet8x4"), dataset, SMALL, "cnn, photographs", config, rounds=rounds)


def _epochs(
    student: nn.Module,
    teacher: nn.Module,
    dataset: IndexedDataset,
    preprocess: Preprocess,
    what: str,
    config: StudentConfig,
    *,
    rounds: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.zarr"
        dump_teacher(teacher, dataset, out=path, preprocess=preprocess, config=DumpConfig(device=config.device))
        live = live_targets(teacher.to(resolve_device(config.device)), preprocess, classes=len(dataset.classes))

        def seconds(result: TrainResult) -> float:
            return result.epoch_seconds[-1]

        def cached(config: StudentConfig) -> float:
            return seconds(train_student(student, dataset, path, preprocess=preprocess, config=config))

        later = {}
        if not dataset.in_memory:
            kept = replace(config, epochs=3, input_memory="4GiB")
            later["from the cache with --input-memory, after the first epoch"] = lambda: cached(kept)

        def alone(objective: Any, join: Any) -> float:
            data = training_data(dataset, preprocess, config, join=join)
            return seconds(train(student, data, objective=objective, config=config))

        steps = -(-len(dataset) // config.batch_size)
        side_by_side(
            {
                "labels only": lambda: alone(label_objective(0.0), None),
                "from the cache": lambda: cached(config),
                **later,
                "with the live teacher": lambda: alone(distillation_objective(config), live),
            },
            rounds=rounds,
            what=f"an epoch of {what}: {steps} steps of batch {config.batch_size}",
            target={"from the cache": "target ≤ 1.02 for steps of 10 ms and more"},
        )
