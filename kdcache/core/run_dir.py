"""A run's folder: `config.json`, `metrics.jsonl`, `last.pt`, `best.pt`, and what can be asked of them later.

A network that reads text has its `tokenizer.json` there too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.core.atomic_files import make_folder, storage_errors, write_durable
from kdcache.core.errors import TargetExists, UsageError

CONFIG, METRICS, LAST, BEST, RESULT = "config.json", "metrics.jsonl", "last.pt", "best.pt", "result.json"
TOKENIZER, BOARD = "tokenizer.json", "tensorboard"

# Settings that change how a run is carried out or where things lie, not what comes out of it.
FREE_ON_RESUME = frozenset({"out", "device", "workers", "data_root", "download", "cache", "plots", "tensorboard"})


class RunFolder:
    """The folder of one training run. Nothing is written before `begin`, so that a refused run leaves nothing.

    Args:
        tokenizer: the JSON of the network's tokenizer, if it reads text.

    Raises:
        TargetExists: a new run meets the files of another one.
        UsageError: a run to resume is not there, or has other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool, tokenizer: str | None = None) -> None:
        self.path, self._tokenizer = path, tokenizer
        self._settings = {name: value for name, value in settings.items() if name != "resume"}
        if resume:
            self._check_same(self._settings)
        elif (path / CONFIG).exists():
            raise TargetExists(
                f"{path} already holds a run",
                "a new folder for a new run",
                "give --resume to continue it, or choose another --out; nothing was changed",
            )

    @property
    def best(self) -> Path:
        """The checkpoint that is the run's result."""
        return self.path / BEST

    @property
    def last(self) -> Path:
        """The training state of the last finished epoch."""
        return self.path / LAST

    def begin(self, kept: list[dict[str, Any]]) -> None:
        """Make the folder with its `config.json`, and `metrics.jsonl` with the epochs of the state to continue from."""
        with storage_errors("create", self.path):
            make_folder(self.path)
        write_durable(self.path / CONFIG, (json.dumps(self._settings, indent=2) + "\n").encode())
        if self._tokenizer is not None:
            write_durable(self.path / TOKENIZER, self._tokenizer.encode())
        write_durable(self.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def add_metrics(self, entry: dict[str, Any]) -> None:
        with storage_errors("write", self.path / METRICS), open(self.path / METRICS, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save_result(self, result: dict[str, Any]) -> None:
        write_durable(self.path / RESULT, (json.dumps(result, indent=2) + "\n").encode())

    def _check_same(self, settings: dict[str, Any]) -> None:
        recorded = read_config(self.path)
        changed = [
            f"{name} was {recorded.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*recorded, *settings])
            if name not in FREE_ON_RESUME and recorded.get(name) != settings.get(name)
        ]
        if changed:
            raise UsageError(
                f"{self.path} cannot be resumed with other settings: {'; '.join(changed)}",
                "the settings in its config.json",
                "leave those flags out, or start a new run in another folder",
            )


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UsageError: there is no run in the folder.
    """
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text())
        return config
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"no run at {path}: its {CONFIG} cannot be read ({problem})",
            "a folder written by train-teacher or train-student",
            "check the path",
        ) from problem


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What a run recorded of its epochs, an entry each.

    Raises:
        UsageError: the record is damaged.
        StorageError: it cannot be read.
    """
    file = path / METRICS
    with storage_errors("read", file):
        lines = file.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as problem:
        raise _damaged(file, problem) from problem


def _damaged(file: Path, problem: ValueError) -> UsageError:
    return UsageError(f"{file} is damaged: {problem}", "a finished run", "take the run from a copy, or train it again")


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run printed with --json.

    Raises:
        UsageError: the run has not finished, or its result is damaged.
    """
    read_config(path)
    try:
        result: dict[str, Any] = json.loads((path / RESULT).read_text())
        return result
    except OSError as problem:
        raise UsageError(
            f"the run at {path} has not finished: it has no {RESULT}", "a finished run", "continue it with --resume"
        ) from problem
    except ValueError as problem:
        raise _damaged(path / RESULT, problem) from problem
