"""A student without torch or any other framework, from batches of numpy arrays."""

import sys

import numpy as np
from sklearn.datasets import load_digits

import kdcache

TEMPERATURE = 4.0
images = load_digits().data.astype(np.float32)[:1437] / 16  # the training split of --dataset digits
cache = kdcache.open_cache("runs/digits.zarr", split="train")


def gradient(weights, inputs, teacher_logits):
    """Of T² · KL(teacher ‖ student) at temperature T, by hand."""
    student = np.exp(log_softmax(inputs @ weights / TEMPERATURE))
    teacher = np.exp(log_softmax(teacher_logits / TEMPERATURE))
    return TEMPERATURE * inputs.T @ (student - teacher) / len(inputs)


def log_softmax(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


weights = np.zeros((64, len(cache.classes)), np.float32)
for epoch in range(20):
    for samples, teacher_logits in cache.epoch(epoch, batch_size=64, seed=0):
        weights -= 0.1 * gradient(weights, images[samples], teacher_logits.astype(np.float32))
agreement = np.mean((images @ weights).argmax(axis=1) == cache.column("logits").argmax(axis=1))
print(f"agrees with the teacher on {agreement:.1%} of the samples")
assert "torch" not in sys.modules
