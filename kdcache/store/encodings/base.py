"""The interface of an encoding."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import UsageError

# Name of the array of plain logits, and of the teacher's output.
LOGITS = "logits"
# Name of the array of embeddings.
EMBEDDINGS = "embeddings"


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
    """How rows of logits of a number of classes are stored.

    Attributes:
        classes: Number of classes.
        spec: The name in the manifest and on the command line, such as `float16` or `topk:20`.
        feature_dtype: Dtype of features that are stored beside the logits.
        compression: Default compression of its arrays: `none` or `zstd:LEVEL`.
        source: The teacher's output that is encoded: `logits`, or `penultimate`, the input of its last layer.
        dense: Whether every logit is stored, up to a bound. Objectives that compare whole rows need it.
        temperatures: Temperatures at which rows can be decoded, ascending; empty if at any.
    """

    classes: int
    spec: str
    feature_dtype: str = "float16"
    compression: str = "none"
    source: str = LOGITS
    dense: bool = True
    temperatures: tuple[float, ...] = ()

    @abstractmethod
    def arrays(self) -> tuple[StoredArray, ...]:
        """The arrays of a row."""

    @abstractmethod
    def encode(self, values_nx: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        """Outputs of the teacher for consecutive samples as stored rows, by array.

        Args:
            values_nx: Values of `source`, (rows, classes) or (rows, width), float32 or float64.
            first_sample: Sample index of the first row, for messages.

        Raises:
            TeacherOutputError: a value is not finite, or out of the encoding's range.
        """

    @abstractmethod
    def decode(self, rows: Mapping[str, Any], *, temperature: float | None = None) -> Any:
        """Logits (rows, classes) of stored rows.

        Args:
            rows: By array name (rows, *row_shape), all numpy arrays or all torch tensors, on any device; rows are
                decoded where they are.
            temperature: Temperature that the logits are to be exact for, where `temperatures` is not empty; None takes
                1, or the lowest.

        Raises:
            UsageError: rows cannot be decoded at this temperature.
        """

    def constants(self) -> dict[str, NDArray[Any]]:
        """Arrays that are stored once per split, by name, such as the weights of the teacher's last layer."""
        return {}

    def with_constants(self, values: Mapping[str, NDArray[Any]]) -> Encoding:
        """The encoding with its constants, as `constants` gave them."""
        return self

    def bytes_per_row(self) -> int:
        """Bytes of one row before compression."""
        return sum(array.bytes_per_row for array in self.arrays())


def chosen_temperature(encoding: Encoding, temperature: float | None) -> float:
    """The temperature to decode at.

    Raises:
        UsageError: it is not one of the encoding's.
    """
    known = encoding.temperatures
    if temperature is None:
        return 1.0 if 1.0 in known else known[0]
    if temperature not in known:
        listed = ",".join(f"{each:g}" for each in known)
        raise UsageError(
            f"the temperature is {temperature:g}, and the cache holds {encoding.spec} for {listed}",
            f"one of {listed}: the logits that {encoding.spec} leaves out are stored as one sum for each temperature",
            f"train at one of these, or dump again with --temperatures {listed},{temperature:g}",
        )
    return temperature


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`numpy.where` or `torch.where`, by the kind of the arrays."""
    return np.where(condition, yes, no) if isinstance(no, np.ndarray) else no.where(~condition, yes)


def as_float32(values: Any) -> Any:
    """A copy of a numpy array or torch tensor in float32."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float()
