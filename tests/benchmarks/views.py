"""What consistent views gain: students of one size, trained for equally many steps on MNIST, taught in five ways.

Needs the real MNIST in KDCACHE_TEST_DATA. Prepares once, and keeps what it prepared, under KDCACHE_BENCH (or a folder
that is thrown away).
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

from kdcache.core.config import DumpConfig, StudentConfig, TrainConfig
from kdcache.core.run_dir import RunFolder
from kdcache.data.batch_sampler import ShardBatches
from kdcache.data.dataset import IndexedDataset
from kdcache.data.kept_inputs import KeptInputs
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.data.registry import open_dataset
from kdcache.data.views import Views
from kdcache.distill.objective import distillation_objective, label_objective
from kdcache.distill.student.soft_targets import CachedTargets
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.checkpoints import load_weights
from kdcache.models.evaluate import evaluate_model
from kdcache.models.registry import build_model
from kdcache.store.cache import Cache, open_cache
from kdcache.store.records import Preprocess, ViewRecipe
from kdcache.store.sampler import Schedule, always, view_schedule
from tests.helpers import logit_source

VIEWS, EPOCHS, SEEDS, TEACHER_EPOCHS = 8, 40, 3, 12
CPU = "cpu"
STUDENT = StudentConfig(
    device=CPU, epochs=EPOCHS, batch_size=128, learning_rate=5e-3, schedule="cosine", temperature=4.0, alpha=1.0
)
TEACHER = TrainConfig(
    device=CPU, epochs=TEACHER_EPOCHS, batch_size=128, learning_rate=2e-3, schedule="cosine", workers=2, ema=0.999
)
# (inputs are augmented, soft targets: none, of the plain sample, or of the view)
ARMS = {
    "labels, plain images": (False, None),
    "labels, views": (True, None),
    "cached targets, plain images": (False, "plain"),
    "fixed targets under augmentation": (True, "plain"),
    "consistent views": (True, "views"),
}


class _Scene:
    """Data, views in memory, and two caches; forked workers share the views."""

    def __init__(self, folder: Path) -> None:
        self.data: dict[str, IndexedDataset] = {
            split: open_dataset("mnist", split=split, data_root=os.environ["KDCACHE_TEST_DATA"])
            for split in ("train", "test")
        }
        train_data = self.data["train"]
        self.preprocess = Preprocess(mean=train_data.default_mean, std=train_data.default_std)
        self.views = Views(train_data, ViewRecipe(augment="affine"))
        teacher = self._teacher(folder)
        self.caches: dict[str, Cache] = {}
        common = DumpConfig(device=CPU, workers=2)
        for name, config in {"plain": common, "views": replace(common, augment="affine", views=VIEWS)}.items():
            path = folder / f"{name}.zarr"
            result = dump_teacher(teacher, train_data, out=path, preprocess=self.preprocess, config=config)
            print(f"cache of {result.rows:,} rows, {result.computed_rows:,} now in {result.seconds:.0f} s", flush=True)
            self.caches[name] = open_cache(path)
        print(self.views.keep(KeptInputs(1 + VIEWS, len(train_data), 1 << 30), range(VIEWS), again=True))
        manifest = self.caches["views"].manifest
        batches = ShardBatches(manifest, 256)
        batches.places = [(range(VIEWS), shard) for shard in range(manifest.shards)]
        loader = batch_loader(
            self.views,
            batches,
            preprocessor=Preprocessor(self.preprocess),
            workers=2,
            device=torch.device(CPU),
        )
        for _ in loader:
            pass

    def build(self, spec: str, seed: int) -> torch.nn.Module:
        shape = self.data["train"].input_shape
        return build_model(spec, num_classes=10, input_shape=shape, seed=seed, default=self.preprocess).module

    def accuracy(self, module: torch.nn.Module) -> float:
        return evaluate_model(module, self.data["test"], preprocess=self.preprocess, config=STUDENT).accuracy

    def student(self, arm: str, seed: int) -> float:
        """Test accuracy of one student after its last epoch."""
        torch.set_num_threads(1)
        augmented, taught = ARMS[arm]
        config = replace(STUDENT, seed=seed)
        schedule = view_schedule("cycle", (), available=VIEWS if augmented else 1, seed=seed)
        join = self._join(taught, schedule, seed) if taught else None
        module = self.build("mlp", seed)
        train(
            module,
            training_data(
                self.views if augmented else self.data["train"], self.preprocess, config, schedule=schedule, join=join
            ),
            objective=distillation_objective(config) if taught else label_objective(0.0),
            config=config,
        )
        return self.accuracy(module)

    def _join(self, taught: str, schedule: Schedule, seed: int) -> CachedTargets:
        cache = self.caches[taught]
        own = schedule if taught == "views" else always(0)
        source, _, _ = logit_source(cache, seed=seed, schedule=own)
        return CachedTargets([cache], [source], schedule=own)

    def _teacher(self, folder: Path) -> torch.nn.Module:
        module, run = self.build("cnn", 0), folder / "teacher"
        if not (run / "best.pt").exists():
            train(
                module,
                training_data(
                    Views(self.data["train"], ViewRecipe(augment="affine", seed=1)),
                    self.preprocess,
                    TEACHER,
                    schedule=lambda epoch: epoch,
                ),
                objective=label_objective(0.0),
                config=TEACHER,
                run=RunFolder(run, {}, resume=(run / "config.json").exists()),
            )
        load_weights(module, run / "best.pt")
        print(f"teacher, cnn: {self.accuracy(module):.2%}", flush=True)
        return module


# What forked workers find.
_SCENES: list[_Scene] = []


def _run(arm: str, seed: int) -> float:
    return _SCENES[-1].student(arm, seed)


def run(*, rounds: int, device: str) -> None:
    if "KDCACHE_TEST_DATA" not in os.environ:
        print("views: needs the real MNIST; set KDCACHE_TEST_DATA to a folder that holds it")
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        _SCENES.append(_Scene(Path(os.environ.get("KDCACHE_BENCH", thrown_away))))
        began = time.perf_counter()
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
            found = {arm: [pool.submit(_run, arm, seed) for seed in range(SEEDS)] for arm in ARMS}
            accuracies = {arm: [future.result() for future in futures] for arm, futures in found.items()}
        seconds = time.perf_counter() - began
    print(f"mlp 784-128-10, {EPOCHS} epochs, {VIEWS} views, {SEEDS} seeds, {seconds:.0f} s; test accuracy on MNIST")
    for arm, values in accuracies.items():
        each = ", ".join(f"{value:.2%}" for value in values)
        print(f"  {arm:<34} {statistics.mean(values):.2%} ± {statistics.stdev(values):.2%}   ({each})")
