"""Weighted sum of several objectives, on logits, labels and features of the student's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core import rng
from kdcache.core.errors import CacheMismatch, ModelError, UsageError
from kdcache.data.batch import Batch
from kdcache.distill.objective import BATCH, LABELS, NEGATIVES, SOFT_TARGETS, STUDENT, TEACHER, ObjectiveSpec
from kdcache.models.device import evaluation_mode, floating_dtype
from kdcache.models.distributed import Processes
from kdcache.models.feature_hooks import PENULTIMATE, FeatureHooks, pool_features
from kdcache.models.forward import output_logits
from kdcache.store.encodings.base import EMBEDDINGS
from kdcache.store.manifest import Manifest
from kdcache.store.records import NONE, FeatureRecord

# The answer itself, in place of a layer.
OUTPUT = "output"


def stored_feature(manifest: Manifest, spec: ObjectiveSpec) -> FeatureRecord:
    """The stored features that a term needs; of embeddings the embedding, unless it names a layer.

    Raises:
        CacheMismatch: the cache does not hold them.
        UsageError: it holds several, and the term does not say which.
    """
    if manifest.is_embedding and spec.layer in ("", OUTPUT):
        return FeatureRecord(layer=OUTPUT, pool=NONE, array=EMBEDDINGS)
    stored = manifest.features
    layer = spec.layer or (stored[0].layer if len(stored) == 1 else "")
    if stored and not layer:
        raise UsageError(
            f"the objective {spec.name} does not say which features it compares",
            f"one of the stored layers: {', '.join(feature.layer for feature in stored)}",
            f"write {spec.name}:layer={stored[0].layer}",
        )
    for feature in stored:
        if feature.layer == layer:
            return feature
    holds = f"features of {', '.join(feature.layer for feature in stored)}" if stored else "no features"
    options = " ".join(filter(None, (f"--features {layer or PENULTIMATE}", spec.loss.dump_options)))
    raise CacheMismatch(
        f"the objective {spec.name} compares features{f' of {layer}' if layer else ''}, and the cache holds {holds}",
        "a cache with those features",
        f"dump the teacher again with {options}, into another folder",
    )


class CompositeObjective(nn.Module):
    """The weighted sum of several objectives.

    Trains a projection from the student's features to the teacher's where a loss needs one width and they differ.
    Close it when training ends, because it hooks layers of the student.

    Args:
        student: The network, with the layers that the terms name.
        inputs: A batch that the student takes, from which the shapes of its features are known.
        manifest: Manifest of the cache.
        seed: Seed of the projections.
        processes: Processes that train together.

    Raises:
        CacheMismatch, UsageError: as for `stored_feature`.
        ModelError: the student has no such layer, or its features cannot be compared with the teacher's.
    """

    def __init__(
        self,
        specs: Sequence[ObjectiveSpec],
        student: nn.Module,
        inputs: Tensor,
        manifest: Manifest,
        *,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self._specs, self._processes = specs, processes or Processes()
        self._features = {at: stored_feature(manifest, spec) for at, spec in enumerate(specs) if spec.loss.features}
        for spec in specs:
            if spec.loss.one_label and manifest.recipe.mix != NONE:
                raise UsageError(
                    f"{spec.name} needs one label per sample, and inputs are mixed ({manifest.recipe.mix})",
                    "another objective, or a cache without --mix",
                )
        self._layers = {
            at: specs[at].student_layer or (OUTPUT if feature.array == EMBEDDINGS else PENULTIMATE)
            for at, feature in self._features.items()
        }
        self._taps = FeatureHooks(student, [each for each in dict.fromkeys(self._layers.values()) if each != OUTPUT])
        self._projections = nn.ModuleDict()
        try:
            self._add_projections(student, inputs, manifest, seed)
        except BaseException:
            self.close()
            raise

    def _add_projections(self, student: nn.Module, inputs: Tensor, manifest: Manifest, seed: int) -> None:
        with evaluation_mode(student):
            output = output_logits(student(inputs))
            found = self._taps.take() | {OUTPUT: output}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.generator_seed(seed, "projection"))
            for at, feature in self._features.items():
                teacher_shape: tuple[int, ...] = (len(manifest.dataset.classes),)
                if feature.array != EMBEDDINGS:
                    teacher_shape = tuple(manifest.array(feature.array).row_shape)
                student_shape = tuple(_pooled_like(found[self._layers[at]], teacher_shape).shape[1:])
                comparable = self._specs[at].loss.comparable
                try:
                    projection = comparable(student_shape, teacher_shape) if comparable else None
                except ValueError as problem:
                    raise ModelError(
                        f"{self._specs[at].name} compares the student's {self._layers[at]}, {student_shape}, with the "
                        f"teacher's {feature.layer}, {teacher_shape}",
                        str(problem),
                        "choose another --student-layer, or dump the teacher's features with --pool avg",
                    ) from problem
                if projection is not None:
                    self._projections[str(at)] = projection
        self._projections.to(inputs.device, floating_dtype(student))

    @property
    def arrays(self) -> list[str]:
        """Names of the feature arrays that the terms need, beside embeddings."""
        arrays = dict.fromkeys(feature.array for feature in self._features.values())
        return [array for array in arrays if array != EMBEDDINGS]

    @property
    def negatives(self) -> dict[str, int]:
        """Number of rows of other samples that the terms need, by feature array, or `embeddings`."""
        wanted: dict[str, int] = {}
        for at, feature in self._features.items():
            if NEGATIVES in self._specs[at].loss.arguments:
                wanted[feature.array] = max(wanted.get(feature.array, 0), self._specs[at].negatives)
        return wanted

    def forward(self, logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        """The sum as `loss`, and each term without its weight by name."""
        caught: Mapping[str, Tensor] = self._taps.take() | {OUTPUT: logits_bc}
        values: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=logits_bc.dtype, device=logits_bc.device)
        for at, spec in enumerate(self._specs):
            if at in self._features:
                arguments = self._feature_arguments(at, batch, caught)
            else:
                arguments = {STUDENT: logits_bc, LABELS: batch.labels, BATCH: batch, SOFT_TARGETS: batch.soft_targets}
                if TEACHER in spec.loss.arguments and batch.soft_targets is not None:
                    arguments[TEACHER] = batch.soft_targets.logits()
            value, share = self._value(spec, arguments, batch)
            values[spec.name if spec.name not in values else f"{spec.name}_{at + 1}"] = value
            warmup = min(epochs_done / spec.warmup, 1.0) if spec.warmup else 1.0
            if share != 1:
                value = value + (share - 1) * (value - value.detach())  # scales its gradient alone
            total = total + spec.weight * warmup * value
        return {"loss": total, **values}

    def _value(self, spec: ObjectiveSpec, arguments: Mapping[str, Any], batch: Batch) -> tuple[Tensor, float]:
        """Value of a term, and what its gradient is to be multiplied by before all processes average theirs."""
        loss, share = spec.loss, 1.0
        taken = [arguments[name] for name in loss.arguments]
        if loss.across_batch and not self._processes.alone:
            taken = [self._processes.gather(rows, batch.counted) for rows in taken]
            # The loss of the whole batch, of which each process has the gradient for its own samples only; other terms
            # are means over a process's own samples.
            share = batch.whole_size / max(batch.counted, 1)
        value: Tensor = loss.function(*taken, **spec.settings)
        return value, share

    def close(self) -> None:
        """Remove the hooks from the student."""
        self._taps.close()

    def _feature_arguments(self, at: int, batch: Batch, caught: Mapping[str, Tensor]) -> dict[str, Any]:
        array = self._features[at].array
        if array == EMBEDDINGS:
            assert batch.soft_targets is not None, "distillation needs joined batches"
            teacher = batch.soft_targets.logits()
        else:
            assert batch.features is not None, "the join brings the features that `arrays` names"
            teacher = batch.features[array]
        student = _pooled_like(caught[self._layers[at]], tuple(teacher.shape[1:]))
        if str(at) in self._projections:
            projection = self._projections[str(at)]
            student = projection(student.to(next(projection.parameters()).dtype))
        if NEGATIVES not in self._specs[at].loss.arguments:
            return {STUDENT: student, TEACHER: teacher}
        assert batch.negatives is not None, "the join brings the negatives that `negatives` names"
        negatives = batch.negatives[array][: self._specs[at].negatives].flatten(1)
        return {STUDENT: student, TEACHER: teacher.flatten(1), NEGATIVES: negatives}


def _pooled_like(student: Tensor, teacher_shape: tuple[int, ...]) -> Tensor:
    """The student's features, averaged over places where the teacher's were."""
    return pool_features(student, "avg") if len(teacher_shape) == 1 and student.ndim > 2 else student
