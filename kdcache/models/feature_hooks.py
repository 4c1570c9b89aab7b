"""What the layers inside a network give, caught as it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.core.errors import ModelError
from kdcache.core.plugins import did_you_mean

# The input of the last linear layer that runs: of a classifier, what its logits are made from.
PENULTIMATE = "penultimate"


class _Hook:
    """Puts what a layer takes or gives into a dictionary, under a name."""

    def __init__(self, caught: dict[str, Any], name: str, *, takes: bool = False) -> None:
        self._caught, self._name, self._takes = caught, name, takes

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
        self._caught[self._name] = inputs[0] if self._takes else output

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self  # the copy of a module must not copy activations; see remove_taps


class Taps:
    """Catches the outputs of some layers at every forward pass, until it is closed.

    Args:
        layers: paths of modules, such as `features.3`, or `penultimate`.

    Raises:
        ModelError: there is no such layer.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self._caught: dict[str, Any] = {}
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        try:
            for layer in layers:
                self._tap(module, layer)
        except BaseException:
            self.close()
            raise

    def take(self) -> dict[str, Tensor]:
        """The outputs of the layers in the last forward pass, by layer, (batch, ...).

        Raises:
            ModelError: a layer did not run, or gives no tensor of the batch.
        """
        caught = dict(self._caught)
        self._caught.clear()
        for layer in self._layers:
            if not isinstance(caught.get(layer), Tensor):
                gives = f"gives a {type(caught[layer]).__name__}" if layer in caught else "did not run"
                raise ModelError(f"the layer {layer} {gives}", "a layer that gives a tensor", "see --list-layers")
        return caught

    def close(self) -> None:
        """Leave the network as it was, and let go of what was caught."""
        for handle in self._handles:
            handle.remove()
        self._caught.clear()

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _tap(self, module: nn.Module, layer: str) -> None:
        named = {name: part for name, part in module.named_modules() if name}
        if layer == PENULTIMATE:
            self._tap_penultimate(module)
        elif layer in named:
            self._handles.append(named[layer].register_forward_hook(_Hook(self._caught, layer)))
        else:
            raise ModelError(
                f"the network has no layer {layer!r}",
                f"{PENULTIMATE}, or the path of a module",
                did_you_mean(layer, list(named)) or "see --list-layers",
            )

    def _tap_penultimate(self, module: nn.Module) -> None:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ModelError(
                "the network has no linear layer", "one, for penultimate", "name a layer; see --list-layers"
            )

        hook = _Hook(self._caught, PENULTIMATE, takes=True)
        # The one that runs last overwrites the others: the order of definition need not be that of running.
        self._handles += [part.register_forward_pre_hook(hook) for part in linear]


def remove_taps(module: nn.Module) -> None:
    """Remove the hooks of every `Taps` from a module, for a copy of one that is listened to; other hooks stay."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]


def pool_features(features: Tensor, pool: str) -> Tensor:
    """Features (batch, ...) as they are stored: for `avg`, maps (batch, channels, height, width) averaged over places
    and sequences (batch, places, width) over places; all else, and for `none`, as it is.
    """
    if pool == "avg" and features.ndim == 4:
        return features.mean(dim=(2, 3))
    if pool == "avg" and features.ndim == 3:
        return features.mean(dim=1)
    return features


def list_layers(module: nn.Module, inputs: Tensor) -> list[tuple[str, str, str]]:
    """Path, type and shape of the output of every layer inside a network, in the order in which they finish.

    Args:
        inputs: a batch that the network takes.
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
