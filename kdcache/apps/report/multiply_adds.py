"""Counting the multiply-adds of a network, or saying that they cannot be counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Gates, each a matrix product with the input and one with the state.
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

# Operators of torch that multiply matrices or vectors and for which torch has no formula.
_UNCOUNTED = frozenset(
    {"_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_trilinear", "_cdist_forward", "_int_mm"}
    | {"addmv", "addmv_", "addr", "addr_", "dot", "vdot", "mv", "mkldnn_rnn_layer"}
)


def multiply_adds(module: nn.Module, inputs: Tensor) -> int | None:
    """Products of two numbers in the matrix products and convolutions of one forward pass; None where unknown.

    torch's counter has no formula for some operators and takes them for free. Recurrent layers are counted here by
    their own formula instead; where anything else is met that cannot be counted, there is no number rather than a wrong
    one.

    Args:
        module: in eval mode, on the CPU.
        inputs: what it takes, (1, ...).
    """
    counter, seen = FlopCounterMode(display=False), _Seen()
    recurrent = _RecurrentLayers(module, counter, seen)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # One operator for a whole layer of attention would hide its products.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter, seen:
            module(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        recurrent.close()
    if seen.uncounted:
        return None
    return int(counter.get_total_flops() - recurrent.flops_of_counter) // 2 + recurrent.multiply_adds


class _Seen(TorchDispatchMode):
    """Notes operators whose work is not counted, unless paused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        known = namespace in ("aten", "prim", "prims") and name.partition(".")[0] not in _UNCOUNTED
        if not known and not self.paused:
            self.uncounted.add(func.name())
        return func(*args, **(kwargs or {}))


class _RecurrentLayers:
    """Listens to the recurrent layers of a network: counts them by formula, and what the counter says of them.

    Attributes:
        multiply_adds: by formula.
        flops_of_counter: that the counter found in them, which is all, some or nothing, by layer and device.
    """

    def __init__(self, module: nn.Module, counter: FlopCounterMode, seen: _Seen) -> None:
        self._counter, self._seen = counter, seen
        self.multiply_adds = self.flops_of_counter = self._before = 0
        self._handles = []
        for layer in module.modules():
            if isinstance(layer, nn.RNNBase):
                self._handles += [
                    layer.register_forward_pre_hook(self._enter),
                    layer.register_forward_hook(self._leave),
                ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._before, self._seen.paused = self._counter.get_total_flops(), True

    def _leave(self, layer: nn.RNNBase, inputs: tuple[Any, ...], output: Any) -> None:
        self.flops_of_counter += self._counter.get_total_flops() - self._before
        self._seen.paused = False
        values = inputs[0].data if isinstance(inputs[0], PackedSequence) else inputs[0]
        self.multiply_adds += values.numel() // values.shape[-1] * _per_token(layer)


def _per_token(layer: nn.RNNBase) -> int:
    """Multiply-adds of a recurrent layer for one token: gates · hidden · (input + state) in each direction."""
    directions = 2 if layer.bidirectional else 1
    state = layer.proj_size or layer.hidden_size
    total, width = 0, layer.input_size
    for _ in range(layer.num_layers):
        total += directions * _GATES[layer.mode] * layer.hidden_size * (width + state)
        total += directions * layer.hidden_size * layer.proj_size
        width = state * directions
    return total
