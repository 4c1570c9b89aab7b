"""The log of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.core.plugins import require_extra


class Board:
    """Writes the numbers of each epoch. Nothing is written before `begin`.

    Args:
        folder: Log directory.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        require_extra("tensorboard", "tensorboard", "--tensorboard")
        self._folder = folder
        self._writer: Any = None

    def begin(self, epochs_done: int) -> None:
        """Continue after some epochs; entries of later epochs, by an earlier attempt, are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=epochs_done + 1)

    def add(self, entry: dict[str, Any]) -> None:
        """Write the metrics of one epoch, as in `metrics.jsonl`."""
        for name, value in entry.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, entry["epoch"])
        self._writer.flush()

    def add_steps(self, step: int, values: dict[str, float]) -> None:
        """Write means over the steps before a step, counted from 1."""
        for name, value in values.items():
            self._writer.add_scalar(f"step/{name}", value, step)
