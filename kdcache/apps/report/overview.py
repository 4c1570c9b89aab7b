"""First sections of the page: summary of the runs, settings and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.analysis import figures
from kdcache.apps.report.html import UNKNOWN, Figure, Section, Table, percent
from kdcache.apps.report.metrics import MeasuredRun
from kdcache.apps.report.runs import ALONE, DISTILLED, TEACHER, CachedTeacher
from kdcache.core.run_dir import FREE_ON_RESUME

USUAL_SETTINGS = ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "temperature", "alpha", "objective")

# Settings that do not change the result, or that the table of runs shows already.
NOT_COMPARED = FREE_ON_RESUME | {"command", "dataset", "checkpoint", "resume", "student", "model", "distill"}


def summary(runs: Sequence[MeasuredRun], unseen: Sequence[CachedTeacher], measured_on: str) -> Section:
    """Summary: accuracy, size and speed of each run.

    Args:
        unseen: Cached teachers without a run among `runs`.
        measured_on: Device and threads of the latency measurement.
    """
    rows = [_headline(each) for each in runs]
    for teacher in unseen:
        for record, accuracy in zip(teacher.records, teacher.test_accuracies, strict=True):
            cells = [teacher.name, percent(accuracy, 2), TEACHER, record.spec, f"{record.parameters:,}"]
            rows.insert(0, [*cells, *[UNKNOWN] * 4])
    header = ["run", "test accuracy", "role", "model", "parameters", "multiply-adds", "checkpoint, bytes"]
    shapes = {"×".join(map(str, each.cost.shape)) for each in runs if each.cost is not None}
    caption = (
        "Test accuracy ± its standard error, which counts chance in the choice of test samples and not that of another "
        "seed. Multiply-adds are those of matrix products and convolutions for one sample "
        f"({' or '.join(sorted(shapes)) or 'none measured'} numbers), counted by FlopCounterMode of torch; it leaves "
        f"out operators for which it has no formula, and {UNKNOWN} stands where it counts none. "
        "The checkpoint is best.pt: weights, their record and for texts the tokenizer. Latency is "
        f"from one prepared input to logits at batch size 1, the median of repeats after warm-up, {measured_on}. "
        "Seconds per epoch were recorded in training, without evaluation, perhaps on another machine."
    )
    if unseen:
        caption += (
            f" Values of a cached teacher come from its manifest; it was neither loaded nor run, hence {UNKNOWN}."
        )
    table = Table(header=[*header, "latency, ms", "s per epoch"], rows=rows, caption=caption, words=(0, 2, 3))
    return Section(anchor="summary", title="Summary", lead=_lead(runs), tables=[table])


def _headline(each: MeasuredRun) -> list[str]:
    run, cost = each.run, each.cost
    accuracy = percent(each.accuracy, 2)
    if each.answers is not None:
        accuracy += f" ± {each.answers.standard_error:.2%}"
    counted = latency = UNKNOWN
    if cost is not None:
        counted = UNKNOWN if cost.multiply_adds is None else f"{cost.multiply_adds:,}"
        latency = f"{cost.latency_ms:.3g}"
    cells = [run.name, accuracy, run.role, str(run.result["model"]), f"{run.result['parameters']:,}"]
    return [*cells, counted, f"{run.checkpoint_bytes:,}", latency, f"{run.epoch_seconds:.3g}"]


def _lead(runs: Sequence[MeasuredRun]) -> list[str]:
    """Sentences on the best run of each role."""
    best = []
    for role in (TEACHER, ALONE, DISTILLED):
        of_role = [each for each in runs if each.run.role == role and each.accuracy is not None]
        if of_role:
            first = max(of_role, key=lambda each: each.accuracy or 0.0)
            most = f"best of {len(of_role)}, " if len(of_role) > 1 else ""
            best.append(f"{first.run.name} ({most}{role}, {first.run.result['model']}) {percent(first.accuracy, 2)}")
    if not best:
        return []
    lead = [f"Accuracy on the test split: {'; '.join(best)}."]
    if len(best) > 1:
        lead.append(
            "Each run is one random draw: a difference below about two standard errors, or one that vanishes with "
            "another seed, is not significant."
        )
    return lead


def training(runs: Sequence[MeasuredRun]) -> Section:
    """Settings, and learning curves of all recorded metrics."""
    caption = (
        "Each panel shows one metric over the epochs for all runs. “loss” is the minimised objective: where "
        "objectives, temperatures or alphas differ, compare its shape and not its level; the other losses are its "
        "terms, before weighting. Training accuracy is measured on batches while the weights still change; "
        "“validation”, the thin line, on samples held out of the training split. The learning rate is that of the "
        "last step of an epoch. The test split is not used here."
    )
    return Section(
        anchor="training",
        title="Training",
        tables=[_settings(runs)],
        figures=[Figure(pictures=figures.curves({each.run.name: each.run.metrics for each in runs}), caption=caption)],
    )


def _settings(runs: Sequence[MeasuredRun]) -> Table:
    """The most common settings, and all others in which the runs differ."""
    configs = {each.run.name: {**each.run.config} for each in runs}
    for config in configs.values():
        if config.get("distill") is False or config.get("objective"):
            for unused in ("temperature", "alpha", *(() if config["distill"] else ("objective",))):
                config.pop(unused, None)
    names = dict.fromkeys([*USUAL_SETTINGS, *(name for config in configs.values() for name in config)])
    rows = []
    for name in names:
        values = [config[name] for config in configs.values() if name in config]
        differ = name not in NOT_COMPARED and any(value != values[0] for value in values)
        cells = [_setting(config.get(name)) for config in configs.values()]
        if (name in USUAL_SETTINGS or differ) and set(cells) != {UNKNOWN}:
            rows.append([name.replace("_", " "), *cells])
    caption = f"The most common settings, and all others in which runs differ; {UNKNOWN} where a setting is not used."
    return Table(header=["setting", *configs], rows=rows, caption=caption)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or UNKNOWN
    return UNKNOWN if value is None else f"{value:g}" if isinstance(value, float) else str(value)
