"""The scalars of an epoch's steps: their means, what is printed of them, and whether they are finite."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from kdcache.core.config import TrainConfig
from kdcache.core.errors import TrainingDiverged
from kdcache.core.progress import Progress, log
from kdcache.data.batch import Batch
from kdcache.distill.run_state import RunState
from kdcache.models.distributed import Processes

# How many steps may pass before a loss that is not finite is noticed: looking at every one would stall a GPU.
CHECK_EVERY_STEPS = 64


class StepRecords:
    """Collects the objective's scalars of each step on the device, and looks at them every now and then.

    Args:
        epoch: Number of the epoch, from 0.
        steps: Steps of the epoch.
        progress: Is advanced by the steps that were looked at.

    Attributes:
        samples: Samples of all processes so far.
        labelled: Those of them that have a label.
    """

    def __init__(
        self,
        config: TrainConfig,
        epoch: int,
        steps: int,
        processes: Processes,
        state: RunState,
        progress: Progress,
    ) -> None:
        self._config, self._epoch, self._steps = config, epoch, steps
        self._processes, self._state, self._progress = processes, state, progress
        self._seen: dict[str, Tensor] = {}
        self._done = self._checked = self.samples = self.labelled = 0
        self._began = time.perf_counter()
        self._logged = (self._began, 0)

    @property
    def seconds(self) -> float:
        """Seconds since the start of the epoch."""
        return time.perf_counter() - self._began

    def add(self, batch: Batch, parts: dict[str, Tensor], learning_rate: float) -> None:
        """Record a step.

        Args:
            parts: The objective's scalars of this process's part of the batch.
            learning_rate: Learning rate of the step.

        Raises:
            TrainingDiverged: the loss of one of the last steps is not finite.
        """
        if not self._seen:
            # One table, because a small tensor kept from each step would leave the heap of the C library in pieces.
            self._seen = {name: part.new_empty(self._steps) for name, part in parts.items()}
        for name, part in parts.items():
            self._seen[name][self._done] = part * (batch.counted / batch.whole_size)
        self._done += 1
        self.samples += batch.whole_size
        self.labelled += batch.whole_size if batch.labelled is None else batch.labelled
        every = self._config.log_every
        line = every > 0 and self._done % every == 0
        if line or self._done - self._checked == CHECK_EVERY_STEPS or self._done == self._steps:
            self._check()
        if line:
            self._log(max(self._done - every, 0), learning_rate)

    def means(self) -> dict[str, float]:
        """Mean of each scalar over the steps of the epoch."""
        return {name: float(values.mean()) for name, values in self._seen.items()}

    def _check(self) -> None:
        window = slice(self._checked, self._done)
        for values in self._seen.values():
            self._processes.add_up(values[window])
        finite = torch.isfinite(self._seen["loss"][window])
        if not bool(finite.all()):
            at = self._checked + int((~finite).nonzero()[0])
            shown = ", ".join(f"{name} {float(each[at]):g}" for name, each in self._seen.items())
            raise TrainingDiverged(
                f"the loss is not finite at epoch {self._epoch + 1}, step {at + 1} of {self._steps}: {shown}",
                "a finite loss",
                "try a lower --learning-rate, --warmup-epochs 1, --clip-norm 1, or --amp off; finished epochs are kept",
            )
        self._progress.advance(self._done - self._checked)
        self._checked = self._done

    def _log(self, first: int, learning_rate: float) -> None:
        """A line on the last steps, and their means in the log for TensorBoard."""
        now, (before, samples) = time.perf_counter(), self._logged
        values = {name: float(each[first : self._done].mean()) for name, each in self._seen.items()}
        values |= {"learning_rate": learning_rate, "samples_per_s": (self.samples - samples) / (now - before)}
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log(f"epoch {self._epoch + 1}/{self._config.epochs}, step {self._done}/{self._steps}: {text}")
        self._state.add_steps(self._epoch * self._steps + self._done, values)
        self._logged = now, self.samples
