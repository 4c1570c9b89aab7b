"""The forward pass of a network: logits for a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core.errors import KdcacheError, ModelError
from kdcache.core.plugins import describe
from kdcache.data.preprocess import Preprocessor
from kdcache.models.compiled import Compiled
from kdcache.models.device import autocast, floating_dtype
from kdcache.models.teacher_outputs import to_logits
from kdcache.store.records import OutputRecord

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels-last"
_MEMORY_FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


class ForwardPass:
    """Forward pass: logits for a batch. The caller sets the network's mode and whether gradients are recorded.

    Args:
        module: The network, on `device`.
        preprocessor: Preprocessing from shared inputs to the network's inputs.
        device: Device of the network.
        classes: Number of classes of the dataset.
        amp: Precision: `off`, `bf16` or `fp16`.
        outputs: Conversion of a teacher's outputs to logits; None if they are logits.
        error: Type of the error for logits of another shape.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessor: Preprocessor,
        device: torch.device,
        *,
        classes: int,
        amp: str = "off",
        outputs: OutputRecord | None = None,
        error: type[KdcacheError] = ModelError,
    ) -> None:
        self.module, self.preprocessor, self.device = module, preprocessor, device
        self.classes, self.amp, self.outputs = classes, amp, outputs or OutputRecord()
        self.memory_format, self._error = CONTIGUOUS, error
        self._compiled: Compiled | None = None

    @property
    def compiled(self) -> bool:
        """Whether the network runs compiled."""
        return self._compiled is not None and self._compiled.works

    def compile(self) -> None:
        """Compile the network at its next forward pass; where that fails, it runs as it is."""
        self._compiled = Compiled(self.module)

    def use_memory_format(self, name: str) -> None:
        """Bring weights and images into a memory format, `contiguous` or `channels-last`."""
        if name != self.memory_format:
            self.module.to(memory_format=_MEMORY_FORMATS[name])
            self.memory_format = name

    @property
    def narrow(self) -> bool:
        """Whether the network computes in a narrower dtype than float32."""
        return self.amp != "off" or floating_dtype(self.module).itemsize < 4

    def raw(self, inputs: Tensor, samples: Tensor | None = None) -> Tensor:
        """Outputs of the network for a batch, (batch, outputs), on the device.

        Args:
            inputs: Inputs (batch, …) after `Preprocessor.per_sample`.
            samples: Indices of the samples, (batch,), for messages.

        Raises:
            ModelError: the network raises an exception of its own.
        """
        prepared = self.preprocessor.per_batch(inputs.to(self.device, non_blocking=True), floating_dtype(self.module))
        if self.memory_format == CHANNELS_LAST and prepared.ndim == 4:
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        try:
            with autocast(self.device, self.amp):
                return output_logits((self._compiled or self.module)(prepared))
        except (KdcacheError, torch.OutOfMemoryError):
            raise
        except Exception as problem:  # the network is code of the user's: it may raise anything
            raise _failure(problem, self.module, prepared, samples) from problem

    def __call__(self, inputs: Tensor, samples: Tensor | None = None) -> Tensor:
        """Logits for a batch, (batch, classes), on the device.

        Args and errors as for `raw`, and the error of the constructor for logits of another shape.
        """
        logits = to_logits(self.raw(inputs, samples), self.outputs)
        if logits.shape != (len(inputs), self.classes):
            raise self._error(
                f"the network returns {tuple(logits.shape)} for a batch of {len(inputs)}",
                f"{(len(inputs), self.classes)}: one logit for each of the dataset's classes",
                "use a network made for this dataset's classes; --class-map chooses among a teacher's outputs",
            )
        return logits


def output_logits(output: Any) -> Tensor:
    """The logits in what a network returns: the tensor itself or its `logits` attribute.

    Raises:
        ModelError: neither.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"the network returns a {type(output).__name__}",
        "a tensor of logits (batch, classes), or an object with a logits attribute",
        "wrap it in a module that returns the logits",
    )


def _failure(problem: Exception, module: nn.Module, inputs: Tensor, samples: Tensor | None) -> ModelError:
    """What a network's own exception means for the user, with the size that the network expects where it says one."""
    which = "" if samples is None or not len(samples) else f" (samples {int(samples.min())} to {int(samples.max())})"
    remedy = "see where it is raised, and take a network that takes such batches"
    if inputs.ndim == 4:
        size = expected_size(module)
        given = f"{inputs.shape[2]} × {inputs.shape[3]} pixels"
        if size is not None and tuple(inputs.shape[2:]) != (size, size):
            remedy = f"give --size {size}: the network is made for {size} × {size} pixels, and these are {given}"
        elif size is None:
            remedy += f"; if it is for larger images than {given}, give --size, such as --size 224"
    return ModelError(
        f"{type(module).__name__} fails on a batch of shape {tuple(inputs.shape)}{which}: {describe(problem)}",
        "a network that takes the dataset's inputs",
        remedy,
    )


def expected_size(module: nn.Module) -> int | None:
    """Side in pixels of the square images that a network is made for; None where it does not say so.

    Looks where torchvision's, timm's and transformers' networks keep it.
    """
    patches = getattr(module, "patch_embed", None)
    settings, config = getattr(module, "default_cfg", None), getattr(module, "config", None)
    places = (
        getattr(module, "image_size", None),
        getattr(patches, "img_size", None),
        getattr(config, "image_size", None),
        settings.get("input_size") if isinstance(settings, dict) else None,
    )
    for place in places:
        size = place[-1] if isinstance(place, list | tuple) and place else place
        if isinstance(size, int):
            return size
    return None
