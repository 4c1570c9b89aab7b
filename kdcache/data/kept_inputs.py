"""Inputs in memory that processes share, as far as they fit, so that each is made only once."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.dataset import IndexedDataset, Indices, WrappedDataset
from kdcache.data.raw_input import Inputs

# An entry is its number of dimensions, their sizes, and its bytes in C order.
_HEADER_WORDS = 8
_HEADER_BYTES, _ALIGNMENT = 4 * _HEADER_WORDS, 16
# Of all entries together: where the last one ends, and whether any two differ in shape.
_END, _DIFFER, _STATES = 0, 1, 2

# Makes the inputs of some samples.
Make = Callable[[NDArray[np.int64]], Inputs]


class KeptInputs:
    """Inputs by slot (such as a view) and sample, kept when they are first made, until the memory is full.

    Forked processes share the memory, and so do processes that get it while they are started; any other pickled copy
    begins empty. It goes with its last process, however that ends.

    Args:
        slots: Number of slots.
        samples: Number of samples in each.
        limit_bytes: Most bytes of the inputs together.
    """

    def __init__(self, slots: int, samples: int, limit_bytes: int) -> None:
        self._open(_memory_file(), slots, samples, limit_bytes)

    def _open(self, file: int, slots: int, samples: int, limit_bytes: int) -> None:
        weakref.finalize(self, os.close, file)
        self._file, self.slots, self.samples, self.limit_bytes = file, slots, samples, limit_bytes
        # Before the entries: the state of all, labels, and where each begins, 0 if it is not kept.
        counts = (_STATES, samples, slots * samples)
        start = _aligned(8 * sum(counts))
        size = start + _aligned(limit_bytes)
        # A file of zeros that takes no room before it is written to.
        os.truncate(file, size)
        memory = mmap.mmap(file, size)
        numbers = np.frombuffer(memory, np.int64, sum(counts))
        self._state, self._labels, places = np.split(numbers, np.cumsum(counts)[:-1])
        self._places = places.reshape(slots, samples)
        self._bytes, self._words = np.frombuffer(memory, np.uint8), np.frombuffer(memory, np.int32)
        self._start, self._size = start, size

    @staticmethod
    def entry_bytes(row_bytes: float) -> int:
        """Bytes that an input of so many takes."""
        return _aligned(_HEADER_BYTES + math.ceil(row_bytes))

    def kept(self, slot: int) -> NDArray[np.bool_]:
        """Which samples of a slot are kept, (samples,)."""
        found: NDArray[np.bool_] = self._places[slot] != 0
        return found

    def fetch(self, slot: int, indices: NDArray[np.int64], make: Make, dtype: torch.dtype) -> Inputs:
        """Inputs of some samples: kept ones as a copy, the others as `make` gives them, which are kept if they fit.

        Args:
            indices: Indices of the samples, (n,).
            make: Called with the indices of samples that are not kept, each once, ascending.
            dtype: Dtype of all inputs.
        """
        places = self._places[slot, indices]
        if not len(indices) or places.all():
            return self._copies(places, dtype)
        wanted = np.unique(indices[places == 0])
        made = dict(zip(wanted.tolist(), make(wanted), strict=True))
        self._keep(slot, made)
        return [
            made[index] if not place else self._copy(place, dtype)
            for index, place in zip(indices.tolist(), places.tolist(), strict=True)
        ]

    def fetch_labelled(
        self,
        slot: int,
        indices: NDArray[np.int64],
        make: Callable[[NDArray[np.int64]], tuple[Inputs, Tensor]],
        dtype: torch.dtype,
        known: NDArray[np.int64] | None,
    ) -> tuple[Inputs, Tensor]:
        """Inputs of some samples as `fetch` gives them, and their labels.

        Args:
            make: Gives inputs and labels.
            known: Labels of all samples; None takes those that `make` gave, (n,) int64.
        """

        def inputs_of(wanted: NDArray[np.int64]) -> Inputs:
            inputs, labels = make(wanted)
            if known is None:
                self._labels[wanted] = labels.numpy()
            return inputs

        inputs = self.fetch(slot, indices, inputs_of, dtype)
        return inputs, torch.from_numpy((self._labels if known is None else known)[indices])

    def _copies(self, places: NDArray[np.int64], dtype: torch.dtype) -> Inputs:
        """Copies of kept inputs: one tensor if they are alike, else a list."""
        if self._state[_DIFFER] or not len(places):
            return [self._copy(place, dtype) for place in places.tolist()]
        shape, size = self._shape(int(places[0]), dtype)
        if not size:
            return torch.empty((len(places), *shape), dtype=dtype)
        # The entries are the rows of a table.
        entry = self.entry_bytes(size)
        count = (self._size - self._start) // entry
        table = self._bytes[self._start : self._start + count * entry].reshape(count, entry)
        rows = table.take((places - self._start) // entry, axis=0)
        contents = np.ascontiguousarray(rows[:, _HEADER_BYTES : _HEADER_BYTES + size])
        return torch.from_numpy(contents).view(dtype).reshape(len(places), *shape)

    def _copy(self, place: int, dtype: torch.dtype) -> Tensor:
        (shape, size), place = self._shape(place, dtype), place + _HEADER_BYTES
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(self._bytes[place : place + size].copy()).view(dtype).reshape(shape)

    def _shape(self, place: int, dtype: torch.dtype) -> tuple[list[int], int]:
        """Shape of a kept input, and its bytes."""
        dimensions, *sizes = self._words[place // 4 : place // 4 + _HEADER_WORDS].tolist()
        shape = sizes[:dimensions]
        return shape, math.prod(shape) * dtype.itemsize

    def _keep(self, slot: int, made: dict[int, Tensor]) -> None:
        """Keep those of some inputs that fit and that no other process has kept meanwhile."""
        places = self._places[slot]
        with self._alone():
            for sample, value in made.items():
                shape, content = value.shape, b""
                if value.numel():
                    content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                place = max(self._start, int(self._state[_END]))
                after = place + self.entry_bytes(len(content))
                if places[sample] or after > self._size or len(shape) >= _HEADER_WORDS:
                    continue
                header = np.zeros(_HEADER_WORDS, np.int32)
                header[: 1 + len(shape)] = len(shape), *shape
                # Written, and not copied into the map: with no room left that is an error, and not the end of the
                # process. The place is published last, so that no process ever reads an unfinished entry.
                if not _written(self._file, header.tobytes() + content, place):
                    return
                if header.tolist() != self._words[self._start // 4 :][:_HEADER_WORDS].tolist():
                    self._state[_DIFFER] = 1
                self._state[_END] = after
                places[sample] = place

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from adding something; a process that is killed lets go."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.slots, self.samples, self.limit_bytes)
        if get_spawning_popen() is None:
            return KeptInputs, settings
        return _handed_over, (DupFd(self._file), *settings)


class KeptDataset(WrappedDataset):
    """A dataset whose inputs are kept in slot 0."""

    def __init__(self, dataset: IndexedDataset, kept: KeptInputs) -> None:
        super().__init__(dataset)
        self._known_labels, self._kept = dataset.labels(), kept
        self._dtype: torch.dtype = getattr(torch, dataset.input_dtype)

    def labels(self) -> NDArray[np.int64] | None:
        return self._known_labels

    def fetch(self, indices: Indices) -> tuple[Inputs, Tensor]:
        positions = np.asarray(indices, np.int64)
        return self._kept.fetch_labelled(0, positions, self._samples.fetch, self._dtype, self._known_labels)


def _memory_file() -> int:
    """A file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("kdcache")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _handed_over(file: Any, slots: int, samples: int, limit_bytes: int) -> KeptInputs:
    """The memory of the process that started this one."""
    kept = KeptInputs.__new__(KeptInputs)
    kept._open(file.detach(), slots, samples, limit_bytes)
    return kept


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _written(file: int, content: bytes, place: int) -> bool:
    """Whether all of it could be written."""
    try:
        return os.pwrite(file, content, place) == len(content)
    except OSError:  # no room
        return False
