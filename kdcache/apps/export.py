"""Export of a run's network as a program that needs no kdcache, written only if its logits match the network's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from kdcache.apps.export_formats import FORMATS, Runnable, foreign_errors, quiet
from kdcache.apps.export_module import Deployable, metadata, trace
from kdcache.core import rng
from kdcache.core.atomic_files import write_durable
from kdcache.core.command_result import Report
from kdcache.core.commands import ExportArgs
from kdcache.core.errors import DatasetError, ModelError, UsageError
from kdcache.core.plugins import require_extra
from kdcache.core.progress import log
from kdcache.data.batch import BatchRequest
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import batch_loader
from kdcache.models.device import evaluation_mode
from kdcache.models.forward import ForwardPass
from kdcache.models.from_run import TrainedNetwork, load_trained, open_split

# Batch size of the comparison, after a batch of one sample. Small, so that texts come in several lengths.
COMPARED_BATCH = 16


class Compared(NamedTuple):
    """Batch on which artefact and network are compared.

    Attributes:
        inputs: Inputs of the artefact, (B, ...).
        logits: Logits of the network in PyTorch, (B, classes) float32.
        indices: Sample indices, (B,).
    """

    inputs: Tensor
    logits: Tensor
    indices: NDArray[np.int64]


def export(settings: ExportArgs) -> Report:
    """Export the best checkpoint of a run as an artefact.

    The artefact's bytes are loaded again and its logits compared with the network's before anything is written.

    Raises:
        UsageError: there is no such run, or the file's suffix is that of another format.
        MissingExtra: a package that the format needs is not installed.
        CheckpointError: the run's checkpoint is missing or damaged.
        DatasetError: there are no samples to compare on, or others than the network was trained on.
        ModelError: the network cannot be exported, or the artefact's logits differ. An older file at `out` is kept.
        StorageError: the file cannot be written.
    """
    format_, out = FORMATS[settings.format], Path(settings.out)
    _check_out(out, settings.format)
    for module in format_.modules:
        require_extra(module, settings.format, f"--format {settings.format}")
    trained = load_trained(Path(settings.run))
    dataset = open_split(trained, settings, settings.split)
    batches = _compared(trained, dataset, settings.samples)
    example = _example(trained, batches[1].inputs)
    facts = metadata(trained, example)
    log(f"exporting {trained.spec} as {settings.format}")
    with quiet():
        program = trace(
            Deployable(trained),
            example,
            max_tokens=trained.preprocessor.record.max_tokens,
            spec=trained.spec,
        )
        with foreign_errors(f"{trained.spec} cannot be written as {settings.format}"):
            content = format_.make(program, facts)
        with foreign_errors("the artefact does not run"):
            found, sample = _largest_difference(format_.load(content), batches)
    if not found <= settings.tolerance:  # a NaN too
        raise ModelError(
            f"the artefact's logits differ from the network's by {found:.2g} of 1 + |x| at sample {sample} of "
            f"{dataset.name}",
            f"at most {settings.tolerance:g}",
            f"nothing was written to {out}; try the other --format, or give a larger --tolerance if that will do",
        )
    write_durable(out, content)
    sizes = sorted({len(batch.inputs) for batch in batches})
    data = {
        "run": settings.run,
        "format": settings.format,
        "out": str(out),
        "bytes": len(content),
        "model": trained.spec,
        "input": facts["input"],
        "output": facts["output"],
        "geometry": facts["geometry"],
        "split": dataset.split,
        "samples": len(np.unique(np.concatenate([batch.indices for batch in batches]))),
        "batch_sizes": sizes,
        "largest_difference": found,
        "tolerance": settings.tolerance,
    }
    shapes = [f"{facts[end]['dtype']} ({', '.join(map(str, facts[end]['shape']))})" for end in ("input", "output")]
    return Report(
        data,
        f"{out}: {trained.spec} as {settings.format}, {data['bytes']:,} bytes, {shapes[0]} → logits {shapes[1]}\n"
        f"largest difference from the network on {data['samples']} samples of {dataset.split}, in batches of "
        f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}: {found:.2g} of 1 + |x|, tolerance {settings.tolerance:g}",
    )


def _check_out(out: Path, name: str) -> None:
    suffix = FORMATS[name].suffix
    if os.path.isdir(out):
        raise UsageError(
            f"--out is {out}, a folder", f"a file that ends in {suffix}", f"write --out {out / f'student{suffix}'}"
        )
    if out.suffix != suffix:
        meant = [f", or --format {other}" for other, each in FORMATS.items() if each.suffix == out.suffix]
        raise UsageError(
            f"--out is {out}, and --format is {name}",
            f"a file that ends in {suffix}",
            f"write --out {out.with_suffix(suffix)}{''.join(meant)}",
        )


def _compared(trained: TrainedNetwork, dataset: IndexedDataset, samples: int) -> list[Compared]:
    """Logits of the network for keyed samples: first for a batch of one, then for all of them in batches."""
    _check_inputs(trained, dataset)
    indices = rng.keyed_sample(len(dataset), samples, 0, "export")
    if len(indices) == 1:
        indices = indices.repeat(2)  # two batch sizes need two rows
    parts = np.split(indices, range(COMPARED_BATCH, len(indices), COMPARED_BATCH))
    requests = [BatchRequest(part) for part in (indices[:1], *parts)]
    device, preprocessor, found = torch.device("cpu"), trained.preprocessor, []
    network = ForwardPass(trained.module, preprocessor, device, classes=len(trained.classes))
    with evaluation_mode(trained.module):
        for batch in batch_loader(dataset, requests, preprocessor=preprocessor, device=device):
            logits = network(batch.inputs, batch.indices).float()
            if not torch.isfinite(logits).all():
                raise ModelError(
                    f"the network itself gives a sample of {dataset.name} a logit that is not finite",
                    "finite logits",
                    "see in its metrics.jsonl whether the training diverged",
                )
            inputs = batch.inputs.long() if preprocessor.makes_tokens else batch.inputs
            found.append(Compared(inputs, logits, batch.indices.numpy()))
    return found


def _check_inputs(trained: TrainedNetwork, dataset: IndexedDataset) -> None:
    """Refuse a split whose inputs are not of the artefact's kind."""
    any_shape = trained.input_shape is None or trained.preprocessor.makes_tokens
    here, there = (
        f"{'texts' if each.is_text else each.input_dtype}{'' if any_shape else f' {each.input_shape}'}"
        for each in (dataset, trained)
    )
    if here != there:
        raise DatasetError(
            f"the inputs of {dataset.name}, split {dataset.split}, are {here}",
            f"{there}, as the network was trained on",
            "compare on another --split, or name the network's own --dataset",
        )


