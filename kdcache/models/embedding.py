"""Encoders: networks whose answer is a vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from kdcache.core.errors import ModelError
from kdcache.data.batch import BatchRequest
from kdcache.data.dataset import IndexedDataset
from kdcache.data.loader import batch_loader
from kdcache.models.device import evaluation_mode
from kdcache.models.feature_hooks import PENULTIMATE, FeatureHooks
from kdcache.models.forward import ForwardPass


class Penultimate(nn.Module):
    """A classifier up to its last linear layer: returns what that layer takes, (batch, width)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, inputs: Any) -> Tensor:
        with FeatureHooks(self.classifier, [PENULTIMATE]) as hooks:
            self.classifier(inputs)
            return hooks.take()[PENULTIMATE].flatten(1)


def embedding_width(network: ForwardPass, dataset: IndexedDataset) -> int:
    """Number of dimensions of an encoder's answers, from those to two samples.

    Raises:
        ModelError: the answers are no vectors.
    """
    request = BatchRequest(np.arange(min(2, len(dataset))))
    (batch,) = batch_loader(dataset, [request], preprocessor=network.preprocessor, device=network.device)
    with evaluation_mode(network.module):
        found = network.raw(batch.inputs, batch.indices)
    if found.ndim != 2 or len(found) != len(request.indices) or not found.is_floating_point():
        raise ModelError(
            f"the encoder returns {found.dtype} {tuple(found.shape)} for a batch of {len(request.indices)}",
            "one vector for each sample, (batch, width)",
            "pool what it returns, as by .mean(dim=1) over tokens or .mean(dim=(2, 3)) over pixels",
        )
    return int(found.shape[1])
