"""A student in JAX, from batches of numpy arrays; torch is not imported."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import kdcache

TEMPERATURE = 4.0
images = load_digits().data.astype(np.float32)[:1437] / 16  # the training split of --dataset digits
cache = kdcache.open_cache("runs/digits.zarr", split="train")


@jax.jit
@jax.value_and_grad
def loss_and_gradient(weights, inputs, teacher_logits):
    teacher = jax.nn.log_softmax(teacher_logits / TEMPERATURE)
    student = jax.nn.log_softmax(inputs @ weights / TEMPERATURE)
    return TEMPERATURE**2 * jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=1))


weights = jnp.zeros((64, len(cache.classes)))
for epoch in range(3):
    for samples, teacher_logits in cache.epoch(epoch, batch_size=64, seed=0):
        loss, gradient = loss_and_gradient(weights, images[samples], teacher_logits.astype(np.float32))
        weights -= 0.1 * gradient
print(f"loss {loss:.4f}")
assert "torch" not in sys.modules
