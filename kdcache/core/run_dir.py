"""A run's folder: `config.json`, `metrics.jsonl`, `last.pt`, `best.pt`, and what can be asked of them later.

A network that reads text has its `tokenizer.json` there too.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.core.atomic_files import check_folder, make_folder, storage_errors, write_durable
from kdcache.core.errors import TargetExists, UsageError
from kdcache.core.file_lock import PathLock

CONFIG, METRICS, LAST, BEST, RESULT = "config.json", "metrics.jsonl", "last.pt", "best.pt", "result.json"
TOKENIZER, BOARD = "tokenizer.json", "tensorboard"

# Settings that change how a run is carried out or where things lie, not what comes out of it.
FREE_ON_RESUME = frozenset(
    {"out", "device", "workers", "data_root", "download", "cache", "plots", "tensorboard", "log_every", "save_every"}
    | {"cache_dir", "cache_disk", "input_memory"}
)

# Settings that older versions recorded under other names, and a source of rows that is no more.
_RENAMED = {"feed": "row_source"}
_MAPPED = "mapped"


class RunFolder:
    """The folder of one training run. Nothing is written before `locked`, so that a refused run leaves nothing.

    A run of which no epoch has finished holds nothing worth keeping: another one takes its place, with any settings.

    Args:
        tokenizer: JSON of the network's tokenizer, if it has one.
        defaults: Defaults of the settings, for a run of a version that did not have all of them.

    Raises:
        TargetExists: a new run meets the files of another one, or a file that is no folder.
        UsageError: a run to resume is not there, has lost its state, or has other settings; only `epochs` may grow.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        resume: bool,
        tokenizer: str | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self._defaults = defaults or {}
        self.path, self._tokenizer, self._resume = path, tokenizer, resume
        self._settings = {name: value for name, value in settings.items() if name != "resume"}
        check_folder(path)
        self._made: list[Path] = []
        self._check()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the run; the folder is made, and goes again if nothing comes into it.

        Raises:
            CacheBusy: another process trains here.
            TargetExists, UsageError: another one has trained here since this object was made.
        """
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with storage_errors("create", self.path):
            make_folder(self.path)
        try:
            with PathLock(self.path, "training run"):
                self._check()
                yield
        finally:
            with contextlib.suppress(OSError):  # not empty: it holds the run
                for folder in self._made:
                    folder.rmdir()

    @property
    def best(self) -> Path:
        """The checkpoint that is the run's result."""
        return self.path / BEST

    @property
    def last(self) -> Path:
        """The training state of the last finished epoch."""
        return self.path / LAST

    def of_epoch(self, epoch: int) -> Path:
        """Weights of one epoch, counted from 1, that are kept beside the best ones."""
        return self.path / f"epoch-{epoch:04}.pt"

    @property
    def begun(self) -> bool:
        """Whether a run stands here, with finished epochs or without."""
        return (self.path / CONFIG).exists()

    @property
    def recorded_epochs(self) -> int | None:
        """Number of epochs that the run was last to have; None where it is not recorded."""
        epochs = read_config(self.path).get("epochs")
        return epochs if isinstance(epochs, int) else None

    def begin(self, kept: list[dict[str, Any]], *, finished: bool = False) -> None:
        """Write `config.json`, and `metrics.jsonl` with the epochs of the state to continue from.

        Args:
            finished: no epoch is to come, so that what stands as the run's result is that of these settings.
        """
        with storage_errors("create", self.path):
            make_folder(self.path)
            if not kept:
                self.best.unlink(missing_ok=True)
            if not finished:
                (self.path / RESULT).unlink(missing_ok=True)
        write_durable(self.path / CONFIG, (json.dumps(self._settings, indent=2) + "\n").encode())
        if self._tokenizer is not None:
            write_durable(self.path / TOKENIZER, self._tokenizer.encode())
        write_durable(self.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def discard(self) -> None:
        """Remove what `begin` wrote, unless an epoch has finished."""
        if _has_epochs(self.path):
            return
        for name in (CONFIG, METRICS, TOKENIZER):
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            shutil.rmtree(self.path / BOARD, ignore_errors=True)

    def add_metrics(self, entry: dict[str, Any]) -> None:
        with storage_errors("write", self.path / METRICS), open(self.path / METRICS, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save_result(self, result: dict[str, Any]) -> None:
        write_durable(self.path / RESULT, (json.dumps(result, indent=2) + "\n").encode())

    def _check(self) -> None:
        recorded = read_config(self.path) if self._resume else {}
        if not _has_epochs(self.path):
            return
        if not self._resume:
            raise TargetExists(
                f"{self.path} already holds a run",
                "a new folder for a new run",
                "give --resume to continue it, or choose another --out; nothing was changed",
            )
        if not self.last.exists():
            raise UsageError(
                f"the run at {self.path} has finished epochs, but no {LAST} to continue from",
                f"its {LAST}",
                f"copy its {LAST} back, or start a new run in another folder; nothing was changed",
            )
        self._check_same(recorded)

    def _check_same(self, recorded: dict[str, Any]) -> None:
        settings = self._settings
        # An older version knew fewer settings, and trained as with their defaults.
        recorded = {name: value for name, value in self._defaults.items() if name in settings} | recorded
        changed = [
            f"{name} was {recorded.get(name)!r} and is {settings.get(name)!r}"
            for name in dict.fromkeys([*recorded, *settings])
            if name not in FREE_ON_RESUME
            and recorded.get(name) != settings.get(name)
            and not (name == "epochs" and _more(recorded.get(name), settings.get(name)))
        ]
        if changed:
            raise UsageError(
                f"{self.path} cannot be resumed with other settings: {'; '.join(changed)}",
                "the settings in its config.json; only --epochs may grow",
                "leave those flags out, or start a new run in another folder",
            )


def _has_epochs(path: Path) -> bool:
    """Whether an epoch of the run in a folder has finished, and left something that is worth keeping."""
    if (path / LAST).exists() or (path / RESULT).exists():
        return True
    # A run killed between the two checkpoints of its first epoch has a best.pt too, and no metrics.
    metrics = path / METRICS
    return (path / BEST).exists() and metrics.exists() and metrics.stat().st_size > 0


def _more(before: Any, now: Any) -> bool:
    return isinstance(before, int) and isinstance(now, int) and now > before


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UsageError: there is no run in the folder.
    """
    try:
        return _in_todays_names(json.loads((path / CONFIG).read_text()))
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"no run at {path}: its {CONFIG} cannot be read ({problem})",
            "a folder written by train-teacher or train-student",
            "check the path",
        ) from problem


def _in_todays_names(config: dict[str, Any]) -> dict[str, Any]:
    config = {_RENAMED.get(name, name): value for name, value in config.items()}
    if config.get("row_source") == _MAPPED:
        config["row_source"] = "auto"
    return config


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


def main_score(values: dict[str, Any], part: str) -> float | None:
    """The score that runs are compared by, of a result (`test`) or an epoch's metrics (`val`): cosine similarity of
    embeddings, mean average precision of several classes per sample, else accuracy; None where it is not known.
    """
    found = (values.get(f"{part}_{name}") for name in ("cosine", "map", "accuracy"))
    return next((float(score) for score in found if score is not None), None)


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
