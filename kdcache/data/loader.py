"""Views of datasets to batches: whole batches are fetched, checked, resized and stacked, in workers or here."""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kdcache.core.errors import DatasetError, KdcacheError
from kdcache.core.plugins import current_folder_first
from kdcache.data.dataset import IndexedDataset
from kdcache.data.preprocess import Preprocessor
from kdcache.data.raw_input import batch_crc32c
from kdcache.data.soft_targets import SoftTargets
from kdcache.data.token_cache import Sequences
from kdcache.data.views import Shared, Views, as_views
from kdcache.store.storage.object_store import has_done_io

# Batches that are joined and pinned while the device computes.
BATCHES_AHEAD = 2


class Share(NamedTuple):
    """One process's part of a batch that several train on.

    Attributes:
        indices: Indices of the whole batch's samples, (n,) int64.
        start: Position of this process's first sample.
        stop: Position after its last one.
        counted: Samples that the loss counts; 0 for a process that has one only to take part in the step.
    """

    indices: NDArray[np.int64]
    start: int
    stop: int
    counted: int


class BatchRequest(NamedTuple):
    """What a loader is asked for.

    Attributes:
        indices: Indices of the samples, (B,) int64.
        checksums: Whether to compute `Batch.input_crc32c`, at about 0.3 µs per small sample.
        more_views: Further views of the same samples, each a batch of its own after that of `view`.
        share: Place of the samples in the batch of all processes; None for a process alone.
    """

    indices: NDArray[np.int64]
    view: int = 0
    checksums: bool = False
    share: Share | None = None
    more_views: tuple[int, ...] = ()


class Batch(NamedTuple):
    """Samples as a loader yields them.

    Attributes:
        inputs: Inputs (B, ...) after `Preprocessor.per_sample`; token ids are (B, longest).
        labels: Labels of the samples, (B,) int64.
        indices: Indices of the samples, (B,) int64.
        input_crc32c: (B,) int64 holding uint32, of the shared inputs before any preprocessing; None unless asked for.
        partner_labels: Labels of the mixed-in samples, (B,) int64; None without mixing.
        mix_lambda: Weight of the sample in its mixed input, (B,) float32 from 0 to 1; None without mixing.
        soft_targets: The teachers' logits of the samples, if a cache was joined.
        features: The teacher's features (B, ...) by array name, if an objective needs them.
        negatives: The teacher's features of other samples, (negatives, ...), by array name, likewise.
        share: Place of the samples in the batch of all processes; None for a process alone.
        labelled: Number of samples of the batch of all processes that have a label; None where all have.
    """

    inputs: Tensor
    labels: Tensor
    indices: Tensor
    input_crc32c: Tensor | None = None
    partner_labels: Tensor | None = None
    mix_lambda: Tensor | None = None
    soft_targets: SoftTargets | None = None
    features: dict[str, Tensor] | None = None
    negatives: dict[str, Tensor] | None = None
    share: Share | None = None
    labelled: int | None = None

    @classmethod
    def concatenated(cls, batches: Sequence[Batch]) -> Batch:
        """Several batches of this process as one, with the negatives of the first."""
        first = batches[0]
        if len(batches) == 1:
            return first
        joined: dict[str, Any] = {}
        for name in ("inputs", "labels", "indices", "partner_labels", "mix_lambda"):
            if getattr(first, name) is not None:
                joined[name] = torch.cat([getattr(batch, name) for batch in batches])
        if first.features is not None:
            parts = [batch.features or {} for batch in batches]
            joined["features"] = {name: torch.cat([part[name] for part in parts]) for name in first.features}
        if first.soft_targets is not None:
            joined["soft_targets"] = SoftTargets.concatenated([b.soft_targets for b in batches if b.soft_targets])
        if first.labelled is not None:
            joined["labelled"] = sum(batch.labelled or 0 for batch in batches)
        return first._replace(input_crc32c=None, **joined)

    @property
    def counted(self) -> int:
        """Number of samples that the loss counts."""
        return len(self.labels) if self.share is None else self.share.counted

    @property
    def whole_size(self) -> int:
        """Number of samples of the batch over all processes."""
        return len(self.labels) if self.share is None else len(self.share.indices)

    @property
    def main_labels(self) -> Tensor:
        """Label with the larger weight in each input, (B,) int64."""
        if self.partner_labels is None or self.mix_lambda is None:
            return self.labels
        return torch.where(self.mix_lambda >= 0.5, self.labels, self.partner_labels)

    def part(self, start: int, stop: int) -> Batch:
        """Some samples of the batch, which know their place in the batch of all processes."""
        whole = self.share or Share(self.indices.numpy(), 0, len(self.labels), len(self.labels))
        counted = min(stop, whole.counted) - min(start, whole.counted)
        share = Share(whole.indices, whole.start + start, whole.start + stop, counted)
        part = self._map(lambda tensor: tensor[start:stop])
        return part._replace(indices=self.indices[start:stop], negatives=self.negatives, share=share)

    def to(self, device: torch.device) -> Batch:
        """The batch with what a step computes with on a device; the indices stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory: a copy from pageable memory waits for all that the device was asked to do before.

        What is on a device already, such as the logits of an online teacher, stays there.
        """
        return self._map(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed that a step computes with."""
        changed: dict[str, Any] = {}
        for name in ("inputs", "labels", "partner_labels", "mix_lambda"):
            if (tensor := getattr(self, name)) is not None:
                changed[name] = change(tensor)
        for name in ("features", "negatives"):
            if (tensors := getattr(self, name)) is not None:
                changed[name] = {key: change(tensor) for key, tensor in tensors.items()}
        if self.soft_targets is not None:
            changed["soft_targets"] = self.soft_targets.map(change)
        return self._replace(**changed)


class Batches(Protocol):
    """The batches of one epoch: a list of requests, or an object that orders each epoch anew."""

    def __iter__(self) -> Iterator[BatchRequest]: ...

    def __len__(self) -> int: ...


def consecutive_batches(indices: NDArray[np.int64], batch_size: int) -> list[BatchRequest]:
    """Plain samples in the order given."""
    return [BatchRequest(part) for part in np.split(indices, range(batch_size, len(indices), batch_size))]


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
