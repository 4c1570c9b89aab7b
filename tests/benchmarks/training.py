"""What an epoch of a student costs: with labels only, from the cache, with the live teacher."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kdcache.core.config import DumpConfig, StudentConfig
from kdcache.distill.objective import distillation_objective, label_objective
from kdcache.distill.student.soft_targets import CachedTargets
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.device import resolve_device
from kdcache.store.cache import open_cache
from tests.benchmarks.data import IMAGE, images, network
from tests.benchmarks.timing import side_by_side
from tests.helpers import live_targets, logit_source

SAMPLES = 30_000


def run(*, rounds: int, device: str) -> None:
    dataset, teacher = images(SAMPLES), network("cnn")
    config = StudentConfig(epochs=1, device=device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.zarr"
        dump_teacher(teacher, dataset, out=path, preprocess=IMAGE, config=DumpConfig(device=device))
        cache = open_cache(path)
        source, _, _ = logit_source(cache)
        cached = CachedTargets([cache], [source])
        live = live_targets(teacher.to(resolve_device(device)), IMAGE, classes=10)
        labels_only, distill = label_objective(0.0), distillation_objective(config)
        for name in ("mlp", "cnn"):
            student = network(name)

            def epoch(objective, join, student=student):
                data = training_data(dataset, IMAGE, config, join=join)
                result = train(student, data, objective=objective, config=config)
                return result.epoch_seconds[0]

            side_by_side(
                {
                    "labels only": lambda: epoch(labels_only, None),
                    "from the cache": lambda: epoch(distill, cached),
                    "with the live teacher (cnn)": lambda: epoch(distill, live),
                },
                rounds=rounds,
                what=f"one epoch of a {name} student over {SAMPLES:,} MNIST-shaped samples, batch {config.batch_size}",
                target={"from the cache": "target ≤ 1.05"},
            )
