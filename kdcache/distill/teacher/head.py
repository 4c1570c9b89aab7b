"""The last linear layer of a teacher, for the encoding `head`: its weights, and the proof that logits come from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.core.errors import ModelError, TeacherOutputError
from kdcache.models.forward import ForwardPass
from kdcache.store.encodings.head import BIAS, WEIGHT
from kdcache.store.records import PROBABILITIES

# Largest difference between the logits and those of the head, relative to 1 + |logit|; for narrow dtypes the second.
TOLERANCE, NARROW_TOLERANCE = 1e-3, 5e-2

_ALTERNATIVE = "choose another encoding, such as quantized:8"


class Head:
    """The linear layer that a teacher's logits come from.

    Args:
        network: The teacher's forward pass, in eval mode.
        inputs: A batch for it, after `Preprocessor.per_sample`.

    Raises:
        ModelError: the network has no linear layer, or the one that runs last does not take one vector per sample.
        TeacherOutputError: the teacher returns probabilities, which are not linear in anything.
    """

    def __init__(self, network: ForwardPass, inputs: Tensor) -> None:
        if network.outputs.kind == PROBABILITIES:
            raise TeacherOutputError(
                "--encoding head is given, and the teacher returns probabilities",
                "logits of a linear layer",
                _ALTERNATIVE,
            )
        ran: list[str] = []
        parts = {name: part for name, part in network.module.named_modules() if isinstance(part, nn.Linear)}
        handles = [
            part.register_forward_pre_hook(lambda module, given, name=name: ran.append(name))
            for name, part in parts.items()
        ]
        try:
            network.raw(inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise ModelError(
                f"--encoding head needs a linear layer, and {type(network.module).__name__} runs none",
                "a teacher whose last layer is linear (torch.nn.Linear)",
                _ALTERNATIVE,
            )
        self.name = ran[-1] or type(network.module).__name__
        self._layer = parts[ran[-1]]
        columns = list(network.outputs.columns) or slice(None)
        weight = self._layer.weight.detach().float()
        bias = weight.new_zeros(len(weight)) if self._layer.bias is None else self._layer.bias.detach().float()
        if len(weight) < network.classes:
            raise self._no_head(f"it gives {len(weight)} outputs for {network.classes} classes")
        self._weight, self._bias = weight[columns], bias[columns]
        self._tolerance = NARROW_TOLERANCE if network.narrow else TOLERANCE

    @property
    def constants(self) -> dict[str, NDArray[Any]]:
        """Weight (classes, width) and bias (classes,), float32, as the encoding takes them."""
        return {WEIGHT: self._weight.cpu().numpy(), BIAS: self._bias.cpu().numpy()}

    def error(self, features: Tensor, logits_bc: Tensor) -> Tensor:
        """Largest difference between a sample's logits and the head's, relative to 1 + |logit|, (batch,), float32.

        Raises:
            ModelError: the features are not one vector per sample.
        """
        if features.ndim != 2 or features.shape[1] != self._weight.shape[1] or logits_bc.shape[1] != len(self._weight):
            raise self._no_head(f"it is given {tuple(features.shape)} for a batch of {len(logits_bc)}")
        with torch.autocast(features.device.type, enabled=False):
            expected = nn.functional.linear(features.float(), self._weight, self._bias)
        return ((expected - logits_bc.float()).abs() / (1 + logits_bc.float().abs())).amax(dim=1)

    def check(self, errors_n: NDArray[np.float32], *, first_sample: int) -> None:
        """Refuse a teacher whose logits are not those of its last linear layer.

        Raises:
            ModelError: they are not; names the layer, the sample and the difference.
        """
        if len(errors_n) and not errors_n.max() <= self._tolerance:
            at = int(np.argmax(np.where(np.isnan(errors_n), np.inf, errors_n)))
            raise self._no_head(
                f"for sample {first_sample + at} its output differs by {errors_n[at]:.3g} from the logits"
            )

    def _no_head(self, found: str) -> ModelError:
        return ModelError(
            f"--encoding head took {self.name} for the layer that the logits come from, and {found}",
            "logits that are the output of the last linear layer",
            _ALTERNATIVE,
        )
