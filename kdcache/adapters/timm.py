"""timm's loaders and training tasks with a teacher's logits from a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcache.core.errors import UsageError
from kdcache.distill import losses
from kdcache.distill.student.joined_dataset import JoinedDataset


class PackedTargets(Dataset[tuple[Any, Tensor]]):
    """Items of `kdcache.join` as timm's loaders take them: (input, target), where a third element would be lost.

    A target is a float32 tensor (1 + classes,): the label, then the teacher's logits. `CachedDistillationTask` takes it
    apart. Mixup and CutMix of timm are not for these: dump mixed inputs with `--mix` and train with kdcache instead.

    Args:
        joined: Result of `kdcache.join`, whose items are (input, label, logits).

    Attributes:
        transform: The student's preprocessing, which `timm.data.create_loader` sets; applied after inputs were compared
            with the cache.
    """

    def __init__(self, joined: JoinedDataset) -> None:
        self._joined = joined
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self._joined)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        value, label, logits = self._joined[index]
        if self.transform is not None:
            value = self.transform(value)
        return value, torch.cat([torch.tensor([float(label)]), logits.float()])

    def set_epoch(self, epoch: int) -> None:
        """Use the view of an epoch, counted from 0."""
        self._joined.set_epoch(epoch)


class CachedDistillationTask(ClassificationTask):
    """A task of timm whose targets are those of `PackedTargets`, for `task(input, target)` in timm's training loop.

    Its loss is alpha · T² · KL(teacher ‖ student) + (1 − alpha) · criterion(student, label) (Hinton et al., 2015).

    Args:
        model: The student.
        criterion: Loss of the labels; None takes timm's, as `ClassificationTask` does.
        temperature: Temperature T of both softmaxes.
        alpha: Weight of the teacher, 0 to 1.
        options: As for `ClassificationTask`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None = None,
        *,
        temperature: float = 2.0,
        alpha: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(model, criterion, **options)
        self.temperature, self.alpha = temperature, alpha

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`loss` and its parts `label_loss` and `kd_loss`, and the student's logits as `output`.

        Raises:
            UsageError: the targets are not those of `PackedTargets`.
        """
        output: Tensor = self.trainable_module(input)
        if target.ndim != 2 or target.shape[1] != 1 + output.shape[1]:
            raise UsageError(
                f"targets have the shape {tuple(target.shape)}, and the student's logits {tuple(output.shape)}",
                f"targets ({len(output)}, {1 + output.shape[1]}): label and teacher's logits",
                "give the loader PackedTargets(kdcache.join(…)), without Mixup and CutMix",
            )
        label_loss = self.criterion(output, target[:, 0].long())
        kd_loss = losses.kd(output, target[:, 1:], temperature=self.temperature)
        loss = self.alpha * kd_loss + (1 - self.alpha) * label_loss
        return {"loss": loss, "label_loss": label_loss, "kd_loss": kd_loss, "output": output}
