"""Views: the shared input of (view, sample), recomputed bit for bit at every use."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core import rng
from kdcache.core.errors import DatasetError, KdcacheError
from kdcache.core.plugins import describe
from kdcache.data.augment import OBJECT, Transform, build_transform, describe_transform, draws_from_torch_only
from kdcache.data.dataset import IndexedDataset
from kdcache.data.kept_inputs import KeptDataset, KeptInputs
from kdcache.data.mixup import Mix, parse_mix
from kdcache.data.raw_input import Inputs, as_input, batch_crc32c, dtype_name
from kdcache.store.records import NONE, ViewRecipe

PROBES = 4
# Number of inputs that are measured to estimate the size of all.
MEASURED = 16
_TORCH_BITS, _NUMPY_BITS = 63, 32


class Shared(NamedTuple):
    """Shared inputs and labels of some samples in one view.

    Attributes:
        inputs: Tensor (B, ...) or B tensors, before any network's preprocessing.
        labels: Labels of the samples, (B,) int64.
        partner_labels: Labels of the mixed-in samples, (B,) int64; None without mixing.
        mix_lambda: Weight of the sample in its mixed input, (B,) float32 from 0 to 1; None without mixing.
    """

    inputs: Inputs
    labels: Tensor
    partner_labels: Tensor | None = None
    mix_lambda: Tensor | None = None


class Views:
    """The views of one dataset. Can be passed to forked and spawned workers, if its transform can.

    Args:
        recipe: `augment`, `mix`, `seed` and `plain_view` are followed; the rest is found out.
        transform: Transform that replaces the one named by `recipe.augment`.

    Attributes:
        recipe: Recipe with the parameters of the transform and, after `probe`, the shape of its outputs.
        input_shape: Shape of one shared input after `probe`, channels first; None where they differ in size.

    Raises:
        UsageError: there is no such augmentation or mixing.
    """

    def __init__(self, dataset: IndexedDataset, recipe: ViewRecipe, *, transform: Transform | None = None) -> None:
        self.dataset = self._samples = dataset
        self._transform = build_transform(recipe.augment, dataset.input_shape) if transform is None else transform
        self._torch_only = draws_from_torch_only(self._transform)
        self._dtype: torch.dtype = getattr(torch, dataset.input_dtype)
        self._mix: Mix | None = parse_mix(recipe.mix)
        self.recipe = ViewRecipe(
            augment=recipe.augment if transform is None else f"{OBJECT}{type(transform).__qualname__}",
            parameters=describe_transform(self._transform),
            mix=NONE if self._mix is None else str(self._mix),
            seed=recipe.seed,
            plain_view=recipe.plain_view,
        )
        self.input_shape = dataset.input_shape
        self._kept: KeptInputs | None = None
        self._kept_views: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def typical_view(self) -> int:
        """A view to measure on: an augmented one, where there are any."""
        return 0 if self.recipe.is_plain(1) else 1

    def keep(self, kept: KeptInputs, views: Sequence[int], *, again: bool) -> str:
        """Make inputs only once from now on: those of some views, if all of them fit, or else the plain ones that fit.

        Args:
            kept: Memory with a slot for the plain inputs, and after it one for each view.
            views: Views that will be used.
            again: Whether a view is used more than once; else nothing is gained by keeping it.

        Returns:
            A message about the decision.
        """
        views, limit = [view for view in views if not self.recipe.is_plain(view)], kept.limit_bytes
        if self._samples.labels() is None and self._samples.multi_label:
            return (
                "inputs have several labels and are of a dataset without a table of these: they are made at every use"
            )
        needed = len(views) * self._kept_bytes(self.typical_view) if views else 0
        if views and again and needed <= limit:
            self._kept, self._kept_views = kept, frozenset(views)
            return f"augmented inputs are kept in memory once they are made: {needed:,} bytes for {len(views)} views"
        why = f"those of {len(views)} views would take {needed:,} bytes" if again else "each is used once"
        lines = [f"augmented inputs are made at every use: {why}"] if views else []
        if self._samples.in_memory:
            return lines[0] if lines else "inputs are in memory as they are"
        self.dataset = KeptDataset(self._samples, kept)
        needed = self._kept_bytes(None)
        part = "" if needed <= limit else f", of which {limit / needed:.0%} fit"
        lines.append(f"decoded inputs are kept in memory once they are read: about {needed:,} bytes{part}")
        return "; ".join(lines)

    def _kept_bytes(self, view: int | None) -> int:
        """Memory for the inputs of a view, or for the plain ones, from the sizes of a few."""
        shape = self._samples.input_shape if view is None else self.input_shape
        if shape is not None:
            size: float = math.prod(shape) * self._dtype.itemsize
        else:
            few = rng.keyed_sample(len(self), MEASURED, 0, "input size")
            inputs = self.dataset.shared_inputs(few) if view is None else self._augmented(view, few)[0]
            size = sum(value.nbytes for value in inputs) / len(few)
        return len(self) * KeptInputs.entry_bytes(size)

    def fetch(self, view: int, indices: NDArray[np.int64]) -> Shared:
        """Some samples as a view shows them. The same for the same view and index, whatever else is asked for.

        Args:
            indices: Indices of the samples, (B,).

        Raises:
            DatasetError: a sample cannot be read, or the transform fails on it.
        """
        if self.recipe.is_plain(view):
            return Shared(*self.dataset.fetch(indices))
        augmented, labels = self._augmented(view, indices)
        if self._mix is None:
            return Shared(augmented, labels)
        mix_key = rng.key_series(self.recipe.seed, "mix", view)
        draws = [self._mix.draw(mix_key(index), index, len(self.dataset)) for index in indices.tolist()]
        partners = np.array([draw.partner for draw in draws], np.int64)
        others, partner_labels = self._augmented(view, partners)
        mixed, lambdas = [], []
        for at, (image, other, draw) in enumerate(zip(augmented, others, draws, strict=True)):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape != other.shape:
                raise DatasetError(
                    f"samples {indices[at]} and {partners[at]} of {self.dataset.name} are {dtype_name(image)} "
                    f"{tuple(image.shape)} and {dtype_name(other)} {tuple(other.shape)} in view {view}",
                    "uint8 images of one shape, to be mixed",
                    "let --augment give them one, as resized-crop-flip does, or leave out --mix",
                )
            result, mix_lambda = self._mix.apply(image, other, draw)
            mixed.append(result)
            lambdas.append(mix_lambda)
        alike = len({image.shape for image in mixed}) == 1
        return Shared(
            torch.stack(mixed) if alike else mixed, labels, partner_labels, torch.tensor(lambdas, dtype=torch.float32)
        )

    def fetch_several(self, views: Sequence[int], indices: NDArray[np.int64]) -> list[Shared]:
        """Some samples as several views show them, each read once where they are not mixed.

        Args and errors as for `fetch`.
        """
        if len(views) == 1 or self._mix is not None or self._kept is not None:
            return [self.fetch(view, indices) for view in views]
        inputs, labels = self.dataset.fetch(indices)
        found = []
        for view in views:
            # A copy for each: what is done to one view must not show in the next.
            own = inputs.clone() if isinstance(inputs, Tensor) else inputs
            found.append(Shared(own if self.recipe.is_plain(view) else self._augment(view, indices, own), labels))
        return found

    def _augmented(self, view: int, indices: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
        """Augmented inputs and labels, before any mixing; from memory, where they are kept."""

        def make(wanted: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
            inputs, labels = self.dataset.fetch(wanted)
            return self._augment(view, wanted, inputs), labels

        if self._kept is None or view not in self._kept_views:
            return make(indices)
        return self._kept.fetch_labelled(1 + view, indices, make, self._dtype, self.dataset.labels())

    def _augment(self, view: int, indices: NDArray[np.int64], inputs: Inputs) -> list[Tensor]:
        if self._transform is None:
            return list(inputs)
        view_key = rng.key_series(self.recipe.seed, "view", view)
        results = []
        # Copies, because a transform that writes into its input would write into the dataset; a tensor of them is one.
        plains = inputs if isinstance(inputs, Tensor) else [plain.clone() for plain in inputs]
        with generators_kept(torch_only=self._torch_only):
            for index, plain in zip(indices.tolist(), plains, strict=True):
                seed_generators(view_key(index), torch_only=self._torch_only)
                try:
                    results.append(self._transform(plain))
                except KdcacheError:
                    raise
                except Exception as problem:
                    raise DatasetError(
                        f"--augment {self.recipe.augment} fails on sample {index} of {self.dataset.name}, which is "
                        f"{dtype_name(plain)} {tuple(plain.shape)}, in view {view}: {name_of(self._transform)} raises "
                        f"{describe(problem)}",
                        "a transform of the dataset's plain inputs",
                        "choose an augmentation that suits them",
                    ) from problem
        return [self._checked(value, view, index) for value, index in zip(results, indices.tolist(), strict=True)]

    def _checked(self, value: Any, view: int, index: int) -> Tensor:
        if type(value) is Tensor and value.dtype == self._dtype and value.device.type == "cpu":
            return value.detach().contiguous() if value.requires_grad or not value.is_contiguous() else value
        try:
            image = as_input(value, f"sample {index} of {self.dataset.name} in view {view}")
        except DatasetError as problem:
            raise self._not_shared(problem.found) from problem
        if image.dtype != self._dtype:
            raise self._not_shared(f"--augment {self.recipe.augment} gives {dtype_name(image)}")
        return image

    def _not_shared(self, found: str) -> DatasetError:
        return DatasetError(
            f"{found} (--augment {self.recipe.augment})",
            f"{self.dataset.input_dtype} on the CPU, as the plain sample is",
            "let the transform return its image, and leave scaling and normalising (ToDtype, ToTensor, Normalize) to "
            "each network's own --mean and --std",
        )

    def probe(self, samples: NDArray[np.int64] | None = None) -> None:
        """Find the shape of an augmented input, and whether it can be made again.

        Args:
            samples: Samples that there are, (n,); None for all.

        Raises:
            DatasetError: the transform fails, does not replay, gives one tensor again and again, or something else than
                a tensor of the dataset's dtype.
        """
        if self.recipe.is_plain(1):
            return
        indices = rng.keyed_sample(len(self.dataset) if samples is None else len(samples), PROBES, 0, "determinism")
        if samples is not None:
            indices = samples[indices]
        shapes = set()
        for view in (1, 2):
            first, second = self.fetch(view, indices).inputs, self.fetch(view, indices[::-1].copy()).inputs
            before, after = batch_crc32c(first), batch_crc32c(second)[::-1]
            for at, (index, one, other) in enumerate(zip(indices, first, reversed(list(second)), strict=True)):
                if one.shape != other.shape or before[at] != after[at]:
                    raise unreplayable(self, view, int(index))
            if len({image.data_ptr() for image in first}) < len(first):
                raise DatasetError(
                    f"--augment {self.recipe.augment} gives one and the same tensor for several samples",
                    "a tensor of its own for each",
                    "let it return a clone",
                )
            shapes |= {tuple(image.shape) for image in first}
        shape = shapes.pop() if len(shapes) == 1 else None
        self.recipe = replace(self.recipe, input_shape=shape)
        self.input_shape = shape


def name_of(transform: Callable[..., Any]) -> str:
    """A function by its own name, an object by its class."""
    return str(getattr(transform, "__qualname__", type(transform).__qualname__))


def as_views(dataset: IndexedDataset | Views) -> Views:
    """The views of a dataset that was given none: the plain one."""
    return dataset if isinstance(dataset, Views) else Views(dataset, ViewRecipe())


def unreplayable(views: Views, view: int, sample: int) -> DatasetError:
    """The error for a sample that a view shows otherwise at a second look."""
    return DatasetError(
        f"two looks at sample {sample} of {views.dataset.name} in view {view} differ: --augment {views.recipe.augment} "
        "keeps a state, or draws from a generator of its own",
        "a transform that draws from torch's, Python's or numpy's global generator, which are seeded for each look",
        "let it draw from one of them: torch.rand, random.random, numpy.random.rand",
    )


@contextmanager
def generators_kept(*, torch_only: bool) -> Iterator[None]:
    """Restore the global generators of torch, Python and numpy on exit, and compute on one thread until then.

    Some kernels, such as the mean of a large float image, sum in another order on several threads, and the last bit of
    a pixel must not depend on the process that computed it.
    """
    threads, kept = torch.get_num_threads(), torch.default_generator.get_state()
    others = None if torch_only else (random.getstate(), np.random.get_state())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.default_generator.set_state(kept)
        if others is not None:
            random.setstate(others[0])
            np.random.set_state(others[1])


def seed_generators(key: int, *, torch_only: bool) -> None:
    """Seed the global generators, or only torch's, from a 128-bit key; for use within `generators_kept`."""
    # Not torch.manual_seed, which also seeds accelerators and takes a hundred times as long.
    torch.default_generator.manual_seed(key & (2**_TORCH_BITS - 1))
    if not torch_only:
        random.seed(key)
        np.random.seed(key >> (128 - _NUMPY_BITS))
