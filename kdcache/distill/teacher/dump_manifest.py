"""The manifest of a dump: teacher, dataset and settings."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

import torch

from kdcache.core.config import DumpConfig
from kdcache.data.registry import fingerprint_labels, fingerprint_samples
from kdcache.data.versions import package_versions
from kdcache.data.views import Views
from kdcache.models.execution import DEFAULT_BATCH
from kdcache.models.feature_hooks import PENULTIMATE
from kdcache.models.forward import ForwardPass
from kdcache.models.registry import count_parameters, weights_sha256
from kdcache.store.constants import constant_records
from kdcache.store.encodings.base import Encoding
from kdcache.store.encodings.head import FEATURES
from kdcache.store.facts import fact_names
from kdcache.store.layout import build_arrays
from kdcache.store.local_paths import portable_spec
from kdcache.store.manifest import Manifest
from kdcache.store.records import ONE_CLASS, DatasetRecord, FeatureRecord, PrecisionRecord, TeacherRecord


def build_manifest(
    teacher: ForwardPass,
    views: Views,
    teacher_name: str,
    config: DumpConfig,
    encoding: Encoding,
    answers: str,
    features: dict[FeatureRecord, tuple[int, ...]],
    precision: PrecisionRecord | None = None,
) -> Manifest:
    """The manifest of a dump, without its results.

    Args:
        answers: What the teacher says of a sample, as `Manifest.answers` names it.
        features: With the shape of one row as it is stored.
        precision: What automatic mixed precision changes in the teacher's answers, where it was measured.
    """
    dataset = views.dataset
    labels = dataset.labels()
    shard_rows, arrays = build_arrays(
        length=len(dataset),
        encoding=encoding,
        features={feature.array: shape for feature, shape in features.items()},
        compression=config.compression,
        shard_rows=config.shard_rows,
        label_shape=(len(dataset.classes),) if dataset.multi_label else (),
    )
    return Manifest(
        dataset=DatasetRecord(
            name=portable_spec(dataset.name),
            split=dataset.split,
            length=len(dataset),
            classes=dataset.classes,
            input_dtype=dataset.input_dtype,
            input_shape=dataset.input_shape,
            sample_sha256=fingerprint_samples(dataset),
            excluded=dataset.excluded,
            labels_sha256=None if labels is None else fingerprint_labels(labels),
        ),
        teacher=TeacherRecord(
            spec=portable_spec(teacher_name),
            weights_sha256=weights_sha256(teacher.module),
            parameters=count_parameters(teacher.module),
            preprocess=teacher.preprocessor.record,
            outputs=teacher.outputs,
        ),
        views=config.views,
        recipe=views.recipe,
        arrays=arrays,
        encoding=encoding.spec,
        temperatures=encoding.temperatures,
        constants=constant_records(encoding),
        # Of softmax, which neither several classes of a sample nor embeddings have.
        facts=fact_names(encoding) if answers == ONE_CLASS else (),
        features=(*features, *_head_features(encoding)),
        shard_rows=shard_rows,
        seed=config.seed,
        amp=config.amp,
        device=teacher.device.type,
        batch_size=config.batch_size or DEFAULT_BATCH,
        memory_format=config.memory_format,
        compiled=teacher.compiled,
        precision=precision,
        versions=package_versions(reads_text=bool(teacher.preprocessor.record.tokenizer_sha256)),
        compute=compute_facts(teacher.device),
        license=config.license,
        citation=config.citation,
    )


def _head_features(encoding: Encoding) -> tuple[FeatureRecord, ...]:
    """The features that the encoding `head` stores as they are."""
    names = [array.name for array in encoding.arrays()]
    return tuple(FeatureRecord(layer=PENULTIMATE, pool="none", array=name) for name in names if name == FEATURES)


def compute_facts(device: torch.device) -> dict[str, str]:
    """The device, and its settings that change the last bits of a result."""
    backends: Any = torch.backends  # whose stubs lack what torch sets at run time
    if device.type == "cpu":
        return {
            "device": "cpu",
            "name": _processor_name(),
            "instructions": backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
            "matmul_precision": backends.mkldnn.matmul.fp32_precision,
            "conv_precision": backends.mkldnn.conv.fp32_precision,
        }
    if device.type != "cuda":
        return {"device": device.type}
    return {
        "device": "cuda",
        "name": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(backends.cudnn.version()),
        "cudnn_benchmark": str(backends.cudnn.benchmark),
        "deterministic": str(backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()),
        # `tf32` or `none`; the former allow_tf32 flags and set_float32_matmul_precision show here too.
        "matmul_precision": backends.cuda.matmul.fp32_precision,
        "conv_precision": backends.cudnn.conv.fp32_precision,
        "rnn_precision": backends.cudnn.rnn.fp32_precision,
    }


def _processor_name() -> str:
    """Name of the processor, such as `AMD EPYC 7763 64-Core Processor`, or its kind where the name is unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