def _example(trained: TrainedNetwork, inputs: Tensor) -> Tensor:
    """Batch to trace with, of at least two inputs and two tokens, because torch takes a size of 1 for a constant."""
    record, rows = trained.preprocessor.record, inputs[:2]
    if record.max_tokens is None:
        return rows
    missing = min(2, record.max_tokens) - rows.shape[1]
    return pad(rows, (0, max(0, missing)), value=record.pad_id)


def _largest_difference(run: Runnable, batches: list[Compared]) -> tuple[float, int]:
    """Largest difference of a logit x as a fraction of 1 + |x|, NaN where a logit is NaN, and its sample index.

    Raises:
        ModelError: the artefact's logits have another shape or dtype.
    """
    largest, at = -1.0, -1
    for inputs, wanted_bc, indices in batches:
        with torch.inference_mode():
            found_bc = run(inputs)
        if found_bc.shape != wanted_bc.shape or found_bc.dtype != torch.float32:
            raise ModelError(
                f"the artefact returns {found_bc.dtype} {tuple(found_bc.shape)} for a batch of {len(inputs)}",
                f"torch.float32 {tuple(wanted_bc.shape)}",
                "try the other --format",
            )
        rows_b = ((found_bc - wanted_bc).abs() / (1 + wanted_bc.abs())).amax(dim=1)
        worst = int(rows_b.argmax())  # NaN counts as the largest
        if not rows_b[worst] <= largest:
            largest, at = float(rows_b[worst]), int(indices[worst])
        if np.isnan(largest):
            break
    return largest, at
