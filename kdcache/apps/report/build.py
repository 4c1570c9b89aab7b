"""The `report` command: measures runs, assembles the page and writes it."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from kdcache.apps.report import overview, sections
from kdcache.apps.report.html import Page, Section, percent, render
from kdcache.apps.report.metrics import MeasuredRun, Predictions, shown_run
from kdcache.apps.report.samples import cards
from kdcache.apps.report.study import Study
from kdcache.core.atomic_files import write_durable
from kdcache.core.command_result import Report
from kdcache.core.commands import ReportArgs
from kdcache.core.errors import UsageError
from kdcache.core.plugins import require_extra
from kdcache.core.progress import log
from kdcache.models.device import resolve_device
from kdcache.store.inspect import inspect_cache


def make_report(settings: ReportArgs) -> Report:
    """Write one HTML page of finished runs, and its pictures into a folder beside it.

    Raises:
        UsageError: a run is not finished, runs are of several datasets, or the output is no .html.
        CacheMismatch, CacheIncomplete, CacheDamaged: an existing cache cannot be compared with.
        MissingExtra: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    require_extra("matplotlib", "plots", "a report")
    out = Path(settings.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out is {settings.out!r}", "a file that ends with .html", "name it as report.html")
    study = Study(settings)
    log("drawing")
    page = _page(study, settings)
    folder = out.with_name(f"{out.stem}_files")
    for name, content in page.files.items():
        write_durable(folder / name, content)
    html = render(page).encode()
    write_durable(out, html)
    data = {
        "report": str(out),
        "bytes": len(html),
        "pictures": [str(folder / name) for name in page.files],
        "runs": [_run_data(each) for each in study.runs],
        "cached": [
            {"caches": list(teacher.paths), **_answers_data(study.cached_answers.get(teacher.key))}
            for teacher in study.unseen
        ],
        "missing": study.missing,
    }
    lines = [_line(each) for each in study.runs]
    lines += [f"missing: {sentence}" for sentence in study.missing]
    lines.append(f"{out}: {len(html):,} bytes, {len(page.files)} pictures in {folder}")
    return Report(data, "\n".join(lines))


def _page(study: Study, settings: ReportArgs) -> Page:
    trained = study.runs[0].run.trained
    device = resolve_device(settings.device)
    where = f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"on this machine's {device.type}"
    if device.type == "cpu":
        where += f" with torch's {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    parts: list[Section] = [overview.summary(study.runs, study.unseen, where), overview.training(study.runs)]
    if study.answers:
        parts.append(sections.errors(study.answers, trained.classes))
    if any(each.calibration is not None for each in study.answers):
        parts.append(sections.calibration(study.answers))
    if any(each.agreements for each in study.runs):
        parts.append(sections.agreement(study.runs))
    shown = shown_run(study.runs)
    if study.test is not None and shown.answers is not None:
        teacher_nc = study.cached_logits(shown.teacher) if shown.run.caches else None
        found = cards(study.test, shown.answers.logits_nc, teacher_nc, study.labels_n, settings.shown)
        parts.append(sections.samples(found, shown.run.name, has_teacher=teacher_nc is not None))
    if study.caches:
        parts.append(sections.cached({path: inspect_cache(path).data["splits"] for path in study.caches}))
    count = len(study.runs)
    test = "no test split" if study.test is None else f"{len(study.test):,} test samples"
    now = datetime.datetime.now().astimezone()
    return Page(
        title=f"Distillation on {settings.dataset or trained.dataset}",
        subtitle=f"{count} run{'s' if count > 1 else ''}, {len(trained.classes)} classes, {test}",
        sections=parts,
        missing=study.missing,
        footer=f"Made by kdcache {importlib.metadata.version('kdcache')} on {now:%Y-%m-%d %H:%M %Z}.",
    )


def _run_data(each: MeasuredRun) -> dict[str, Any]:
    run, cost = each.run, each.cost
    return {
        "run": str(run.folder),
        "role": run.role,
        "model": run.result["model"],
        "parameters": run.result["parameters"],
        "epoch_seconds": run.epoch_seconds,
        "multiply_adds": None if cost is None else cost.multiply_adds,
        "checkpoint_bytes": run.checkpoint_bytes,
        "latency_ms": None if cost is None else cost.latency_ms,
        **_answers_data(each.answers),
        "agreement": {
            found.split: {"samples": found.samples, "same_top_class": found.same, "kl": found.kl}
            for found in each.agreements
        },
    }


def _answers_data(answers: Predictions | None) -> dict[str, Any]:
    found = None if answers is None else answers.calibration
    confusion = None if answers is None else answers.confusion_cc
    return {
        "test_accuracy": None if answers is None else answers.accuracy,
        "confusion": None if confusion is None else confusion.tolist(),
        "calibration": None
        if found is None
        else {
            "temperature": found.temperature,
            "fitted_on": found.fitted,
            "judged_on": found.evaluated,
            "ece_before": found.before.ece,
            "ece_after": found.after.ece,
            "nll_before": found.nll_before,
            "nll_after": found.nll_after,
        },
    }


def _line(each: MeasuredRun) -> str:
    parts = [f"{each.run.name} ({each.run.role}): test accuracy {percent(each.accuracy, 2)}"]
    if each.answers is not None and each.answers.calibration is not None:
        parts.append(f"ECE {each.answers.calibration.before.ece:.2%}")
    parts += [f"agreement on {found.split} {found.same:.2%}, KL {found.kl:.3g}" for found in each.agreements]
    return ", ".join(parts)
