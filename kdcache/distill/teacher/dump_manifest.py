"""What a dump is of: the manifest of a teacher, a dataset and the settings that join them."""

from __future__ import annotations

import torch
from torch import nn

from kdcache.core.config import DumpConfig
from kdcache.data.registry import fingerprint_labels, fingerprint_samples
from kdcache.data.versions import package_versions
from kdcache.data.views import Views
from kdcache.models.registry import count_parameters, weights_sha256
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.layout import build_arrays
from kdcache.store.manifest import DatasetRecord, FeatureRecord, Manifest, Preprocess, TeacherRecord


def build_manifest(
    teacher: nn.Module,
    views: Views,
    split: str,
    teacher_name: str,
    preprocess: Preprocess,
    device: torch.device,
    config: DumpConfig,
    feature_shapes: dict[str, tuple[int, ...]],
) -> Manifest:
    """The manifest of a dump, without its results.

    Args:
        feature_shapes: of one row, by layer, as they are stored.
    """
    dataset = views.dataset
    labels = dataset.labels()
    features = tuple(
        FeatureRecord(layer=layer, pool=config.pool, array=f"features.{layer}") for layer in feature_shapes
    )
    shard_rows, arrays = build_arrays(
        length=len(dataset),
        encoding=encoding_named(config.encoding),
        classes=len(dataset.classes),
        features={feature.array: feature_shapes[feature.layer] for feature in features},
        compression=config.compression,
        shard_rows=config.shard_rows,
    )
    return Manifest(
        dataset=DatasetRecord(
            name=dataset.name,
            split=split,
            length=len(dataset),
            classes=dataset.classes,
            input_dtype=dataset.input_dtype,
            input_shape=dataset.input_shape,
            sample_sha256=fingerprint_samples(dataset),
            labels_sha256=None if labels is None else fingerprint_labels(labels),
            data_root=dataset.data_root,
        ),
        teacher=TeacherRecord(
            spec=teacher_name,
            weights_sha256=weights_sha256(teacher),
            parameters=count_parameters(teacher),
            preprocess=preprocess,
        ),
        views=config.views,
        recipe=views.recipe,
        arrays=arrays,
        encoding=config.encoding,
        features=features,
        shard_rows=shard_rows,
        seed=config.seed,
        amp=config.amp,
        device=str(device),
        batch_size=config.batch_size,
        versions=package_versions(reads_text=bool(preprocess.tokenizer_sha256)),
    )
