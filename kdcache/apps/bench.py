"""What a cache saves with one's own teacher, student, data and device, measured side by side."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.apps.stages import stage_lines, stage_seconds
from kdcache.core.command_result import Report
from kdcache.core.commands import BenchArgs
from kdcache.core.config import DumpConfig, InputConfig, RuntimeConfig, StudentConfig
from kdcache.core.json_records import to_json
from kdcache.core.options import narrow
from kdcache.core.progress import log, muted
from kdcache.data.dataset import IndexedDataset, WrappedDataset
from kdcache.data.loader import Fetcher
from kdcache.data.views import as_views
from kdcache.distill.objective import Join, Objective, distillation_objective, label_objective
from kdcache.distill.student.train_student import train_student
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.distill.teacher.live_teacher import LiveTargets
from kdcache.distill.trainer import TrainResult, train
from kdcache.distill.training_data import training_data
from kdcache.models.build import build, dataset_preprocess, open_data
from kdcache.models.checkpoints import read_checkpoint
from kdcache.models.device import move_to, resolve_device
from kdcache.models.forward import ForwardPass
from kdcache.models.registry import BuiltModel, count_parameters
from kdcache.models.teacher import check_checkpoint_key, load_teacher
from kdcache.store.cache import open_cache
from kdcache.store.layout import predicted_bytes
from kdcache.store.records import OutputRecord, ViewRecipe

LABELS, CACHE, LIVE = "labels only", "from the cache", "with the live teacher"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Epochs of one student, timed in turn, and the dump that the cached ones need once.

    Attributes:
        epoch_seconds: by way of training, one a round.
        dump_seconds: of the dump.
        bytes: of the cache.
        stage_seconds: of each stage of the dump, per sample.
    """

    epoch_seconds: dict[str, list[float]]
    dump_seconds: float
    bytes: int
    stage_seconds: dict[str, float]

    def median(self, way: str) -> float:
        """Seconds an epoch."""
        return statistics.median(self.epoch_seconds[way])

    def ratios(self, way: str, to: str = LABELS) -> list[float]:
        """Of each round, so that what slows the machine down for a while slows both sides."""
        return [a / b for a, b in zip(self.epoch_seconds[way], self.epoch_seconds[to], strict=True)]

    @property
    def break_even_epochs(self) -> float | None:
        """Student epochs after which the dump has paid; None where an epoch with the live teacher is no dearer."""
        saved = self.median(LIVE) - self.median(CACHE)
        return self.dump_seconds / saved if saved > 0 else None


def bench(settings: BenchArgs) -> Report:
    """Measure, and say after how many epochs the cache has paid."""
    dataset = open_data(settings, settings.dataset, "train")
    if settings.samples is not None and settings.samples < len(dataset):
        dataset = _First(dataset, settings.samples)
    teacher, student = build_pair(settings, dataset)
    given = to_json(settings)
    config = StudentConfig(**{each.name: given[each.name] for each in fields(StudentConfig) if each.name in given})
    measured = measure(teacher, student, dataset, config, rounds=settings.rounds)
    data: dict[str, Any] = {
        "dataset": settings.dataset,
        "samples": len(dataset),
        "batch_size": settings.batch_size,
        "device": str(resolve_device(settings.device)),
        "teacher": {"model": teacher.spec, "parameters": count_parameters(teacher.module)},
        "student": {"model": student.spec, "parameters": count_parameters(student.module)},
        "rounds": settings.rounds,
        "epoch_seconds": measured.epoch_seconds,
        "dump_seconds": measured.dump_seconds,
        "bytes": measured.bytes,
        "break_even_epochs": measured.break_even_epochs,
        "stage_seconds": measured.stage_seconds,
    }
    return Report(data, _text(data, measured))


def build_pair(settings: BenchArgs, dataset: IndexedDataset) -> tuple[BuiltModel, BuiltModel]:
    """Teacher and student; a teacher without weights is as fast as one with them."""
    default = dataset_preprocess(dataset)
    if settings.checkpoint or settings.class_map:
        teacher = load_teacher(
            teacher_input(settings, settings.checkpoint),
            settings.teacher,
            settings.checkpoint,
            dataset,
            ViewRecipe(),
            kind=settings.teacher_outputs,
            class_map=settings.class_map,
            checkpoint_key=settings.checkpoint_key,
        )
    else:
        check_checkpoint_key(settings.checkpoint, settings.checkpoint_key)
        log(f"the teacher {settings.teacher} is timed as it is built, without a checkpoint")
        teacher = build(settings.teacher, dataset, settings, 0, default, training=True)
        teacher = replace(teacher, outputs=OutputRecord(kind=settings.teacher_outputs))
    return teacher, build(settings.student, dataset, settings, settings.seed, default, training=True)


def teacher_input(settings: InputConfig, checkpoint: str | None) -> InputConfig:
    """Of a teacher beside a student: the settings are the student's, unless the checkpoint records none of its own."""
    return settings if checkpoint and "kdcache" not in read_checkpoint(checkpoint) else InputConfig()


