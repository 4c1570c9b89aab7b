"""Objectives: the table of losses, and their specs on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Size, Tensor, nn

from kdcache.core.config import StudentConfig
from kdcache.core.errors import UsageError
from kdcache.core.plugins import did_you_mean
from kdcache.core.specs import number, split_options, split_spec
from kdcache.data.batch import Batch
from kdcache.data.soft_targets import SoftTargets
from kdcache.distill import losses
from kdcache.store.encodings.topk import CLASSES, VALUES


class Objective(Protocol):
    """The training objective. The parameters of an objective that is a module are trained too."""

    def __call__(self, logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, the others are logged.

        Args:
            logits_bc: Logits of the network, (batch, classes), on the device.
            batch: Labels, soft targets and features on the device, indices on the host.
            epochs_done: Epochs since the start of training, with the fraction of the current one.
        """
        ...


class Join(Protocol):
    """Joins batches with soft targets."""

    def start_epoch(self, epoch: int) -> None:
        """Prepare for the batches of an epoch, counted from 0."""
        ...

    def __call__(self, batch: Batch) -> Batch:
        """A batch with soft targets; called by the loader with each batch on the host, in the order of the epoch."""
        ...


def label_objective(label_smoothing: float) -> Objective:
    """Objective of training on labels alone."""

    def objective(logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        return {"loss": label_loss(logits_bc, batch, label_smoothing=label_smoothing)}

    return objective


def distillation_objective(config: StudentConfig) -> Objective:
    """alpha · kd + (1 − alpha) · cross entropy, for batches with soft targets."""

    def objective(logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        assert batch.soft_targets is not None, "distillation needs joined batches"
        if batch.labels.ndim == 2:
            soft = losses.binary_kd(logits_bc, batch.soft_targets.logits(), temperature=config.temperature)
        else:
            soft = kd_from_cache(logits_bc, batch.soft_targets, temperature=config.temperature)
        hard = label_loss(logits_bc, batch, label_smoothing=config.label_smoothing)
        return {"loss": config.alpha * soft + (1 - config.alpha) * hard, "kd": soft, "cross_entropy": hard}

    return objective


def kd_from_cache(student_bc: Tensor, soft_targets: SoftTargets, *, temperature: float) -> Tensor:
    """`losses.kd`, or `losses.topk_kd` where only the teacher's largest logits are stored."""
    encoding = soft_targets.sparse
    if encoding is None:
        return losses.kd(student_bc, soft_targets.logits(temperature), temperature=temperature)
    rows = soft_targets.rows
    return losses.topk_kd(
        student_bc,
        rows[VALUES],
        rows[CLASSES],
        encoding.tail(rows, temperature),
        temperature=temperature,
        tail=soft_targets.tail,
    )


def label_loss(logits_bc: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy with the labels; of mixed inputs with both labels of each, by their parts.

    Where a sample belongs to several classes, it is that of each class alone.

    Where samples have no label, the mean is over those that have one, and 0 where none has.
    """
    if batch.labels.ndim == 2:
        return losses.binary_cross_entropy(logits_bc, batch.labels, label_smoothing=label_smoothing)
    if batch.labelled is not None:
        total = losses.labelled_cross_entropy(logits_bc, batch.labels, label_smoothing=label_smoothing)
        # A mean over the batch of all processes, as a part of which this process's loss is weighed.
        return total * (batch.whole_size / max(batch.counted, 1) / max(batch.labelled, 1))
    if batch.partner_labels is None or batch.mix_lambda is None:
        return losses.hard_cross_entropy(logits_bc, batch.labels, label_smoothing=label_smoothing)
    return losses.mixed_cross_entropy(
        logits_bc, batch.labels, batch.partner_labels, batch.mix_lambda, label_smoothing=label_smoothing
    )


# Kinds of positional arguments of losses.
STUDENT, TEACHER, LABELS, BATCH, NEGATIVES = "student", "teacher", "labels", "batch", "negatives"
SOFT_TARGETS = "soft targets"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss and what it needs.

    Attributes:
        function: Pure function of tensors; its keyword-only parameters are the options of its spec.
        arguments: Positional arguments of the function, in their order.
        features: Whether student and teacher are features or embeddings, and not logits.
        comparable: Makes the student's features comparable with the teacher's: takes the shapes of one sample's
            features, student first, and returns a projection of the student's, or None where none is needed. Raises
            ValueError with the shapes that would be comparable. None where any shapes are.
        temperature: Default temperature, where it is not the student's.
        one_label: Whether inputs must have one label each, so that none can be mixed.
        needs_labels: Whether it has nothing to compare with where no sample is labelled.
        multi_label: Whether it is for samples of several classes each; losses of features are for all.
        whole_rows: Whether it needs the teacher's logits of all classes.
        across_batch: Whether it compares samples of a batch with each other, so that it needs all of them.
        dump_options: Options of dump-teacher, beside `--features`, that store the features it needs.
    """

    function: Callable[..., Tensor]
    arguments: tuple[str, ...] = (STUDENT, TEACHER)
    features: bool = False
    comparable: Callable[[Shape, Shape], nn.Module | None] | None = None
    temperature: float | None = None
    one_label: bool = False
    needs_labels: bool = False
    multi_label: bool = False
    whole_rows: bool = False
    across_batch: bool = False
    dump_options: str = ""

    @property
    def keywords(self) -> Mapping[str, inspect.Parameter]:
        """The options of the function."""
        parameters = inspect.signature(self.function).parameters
        return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def _same_maps(student: Shape, teacher: Shape) -> None:
    if not len(student) == len(teacher) == 3 or student[1:] != teacher[1:]:
        raise ValueError("maps (channels, height, width) of one height and width")


def _projected(student: Shape, teacher: Shape) -> nn.Module | None:
    if student == teacher:
        return None
    if len(student) == len(teacher) == 1:
        return nn.Linear(student[0], teacher[0])
    if len(student) == len(teacher) == 3 and student[1:] == teacher[1:]:
        return nn.Conv2d(student[0], teacher[0], 1)
    raise ValueError("vectors, or maps of one height and width")


def _projected_vectors(student: Shape, teacher: Shape) -> nn.Module | None:
    width = int(Size(teacher).numel())
    if student != teacher and len(student) != 1:
        raise ValueError("vectors")
    return None if student in (teacher, (width,)) else nn.Linear(student[0], width)


LOSSES: dict[str, Loss] = {
    "hard_cross_entropy": Loss(function=label_loss, arguments=(STUDENT, BATCH), needs_labels=True),
    "kd": Loss(function=kd_from_cache, arguments=(STUDENT, SOFT_TARGETS)),
    "soft_cross_entropy": Loss(function=losses.soft_cross_entropy, whole_rows=True),
    "logit_mse": Loss(function=losses.logit_mse, whole_rows=True),
    "binary_kd": Loss(function=losses.binary_kd, multi_label=True, whole_rows=True),
    "binary_cross_entropy": Loss(
        function=losses.binary_cross_entropy, arguments=(STUDENT, LABELS), needs_labels=True, multi_label=True
    ),
    "decoupled_kd": Loss(
        function=losses.decoupled_kd, arguments=(STUDENT, TEACHER, LABELS), one_label=True, whole_rows=True
    ),
    "dist": Loss(function=losses.dist, whole_rows=True, across_batch=True),
    "standardized_kd": Loss(function=losses.standardized_kd, whole_rows=True),
    "cosine": Loss(function=losses.cosine, features=True, comparable=_projected_vectors),
    "feature_mse": Loss(function=losses.feature_mse, features=True, comparable=_projected),
    "attention_transfer": Loss(
        function=losses.attention_transfer, features=True, comparable=_same_maps, dump_options="--pool none"
    ),
    "similarity_preserving": Loss(function=losses.similarity_preserving, features=True, across_batch=True),
    "relational_distance": Loss(function=losses.relational_distance, features=True, across_batch=True),
    "relational_angle": Loss(function=losses.relational_angle, features=True, across_batch=True),
    "contrastive": Loss(
        function=losses.contrastive,
        arguments=(STUDENT, TEACHER, NEGATIVES),
        features=True,
        comparable=_projected_vectors,
        temperature=0.1,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSpec:
    """One term of the objective, as given on the command line.

    Attributes:
        name: Key of `LOSSES`.
        weight: Weight of the term in the sum.
        warmup: Epochs over which the weight grows from 0; may be a fraction.
        layer: Layer of the teacher, for losses of features; empty for the only one that is stored.
        student_layer: Layer of the student, likewise; empty for the penultimate.
        negatives: Number of samples outside the batch that each sample is contrasted with.
        settings: Keyword arguments of the loss.
    """

    name: str
    weight: float = 1.0
    warmup: float = 0.0
    layer: str = ""
    student_layer: str = ""
    negatives: int = 1024
    settings: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]


def parse_objectives(specs: Sequence[str], config: StudentConfig) -> list[ObjectiveSpec]:
    """Terms of an objective, from specs `NAME[:key=value,…]`.

    Args:
        config: Its temperature is that of losses without a default, its `student_layer` that of losses of features.

    Raises:
        UsageError: no such objective, key or value.
    """
    return [_parse(spec, config) for spec in specs]


def _parse(spec: str, config: StudentConfig) -> ObjectiveSpec:
    name, options = split_spec(spec)
    name = name.replace("-", "_")
    if name not in LOSSES:
        known = list(LOSSES)
        raise UsageError(f"there is no objective {name!r}", f"one of {', '.join(known)}", did_you_mean(name, known))
    loss = LOSSES[name]
    own: dict[str, Any] = {}
    settings: dict[str, float] = {}
    layers = ("layer", "student_layer") if loss.features else ()
    numbers = ("weight", "warmup", *(("negatives",) if NEGATIVES in loss.arguments else ()))
    for key, value in split_options(options).items():
        if key in layers:
            own[key] = value
        elif key in (*numbers, *loss.keywords):
            (own if key in numbers else settings)[key] = _number(spec, key, value)
        else:
            allowed = ", ".join((*numbers, *layers, *loss.keywords))
            raise UsageError(f"--objective {spec} sets {key!r}", f"one of {allowed}", "write NAME:key=value,key=value")
    temperature = loss.keywords.get("temperature")
    if temperature is not None and temperature.default is inspect.Parameter.empty:
        settings.setdefault("temperature", loss.temperature or config.temperature)
    if "label_smoothing" in loss.keywords:
        settings.setdefault("label_smoothing", config.label_smoothing)
    if loss.features:
        own.setdefault("student_layer", config.student_layer)
    return ObjectiveSpec(name=name, **own, settings=settings)


def _number(spec: str, key: str, text: str) -> float:
    try:
        if key == "negatives":
            return number(text, int, 1)
        return number(text, float, 0, above=key == "temperature")
    except ValueError as problem:
        raise UsageError(f"--objective {spec}: {key} is {text!r}", str(problem)) from problem


def objective_parameters(objective: Objective) -> list[nn.Parameter]:
    """The parameters of an objective, which are trained with the network's."""
    return list(objective.parameters()) if isinstance(objective, nn.Module) else []
