"""Logits with a few bits per class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import UsageError
from kdcache.store.encodings.base import LOGITS, Encoding, StoredArray, as_float32, where
from kdcache.store.encodings.floats import as_bounded

CODES, GRID = "logits.codes", "logits.grid"

# Ranges twice as large still fit float32.
LARGEST = 1e38


class Quantizer:
    """Rows of numbers on a uniform grid per row, with the largest number apart.

    Code 0 is the row's largest number, stored exactly in float32. Codes 1 to 2^BITS − 1 are an even grid from the
    largest of the other numbers down to the smallest, so that nothing else is moved onto or above the maximum, and
    equal numbers stay equal. A number x is decoded to within (second − smallest) / (2^BITS − 2) / 2 of itself, and
    float32's rounding.

    Eight bits are one byte per number. Fewer are stored as planes of one bit each, eight numbers per byte.

    Args:
        bits: 4 to 8.
        names: Names of the arrays of codes and grids.

    Raises:
        UsageError: another number of bits.
    """

    def __init__(self, bits: int, names: tuple[str, str] = (CODES, GRID)) -> None:
        if not 4 <= bits <= 8:
            raise UsageError(f"--encoding asks for {bits} bits", "4 to 8", "give 8, as in quantized:8 or head:8")
        self.bits, self._steps = bits, 2**bits - 2
        self._codes, self._grid = names

    def arrays(self, width: int, axis: str) -> tuple[StoredArray, ...]:
        """The arrays of rows of `width` numbers: codes, and largest, second largest and step, float32."""
        codes = StoredArray(name=self._codes, dtype="uint8", row_shape=(width,), row_names=(axis,))
        if self.bits < 8:
            shape = self.bits, -(-width // 8)
            codes = StoredArray(name=self._codes, dtype="uint8", row_shape=shape, row_names=("bit", f"{axis} / 8"))
        return codes, StoredArray(name=self._grid, dtype="float32", row_shape=(3,), row_names=("grid",))

    def encode(self, values_nw: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Codes and grids of rows of finite numbers of at most 1e38 in size, (rows, width)."""
        top_n1 = values_nw.max(axis=1, keepdims=True)
        is_top = values_nw == top_n1
        # In float64, so that the code of a number does not depend on rounding.
        below = np.where(is_top, -np.inf, values_nw.astype(np.float64))
        second_n1 = below.max(axis=1, keepdims=True)
        second_n1 = np.where(np.isinf(second_n1), top_n1, second_n1)
        step_n1 = ((second_n1 - values_nw.min(axis=1, keepdims=True)) / self._steps).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint((second_n1 - values_nw) / step_n1.astype(np.float64)) + 1
        codes = np.where(is_top, 0, np.where(step_n1 > 0, np.clip(codes, 1, self._steps + 1), 1)).astype(np.uint8)
        if self.bits < 8:
            planes = (codes[:, None, :] >> np.arange(self.bits, dtype=np.uint8)[:, None]) & 1
            codes = np.packbits(planes, axis=2, bitorder="little")
        return {self._codes: codes, self._grid: np.hstack([top_n1, second_n1, step_n1]).astype(np.float32)}

    def decode(self, rows: Mapping[str, Any], width: int) -> Any:
        """Numbers (rows, width), float32."""
        codes, grid = rows[self._codes], rows[self._grid]
        if self.bits < 8:
            codes = self._unpacked(codes, width)
        top_n1, second_n1, step_n1 = grid[:, 0:1], grid[:, 1:2], grid[:, 2:3]
        values = as_float32(codes)
        # In this order, because the second largest is then exact, and nothing is rounded onto the maximum.
        values -= 1
        values *= -step_n1
        values += second_n1
        if isinstance(values, np.ndarray):
            # Faster than a choice for each number, because few are the largest.
            places = np.flatnonzero(codes.reshape(-1) == 0)
            values.reshape(-1)[places] = top_n1[places // width, 0]
            return values
        return where(codes == 0, top_n1, values)

    def _unpacked(self, planes: Any, width: int) -> Any:
        if isinstance(planes, np.ndarray):
            bits = np.unpackbits(planes, axis=2, count=width, bitorder="little")
            codes = bits[:, 0]
            for bit in range(1, self.bits):
                codes |= bits[:, bit] << np.uint8(bit)
            return codes
        shifts = planes.new_tensor(range(8))
        bits = ((planes.unsqueeze(-1) >> shifts) & 1).flatten(2)[:, :, :width]
        codes = bits[:, 0]
        for bit in range(1, self.bits):
            codes = codes | (bits[:, bit] << bit)
        return codes


class QuantizedEncoding(Encoding):
    """Logits with 4 to 8 bits per class, on a grid of their own for each row (see `Quantizer`).

    The largest logit is exact, and the predicted class never changes.

    Args:
        bits: Number of bits.
    """

    compression = "zstd:5"

    def __init__(self, bits: int, classes: int) -> None:
        self._quantizer = Quantizer(bits)
        self.spec, self.classes = f"quantized:{bits}", classes

    def arrays(self) -> tuple[StoredArray, ...]:
        return self._quantizer.arrays(self.classes, "class")

    def encode(self, values_nx: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        return self._quantizer.encode(
            as_bounded(values_nx, LARGEST, spec=self.spec, first_sample=first_sample, name=LOGITS)
        )

    def decode(self, rows: Mapping[str, Any], *, temperature: float | None = None) -> Any:
        return self._quantizer.decode(rows, self.classes)
