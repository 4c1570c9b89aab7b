"""A sweep of eight settings from one cache, against the same eight with the live teacher at every step."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

from torch import nn

from kdcache.core.config import DumpConfig, StudentConfig
from kdcache.distill.objective import Join, distillation_objective
from kdcache.distill.student.soft_targets import CachedTargets
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.device import resolve_device
from kdcache.models.registry import count_parameters
from kdcache.store.cache import open_cache
from tests.benchmarks.data import IMAGE, images, network
from tests.benchmarks.timing import side_by_side
from tests.helpers import live_targets, logit_source

SAMPLES, EPOCHS = 8_192, 2
SETTINGS = list(itertools.product((1.0, 2.0, 4.0, 8.0), (0.5, 0.9)))
PAIRS = (("cnn", "mlp"), ("resnet20", "cnn"))


def run(*, rounds: int, device: str) -> None:
    dataset = images(SAMPLES)
    for teacher_name, student_name in PAIRS:
        teacher = network(teacher_name).to(resolve_device(device))

        def students(join: Join, name: str = student_name) -> list[nn.Module]:
            configs = [
                StudentConfig(device=device, epochs=EPOCHS, temperature=temperature, alpha=alpha)
                for temperature, alpha in SETTINGS
            ]
            return [
                train(
                    network(name),
                    training_data(dataset, IMAGE, config, join=join),
                    objective=distillation_objective(config),
                    config=config,
                ).module
                for config in configs
            ]

        def from_cache(teacher: nn.Module = teacher) -> float:
            """The dump, and then the students."""
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache.zarr"
                dump_teacher(teacher, dataset, out=path, preprocess=IMAGE, config=DumpConfig(device=device))
                cache = open_cache(path)
                students(CachedTargets([cache], [logit_source(cache)[0]]))
            return time.perf_counter() - began

        def live(teacher: nn.Module = teacher) -> float:
            began = time.perf_counter()
            students(live_targets(teacher, IMAGE, classes=10))
            return time.perf_counter() - began

        side_by_side(
            {"from one cache, with its dump": from_cache, "with the live teacher": live},
            rounds=rounds,
            what=f"{len(SETTINGS)} {student_name} students ({count_parameters(network(student_name)):,} parameters) of "
            f"a {teacher_name} ({count_parameters(teacher):,}), {EPOCHS} epochs of {SAMPLES:,} samples each",
            target={},
        )
