"""Captures the activations of layers with forward hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.core.errors import ModelError
from kdcache.core.plugins import did_you_mean

# The input of the last linear layer that runs: the features that a classifier's logits are computed from.
PENULTIMATE = "penultimate"


class _Hook:
    """Stores the input or the output of a layer in a dictionary under a name."""

    def __init__(self, captured: dict[str, Any], name: str, *, of_input: bool = False) -> None:
        self._captured, self._name, self._input = captured, name, of_input

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        self._captured[self._name] = inputs[0] if self._input else output


class FeatureHooks:
    """Captures the outputs of layers at every forward pass until closed.

    Args:
        layers: Paths of modules, such as `features.3`, or `penultimate`.

    Raises:
        ModelError: there is no such layer.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self.module = module
        self._captured: dict[str, Any] = {}
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._register()

    def _register(self) -> None:
        _REGISTERED.add(self)
        try:
            for layer in self._layers:
                self._hook(layer)
        except BaseException:
            self.close()
            raise

    def take(self) -> dict[str, Tensor]:
        """The outputs of the layers in the last forward pass, by layer, (batch, ...).

        Raises:
            ModelError: a layer did not run, or gives no tensor of the batch.
        """
        captured = dict(self._captured)
        self._captured.clear()
        for layer in self._layers:
            if not isinstance(captured.get(layer), Tensor):
                gives = f"gives a {type(captured[layer]).__name__}" if layer in captured else "did not run"
                raise ModelError(f"the layer {layer} {gives}", "a layer that gives a tensor", "see --list-layers")
        return captured

    def close(self) -> None:
        """Remove the hooks and the captured activations."""
        while self._handles:
            self._handles.pop().remove()
        self._captured.clear()
        _REGISTERED.discard(self)

    def __enter__(self) -> FeatureHooks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _hook(self, layer: str) -> None:
        named = {name: part for name, part in self.module.named_modules() if name}
        if layer == PENULTIMATE:
            self._hook_penultimate()
        elif layer in named:
            self._handles.append(named[layer].register_forward_hook(_Hook(self._captured, layer)))
        else:
            raise ModelError(
                f"the network has no layer {layer!r}",
                f"{PENULTIMATE}, or the path of a module",
                did_you_mean(layer, list(named)) or "see --list-layers",
            )

    def _hook_penultimate(self) -> None:
        linear = [part for part in self.module.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ModelError(
                "the network has no linear layer", "one, for penultimate", "name a layer; see --list-layers"
            )

        hook = _Hook(self._captured, PENULTIMATE, of_input=True)
        # The one that runs last overwrites the others: the order of definition need not be that of running.
        self._handles += [part.register_forward_pre_hook(hook) for part in linear]


_REGISTERED: weakref.WeakSet[FeatureHooks] = weakref.WeakSet()


def copy_module(module: nn.Module) -> nn.Module:
    """Deep copy of a module without the hooks of `FeatureHooks`; it keeps copies of all other hooks."""
    registered = [each for each in _REGISTERED if each.module is module]
    for each in registered:
        each.close()
    try:
        return copy.deepcopy(module)
    finally:
        for each in registered:
            each._register()


def pool_features(features: Tensor, pool: str) -> Tensor:
    """Features (batch, ...) in their stored shape: `avg` averages maps (batch, channels, height, width) and sequences
    (batch, positions, width) over positions; `none`, and features of another rank, are unchanged.
    """
    if pool == "avg" and features.ndim == 4:
        return features.mean(dim=(2, 3))
    if pool == "avg" and features.ndim == 3:
        return features.mean(dim=1)
    return features


def list_layers(module: nn.Module, inputs: Tensor) -> list[tuple[str, str, str]]:
    """Path, type and shape of the output of every layer of a network, in the order in which they finish.

    Args:
        inputs: A batch of the network's inputs.
    """
    found: list[tuple[str, str, str]] = []

    def hook_of(name: str) -> Any:
        def hook(part: nn.Module, given: Any, output: Any) -> None:
            shape = "×".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else type(output).__name__
            found.append((name, type(part).__name__, shape))

        return hook

    handles = [part.register_forward_hook(hook_of(name)) for name, part in module.named_modules() if name]
    try:
        module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
