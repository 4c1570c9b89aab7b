"""Many students from one cache: a grid of settings, several at once, each in a run folder of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kdcache.analysis.matrix_plots import draw_heat_map
from kdcache.apps.bench import CACHE, LIVE, Measured, measure, teacher_input
from kdcache.apps.sweep_workers import Job, Outcome, available_slots, run_all
from kdcache.core.atomic_files import make_folder, storage_errors, write_durable
from kdcache.core.command_result import Report
from kdcache.core.commands import SweepArgs, TrainStudentArgs
from kdcache.core.config import StudentConfig
from kdcache.core.errors import UsageError
from kdcache.core.file_lock import PathLock
from kdcache.core.json_records import to_json
from kdcache.core.options import merge, narrow
from kdcache.core.progress import log
from kdcache.core.run_dir import main_score
from kdcache.core.specs import parse_bytes
from kdcache.core.text_table import text_table
from kdcache.core.workers import launched_process
from kdcache.data.kept_inputs import KeptInputs
from kdcache.data.taught import as_taught
from kdcache.models.build import build, open_data
from kdcache.models.teacher import load_teacher
from kdcache.store.cache import open_cache
from kdcache.store.manifest import Manifest
from kdcache.store.records import NONE

RESULT, HEAT_MAP = "sweep.json", "sweep.png"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the grid, of which there is a student for each seed.

    Attributes:
        objective: parts joined by `+`; empty for alpha · kd + (1 − alpha) · cross entropy.
        alpha: None where an objective is given, which has its own weights.
    """

    temperature: float
    alpha: float | None
    objective: str

    @property
    def name(self) -> str:
        """For people, and for the heat map's rows."""
        return self.objective or f"alpha {self.alpha:g}"

    @property
    def folder(self) -> str:
        """For the run's folder; what a file name cannot hold is replaced, and told apart by a hash."""
        if not self.objective:
            return f"T{self.temperature:g}-a{self.alpha:g}"
        plain = re.sub(r"[^A-Za-z0-9_+=.-]", "_", self.objective)[:60]
        mark = "" if plain == self.objective else "-" + hashlib.sha256(self.objective.encode()).hexdigest()[:8]
        return f"T{self.temperature:g}-{plain}{mark}"


def grid_of(settings: SweepArgs) -> list[Setting]:
    """Every combination, each once; an objective has no alpha."""
    found = [
        Setting(temperature=temperature, alpha=None, objective=objective)
        for objective, temperature in itertools.product(settings.objective, settings.temperature)
    ] or [
        Setting(temperature=temperature, alpha=alpha, objective="")
        for temperature, alpha in itertools.product(settings.temperature, settings.alpha)
    ]
    return list(dict.fromkeys(found))


def sweep(settings: SweepArgs) -> Report:
    """Train what is not trained yet, and put all students into one table, best first.

    A student that fails is named, and does not stop the others; the same command tries it again.

    Raises:
        KdcacheError: what no student could be trained with: a cache that cannot be read, a teacher without weights.
        CacheBusy: another sweep trains into the same folder.
    """
    out = Path(settings.out)
    _check(settings)
    if (launched := launched_process()).count > 1:
        raise UsageError(
            f"sweep is started as {launched.count} processes",
            "one process, which starts the students, one a GPU or several side by side",
            "start it without torchrun; train-student trains one student on several GPUs",
        )
    manifests = [open_cache(path, allow_partial=settings.allow_partial).manifest for path in settings.cache]
    for path, manifest in zip(settings.cache, manifests, strict=True):
        _check_embedding(settings, manifest)
        mix = manifest.recipe.mix
        if settings.val_fraction and mix != NONE:
            raise UsageError(
                f"--val-fraction is {settings.val_fraction:g}, and the inputs of {path} are mixed ({mix}) with any "
                "sample, also with those that would be held out to choose a setting by",
                "--val-fraction 0 with mixed inputs",
                "give --val-fraction 0: settings then stay in the order of the grid, and none is chosen",
            )
    with storage_errors("create", out):
        make_folder(out)
    with PathLock(out, "sweep"):
        return _sweep(settings, out, manifests)


