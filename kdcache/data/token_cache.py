"""Token ids of a dataset's samples: each made once and kept, as far as they fit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data.kept_inputs import KeptInputs
from kdcache.data.preprocess import Preprocessor
from kdcache.data.raw_input import Inputs

# What the token ids of one split may take: those of a million texts of 256 tokens. Making them takes about 0.2 ms a
# text of that length, which a small student would notice at every epoch.
KEPT_BYTES = 2**30


class Sequences:
    """The token ids of one dataset's samples for one network. Workers share what is kept.

    Args:
        preprocessor: Preprocessing of a network for sequences.
        samples: Number of samples in the dataset.
        name: Name of the dataset.
    """

    def __init__(self, preprocessor: Preprocessor, samples: int, name: str) -> None:
        self._preprocessor, self._name = preprocessor, name
        assert preprocessor.record.max_tokens is not None, "a network that takes sequences"
        # How many there are, and then the ids, filled up: of one length, because that is the fastest to copy.
        self._width = 1 + preprocessor.record.max_tokens
        self._kept = KeptInputs(1, samples, KEPT_BYTES)

    def batch(self, indices: NDArray[np.int64], inputs: Inputs, *, plain: bool) -> Tensor:
        """Sequences of a batch, (B, longest) int32, filled up; one token at least.

        Args:
            inputs: the samples' shared inputs.
            plain: whether these are the samples themselves, and not views of them.

        Raises:
            DatasetError: an input is neither text nor token ids.
        """

        def make(wanted: NDArray[np.int64]) -> list[Tensor]:
            given = dict(zip(indices.tolist(), inputs, strict=True))
            return [self._row(given[index], index) for index in wanted.tolist()]

        if plain:
            rows = self._kept.fetch(0, indices, make, torch.int32)
        else:
            rows = [self._row(value, index) for index, value in zip(indices.tolist(), inputs, strict=True)]
        rows = rows if isinstance(rows, Tensor) else torch.stack(rows)
        longest = max(1, int(rows[:, 0].max()))
        return rows[:, 1 : 1 + longest].contiguous()

    def _row(self, value: Tensor, index: int) -> Tensor:
        """Number of token ids, and the ids, filled up, (width,) int32."""
        ids = self._preprocessor.token_ids(value, f"sample {index} of {self._name}")
        row = torch.full((self._width,), self._preprocessor.record.pad_id, dtype=torch.int32)
        row[0] = len(ids)
        row[1 : 1 + len(ids)] = torch.from_numpy(ids)
        return row
