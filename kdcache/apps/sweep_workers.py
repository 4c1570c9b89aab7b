"""Several training runs at once, each slot a process of its own: one that dies takes no other with it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from kdcache.core.atomic_files import storage_errors
from kdcache.core.commands import TrainStudentArgs
from kdcache.core.errors import KdcacheError
from kdcache.core.options import default_values
from kdcache.core.plugins import describe
from kdcache.core.progress import Progress, log
from kdcache.core.run_dir import CONFIG, RESULT, RunFolder, main_score, read_metrics, read_result
from kdcache.data.kept_inputs import KeptInputs
from kdcache.models.device import device_count
from kdcache.store.storage.registry import StorageOptions, process_options, set_process_options

# Memory for inputs that this process was given for its students; at most one.
_shared_inputs: list[KeptInputs] = []


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one run at a time goes.

    Attributes:
        threads: that it may compute with on the CPU.
    """

    device: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One student.

    Attributes:
        settings: of `train-student`, as plain values.
    """

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        result: what `train-student --json` prints; None where it failed.
        val_accuracy: the best one, where a part of the training split was held out; with several classes per sample the
            mean average precision.
        error: why it failed; None where it did not.
    """

    result: dict[str, Any] | None = None
    val_accuracy: float | None = None
    error: str | None = None


def available_slots(device: str, jobs: int | None, runs: int) -> list[Slot]:
    """One slot for each GPU, or for each core; or as many as were asked for, which share them; never more than `runs`.

    Raises:
        UsageError: the device is not there.
    """
    kind, count = device_count(device)
    jobs = min(jobs or count, runs)
    if kind == "cpu":
        return [Slot("cpu", max(1, count // jobs))] * jobs
    names = [f"{kind}:{index % count}" for index in range(jobs)] if device in ("auto", kind) else [device] * jobs
    return [Slot(name, 1) for name in names]


def run_all(
    jobs: Sequence[Job], out: Path, slots: Sequence[Slot], *, kept: KeptInputs | None = None
) -> dict[str, Outcome]:
    """Run what has not finished; outcomes by name, in the order of `jobs`.

    Args:
        out: takes `NAME.log` of each, which its messages go to.
        kept: memory for inputs, which all of them share; None for one of each one's own.
    """
    outcomes: dict[str, Outcome] = {}
    waiting: deque[Job] = deque()
    for job in jobs:
        finished = _finished(job)
        if finished is None:
            waiting.append(job)
        else:
            outcomes[job.name] = finished
    if outcomes:
        log(f"{len(outcomes)} of {len(jobs)} students are finished already")
    lock = threading.Lock()
    # Nothing is ever sent: workers end when our end is closed, which the system does for a process that is killed.
    alive, ours = get_context("spawn").Pipe(duplex=False)
    with alive, Progress("sweep", len(jobs), "students", len(outcomes)) as progress:

        def work(slot: Slot) -> None:
            pool = _pool(alive, kept)
            try:
                while True:
                    with lock:
                        if ours.closed or not waiting:
                            return
                        job = waiting.popleft()
                    try:
                        outcome = pool.submit(_train, job.settings, slot, str(out / f"{job.name}.log")).result()
                    except BrokenProcessPool:
                        if ours.closed:
                            return
                        outcome = Outcome(error="its process died; memory may have run out. Fewer --jobs take less")
                        pool.shutdown(wait=False)
                        pool = _pool(alive, kept)
                    with lock:
                        outcomes[job.name] = outcome
                        progress.advance(1)
                        log(f"{job.name}: {_said(outcome)}")
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

        with ThreadPoolExecutor(len(slots), thread_name_prefix="kdcache-sweep") as threads:
            futures = [threads.submit(work, slot) for slot in slots[: len(waiting)]]
            try:
                for future in futures:
                    future.result()
            finally:
                ours.close()  # interrupted, this ends what still trains; its finished epochs are kept
    return {job.name: outcomes[job.name] for job in jobs}


def _pool(alive: Connection, kept: KeptInputs | None) -> ProcessPoolExecutor:
    # Spawned: a forked process that inherits CUDA or running threads does not work.
    return ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_begin, initargs=(alive, process_options(), kept)
    )


def _begin(alive: Connection, options: StorageOptions, kept: KeptInputs | None) -> None:
    set_process_options(options)
    _shared_inputs[:] = [] if kept is None else [kept]
    _end_with(alive)


def _end_with(alive: Connection) -> None:
    """Let this process end with the sweep: left alone it would train beside the one that goes on, and never end."""

    def watch() -> None:
        alive.poll(None)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the sweep closes the pipe
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, of which Python would say that it leaked
    threading.Thread(target=watch, daemon=True).start()


def _finished(job: Job) -> Outcome | None:
    """The outcome of an earlier sweep's run with these settings; None where it has to run (on).

    Raises:
        UsageError: a run of other settings stands there.
    """
    folder = Path(job.settings["out"])
    if not (folder / CONFIG).exists():
        return None
    settings = {"command": "train-student", **job.settings}
    RunFolder(folder, settings, resume=True, defaults=default_values(TrainStudentArgs))
    # A run that is to have more epochs than before has a result, but not that of these settings.
    finished = (folder / RESULT).exists() and len(read_metrics(folder)) >= job.settings["epochs"]
    return _outcome(folder) if finished else None


def _outcome(folder: Path) -> Outcome:
    found = [main_score(entry, "val") for entry in read_metrics(folder)]
    validations = [score for score in found if score is not None]
    return Outcome(result=read_result(folder), val_accuracy=max(validations, default=None))


def _said(outcome: Outcome) -> str:
    if outcome.result is None:
        return f"FAILED: {outcome.error}"
    score = main_score(outcome.result, "test")
    return "finished" if score is None else f"finished, test score {score:.2%}"


def _train(settings: dict[str, Any], slot: Slot, log_path: str) -> Outcome:
    """Train one student, in a process of the pool."""
    folder = Path(settings["out"])
    logging = storage_errors("write", Path(log_path))
    with logging, open(log_path, "a") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            import torch

            from kdcache.apps import training
            from kdcache.core.options import merge

            torch.set_num_threads(slot.threads)
            resume = (folder / CONFIG).exists()
            own = settings | {"device": slot.device, "resume": resume}
            training.train_student(merge(TrainStudentArgs, own, where="sweep"), *_shared_inputs)
            return _outcome(folder)
        except KdcacheError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return Outcome(error=str(problem))
        except Exception as problem:  # one student's fault, whatever it is, must not stop the others
            import traceback

            traceback.print_exc()
            return Outcome(error=f"{describe(problem)}; see {log_path}")
