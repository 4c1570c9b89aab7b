"""Several objectives in one: each with its weight, on logits, labels, and features of layers inside the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdcache.core import rng
from kdcache.core.errors import CacheMismatch, ModelError, UsageError
from kdcache.data.loader import Batch
from kdcache.distill.objective import ObjectiveSpec, label_loss
from kdcache.models.device import evaluation_mode, floating_dtype
from kdcache.models.feature_hooks import PENULTIMATE, Taps, pool_features
from kdcache.store.manifest import NONE, FeatureRecord, Manifest


def feature_of(manifest: Manifest, spec: ObjectiveSpec) -> FeatureRecord:
    """The stored features that a part asks for.

    Raises:
        CacheMismatch: the cache does not hold them.
        UsageError: it holds several, and the part does not say which.
    """
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
    option = f"--features {layer or PENULTIMATE}"
    if spec.name == "attention_transfer":
        option += " --pool none"
    raise CacheMismatch(
        f"the objective {spec.name} compares features{f' of {layer}' if layer else ''}, and the cache holds {holds}",
        "a cache with those features",
        f"dump the teacher again with {option}, into another folder",
    )


class Composition(nn.Module):
    """The weighted sum of several objectives, for batches that bring what they need.

    Learns a projection from the student's features to the teacher's where a part needs one width and they differ.
    Close it when training ends: it listens to layers of the student.

    Args:
        student: with the layers that the parts name.
        inputs: a batch that the student takes, to learn the shapes of its features.
        manifest: of the cache.
        seed: of the projections.

    Raises:
        CacheMismatch, UsageError: as for `feature_of`.
        ModelError: the student has no such layer, or its features cannot be compared with the teacher's.
    """

    def __init__(
        self, specs: Sequence[ObjectiveSpec], student: nn.Module, inputs: Tensor, manifest: Manifest, *, seed: int
    ) -> None:
        super().__init__()
        self._specs = specs
        self._features = {
            at: feature_of(manifest, spec) for at, spec in enumerate(specs) if "features" in spec.kind.needs
        }
        if manifest.recipe.mix != NONE and any(spec.name == "decoupled_kd" for spec in specs):
            raise UsageError(
                f"decoupled_kd needs one label a sample, and inputs are mixed ({manifest.recipe.mix})",
                "another objective, or a cache without --mix",
            )
        self._layers = {at: specs[at].student_layer or PENULTIMATE for at in self._features}
        self._taps = Taps(student, list(dict.fromkeys(self._layers.values())))
        self._projections = nn.ModuleDict()
        try:
            self._learn_shapes(student, inputs, manifest, seed)
        except BaseException:
            self.close()
            raise

    def _learn_shapes(self, student: nn.Module, inputs: Tensor, manifest: Manifest, seed: int) -> None:
        with evaluation_mode(student):
            student(inputs)
            found = self._taps.take()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.generator_seed(seed, "projection"))
            for at, feature in self._features.items():
                shape = tuple(manifest.array(feature.array).row_shape)
                self._add_projection(at, self._suited(found[self._layers[at]], shape), shape)
        self._projections.to(inputs.device, floating_dtype(student))

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays whose rows the parts need."""
        return list(dict.fromkeys(feature.array for feature in self._features.values()))

    @property
    def negatives(self) -> dict[str, int]:
        """How many rows of other samples the parts need, by array."""
        wanted: dict[str, int] = {}
        for at, feature in self._features.items():
            if "negatives" in self._specs[at].kind.needs:
                wanted[feature.array] = max(wanted.get(feature.array, 0), self._specs[at].negatives)
        return wanted

    def forward(self, logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        """The sum as `loss`, and each part without its weight by name."""
        caught: Mapping[str, Tensor] = self._taps.take() if self._features else {}
        values: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=logits_bc.dtype, device=logits_bc.device)
        for at, spec in enumerate(self._specs):
            value = self._part(at, spec, logits_bc, batch, caught)
            name = spec.name if spec.name not in values else f"{spec.name}_{at + 1}"
            values[name] = value
            grown = min(epochs_done / spec.warmup, 1.0) if spec.warmup else 1.0
            total = total + spec.weight * grown * value
        return {"loss": total, **values}

    def close(self) -> None:
        """Stop listening to the student."""
        self._taps.close()

    def _part(
        self, at: int, spec: ObjectiveSpec, logits_bc: Tensor, batch: Batch, caught: Mapping[str, Tensor]
    ) -> Tensor:
        if spec.name == "hard_cross_entropy":
            return label_loss(logits_bc, batch, spec.settings["label_smoothing"])
        if at not in self._features:
            assert batch.soft_targets is not None, "distillation needs joined batches"
            labels = (batch.labels,) if "labels" in spec.kind.needs else ()
            return spec.kind.function(logits_bc, batch.soft_targets, *labels, **spec.settings)
        assert batch.features is not None, "features were asked for"
        array = self._features[at].array
        teacher = batch.features[array]
        student = self._suited(caught[self._layers[at]], tuple(teacher.shape[1:]))
        if str(at) in self._projections:
            student = self._projections[str(at)](student.to(next(self._projections[str(at)].parameters()).dtype))
        if "negatives" not in spec.kind.needs:
            return spec.kind.function(student, teacher, **spec.settings)
        assert batch.negatives is not None, "negatives were asked for"
        negatives = batch.negatives[array][: spec.negatives].flatten(1)
        return spec.kind.function(student, teacher.flatten(1), negatives, **spec.settings)

    @staticmethod
    def _suited(student: Tensor, teacher_shape: tuple[int, ...]) -> Tensor:
        """The student's features, averaged over places where the teacher's were."""
        return pool_features(student, "avg") if len(teacher_shape) == 1 and student.ndim > 2 else student

    def _add_projection(self, at: int, student: Tensor, teacher_shape: tuple[int, ...]) -> None:
        """What makes the student's features comparable with the teacher's, if they are not.

        Args:
            student: features, (batch, ...), averaged where the teacher's are.
            teacher_shape: of one sample.
        """
        spec, found = self._specs[at], tuple(student.shape[1:])
        if spec.name == "attention_transfer":
            fits = len(found) == len(teacher_shape) == 3 and found[1:] == teacher_shape[1:]
            if not fits:
                raise self._unlike(at, found, teacher_shape, "maps (channels, height, width) of one height and width")
            return
        if spec.name not in ("feature_mse", "contrastive") or found == teacher_shape:
            return
        if spec.name == "contrastive" or len(found) == len(teacher_shape) == 1:
            width = int(torch.Size(teacher_shape).numel())
            if len(found) != 1:
                raise self._unlike(at, found, teacher_shape, "vectors")
            if found[0] != width:
                self._projections[str(at)] = nn.Linear(found[0], width)
            return
        if len(found) == len(teacher_shape) == 3 and found[1:] == teacher_shape[1:]:
            self._projections[str(at)] = nn.Conv2d(found[0], teacher_shape[0], 1)
            return
        raise self._unlike(at, found, teacher_shape, "vectors, or maps of one height and width")

    def _unlike(self, at: int, found: tuple[int, ...], teacher_shape: tuple[int, ...], needed: str) -> ModelError:
        return ModelError(
            f"{self._specs[at].name} compares the student's {self._layers[at]}, {found}, with the teacher's "
            f"{self._features[at].layer}, {teacher_shape}",
            needed,
            "choose another --student-layer, or dump the teacher's features with --pool avg",
        )
