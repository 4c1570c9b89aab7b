"""Versions of every package that could change an input or a logit."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

_VERSIONED = ("torch", "torchvision", "numpy", "zarr", "pillow", "kdcache")


def package_versions(*, reads_text: bool = False) -> dict[str, str]:
    """Versions of packages that could change an input or a logit, and the CPU instructions that torch uses.

    Args:
        reads_text: Whether the network has a tokenizer.
    """
    names = (*_VERSIONED, "tokenizers") if reads_text else _VERSIONED
    packages = {name: importlib.metadata.version(name) for name in names}
    return packages | {"python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}