def _check(settings: SweepArgs) -> None:
    """What needs no cache to be refused."""
    if (settings.checkpoint or settings.checkpoint_key) and not settings.teacher:
        raise UsageError(
            "--checkpoint or --checkpoint-key is given without --teacher",
            "a teacher, to measure it live",
            "add --teacher",
        )
    if not all(settings.objective) or not grid_of(settings):
        raise UsageError(
            "there is an empty --objective, --temperature or --alpha",
            "at least one setting to train with",
            "leave it out for the default",
        )
    if settings.objective and settings.alpha != SweepArgs().alpha:
        raise UsageError(
            f"--alpha {','.join(map(str, settings.alpha))} is given beside --objective",
            "one of the two: an objective has its own weights",
            "leave out --alpha, or write the weights as kd:weight=0.9",
        )


def _check_embedding(settings: SweepArgs, manifest: Manifest) -> None:
    """Refuse what supposes classes, where the teacher answers with a vector."""
    if not manifest.is_embedding:
        return
    if settings.teacher:
        raise UsageError("--teacher is given, and the cache holds embeddings", "a teacher of classes", "leave it out")
    if not settings.objective:
        raise UsageError(
            "no --objective is given, and the cache holds embeddings, without labels to weigh against",
            "the objectives to try",
            "give --objective cosine --objective feature_mse, for example",
        )


def _sweep(settings: SweepArgs, out: Path, manifests: Sequence[Manifest]) -> Report:
    grid = grid_of(settings)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    jobs = [
        Job(name=f"{setting.folder}-seed{seed}", settings=_run_settings(settings, setting, seed))
        for setting, seed in itertools.product(grid, seeds)
    ]
    slots = available_slots(settings.device, settings.jobs, len(jobs))
    # First, because what it refuses should not be known only after hours of training.
    live = None if settings.teacher is None else _live_cost(settings, threads=slots[0].threads)
    log(f"students: {len(jobs)}, settings: {len(grid)}, at once: {len(slots)}; each logs to {out}/NAME.log")
    outcomes = run_all(jobs, out, slots, kept=_shared_inputs(settings, manifests))
    rows = _rows(grid, seeds, outcomes)
    data: dict[str, Any] = {
        "sorted_by": "validation" if settings.val_fraction else "grid",
        "settings": rows,
        "failed": {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None},
        "train_seconds": sum(sum(each.result["epoch_seconds"]) for each in outcomes.values() if each.result),
    }
    if live is not None:
        data["live"] = live | {"train_seconds": data["train_seconds"] * live["ratio"]}
    lines = _lines(rows, data, out)
    shown = rows if settings.val_fraction else [row | {"score": _mean_of(row["test_accuracy"])} for row in rows]
    if any(row["score"] is not None for row in shown):
        lines += draw_heat_map(shown, out / HEAT_MAP)
    write_durable(out / RESULT, (json.dumps(data, indent=2) + "\n").encode())
    return Report(data | {"out": str(out)}, "\n".join(lines), exit_code=1 if data["failed"] else 0)


def _shared_inputs(settings: SweepArgs, manifests: Sequence[Manifest]) -> KeptInputs | None:
    """Memory for inputs that all students share."""
    limit = parse_bytes(settings.input_memory)
    if not limit:
        return None
    return KeptInputs(1 + max(each.views for each in manifests), manifests[0].dataset.length, limit)


def _run_settings(settings: SweepArgs, setting: Setting, seed: int) -> dict[str, Any]:
    """Those of `train-student` for one student."""
    names = {each.name for each in fields(TrainStudentArgs)}
    shared = {name: value for name, value in to_json(settings).items() if name in names}
    own: dict[str, Any] = {
        "temperature": setting.temperature,
        "objective": setting.objective.split("+") if setting.objective else [],
        "seed": seed,
        "out": str(Path(settings.out) / f"{setting.folder}-seed{seed}"),
    }
    own["alpha"] = StudentConfig().alpha if setting.alpha is None else setting.alpha
    return dict(to_json(merge(TrainStudentArgs, shared | own, where="sweep")))


