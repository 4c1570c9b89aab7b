"""From a shared input to what one network takes: geometry or tokens on each sample, numbers on the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import DatasetError, ModelError
from kdcache.data.raw_input import CHANNELS_FIRST, is_channels_last
from kdcache.data.tokenizer import Tokenizer
from kdcache.store.records import Preprocess

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def resize(image: Tensor, size: list[int], interpolation: str, *, antialias: bool) -> Tensor:
    """An image (..., H, W) resized by torchvision.

    Args:
        size: [height, width], or [pixels] of the shorter side.
        interpolation: One of `INTERPOLATIONS`.
    """
    # Here, because torchvision's import takes seconds, and most networks for small images resize nothing.
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

    mode = InterpolationMode(interpolation)
    # Nearest picks pixels: there is nothing to smooth, and torchvision refuses the wish.
    antialias = antialias and mode is not InterpolationMode.NEAREST
    resized: Tensor = functional.resize(image, size, interpolation=mode, antialias=antialias)
    return resized


def _center_crop(image: Tensor, pixels: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    cropped: Tensor = functional.center_crop(image, [pixels, pixels])
    return cropped


class Preprocessor:
    """Applies one `Preprocess` record. Goes to workers without what lies on a device.

    Args:
        tokenizer: Tokenizer of the record, for text.

    Attributes:
        record: Record of the preprocessing.
        channels: Number of channels of the network's inputs (the length of the mean); None where unknown.
        has_geometry: Whether images are resized or cropped.

    Raises:
        ModelError: the record names an interpolation that does not exist, or another tokenizer than the given one, or
            leaves no room for a token of a text.
    """

    def __init__(self, record: Preprocess, tokenizer: Tokenizer | None = None) -> None:
        given = "" if tokenizer is None else tokenizer.sha256
        if given != record.tokenizer_sha256:
            raise ModelError(
                f"the preprocessing names the tokenizer {record.tokenizer_sha256[:16] or 'none'}; given is "
                f"{given[:16] or 'none'}",
                "the tokenizer that the network was trained with",
                "take it from the network's checkpoint or run folder (tokenizer.json), and pass "
                "Preprocessor(record, tokenizer)",
            )
        if record.interpolation not in INTERPOLATIONS:
            raise ModelError(f"interpolation is {record.interpolation!r}", f"one of {', '.join(INTERPOLATIONS)}")
        if tokenizer is not None and (record.max_tokens or 0) <= tokenizer.special_tokens:
            raise ModelError(
                f"max_tokens is {record.max_tokens}, and the tokenizer adds {tokenizer.special_tokens} of its own",
                f"at least {tokenizer.special_tokens + 1}",
                "give a larger --max-tokens",
            )
        self.record, self.tokenizer = record, tokenizer
        self.channels = len(record.mean) or None
        self.has_geometry = record.resize is not None or record.crop is not None
        if self.has_geometry:
            import torchvision.transforms.v2  # type: ignore[import-untyped]  # noqa: F401  # once, before workers are forked
        # One copy to the device in a run, not one a step: a copy from pageable memory waits for the device.
        self._constants: dict[tuple[torch.device, torch.dtype, bool, int], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Preprocessor, (self.record, self.tokenizer)

    @property
    def makes_tokens(self) -> bool:
        """Whether the network takes sequences of token ids."""
        return self.record.max_tokens is not None

    def token_ids(self, value: Tensor, where: str) -> NDArray[np.int32]:
        """The token ids of one sample, cut to `max_tokens` and not filled up: (tokens,) int32.

        Args:
            value: a text as UTF-8, (bytes,) uint8, where the record names a tokenizer; else token ids, (tokens,).
            where: names the sample in a message.

        Raises:
            DatasetError: it is no sequence of integers, or an id lies outside of the vocabulary.
        """
        limit, size = self.record.max_tokens, self.record.vocabulary_size
        assert limit is not None, "a record of sequences"
        if self.tokenizer is not None:
            return self.tokenizer.ids(_text(value, where), limit)
        ids = value.numpy() if value.dtype != torch.bfloat16 else None
        if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DatasetError(
                f"{where} is {value.dtype} of shape {tuple(value.shape)}",
                "token ids: integers of shape (tokens,)",
                "let the dataset return them, or take a network for such inputs",
            )
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < (size or 0)):
            raise DatasetError(
                f"{where} has token ids from {ids.min()} to {ids.max()}",
                f"0 to {(size or 0) - 1}, for its vocabulary of {size}",
                "set the dataset's attribute vocabulary_size to one more than its largest id",
            )
        return ids[:limit].astype(np.int32)

    def per_sample(self, image: Tensor) -> Tensor:
        """Resize the shorter side, then crop the centre, padding with zeros what is smaller than the crop.

        Args:
            image: (C, H, W), any dtype; with more dimensions in front, each image gets the same pixels as alone.

        Returns:
            (C, H', W') of the same dtype.

        Raises:
            ModelError: there is geometry to apply, and the input is no image.
        """
        if not self.has_geometry:
            return image
        if image.ndim < 3:
            raise ModelError(
                f"the preprocessing resizes or crops, and an input has shape {tuple(image.shape)}",
                "images of shape (channels, height, width)",
                "leave out --size",
            )
        record = self.record
        if record.resize is not None:
            size = [record.resize] * (2 if record.stretch else 1)
            image = resize(image, size, record.interpolation, antialias=record.antialias)
        if record.crop is not None:
            image = _center_crop(image, record.crop)
        return image

    def per_batch(self, inputs_bchw: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale, expand and normalise on the device that holds the batch.

        uint8 is scaled to [0, 1]; every other dtype is only cast. One channel becomes as many as the mean has.
        A dtype narrower than float32 is computed in float32 and rounded once.

        Args:
            inputs_bchw: (B, C, ...), after `per_sample`; (B, ...) of any rank where the record has no mean; (B, tokens)
                where it is of sequences.
            dtype: floating, of the result.

        Returns:
            (B, C or channels, ...) of `dtype`; token ids as int64.

        Raises:
            ModelError: the inputs have neither one channel nor as many as the mean.
        """
        if self.makes_tokens:
            return inputs_bchw.long()
        scaled = inputs_bchw.dtype == torch.uint8
        work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        if self.channels is None:
            return inputs_bchw.to(work).div_(255).to(dtype) if scaled else inputs_bchw.to(dtype)
        if inputs_bchw.ndim < 2 or inputs_bchw.shape[1] not in (1, self.channels):
            last = is_channels_last(tuple(inputs_bchw.shape[1:]))
            raise ModelError(
                f"a batch of inputs has shape {tuple(inputs_bchw.shape)}, the mean has {self.channels} channels",
                f"inputs of 1 or {self.channels} channels, channels first",
                CHANNELS_FIRST if last else "give --mean and --std with one number for each channel of the dataset",
            )
        scale, shift = self._scale_and_shift(inputs_bchw.device, work, scaled, inputs_bchw.ndim)
        # (x / 255 - mean) / std as one product, which casts uint8 and makes missing channels on its way, and one sum
        # in place. On two CPU cores 35 µs for 128 MNIST images; addcmul takes 67 µs, the four steps by hand 63 µs.
        values = inputs_bchw if scaled else inputs_bchw.to(work)
        return torch.mul(values, scale).add_(shift).to(dtype)

    def output_shape(self, input_shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Shape of one input after both methods; None where it differs between samples or cannot be known."""
        record = self.record
        if input_shape is not None and (len(input_shape) != 3 or not self.has_geometry):
            return (self.channels or input_shape[0], *input_shape[1:]) if input_shape else input_shape
        channels = self.channels or (input_shape[0] if input_shape else None)
        if channels is None:
            return None
        if record.crop is not None:
            return channels, record.crop, record.crop
        if record.stretch and record.resize is not None:
            return channels, record.resize, record.resize
        if input_shape is None or record.resize is None:
            return None
        height, width = input_shape[1:]
        short, long = record.resize, int(record.resize * max(height, width) / min(height, width))
        return (channels, short, long) if height <= width else (channels, long, short)

    def _scale_and_shift(
        self, device: torch.device, dtype: torch.dtype, scaled: bool, ndim: int
    ) -> tuple[Tensor, Tensor]:
        key = (device, dtype, scaled, ndim)
        if key not in self._constants:
            shape = (-1, *[1] * (ndim - 2))
            mean, std = (torch.tensor(value, dtype=torch.float64) for value in (self.record.mean, self.record.std))
            scale = 1 / (std * 255 if scaled else std)
            shift = -mean / std
            self._constants[key] = (
                scale.reshape(shape).to(device, dtype),
                shift.reshape(shape).to(device, dtype),
            )
        return self._constants[key]


def _text(value: Tensor, where: str) -> str:
    try:
        if value.dtype != torch.uint8 or value.ndim != 1:
            raise ValueError(f"{value.dtype} of shape {tuple(value.shape)}")
        return bytes(value.numpy()).decode()
    except ValueError as problem:  # also what is not UTF-8
        raise DatasetError(f"{where} is no text: {problem}", "a text as UTF-8") from problem


def as_preprocessor(preprocess: Preprocess | Preprocessor) -> Preprocessor:
    """What applies a record; one that is given is taken as it is.

    Raises:
        ModelError: a record that names a tokenizer, without it.
    """
    return preprocess if isinstance(preprocess, Preprocessor) else Preprocessor(preprocess)
