"""What a training run keeps after each epoch, and how it goes on from there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from kdcache.core.config import TrainConfig
from kdcache.core.errors import CacheMismatch, DatasetError, ModelError, UsageError
from kdcache.core.json_records import brief, differences
from kdcache.core.progress import log
from kdcache.core.run_dir import BOARD, RunFolder
from kdcache.distill.board import Board
from kdcache.models.checkpoints import read_checkpoint, save_checkpoint
from kdcache.models.distributed import Processes

# The plain values of a checkpoint for a run of so many epochs.
Description = Callable[[int], dict[str, Any]]


class Stateful(Protocol):
    """A part of the training state, such as an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class RunState:
    """History of a run, and its folder where it has one.

    Args:
        folder: Folder of the run; None keeps nothing.
        description: Plain values put into every checkpoint, and compared when the run is continued.
        config: Settings of the training.

    Attributes:
        history: Metrics of the finished epochs, one entry each.
        best: What the best epoch has of the validation metric, larger being better; -inf before the first one.
    """

    def __init__(self, folder: RunFolder | None, description: Description, config: TrainConfig) -> None:
        self._folder, self._description, self._config = folder, description, config
        self._board = Board(folder.path / BOARD) if config.tensorboard and folder is not None else None
        self.history: list[dict[str, Any]] = []
        self.best = -math.inf

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the folder.

        Raises:
            CacheBusy: another process trains here.
        """
        if self._folder is None:
            yield
            return
        with self._folder.locked():
            try:
                yield
            except (ModelError, DatasetError, CacheMismatch):
                self._folder.discard()  # the same settings would fail again: there is nothing to resume
                raise

    def restore(self, parts: Mapping[str, Stateful | None], processes: Processes | None = None) -> bool:
        """Load the state of the last finished epoch into the parts; False where there is none.

        Of several processes the first one reads it, which has the folder, and the others receive it.

        Raises:
            UsageError: the run was begun with other data, another cache or another model.
        """
        state, epochs = (processes or Processes()).from_first(self._read())
        if state is None:
            return False
        self._check_description(state, epochs)
        if epochs < self._config.epochs:
            log(
                f"the run is extended from {epochs} to {self._config.epochs} epochs; from here on the learning rate "
                f"follows the {self._config.schedule} schedule of {self._config.epochs} epochs"
            )
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        self.best, self.history = state["best"], list(state["history"])
        done, wanted = len(self.history), self._config.epochs
        log(f"continuing after epoch {done} of {wanted}" if done < wanted else f"all {wanted} epochs are finished")
        return True

    def _read(self) -> tuple[dict[str, Any] | None, int]:
        """The state of the last finished epoch, None where there is none, and the epochs that the run was to have."""
        if self._folder is None or not self._folder.last.exists():
            if self._folder is not None and self._folder.begun:
                log(f"no epoch of the run at {self._folder.path} had finished: it starts from the beginning")
            return None, 0
        state = read_checkpoint(self._folder.last)
        # An older version did not write the number of epochs into its state.
        return state, state.get("epochs", self._folder.recorded_epochs) or self._config.epochs

    def _check_description(self, state: dict[str, Any], epochs: int) -> None:
        description = self._description(epochs)
        if "samples" in description and "samples" not in state:  # written by an older version
            log("the state of the run does not record which samples it was trained on, so these are not compared")
            del description["samples"]
        changed = [name for name, value in description.items() if state.get(name) != value]
        if changed:
            before = {name: state.get(name) for name in changed}
            now = {name: description[name] for name in changed}
            apart = [f"{place} was {brief(old)} and is {brief(new)}" for place, old, new in differences(before, now)]
            raise UsageError(
                f"the run cannot be continued: {'; '.join(apart)}",
                "what it was begun with",
                "continue with the data, the cache and the model that it was begun with, or start a new run",
            )

    def begin(self) -> None:
        """Write the settings and the metrics of the epochs to continue from."""
        if self._folder is not None:
            self._folder.begin(self.history, finished=len(self.history) == self._config.epochs)
        if self._board is not None:
            self._board.begin(len(self.history))

    def add_steps(self, step: int, values: dict[str, float]) -> None:
        """Write means over some steps into the log for TensorBoard, where there is one."""
        if self._board is not None:
            self._board.add_steps(step, values)

    def add(
        self, entry: dict[str, Any], *, improved: bool, result: nn.Module, parts: Mapping[str, Stateful | None]
    ) -> None:
        """Keep a finished epoch.

        Args:
            entry: Metrics of the epoch.
            improved: Whether its weights are the best so far.
            result: Network whose weights are the run's result, with averaged weights where asked.
            parts: All that the next epoch starts from.
        """
        self.history.append(entry)
        if self._folder is None:
            return
        described = self._description(self._config.epochs)
        weights = {**described, "epoch": entry["epoch"], "state_dict": result.state_dict()}
        if improved:
            save_checkpoint(self._folder.best, weights)
        if self._config.save_every and entry["epoch"] % self._config.save_every == 0:
            save_checkpoint(self._folder.of_epoch(entry["epoch"]), weights)
        save_checkpoint(
            self._folder.last,
            {
                **described,
                **{name: None if part is None else part.state_dict() for name, part in parts.items()},
                "best": self.best,
                "epochs": self._config.epochs,
                "history": self.history,
            },
        )
        self._folder.add_metrics(entry)
        if self._board is not None:
            self._board.add(entry)
