"""Training by several processes, with `torch.distributed`: the collectives that the loop needs, and their start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from kdcache.core.errors import KdcacheError, UsageError
from kdcache.core.progress import muted
from kdcache.core.workers import Worker, restarts
from kdcache.models.device import resolve_device

# Longer than an evaluation or a checkpoint that the others wait for.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """The processes that train one network together. The default is this one alone, whose collectives do nothing.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes, logs and reports."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if not self.alone:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor, counted: int) -> Tensor:
        """Rows of all processes, (all rows, ...), in the order of their ranks; the own rows keep their gradient.

        Args:
            values: Rows of this process, of which the first `counted` are taken.
        """
        own = values[:counted]
        if self.alone:
            return own
        counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([counted], device=values.device))
        lengths = [int(each) for each in counts]
        # Collectives need one shape, so the rows are padded for the way.
        sent = values.new_zeros(max(lengths), *values.shape[1:])
        sent[:counted] = own.detach()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        parts = [rows[:length] for rows, length in zip(received, lengths, strict=True)]
        parts[self.rank] = own
        return torch.cat(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of each process, in the order of their ranks."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The value of the first process."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def synchronize(self, tensors: Mapping[str, Tensor] | Iterator[Tensor]) -> None:
        """Copy tensors, in place, from the first process."""
        if not self.alone:
            with torch.no_grad():
                for tensor in tensors.values() if isinstance(tensors, Mapping) else tensors:
                    dist.broadcast(tensor, 0)

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first process do something, such as a download, before the others do it."""
        if not self.first:
            self.from_first(None)
        yield
        if self.first:
            self.from_first(None)

    def wrap(self, step: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over all processes by DistributedDataParallel."""
        if self.alone or not any(parameter.requires_grad for parameter in step.parameters()):
            return step
        # A layer that takes no part in a step, as plain training allows, has no gradient to wait for.
        return nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)


def accumulating(step: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While within, gradients are added up in each process, and not averaged over all."""
    if not isinstance(step, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    within: contextlib.AbstractContextManager[None] = step.no_sync()
    return within


def synchronized_batchnorm(module: nn.Module, device: torch.device, processes: Processes) -> nn.Module:
    """A network whose BatchNorm layers compute their statistics over the batches of all processes, converted in place.

    Raises:
        UsageError: there is only one process, or it computes on the CPU, where torch has no such layer.
    """
    if processes.alone or device.type != "cuda":
        here = f"{processes.size} on {device.type}" if not processes.alone else "one"
        raise UsageError(
            f"--sync-batchnorm is given, and the number of processes is {here}",
            "several processes, each with a GPU",
            "start it by torchrun, or leave out --sync-batchnorm",
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return converted


@contextlib.contextmanager
def processes_of(launched: Worker, device: str) -> Iterator[Processes]:
    """Join the process group of a launcher such as torchrun; this process alone where there is none.

    All processes but the first are silent within `with`.

    Args:
        launched: Which of the launched processes this one is.
        device: Name of this process's device.

    Raises:
        UsageError: the launcher does not say where the processes meet.
        KdcacheError: one of them cannot be reached.
    """
    if launched.count == 1:
        yield Processes()
        return
    backend = "gloo"
    if (here := resolve_device(device)).type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(here)  # through which collectives of objects go
    try:
        store, rank, size = next(rendezvous("env://", launched.index, launched.count, timeout=TIMEOUT))
        # torchrun keeps its store when it restarts the processes, and the addresses of the dead ones in it.
        store = dist.PrefixStore(f"kdcache attempt {restarts()}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except ValueError as problem:  # a variable is missing
        raise UsageError(
            f"the {launched.count} processes cannot meet: {problem}",
            "MASTER_ADDR and MASTER_PORT, as torchrun sets them",
            "start it by torchrun --nproc-per-node N -m kdcache train-student …",
        ) from problem
    except RuntimeError as problem:
        raise KdcacheError(
            f"process {launched.index} of {launched.count} does not reach the others: {_first_line(problem)}",
            "all processes of the training run, each of which can reach MASTER_ADDR",
            "see whether another one ended with an error of its own",
        ) from problem
    try:
        with contextlib.nullcontext() if launched.index == 0 else muted():
            yield Processes(rank=launched.index, size=launched.count)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def lost_processes(processes: Processes) -> Iterator[None]:
    """Turn what torch.distributed raises where another process has ended into an error that says so."""
    try:
        yield
    except RuntimeError as problem:
        if processes.alone or not is_lost(problem):
            raise
        raise KdcacheError(
            f"process {processes.rank} of {processes.size} lost another one: {_first_line(problem)}",
            "all processes of the training run",
            "see the message of the process that ended first; the launcher can restart all of them (--max-restarts)",
        ) from problem


def is_lost(problem: BaseException) -> bool:
    """Whether an error is one of the connection to another process."""
    # gloo's errors have no class of their own.
    return isinstance(problem, dist.DistError) or "gloo" in str(problem) or "Connection closed by peer" in str(problem)


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)
