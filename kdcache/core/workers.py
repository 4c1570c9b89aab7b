"""Which of several processes this one is: from `--worker`, or from the variables that launchers set.

Nothing else reads these variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of several processes that dump together.

    Attributes:
        index: Number of the worker, from 0.
        count: Number of workers.
        local_index: Number of the worker on its machine, which chooses its GPU; None where it is not known.
    """

    index: int = 0
    count: int = 1
    local_index: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"worker {self.index} of {self.count}",
                f"a number from 0 to {self.count - 1}" if self.count > 0 else "at least one worker",
                "number the workers from 0",
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def run(self, units: int) -> range:
        """This worker's part of `units` numbered units: a contiguous run. The runs of all workers partition them."""
        return range(units * self.index // self.count, units * (self.index + 1) // self.count)


def worker_of(given: str | None = None, environ: Mapping[str, str] | None = None) -> Worker:
    """The worker that this process is.

    The first of these that is there counts: `given`, as `3/32`; `RANK` and `WORLD_SIZE` with `LOCAL_RANK` (torchrun,
    accelerate); `SLURM_ARRAY_TASK_ID` and `SLURM_ARRAY_TASK_COUNT`; `SLURM_PROCID` and `SLURM_NTASKS` with
    `SLURM_LOCALID`. In a job array whose tasks are started by srun both of the last two count: the workers are all
    tasks of all jobs. A number of processes of 1 is ignored, and where nothing is left the result is the only worker.

    Args:
        given: Value of `--worker`.
        environ: Environment variables; None takes those of this process.

    Raises:
        UsageError: a value is no number or out of range, or one variable of a pair is missing.
    """
    variables = os.environ if environ is None else environ
    if given is not None:
        if not (match := re.fullmatch(r"(\d+)/(\d+)", given)):
            raise UsageError(f"--worker is {given!r}", "K/N: number of the worker, from 0, and of all", "such as 3/32")
        return Worker(index=int(match[1]), count=int(match[2]), local_index=_number(variables, "LOCAL_RANK"))
    if (launched := _pair(variables, "RANK", "WORLD_SIZE")) is not None:
        return Worker(index=launched[0], count=launched[1], local_index=_number(variables, "LOCAL_RANK"))
    array = _array(variables)
    task = _pair(variables, "SLURM_PROCID", "SLURM_NTASKS")
    if array is None and task is None:
        return Worker()
    (job, jobs), (process, processes) = array or (0, 1), task or (0, 1)
    local = _number(variables, "SLURM_LOCALID") if task is not None else None
    return Worker(index=job * processes + process, count=jobs * processes, local_index=local)


def _array(variables: Mapping[str, str]) -> tuple[int, int] | None:
    """Number of a job in its array, from 0, and of all; arrays may begin elsewhere and leave numbers out."""
    pair = _pair(variables, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    if pair is None:
        return None
    first = _number(variables, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(variables, "SLURM_ARRAY_TASK_STEP") or 1
    number, count = pair
    if (number - first) % step or not 0 <= (number - first) // step < count:
        raise UsageError(
            f"SLURM_ARRAY_TASK_ID is {number} in an array of {count} that begins at {first} in steps of {step}",
            "an array of consecutive numbers, such as --array=0-31",
            "give --worker K/N",
        )
    return (number - first) // step, count


def _pair(variables: Mapping[str, str], index: str, count: str) -> tuple[int, int] | None:
    """Values of two variables that belong together; None where neither is set, or there is only one process."""
    number, total = _number(variables, index), _number(variables, count)
    if total == 1 or (number is None and total is None):
        return None
    if number is None or total is None:
        missing, there = (index, count) if number is None else (count, index)
        raise UsageError(
            f"{there} is set to {variables[there]} in the environment, and {missing} is not",
            "both, as a launcher sets them, or neither",
            f"start it by torchrun or srun, unset {there}, or give --worker K/N (--worker 0/1 for a single process)",
        )
    return number, total


def _number(variables: Mapping[str, str], name: str) -> int | None:
    value = variables.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise UsageError(f"{name} is {value!r} in the environment", "a whole number", "correct it, or unset it")
    return int(value)


def launched_process(environ: Mapping[str, str] | None = None) -> Worker:
    """Which process of a training run this one is, as torchrun or accelerate say; the only one where they do not.

    SLURM's variables do not count: the tasks of an array train one student each.

    Raises:
        UsageError: one of `RANK` and `WORLD_SIZE` is missing or no number.
    """
    variables = os.environ if environ is None else environ
    if (launched := _pair(variables, "RANK", "WORLD_SIZE")) is None:
        return Worker()
    return Worker(index=launched[0], count=launched[1], local_index=_number(variables, "LOCAL_RANK"))


def restarts(environ: Mapping[str, str] | None = None) -> int:
    """How many times torchrun has started the processes again after one of them had failed."""
    return _number(os.environ if environ is None else environ, "TORCHELASTIC_RESTART_COUNT") or 0
