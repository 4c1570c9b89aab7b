"""The interface of an encoding."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """One array that an encoding needs.

    Attributes:
        name: Name of the Zarr array.
        dtype: Stored dtype by numpy's name, without byte order.
        row_shape: Shape of one row.
        row_names: Dimension names of `row_shape`.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...] = ()
    row_names: tuple[str, ...] = ()

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row before compression."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.row_shape)


class Encoding(ABC):
    """How rows of logits are stored.

    Attributes:
        spec: The name in the manifest and on the command line, such as `float16`.
        feature_dtype: Dtype of features that are stored beside the logits.
    """

    spec: str
    feature_dtype: str = "float16"

    @abstractmethod
    def arrays(self, classes: int) -> tuple[StoredArray, ...]:
        """The arrays of a row with this many classes."""

    @abstractmethod
    def encode(self, logits_nc: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        """Logits of consecutive samples as stored rows, by array.

        Args:
            logits_nc: (rows, classes), float32 or float64.
            first_sample: Sample index of the first row, for messages.

        Raises:
            TeacherOutputError: a value is not finite, or out of the encoding's range.
        """

    @abstractmethod
    def decode(self, rows: Mapping[str, Any]) -> Any:
        """Logits (rows, classes) of stored rows.

        Args:
            rows: By array name (rows, *row_shape), all numpy arrays or all torch tensors, on any device. An encoding
                uses operators that both have, so that rows are decoded where they are.
        """

    def bytes_per_row(self, classes: int) -> int:
        """Bytes of one row before compression."""
        return sum(array.bytes_per_row for array in self.arrays(classes))
