"""Several forked processes that meet in a group of `torch.distributed`, as a launcher would start them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache.core.workers import launched_process
from kdcache.models.distributed import Processes, processes_of
from tests.crashes import start, wait


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, which would take it until it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launched(count: int, work: Callable[[int], None], folder: Path) -> None:
    """Do something in `count` processes with the variables that torchrun sets; their stderr goes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}

    def process(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(address, RANK=str(rank))
        os.dup2(os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT), 2)
        work(rank)

    children = [start(lambda rank=rank: process(rank)) for rank in range(count)]
    statuses = [wait(child) for child in children]
    assert statuses == [0] * count, "\n".join((folder / f"{rank}.log").read_text() for rank in range(count))


def together(count: int, work: Callable[[Processes], Any], folder: Path) -> list[Any]:
    """Do something in `count` processes that have met; what it returned in each, in the order of their ranks."""

    def process(rank: int) -> None:
        with processes_of(launched_process(), "cpu") as processes:
            torch.save(work(processes), folder / f"{rank}.pt")

    launched(count, process, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
