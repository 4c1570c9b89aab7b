"""Data and live teachers for the benchmarks."""

from __future__ import annotations

import numpy as np
import torch

from kdcache.data.dataset import ArrayDataset
from kdcache.models.registry import build_model
from kdcache.store.records import Preprocess

IMAGE = Preprocess(mean=(0.13,), std=(0.31,))


def images(samples: int) -> ArrayDataset:
    """MNIST-shaped noise; time does not depend on what the pixels show."""
    random = np.random.default_rng(0)
    inputs = torch.from_numpy(random.integers(0, 256, (samples, 1, 28, 28), dtype=np.uint8))
    labels = random.integers(0, 10, samples)
    return ArrayDataset(inputs, labels, name="noise", split="train", classes=tuple("0123456789"))


def network(name: str) -> torch.nn.Module:
    return build_model(name, num_classes=10, input_shape=(1, 28, 28), seed=0, default=IMAGE).module
