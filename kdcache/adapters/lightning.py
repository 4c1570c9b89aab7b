"""Lightning with a teacher's logits from a cache."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from kdcache.distill.student.joined_dataset import JoinedDataset


class EpochSampler(DistributedSampler[Any]):
    """Shuffled samples of one process, whose `set_epoch` also chooses the view of the epoch.

    Lightning calls `set_epoch` before each epoch, and keeps a `DistributedSampler` where it would put another sampler
    in its place. As each of those does, it repeats a few samples so that all processes get equally many.
    """

    def set_epoch(self, epoch: int) -> None:
        """Use the order and the view of an epoch, counted from 0."""
        super().set_epoch(epoch)
        joined: Any = self.dataset
        joined.set_epoch(epoch)


class CachedDataModule(LightningDataModule):
    """Batches of (inputs, labels, teacher's logits) for `training_step`, from `kdcache.join`; or dicts, where it gives.

    Args:
        train: Result of `kdcache.join`.
        val: Dataset for `validation_step`, without logits; None for none.
        batch_size: Samples per batch and process.
        seed: Seed of the order.
        options: As for `DataLoader`, such as `num_workers`.
    """

    def __init__(
        self, train: JoinedDataset, val: Any = None, *, batch_size: int = 128, seed: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self._train, self._val, self._seed = train, val, seed
        self._options = {"batch_size": batch_size, **options}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training data; each process has its own part."""
        size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EpochSampler(self._train, num_replicas=size, rank=rank, seed=self._seed)
        return DataLoader(self._train, sampler=sampler, **self._options)

    def val_dataloader(self) -> Any:
        """Batches of the validation data in order; none where there are none."""
        if not isinstance(self._val, Sized):
            return []
        return DataLoader(self._val, **self._options)  # type: ignore[arg-type]