def measure(
    teacher: BuiltModel, student: BuiltModel, dataset: IndexedDataset, config: StudentConfig, *, rounds: int
) -> Measured:
    """Dump once, then train an epoch in each way, in turn; a first round does not count.

    The cache is read as `train_student` reads it, its checks of inputs included. The live teacher gets the student's
    own copy of the inputs on the device, where both take the same ones.

    Args:
        config: of the student; its number of epochs is not looked at.
    """
    config = replace(config, epochs=1, val_fraction=0.0, views=(), cache_weights=(), distill=True, objective=())
    device = resolve_device(config.device)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        path = Path(folder) / "cache.zarr"
        execution = to_json(narrow(RuntimeConfig, config))
        with muted():  # whatever the teacher's accuracy is, its time is what counts
            result = dump_teacher(
                teacher.module,
                dataset,
                out=path,
                split=dataset.split,
                preprocess=teacher.preprocessor,
                # The student's batch size is no measure for the teacher's.
                config=DumpConfig(**(execution | {"batch_size": None})),
                outputs=teacher.outputs,
            )
        cache = open_cache(path, dataset.split)
        move_to(teacher.module, device)
        network = ForwardPass(
            teacher.module,
            teacher.preprocessor,
            device,
            classes=len(dataset.classes),
            amp=config.amp,
            outputs=teacher.outputs,
        )
        network.use_memory_format(cache.manifest.memory_format)
        stages = stage_seconds(network, as_views(dataset), cache, Path(folder))
        live = live_targets(teacher, student, dataset, config)

        def from_cache() -> TrainResult:
            return train_student(student.module, dataset, cache, preprocess=student.preprocessor, config=config)

        def alone(objective: Objective, join: Join | None) -> TrainResult:
            data = training_data(dataset, student.preprocessor, config, join=join)
            return train(student.module, data, objective=objective, config=config)

        ways: dict[str, Callable[[], TrainResult]] = {
            LABELS: lambda: alone(label_objective(config.label_smoothing), None),
            CACHE: from_cache,
            LIVE: lambda: alone(distillation_objective(config), live),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, run in ways.items():
                with muted():
                    trained = run()
                if turn:
                    seconds[way].append(trained.epoch_seconds[0])
            log(f"round {turn} of {rounds}" + ("" if turn else ", which does not count"))
    return Measured(
        epoch_seconds=seconds,
        dump_seconds=result.seconds,
        bytes=predicted_bytes(result.manifest),
        stage_seconds=stages,
    )


def live_targets(
    teacher: BuiltModel, student: BuiltModel, dataset: IndexedDataset, config: StudentConfig
) -> LiveTargets:
    """The teacher at every step; where it takes other inputs than the student, they are made for it as well."""
    same = geometry_of(teacher) == geometry_of(student)
    device = resolve_device(config.device)
    network = ForwardPass(
        move_to(teacher.module, device),
        teacher.preprocessor,
        device,
        classes=len(dataset.classes),
        amp=config.amp,
        outputs=teacher.outputs,
    )
    return LiveTargets(network, fetcher=None if same else Fetcher(as_views(dataset), teacher.preprocessor))


def geometry_of(built: BuiltModel) -> tuple[Any, ...]:
    """What a loader does to a sample for a network: where two networks agree in it, they can share a batch."""
    record = built.preprocess
    tokens = (record.max_tokens, record.tokenizer_sha256, record.pad_id)
    return (record.resize, record.stretch, record.crop, record.interpolation, record.antialias, *tokens)


def _text(data: dict[str, Any], measured: Measured) -> str:
    lines = [
        f"{data['dataset']}, {data['samples']:,} samples, batch {data['batch_size']}, {data['device']}; teacher "
        f"{data['teacher']['model']} ({data['teacher']['parameters']:,} parameters), student "
        f"{data['student']['model']} ({data['student']['parameters']:,}); median of {data['rounds']} "
        f"round{'s' if data['rounds'] > 1 else ''}"
    ]
    for way in measured.epoch_seconds:
        ratios = measured.ratios(way)
        spread = f"× {LABELS}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"  {way:<22} {measured.median(way):9.3f} s an epoch   {'' if way == LABELS else spread}".rstrip())
    lines.append(f"  dump, once             {measured.dump_seconds:9.3f} s, {measured.bytes:,} bytes")
    epochs = measured.break_even_epochs
    lines.append(
        "the live teacher costs no more than the cache here: a cache saves no time"
        if epochs is None
        else f"the cache has paid after {epochs:.1f} student epochs, all students together"
    )
    return "\n".join([*lines, *stage_lines(measured.stage_seconds)])


class _First(WrappedDataset):
    """The first samples of a dataset."""

    def __init__(self, whole: IndexedDataset, count: int) -> None:
        super().__init__(whole)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def labels(self) -> NDArray[np.int64] | None:
        labels = self._samples.labels()
        return None if labels is None else labels[: self._count]
