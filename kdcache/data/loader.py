"""Views of datasets to batches: whole batches are fetched, checked, resized and stacked, in workers or here."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kdcache.core.errors import DatasetError, KdcacheError
from kdcache.core.plugins import current_folder_first
from kdcache.data.batch import Batch, Batches, BatchRequest
from kdcache.data.dataset import IndexedDataset
from kdcache.data.preprocess import Preprocessor
from kdcache.data.raw_input import batch_crc32c
from kdcache.data.token_cache import Sequences
from kdcache.data.views import Shared, Views, as_views
from kdcache.store.storage.object_store import has_done_io

# Batches that are joined and pinned while the device computes.
BATCHES_AHEAD = 2


def batch_loader(
    dataset: IndexedDataset | Views,
    batches: Batches,
    *,
    preprocessor: Preprocessor,
    workers: int = 0,
    device: torch.device,
    join: Callable[[Batch], Batch] | None = None,
    merge: bool = False,
) -> BatchLoader:
    """A loader of the given batches, in their order. Each `iter` of it asks `batches` for an epoch.

    Args:
        dataset: Views of a dataset, or a dataset, of which only the plain view is read.
        workers: Number of persistent worker processes; 0 reads in this one, best for data in memory.
        device: Device for the batches, which are in pinned memory for CUDA.
        join: Adds to each batch what this process holds of it, such as soft targets, before it is pinned.
        merge: Whether the views of a request are one batch, once they are joined.

    Raises:
        DatasetError: while iterating, a sample cannot be read or stacked, or a worker died.
        ModelError: while iterating, the preprocessing does not suit the samples.
    """
    return BatchLoader(
        # A fresh preprocessor: workers have no use for constants that sit on a device.
        Fetcher(as_views(dataset), Preprocessor(preprocessor.record, preprocessor.tokenizer)),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        device=device,
        join=join,
        merge=merge,
        persistent_workers=workers > 0,
        # What a process that used an object store has open does not survive a fork.
        multiprocessing_context="forkserver" if workers and has_done_io() else None,
        # Without one, each epoch draws a number from the global generator.
        generator=torch.Generator().manual_seed(0),
    )


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that joins and pins its batches, and raises a worker's KdcacheError as it was.

    With workers and a GPU, batches are joined and pinned by a thread while the GPU computes. Without workers this
    process also augments, and a thread would draw from the random generators at the same time as the training step.
    """

    def __init__(
        self,
        *args: Any,
        device: torch.device,
        join: Callable[[Batch], Batch] | None = None,
        merge: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._device, self._join, self._merge = device, join, merge

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        iterator = self._started()
        if self.num_workers == 0 or self._device.type != "cuda":
            while (batches := self._next(iterator)) is not None:
                yield from batches
            return
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(_number(self._device),)) as pool:
            coming = deque(pool.submit(self._next, iterator) for _ in range(BATCHES_AHEAD))
            while (batches := coming.popleft().result()) is not None:
                coming.append(pool.submit(self._next, iterator))
                yield from batches

    def _next(self, iterator: Iterator[Any]) -> list[Batch] | None:
        """The batches of the next request, ready for their steps; None after the last one."""
        try:
            found: Any = next(iterator, None)
        except RuntimeError as problem:
            # "Caught X in DataLoader worker process 0" is another message: an error that the worker raised.
            if self.num_workers == 0 or not str(problem).startswith("DataLoader worker"):
                raise
            raise DatasetError(
                f"a process that reads samples died: {problem}",
                "workers that live as long as the run",
                "see whether memory (or shared memory, /dev/shm) ran out, and try --workers 0",
            ) from problem
        if found is None:
            return None
        if isinstance(found, KdcacheError):
            raise found
        batches: list[Batch] = found if self._join is None else [self._join(batch) for batch in found]
        if self._merge:
            batches = [Batch.concatenated(batches)]
        return [batch.pin_memory() for batch in batches] if self._device.type == "cuda" else batches

    def _started(self) -> Iterator[Any]:
        """The iterator of torch, its workers running."""
        if self.num_workers == 0:
            return super().__iter__()
        try:
            # A spawned worker imports what a py: spec named.
            with current_folder_first(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # it is raised too, and told below
                return super().__iter__()
        except (pickle.PicklingError, AttributeError, TypeError) as problem:
            raise DatasetError(
                f"the dataset or its transform cannot be sent to worker processes: {type(problem).__name__}: {problem}",
                "what pickle takes, as workers here are started anew: classes and functions that stand at the top of a "
                "module, and no lambda, generator or open file among their attributes",
                "replace it by a function with a name, or give --workers 0",
            ) from problem
        except OSError as problem:
            raise DatasetError(
                f"{self.num_workers} worker processes could not be started: {problem}",
                "memory, processes and open files for them",
                "give fewer --workers, or 0",
            ) from problem


class Fetcher(Dataset[Batch]):
    """What a loader sees of a dataset: batches, or in a worker the error that prevented one."""

    def __init__(self, views: Views, preprocessor: Preprocessor) -> None:
        self.views = views
        self.preprocessor = preprocessor
        self.sequences = Sequences(preprocessor, len(views), views.dataset.name) if preprocessor.makes_tokens else None

    def __getitems__(self, request: BatchRequest) -> list[Batch] | KdcacheError:
        try:
            return self.batches(request)
        except KdcacheError as error:
            if get_worker_info() is None:
                raise
            # The worker's own traceback does not survive the way; as a note it is shown where tracebacks are.
            error.add_note(traceback.format_exc())
            return error

    def batch(self, request: BatchRequest) -> Batch:
        """Some samples of one view; see `batches`."""
        (batch,) = self.batches(request)
        return batch

    def batches(self, request: BatchRequest) -> list[Batch]:
        """Some samples of a view, or of several, as one network takes them.

        Raises:
            DatasetError: a sample cannot be read or stacked.
            ModelError: the preprocessing does not suit it.
        """
        indices, views = request.indices.astype(np.int64), (request.view, *request.more_views)
        shared = self.views.fetch_several(views, indices)
        return [
            self._batch(request._replace(view=view), indices, each) for view, each in zip(views, shared, strict=True)
        ]

    def _batch(self, request: BatchRequest, indices: NDArray[np.int64], shared: Shared) -> Batch:
        inputs, labels, partner_labels, mix_lambda = shared
        checksums = torch.tensor(batch_crc32c(inputs), dtype=torch.int64) if request.checksums else None
        if self.sequences is not None:
            plain = self.views.recipe.is_plain(request.view)
            inputs = self.sequences.batch(indices, inputs, plain=plain)
        elif isinstance(inputs, Tensor):
            inputs = self.preprocessor.per_sample(inputs)
        else:
            name = self.views.dataset.name
            inputs = _stack([self.preprocessor.per_sample(value) for value in inputs], indices, name)
        numbers = torch.from_numpy(indices)
        return Batch(inputs, labels, numbers, checksums, partner_labels, mix_lambda, share=request.share)


def _number(device: torch.device) -> int:
    """The GPU of a device; the current one where it has no number."""
    return torch.cuda.current_device() if device.index is None else device.index


def _as_it_is(batch: Any) -> Any:
    return batch


def _stack(inputs: list[Tensor], indices: NDArray[np.int64], name: str) -> Tensor:
    first = inputs[0].shape
    for index, value in zip(indices, inputs, strict=True):
        if value.shape != first:
            same_channels = value.ndim == 3 and len(first) == 3 and value.shape[0] == first[0]
            raise DatasetError(
                f"sample {indices[0]} of {name} has shape {tuple(first)}, sample {index} has {tuple(value.shape)}",
                "one shape for all inputs of a network",
                "give --size PIXELS" if same_channels else "make the dataset return inputs of one kind",
            )
    return torch.stack(inputs)
