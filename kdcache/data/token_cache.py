"""Token ids of a dataset's samples: each made once and kept, where all of them fit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.preprocess import Preprocessor
from kdcache.data.raw_input import Inputs
from kdcache.data.shared_memo import RememberedRows

# What the token ids of one split may take: those of a million texts of 256 tokens. Making them takes about 0.2 ms a
# text of that length, which a small student would notice at every epoch.
KEPT_BYTES = 2**30


class Sequences:
    """The token ids of one dataset's samples for one network. Forked workers share what is kept.

    Args:
        preprocessor: Preprocessing of a network for sequences.
        samples: Number of samples in the dataset.
        name: Name of the dataset.
    """

    def __init__(self, preprocessor: Preprocessor, samples: int, name: str) -> None:
        self._preprocessor, self._name = preprocessor, name
        assert preprocessor.record.max_tokens is not None, "a network that takes sequences"
        # How many there are, and then the ids, filled up.
        self._width = 1 + preprocessor.record.max_tokens
        row_bytes = self._width * np.dtype(np.int32).itemsize
        fits = RememberedRows.bytes_needed(1, samples, row_bytes) <= KEPT_BYTES
        self._kept = RememberedRows([0], samples, row_bytes) if fits else None

    def batch(self, indices: NDArray[np.int64], inputs: Inputs, *, plain: bool) -> Tensor:
        """Sequences of a batch, (B, longest) int32, filled up; one token at least.

        Args:
            inputs: the samples' shared inputs.
            plain: whether these are the samples themselves, and not views of them.

        Raises:
            DatasetError: an input is neither text nor token ids.
        """
        if self._kept is None or not plain:
            rows = self._made(indices, inputs, range(len(indices)))
        else:
            missing = np.flatnonzero(self._kept.missing(0, indices))
            if len(missing):
                self._kept.put(0, indices[missing], self._made(indices, inputs, missing).view(np.uint8))
            rows = self._kept.take(0, indices).view(np.int32)
        longest = max(1, int(rows[:, 0].max()))
        return torch.from_numpy(np.ascontiguousarray(rows[:, 1 : 1 + longest]))

    def _made(self, indices: NDArray[np.int64], inputs: Inputs, places: NDArray[np.intp] | range) -> NDArray[np.int32]:
        rows = np.full((len(places), self._width), self._preprocessor.record.pad_id, np.int32)
        for row, at in zip(rows, places, strict=True):
            ids = self._preprocessor.token_ids(inputs[int(at)], f"sample {indices[at]} of {self._name}")
            row[0] = len(ids)
            row[1 : 1 + len(ids)] = ids
        return rows
