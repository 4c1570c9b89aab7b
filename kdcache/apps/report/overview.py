"""From numbers to the first sections of a page: who there is, how good, how large, and how they were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.analysis import figures
from kdcache.apps.report.html import UNKNOWN, Figure, Section, Table, percent
from kdcache.apps.report.metrics import MeasuredRun
from kdcache.apps.report.runs import ALONE, DISTILLED, TEACHER, CachedTeacher
from kdcache.core.run_dir import FREE_ON_RESUME

USUAL_SETTINGS = ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "temperature", "alpha", "objective")

# Settings that say where and how, or that the table of runs shows already.
NO_MATTER = FREE_ON_RESUME | {"command", "dataset", "checkpoint", "resume", "student", "model", "distill"}


def summary(runs: Sequence[MeasuredRun], unseen: Sequence[CachedTeacher], measured_on: str) -> Section:
    """The headline: who there is, how good, how large, how fast.

    Args:
        unseen: cached teachers of which there is no run.
        measured_on: the device and its threads.
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
        f"({' or '.join(sorted(shapes)) or 'none measured'} numbers); {UNKNOWN} where a layer cannot be counted. "
        "The checkpoint is best.pt, which holds the weights, what they are of and for texts the tokenizer. Latency is "
        f"from one prepared input to logits at batch size 1, the median of repeats after warm-up, {measured_on}. "
        "Seconds an epoch were recorded in training, evaluation aside, perhaps on another machine."
    )
    if unseen:
        caption += f" Of a cached teacher the manifest tells what is not {UNKNOWN}: it was neither loaded nor run."
    table = Table(header=[*header, "latency, ms", "s an epoch"], rows=rows, caption=caption, words=(0, 2, 3))
    return Section(anchor="summary", title="In short", lead=_lead(runs), tables=[table])


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
    """The best run of each role in a sentence."""
    best = []
    for role in (TEACHER, ALONE, DISTILLED):
        of_role = [each for each in runs if each.run.role == role and each.accuracy is not None]
        if of_role:
            first = max(of_role, key=lambda each: each.accuracy or 0.0)
            most = f"best of {len(of_role)}, " if len(of_role) > 1 else ""
            best.append(f"{first.run.name} ({most}{role}, {first.run.result['model']}) {percent(first.accuracy, 2)}")
    if not best:
        return []
    lead = [f"Right answers on the test split: {'; '.join(best)}."]
    if len(best) > 1:
        lead.append(
            "One run is one draw: a difference of less than about two standard errors, or one that another seed "
            "undoes, is no finding."
        )
    return lead


def training(runs: Sequence[MeasuredRun]) -> Section:
    """Curves of everything that was recorded over the epochs."""
    caption = (
        "Each panel is one quantity over the epochs, all runs over each other. “loss” is what a run minimised: where "
        "objectives, temperatures or alphas differ, compare its course and not its height; the other losses are its "
        "parts, before their weights. Accuracy is on training batches while the weights still change; “validation”, "
        "the thin line, is on samples held out of the training split. The learning rate is that of an epoch's last "
        "step. Nothing here is of the test split."
    )
    return Section(
        anchor="training",
        title="Training",
        tables=[_settings(runs)],
        figures=[Figure(pictures=figures.curves({each.run.name: each.run.metrics for each in runs}), caption=caption)],
    )


def _settings(runs: Sequence[MeasuredRun]) -> Table:
    """The settings that everybody asks for, and the others in which the runs differ."""
    configs = {each.run.name: {**each.run.config} for each in runs}
    for config in configs.values():
        if config.get("distill") is False or config.get("objective"):
            for unused in ("temperature", "alpha", *(() if config["distill"] else ("objective",))):
                config.pop(unused, None)
    names = dict.fromkeys([*USUAL_SETTINGS, *(name for config in configs.values() for name in config)])
    rows = []
    for name in names:
        values = [config[name] for config in configs.values() if name in config]
        differ = name not in NO_MATTER and any(value != values[0] for value in values)
        cells = [_setting(config.get(name)) for config in configs.values()]
        if (name in USUAL_SETTINGS or differ) and set(cells) != {UNKNOWN}:
            rows.append([name.replace("_", " "), *cells])
    caption = f"The usual settings, and all others in which runs differ; {UNKNOWN} where a run has or uses none."
    return Table(header=["setting", *configs], rows=rows, caption=caption)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or UNKNOWN
    return UNKNOWN if value is None else f"{value:g}" if isinstance(value, float) else str(value)