def _rows(grid: Sequence[Setting], seeds: Sequence[int], outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """A row for each setting, best on the validation part first, those without a finished student last; without a
    validation part in the order of the grid, because the test split chooses nothing.
    """
    rows = []
    for setting in grid:
        runs = [f"{setting.folder}-seed{seed}" for seed in seeds]
        done = [outcomes[run] for run in runs if outcomes[run].result]
        measured = [main_score(each.result, "test") for each in done if each.result]
        tests = [score for score in measured if score is not None]
        validations = [each.val_accuracy for each in done if each.val_accuracy is not None]
        rows.append(
            {
                "name": setting.name,
                "temperature": setting.temperature,
                "alpha": setting.alpha,
                "objective": setting.objective,
                "runs": runs,
                "finished": len(done),
                "test_accuracy": tests,
                "val_accuracy": validations,
                "score": _mean_of(validations),
            }
        )
    return sorted(rows, key=lambda row: -1.0 if row["score"] is None else row["score"], reverse=True)


def _live_cost(settings: SweepArgs, *, threads: int) -> dict[str, Any]:
    """What an epoch costs with the live teacher, as a ratio to one from the cache: measured in turn."""
    import torch

    cache = open_cache(
        settings.cache[0],
        allow_partial=settings.allow_partial,
        cache_dir=settings.cache_dir,
        cache_disk=settings.cache_disk,
    )
    manifest, local = cache.manifest, cache.local
    spec = settings.dataset or local.dataset
    record = manifest.dataset
    dataset = open_data(settings, spec, record.split, hint=local.data_root, classes=record.classes)
    dataset = as_taught(dataset, manifest)
    own = teacher_input(settings, settings.checkpoint)
    teacher = load_teacher(
        own,
        str(settings.teacher),
        settings.checkpoint,
        dataset,
        manifest.recipe,
        outputs=manifest.teacher.outputs,
        checkpoint_key=settings.checkpoint_key,
    )
    student = build(settings.student, dataset, settings, 0, manifest.teacher.preprocess, training=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        log("measuring the live teacher: labels only, cache and live teacher in turn")
        measured: Measured = measure(teacher, student, dataset, narrow(StudentConfig, _plain(settings)), rounds=3)
    finally:
        torch.set_num_threads(before)
    ratio = statistics.median(measured.ratios(LIVE, to=CACHE))
    return {
        "ratio": ratio,
        "cached_epoch_seconds": measured.median(CACHE),
        "live_epoch_seconds": measured.median(LIVE),
        "dump_seconds": measured.dump_seconds * manifest.views,
        "on_plain_samples": not all(map(manifest.recipe.is_plain, range(manifest.views))),
    }


def _plain(settings: SweepArgs) -> StudentConfig:
    """The sweep's way of training, with one temperature and alpha: neither changes what a step costs."""
    shared = to_json(settings)
    # The measured cache is one of plain samples and of the one live teacher, and no sample is read twice in an epoch.
    elsewhere = {"views", "view_schedule", "cache_weights", "allow_partial", "input_memory"}
    names = {each.name for each in fields(StudentConfig)} - {"temperature", "alpha", "objective"} - elsewhere
    return merge(StudentConfig, {name: shared[name] for name in names if name in shared}, where="sweep")


def _lines(rows: list[dict[str, Any]], data: dict[str, Any], out: Path) -> list[str]:
    by_validation = any(row["val_accuracy"] for row in rows)
    header = ["setting", "T", *(["validation"] if by_validation else []), "test", "students"]
    table = []
    for row in rows:
        cells = [row["name"], f"{row['temperature']:g}"]
        cells += [_mean(row["val_accuracy"])] if by_validation else []
        table.append([*cells, _mean(row["test_accuracy"]), f"{row['finished']} of {len(row['runs'])}"])
    lines = text_table(header, table)
    if not by_validation:
        lines.append("in the order of the grid: without --val-fraction nothing is held out that could choose a setting")
    else:
        lines.append(
            "sorted by accuracy (mAP with several classes per sample, cosine similarity of embeddings) on the "
            "validation part of the training split; the test split chooses nothing"
        )
    lines.append(
        f"training took {data['train_seconds']:,.1f} s of all students together; {out / RESULT} has every number"
    )
    if live := data.get("live"):
        lines.append(
            f"with the live teacher these epochs cost × {live['ratio']:.2f} (measured: "
            f"{live['live_epoch_seconds']:.3f} s an epoch against {live['cached_epoch_seconds']:.3f} s): "
            f"{live['train_seconds']:,.1f} s, against "
            f"{data['train_seconds']:,.1f} s and one dump of {live['dump_seconds']:,.1f} s"
            + ("; measured on plain samples, and making views costs both ways more" if live["on_plain_samples"] else "")
        )
    lines += [f"failed: {name}: {error}" for name, error in data["failed"].items()]
    return lines


def _mean_of(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2%}{spread}"
