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
        caught, self._caught = self._caught, {}
        for layer in self._layers:
            if not isinstance(caught.get(layer), Tensor):
                gives = f"gives a {type(caught[layer]).__name__}" if layer in caught else "did not run"
                raise ModelError(f"the layer {layer} {gives}", "a layer that gives a tensor", "see --list-layers")
        return caught

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _tap(self, module: nn.Module, layer: str) -> None:
        named = {name: part for name, part in module.named_modules() if name}
        if layer == PENULTIMATE:
            self._tap_penultimate(module)
        elif layer in named:
            self._handles.append(named[layer].register_forward_hook(self._catch_output(layer)))
        else:
            raise ModelError(
                f"the network has no layer {layer!r}",
                f"{PENULTIMATE}, or the path of a module",
                did_you_mean(layer, list(named)) or "see --list-layers",
            )

    def _catch_output(self, layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._caught[layer] = output

        return hook

    def _tap_penultimate(self, module: nn.Module) -> None:
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ModelError(
                "the network has no linear layer", "one, for penultimate", "name a layer; see --list-layers"
            )

        def hook(part: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._caught[PENULTIMATE] = inputs[0]

        # The one that runs last overwrites the others: the order of definition need not be that of running.
        self._handles += [part.register_forward_pre_hook(hook) for part in linear]


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
