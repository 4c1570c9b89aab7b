"""What a network is trained for, and how soft targets come to a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from kdcache.core.config import StudentConfig
from kdcache.core.errors import UsageError
from kdcache.core.plugins import did_you_mean
from kdcache.data.loader import Batch
from kdcache.distill import losses


class Objective(Protocol):
    """What a network is trained for. One that is a module has parameters of its own, which are trained along."""

    def __call__(self, logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, the others are shown.

        Args:
            logits_bc: the network's, (batch, classes), on the device.
            batch: labels, soft targets and features on the device, indices on the host.
            epochs_done: with the part of the present one.
        """
        ...


class Join(Protocol):
    """Puts soft targets to the inputs of a batch."""

    def start_epoch(self, epoch: int) -> None:
        """Prepare for the batches of an epoch, counted from 0."""
        ...

    def __call__(self, batch: Batch) -> Batch:
        """Given each batch on the host before its step; returns it with soft targets."""
        ...


def label_objective(label_smoothing: float) -> Objective:
    """Cross entropy with the labels and nothing else."""

    def objective(logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        return {"loss": label_loss(logits_bc, batch, label_smoothing)}

    return objective


def distillation_objective(config: StudentConfig) -> Objective:
    """alpha · kd + (1 − alpha) · cross entropy, for batches with soft targets."""

    def objective(logits_bc: Tensor, batch: Batch, epochs_done: float = 0.0) -> dict[str, Tensor]:
        assert batch.soft_targets is not None, "distillation needs joined batches"
        soft = losses.kd(logits_bc, batch.soft_targets, temperature=config.temperature)
        hard = label_loss(logits_bc, batch, config.label_smoothing)
        return {"loss": config.alpha * soft + (1 - config.alpha) * hard, "kd": soft, "cross_entropy": hard}

    return objective


def label_loss(logits_bc: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross entropy with the labels, or where inputs are mixed with both labels of each, in their shares."""
    if batch.partner_labels is None or batch.shares is None:
        return losses.hard_cross_entropy(logits_bc, batch.labels, label_smoothing=label_smoothing)
    return losses.mixed_cross_entropy(
        logits_bc, batch.labels, batch.partner_labels, batch.shares, label_smoothing=label_smoothing
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """A loss by name.

    Attributes:
        needs: `labels`, `logits` or `features`, of the teacher or the dataset.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...]


KINDS: dict[str, _Kind] = {
    "hard_cross_entropy": _Kind(losses.hard_cross_entropy, ("labels",)),
    "kd": _Kind(losses.kd, ("logits",)),
    "soft_cross_entropy": _Kind(losses.soft_cross_entropy, ("logits",)),
    "logit_mse": _Kind(losses.logit_mse, ("logits",)),
    "decoupled_kd": _Kind(losses.decoupled_kd, ("logits", "labels")),
    "dist": _Kind(losses.dist, ("logits",)),
    "standardized_kd": _Kind(losses.standardized_kd, ("logits",)),
    "feature_mse": _Kind(losses.feature_mse, ("features",)),
    "attention_transfer": _Kind(losses.attention_transfer, ("features",)),
    "similarity_preserving": _Kind(losses.similarity_preserving, ("features",)),
    "relational_distance": _Kind(losses.relational_distance, ("features",)),
    "relational_angle": _Kind(losses.relational_angle, ("features",)),
    "contrastive": _Kind(losses.contrastive, ("features", "negatives")),
}

# Where a loss has no temperature of its own.
CONTRASTIVE_TEMPERATURE = 0.1
NEGATIVES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSpec:
    """One part of what is minimised, as it was asked for.

    Attributes:
        name: a key of `KINDS`.
        weight: of the part in the sum.
        warmup: epochs over which the weight grows from 0; may be a fraction.
        layer: of the teacher, where features are compared; empty for the only one that is stored.
        student_layer: likewise, of the student.
        negatives: of `contrastive`: how many other samples each is told from.
        settings: keywords of the loss.
    """

    name: str
    weight: float = 1.0
    warmup: float = 0.0
    layer: str = ""
    student_layer: str = ""
    negatives: int = NEGATIVES
    settings: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> _Kind:
        return KINDS[self.name]


def parse_objectives(specs: Sequence[str], config: StudentConfig) -> list[ObjectiveSpec]:
    """What `NAME[:key=value,…]` mean.

    Args:
        config: its temperature is that of losses which have no default, its `student_layer` that of features.

    Raises:
        UsageError: no such objective, key or value.
    """
    return [_parse(spec, config) for spec in specs]


def _parse(spec: str, config: StudentConfig) -> ObjectiveSpec:
    name, _, text = spec.partition(":")
    name = name.replace("-", "_")
    if name not in KINDS:
        known = list(KINDS)
        raise UsageError(f"there is no objective {name!r}", f"one of {', '.join(known)}", did_you_mean(name, known))
    keywords = [
        each.name
        for each in inspect.signature(KINDS[name].function).parameters.values()
        if each.kind is each.KEYWORD_ONLY
    ]
    own: dict[str, Any] = {"name": name}
    settings: dict[str, float] = {}
    words = ("layer", "student_layer") if "features" in KINDS[name].needs else ()
    numbers = ("weight", "warmup", *(("negatives",) if "negatives" in KINDS[name].needs else ()))
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if key in words:
            own[key] = value
        elif key in (*numbers, *keywords):
            (own if key in numbers else settings)[key] = _number(spec, key, value)
        else:
            allowed = ", ".join((*numbers, *words, *keywords))
            raise UsageError(f"--objective {spec} sets {key!r}", f"one of {allowed}", "write NAME:key=value,key=value")
    if "temperature" in keywords and "temperature" not in settings and not _has_default(name, "temperature"):
        settings["temperature"] = CONTRASTIVE_TEMPERATURE if name == "contrastive" else config.temperature
    if "label_smoothing" in keywords:
        settings.setdefault("label_smoothing", config.label_smoothing)
    if "features" in KINDS[name].needs:
        own.setdefault("student_layer", config.student_layer)
    own["negatives"] = int(own.get("negatives", NEGATIVES))
    return ObjectiveSpec(**own, settings=settings)


def _has_default(name: str, keyword: str) -> bool:
    return inspect.signature(KINDS[name].function).parameters[keyword].default is not inspect.Parameter.empty


def _number(spec: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as problem:
        raise UsageError(f"--objective {spec}: {key} is {text!r}", "a number") from problem
    positive = key in ("temperature", "negatives")
    if not (value > 0 if positive else value >= 0) or value == float("inf"):
        raise UsageError(f"--objective {spec}: {key} is {text}", "a positive number" if positive else "0 or more")
    return value


def trained_parts(objective: Objective) -> list[nn.Parameter]:
    """The parameters that an objective brings along."""
    return list(objective.parameters()) if isinstance(objective, nn.Module) else []
