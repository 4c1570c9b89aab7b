"""Hugging Face's `Trainer` with a teacher's logits from a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from kdcache.core.errors import UsageError
from kdcache.distill import losses
from kdcache.distill.student.joined_items import TEACHER_LOGITS


class TeacherLogitsCollator:
    """A collator that stacks the teacher's logits, and leaves the rest of the items to another one.

    Others than the default pad what they do not know, or cannot make a tensor of tensors. `DistillationTrainer` puts
    this one around its own.

    Args:
        collator: Collator of the items without `teacher_logits`.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self._collator = collator

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        """A batch with `teacher_logits`, (items, classes), where the items have them."""
        logits = [item[TEACHER_LOGITS] for item in items if TEACHER_LOGITS in item]
        batch = self._collator([{key: item[key] for key in item if key != TEACHER_LOGITS} for item in items])
        if logits:
            batch[TEACHER_LOGITS] = torch.stack(logits)
        return batch


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is alpha · T² · KL(teacher ‖ student) + (1 − alpha) · cross entropy (Hinton et al., 2015).

    The items of `train_dataset` are dicts with `labels` or `label` and, from `kdcache.join`, `teacher_logits`, which
    stay with them through `remove_unused_columns` and any collator. Each epoch has its own view. Evaluation needs no
    teacher's logits, and reports the model's own loss.

    Args:
        temperature: Temperature T of both softmaxes.
        alpha: Weight of the teacher, 0 to 1.
        args, options: As for `Trainer`.

    Raises:
        UsageError: a batch of training has no `teacher_logits`, or no labels.
    """

    def __init__(self, *args: Any, temperature: float = 2.0, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(*args, **options)
        self.temperature, self.alpha = temperature, alpha
        # The loss is a mean over its batch, which Trainer then divides by the batches of a step.
        self.model_accepts_loss_kwargs = False
        self.data_collator: Any = TeacherLogitsCollator(self.data_collator)
        self.add_callback(_EpochCallback(self.train_dataset))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, (), and the model's outputs where they are asked for."""
        teacher_logits = inputs.pop(TEACHER_LOGITS, None)
        if teacher_logits is None:
            if model.training:
                raise UsageError(
                    f"a batch has no {TEACHER_LOGITS}, but {', '.join(map(str, inputs))}",
                    "the items of kdcache.join, and a collator that keeps them",
                    "give train_dataset=kdcache.join(dataset, cache, input_key=…, label_key=…)",
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        if labels is None:
            raise UsageError(
                f"a batch has no labels, but {', '.join(map(str, inputs))}",
                "labels",
                "let the items have them as label or labels",
            )
        outputs = model(**inputs)
        loss: Tensor = losses.kd_with_labels(
            outputs.logits, teacher_logits, labels, temperature=self.temperature, alpha=self.alpha
        )
        return (loss, outputs) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = [*dict.fromkeys([*(self._signature_columns or ()), TEACHER_LOGITS])]


class _EpochCallback(TrainerCallback):
    """Chooses the view of each epoch. Trainer itself tells the dataset only where there is one process."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(int(state.epoch or 0))
