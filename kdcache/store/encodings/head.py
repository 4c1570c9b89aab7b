"""Logits as the input of the teacher's last layer, which is linear, and the weights of that layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.store.encodings.base import Encoding, StoredArray, as_float32
from kdcache.store.encodings.floats import as_bounded, as_floats
from kdcache.store.encodings.quantized import LARGEST, Quantizer

FEATURES, WEIGHT, BIAS = "logits.features", "logits.weight", "logits.bias"
CODES, GRID = f"{FEATURES}.codes", f"{FEATURES}.grid"


class HeadEncoding(Encoding):
    """Features of the penultimate layer per row, and the last layer's weight and bias once: z = W x + b.

    Exact up to the precision of the features at every temperature, and smaller than the logits where there are more
    classes than features.

    Args:
        bits: Bits per feature, 4 to 8 on a grid per row; None stores float16.
        classes: Number of classes.
    """

    source = "penultimate"

    def __init__(self, bits: int | None, classes: int) -> None:
        self._quantizer = None if bits is None else Quantizer(bits, (CODES, GRID))
        self.spec, self.classes = "head" if bits is None else f"head:{bits}", classes
        self._constants: dict[str, NDArray[Any]] = {}
        # Copies of weight and bias on the devices that decode.
        self._on_device: dict[Any, tuple[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_on_device": {}}

    @property
    def width(self) -> int:
        """Number of features; known once the encoding has its constants."""
        return int(self._constants[WEIGHT].shape[1])

    def arrays(self) -> tuple[StoredArray, ...]:
        if self._quantizer is not None:
            return self._quantizer.arrays(self.width, "feature")
        return (StoredArray(name=FEATURES, dtype="float16", row_shape=(self.width,), row_names=("feature",)),)

    def constants(self) -> dict[str, NDArray[Any]]:
        return self._constants

    def with_constants(self, values: Mapping[str, NDArray[Any]]) -> HeadEncoding:
        bound = HeadEncoding(None if self._quantizer is None else self._quantizer.bits, self.classes)
        bound._constants = {WEIGHT: values[WEIGHT], BIAS: values[BIAS]}
        return bound

    def encode(self, values_nx: NDArray[Any], *, first_sample: int) -> dict[str, NDArray[Any]]:
        if self._quantizer is None:
            return {FEATURES: as_floats(values_nx, "float16", first_sample=first_sample, name=FEATURES)}
        return self._quantizer.encode(
            as_bounded(values_nx, LARGEST, spec=self.spec, first_sample=first_sample, name=FEATURES)
        )

    def decode(self, rows: Mapping[str, Any], *, temperature: float | None = None) -> Any:
        quantizer = self._quantizer
        features = as_float32(rows[FEATURES]) if quantizer is None else quantizer.decode(rows, self.width)
        if isinstance(features, np.ndarray):
            return features @ self._constants[WEIGHT].T + self._constants[BIAS]
        if features.device not in self._on_device:
            self._on_device[features.device] = tuple(
                features.new_tensor(self._constants[name]) for name in (WEIGHT, BIAS)
            )
        weight, bias = self._on_device[features.device]
        return features @ weight.T + bias
