"""Device, precision and what follows from them. The only room that asks the machine what it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from kdcache.core.errors import KdcacheError, UsageError
from kdcache.core.system import core_count

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device that a name means; `auto` is the accelerator that works, else the CPU.

    Makes a CUDA device with a number the current one of this thread: events, streams and pinned memory that do not
    name a device belong to the current one, and would otherwise be those of another GPU.

    Raises:
        UsageError: the name is no device, or this machine does not have it.
    """
    device = _find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _find_device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UsageError(f"--device is {name!r}", "auto, cpu, cuda, cuda:N or mps") from problem
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or accelerator.type != device.type or (device.index or 0) >= count:
        has = f"{count} of type {accelerator.type}" if accelerator else "none"
        raise UsageError(
            f"--device is {name!r}, and torch sees {has}", "a device that this machine has", "use --device auto"
        )
    return device


def worker_device(name: str, local_index: int | None) -> str:
    """The device of one of several processes on a machine: `auto` and `cuda` are spread over its GPUs.

    Args:
        local_index: Number of the process on its machine; None where it is not known.

    Raises:
        UsageError: as for `resolve_device`.
    """
    if local_index is None or name not in ("auto", "cuda"):
        return name
    device = _find_device(name)
    if device.type != "cuda":
        return name
    # A launcher may show each process its own GPU only, as number 0.
    return f"cuda:{local_index % torch.cuda.device_count()}"


def device_count(name: str) -> tuple[str, int]:
    """What kind of device a name means, and how many runs at once suit it: one a GPU, or one a core.

    Raises:
        UsageError: as for `resolve_device`.
    """
    device = _find_device(name)
    if device.type == "cpu":
        return "cpu", core_count()
    return device.type, torch.accelerator.device_count() if device.index is None else 1


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """The precision context of a forward pass; `off` changes nothing."""
    if amp == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AMP[amp])


def to_host(tensor: torch.Tensor) -> Callable[[], NDArray[Any]]:
    """Start copying a tensor to the host; calling the result waits for the copy and gives the array.

    On CUDA the wait is for this copy only, not for what was queued after it, so the next batch computes meanwhile.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.device(tensor.device):
        # An event records on the current device's stream, unless told: on another GPU it would be over at once, and
        # the host would read what lay in its memory before.
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> NDArray[Any]:
        copied.synchronize()
        array: NDArray[Any] = host.numpy()
        return array

    return wait


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; a clock read before that lies."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def memory_errors(batch_size: int, remedy: str | None = None) -> Iterator[None]:
    """Turn the device's lack of memory into an error that says what to do; by default, to make smaller batches."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise KdcacheError(
            f"the device ran out of memory: {_first_line(problem)}",
            f"room for {batch_size:,} samples at once",
            remedy or f"use --batch-size {max(batch_size // 2, 1)}, or --amp bf16",
        ) from problem


def move_to(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device, in place.

    Raises:
        KdcacheError: the device has no room for its weights.
    """
    try:
        return module.to(device)
    except torch.OutOfMemoryError as problem:
        weights = [*module.parameters(), *module.buffers()]
        needed = sum(each.numel() * each.element_size() for each in weights)
        raise KdcacheError(
            f"{device} ran out of memory while {type(module).__name__} was moved there: {_first_line(problem)}",
            f"{needed:,} bytes for its weights alone",
            "end what else uses the device, choose another --device, or take a smaller model",
        ) from problem


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for a while, and given back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluation_mode(module: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """A module in eval mode and without gradients for a while, each part given back in the mode it had.

    Args:
        gradients: Whether gradients are recorded all the same.

    Not under `torch.inference_mode`: a tensor that a module makes there and keeps, such as a mask or a table of rotary
    embeddings, can never again take part in training.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with contextlib.nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
