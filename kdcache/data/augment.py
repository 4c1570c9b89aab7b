"""Augmentations by name, and their descriptions."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.core.errors import DatasetError, KdcacheError, UsageError
from kdcache.core.plugins import PREFIX, call_with_accepted, describe, did_you_mean, resolve
from kdcache.core.specs import number, split_spec
from kdcache.data.transform_fingerprint import describe_object, settings_of
from kdcache.store.records import NONE

# From one plain uint8 image (C, H, W) to the shared one.
Transform = Callable[[Tensor], Any]

# Before the type of a transform that was given as an object, and so cannot be made again from its name.
OBJECT = "object:"
RESIZED_PIXELS = 224


def _affine(size: int | None, input_shape: tuple[int, ...] | None) -> Transform:
    """For digits and letters, which have a right way up. Small, so that a small student can follow: with twice as much
    and a shear, a student of one hidden layer lost 0.15 points of accuracy on MNIST.
    """
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]

    affine: Transform = _v2().RandomAffine(
        7, translate=(0.07, 0.07), scale=(0.95, 1.05), interpolation=InterpolationMode.BILINEAR
    )
    return affine


def _crop_flip(size: int | None, input_shape: tuple[int, ...] | None) -> Transform:
    """CIFAR: a crop after padding by an eighth of the side, and a flip (He et al., 2016, section 4.2)."""
    if input_shape is None or len(input_shape) != 3:
        raise DatasetError(
            f"crop-flip was asked for inputs of shape {input_shape or 'that varies'}",
            "images of one shape (channels, height, width)",
            "use resized-crop-flip for images of varying size",
        )
    height, width = input_shape[1:]
    padding = max(height, width) // 8
    v2 = _v2()
    return _in_turn(v2.RandomCrop((size or height, size or width), padding=padding), v2.RandomHorizontalFlip())


def _crop_flip_randaugment(size: int | None, input_shape: tuple[int, ...] | None) -> Transform:
    """The same, then two operations of RandAugment at magnitude 9 (Cubuk et al., 2020)."""
    return _in_turn(_crop_flip(size, input_shape), _v2().RandAugment(num_ops=2, magnitude=9))


def _resized_crop_flip(size: int | None, input_shape: tuple[int, ...] | None) -> Transform:
    """ImageNet: a crop of 8 to 100 % of the area, resized to a square, and a flip (Szegedy et al., 2015)."""
    v2 = _v2()
    return _in_turn(v2.RandomResizedCrop(size or RESIZED_PIXELS, antialias=True), v2.RandomHorizontalFlip())


def _in_turn(*transforms: Transform) -> Transform:
    composed: Transform = _v2().Compose(list(transforms))
    return composed


def _v2() -> Any:
    """torchvision's v2 transforms; its import takes seconds, and is for those who augment."""
    from torchvision.transforms import v2

    return v2


PRESETS: dict[str, Callable[[int | None, tuple[int, ...] | None], Transform]] = {
    "affine": _affine,
    "crop-flip": _crop_flip,
    "crop-flip-randaugment": _crop_flip_randaugment,
    "resized-crop-flip": _resized_crop_flip,
}


def build_transform(spec: str, input_shape: tuple[int, ...] | None) -> Transform | None:
    """Build the transform of a spec; None for `none`.

    Args:
        spec: `none`, a name of `PRESETS`, followed by `:PIXELS` for another size of the result, or
            `py:package.module:function`, which is called with those of `input_shape` that it takes and returns a
            transform.
        input_shape: Shape of one plain input; None where they differ in size.

    Raises:
        UsageError: there is no such preset or function, or it returns something else.
        DatasetError: the preset does not suit the inputs.
    """
    if spec == NONE:
        return None
    if spec.startswith(OBJECT):
        raise UsageError(
            f"the augmentation is a {spec.removeprefix(OBJECT)} that was given as an object",
            "the same transform, to make the same inputs",
            "pass augment=TRANSFORM; or dump with --augment py:package.module:function, which can be found by name",
        )
    if spec.startswith(PREFIX):
        function = resolve(spec, error=UsageError)
        try:
            transform: Any = call_with_accepted(function, input_shape=input_shape)
        except Exception as problem:
            raise UsageError(f"--augment {spec} fails with {describe(problem)}", "a transform") from problem
        if not callable(transform):
            raise UsageError(
                f"--augment {spec} returns a {type(transform).__name__}", "a transform: a torchvision v2 one, say"
            )
        found: Transform = transform
        return found
    name, pixels = split_spec(spec)
    try:
        return PRESETS[name](None if pixels is None else number(pixels, int, 1), input_shape)
    except (KeyError, ValueError) as problem:
        if isinstance(problem, KdcacheError):  # the preset does not suit the inputs
            raise
        raise UsageError(
            f"--augment is {spec!r}",
            f"none, {', '.join(PRESETS)} (with :PIXELS behind it), or py:package.module:function",
            did_you_mean(name, [NONE, *PRESETS]),
        ) from problem


def describe_transform(transform: Transform | None) -> dict[str, str]:
    """Parameters of a transform as text by dotted name; transforms that differ there are different augmentations.

    A change in the code of a function does not show here, but in the checksums of the inputs.
    """
    return {} if transform is None else describe_object("transform", transform)


def draws_from_torch_only(transform: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether a transform is made of torchvision's v2 transforms alone, which draw from no generator but torch's.

    Seeding Python's and numpy's too takes 7 µs a sample, more than the smallest transforms take themselves.
    """
    if id(transform) in above:
        return True
    within = partial(draws_from_torch_only, above=(*above, id(transform)))
    if isinstance(transform, nn.Module):
        theirs = type(transform).__module__.startswith("torchvision.transforms.v2")
        return theirs and all(map(within, settings_of(transform).values()))
    if isinstance(transform, Mapping):
        return all(map(within, transform.values()))
    if isinstance(transform, list | tuple | set | frozenset):
        return all(map(within, transform))
    # Parameters are values; a function or an object of another library may draw from any generator.
    return transform is None or isinstance(
        transform, bool | int | float | str | enum.Enum | Tensor | np.ndarray | type | torch.dtype
    )
