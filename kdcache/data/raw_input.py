"""Shared inputs: what a sample is as a tensor before any network's own preprocessing, and its checksum."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.errors import DatasetError, UnreadableSample
from kdcache.core.plugins import describe
from kdcache.data.folders import printable

# One tensor (B, ...) where the samples have one shape and are held together, else B tensors.
Inputs = Tensor | list[Tensor]


def dtype_name(tensor: Tensor) -> str:
    """Such as `uint8`."""
    return str(tensor.dtype).removeprefix("torch.")


CHANNELS_FIRST = "let the dataset return images channels first, as image.permute(2, 0, 1) or transpose(2, 0, 1) does"


def is_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether an input looks like an image (H, W, C) of 1, 3 or 4 channels."""
    return len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[:2]) > 4


def as_sequence(value: str | list[Any], where: str) -> Tensor:
    """A text as its UTF-8, a list of token ids as int64."""
    if isinstance(value, str):
        try:
            return torch.from_numpy(np.frombuffer(value.encode(), np.uint8).copy())
        except UnicodeEncodeError as problem:  # a lone surrogate
            raise DatasetError(f"{where} is a text that UTF-8 cannot hold: {problem}", "whole characters") from problem
    if not all(type(item) is int for item in value):
        raise DatasetError(f"{where} is a list of other things than integers", "token ids, or a tensor or numpy array")
    try:
        return torch.tensor(value, dtype=torch.int64)
    except (OverflowError, ValueError, RuntimeError) as problem:
        raise DatasetError(f"{where} has a token id beyond 64 bits: {problem}", "token ids") from problem


def as_input(value: Any, where: str) -> Tensor:
    """A tensor, array or PIL image as a shared input; images as uint8 (C, H, W)."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise DatasetError(
                f"{where} is a tensor on {value.device.type}, of layout {value.layout}",
                "a dense tensor on the CPU",
                "let it return value.cpu(), or value.to_dense() where it is sparse",
            )
        return value.detach().as_subclass(Tensor).contiguous()  # torchvision wraps images in a subclass
    if isinstance(value, np.ndarray):
        try:
            return torch.tensor(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
        except (TypeError, ValueError) as problem:
            raise DatasetError(f"{where} is an array of {value.dtype}", "an array of numbers") from problem
    from PIL import Image

    if not isinstance(value, Image.Image):
        raise DatasetError(
            f"{where} is a {type(value).__name__}", "a PIL image, a tensor or a numpy array (in a dataset also text)"
        )
    if value.mode.startswith(("I", "F")):
        raise DatasetError(
            f"{where} is a PIL image of mode {value.mode}", "8 bits a channel", "return such images as arrays"
        )
    try:  # Pillow opens lazily: it is now that the file is read
        return pil_to_tensor(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    except Exception as problem:
        raise UnreadableSample(
            f"{where} is an image that cannot be decoded: {describe(problem)}",
            "a whole image",
            "copy its file again, or leave it out",
        ) from problem


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Tensor:
    """The first frame of an image file in a mode of Pillow's, not turned as EXIF may say: uint8 (C, H, W).

    Raises:
        UnreadableSample: it cannot be read.
        DatasetError: it has more than 8 bits a channel.
    """
    from PIL import Image

    name = printable(path)
    try:
        with Image.open(path) as picture:
            depth = picture.mode
            # Converting more than 8 bits to 8 clips; what to make of them only the user can tell.
            image = None if depth.startswith(("I", "F")) else pil_to_tensor(picture.convert(mode))
    except Exception as problem:  # Pillow's decoders raise OSError, SyntaxError, ValueError and struct.error
        raise UnreadableSample(
            f"{name} cannot be read as an image: {type(problem).__name__}: {problem}",
            "a whole image file",
            "copy the file again, leave it out, or dump with --skip-unreadable",
        ) from problem
    if image is None:
        raise DatasetError(
            f"{name} is an image of mode {depth}",
            "8 bits a channel",
            "scale its values to 0 to 255 before it is converted, which by itself cuts off what is larger",
        )
    return image


def pil_to_tensor(image: Any) -> Tensor:
    """uint8 (C, H, W), contiguous, because checksums are of the bytes in this order."""
    pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)))


def input_crc32c(shared_input: Tensor) -> int:
    """crc32c of one shared input's bytes in C order; the shape and the dtype are not part of it."""
    return batch_crc32c([shared_input])[0]


def batch_crc32c(inputs: Inputs) -> list[int]:
    """crc32c of each shared input of a batch, on the CPU."""
    if isinstance(inputs, Tensor):
        rows = list(_bytes(inputs).reshape(len(inputs), -1))
    else:
        rows = [_bytes(value) for value in inputs]
    return [crc32c(row.data) for row in rows]


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor."""
    # Reinterpreted by torch, because numpy knows no bfloat16.
    values: NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return values
