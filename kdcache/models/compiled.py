"""Networks through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core.plugins import describe
from kdcache.core.progress import log


class Compiled:
    """A network through torch.compile; where that fails, the network as it is.

    Attributes:
        works: Whether the compiled network is used; not known, and taken for true, before the first call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Callable[[Tensor], Any] | None = torch.compile(module)
        self._worked = False

    @property
    def works(self) -> bool:
        return self._compiled is not None

    def __call__(self, inputs: Tensor) -> Any:
        if self._compiled is None:
            return self._module(inputs)
        try:
            result = self._compiled(inputs)
        except Exception as problem:  # of a compiler, which may raise anything, or of the network
            if self._worked:
                raise
            result = self._module(inputs)  # raises what is the network's own
            log(f"torch.compile fails on {type(self._module).__name__}, which runs as it is: {describe(problem)}")
            self._compiled = None
        self._worked = True
        return result
