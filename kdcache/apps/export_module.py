"""Export of a trained network with its preprocessing: the module to trace, the traced program and its metadata."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kdcache.core.errors import ModelError
from kdcache.core.json_records import to_json
from kdcache.data.preprocess import Preprocessor
from kdcache.models.device import floating_dtype
from kdcache.models.forward import output_logits
from kdcache.models.from_run import TrainedNetwork

# Names of the artefact's input and output; the first is that of the argument of `Deployable.forward` too.
INPUTS, LOGITS = "inputs", "logits"
METADATA_VERSION = 1


class Deployable(nn.Module):
    """Network with the scaling and normalisation of its inputs.

    Recurrent layers are traced step by step, for one number of tokens: shorter texts are padded to it inside.

    Args:
        trained: Network to export; its module is used without a copy, with frozen weights.
    """

    def __init__(self, trained: TrainedNetwork) -> None:
        super().__init__()
        # Tracers look at the gradients of weights that could have some, and torch warns of each look.
        self.network = trained.module.requires_grad_(False)
        self._preprocessor = Preprocessor(trained.preprocessor.record, trained.preprocessor.tokenizer)
        self._dtype = floating_dtype(trained.module)
        recurrent = any(isinstance(layer, nn.RNNBase) for layer in trained.module.modules())
        self._padded_length = trained.preprocessor.record.max_tokens if recurrent else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes) float32 of inputs (B, ...) after resize and crop, or of token ids (B, tokens)."""
        if self._padded_length is not None:
            missing = self._padded_length - inputs.shape[1]
            inputs = pad(inputs, (0, missing), value=self._preprocessor.record.pad_id)
        prepared = self._preprocessor.per_batch(inputs, self._dtype)
        return output_logits(self.network(prepared)).float()


def trace(
    deployable: Deployable, example: Tensor, *, max_tokens: int | None, spec: str
) -> torch.export.ExportedProgram:
    """Trace a module for any batch size, and for token ids of any length up to `max_tokens`.

    Args:
        example: Batch of at least two inputs, because torch takes a size of 1 for a constant.
        max_tokens: Largest number of tokens; None for inputs that are not token ids.
        spec: Name of the network in messages.

    Raises:
        ModelError: the network cannot be traced, or its operations depend on the batch size or length.
    """
    dimensions = {0: torch.export.Dim("batch")}
    if max_tokens is not None and max_tokens > 1:
        dimensions[1] = torch.export.Dim("tokens", max=max_tokens)
    try:
        with torch.no_grad():
            # A first forward pass makes the preprocessor's constants, which the program then holds.
            deployable(example)
            return torch.export.export(deployable, (example,), dynamic_shapes=(dimensions,))
    except Exception as problem:  # of tracing, and of the network's own code
        if isinstance(problem, ModelError):
            raise
        raise ModelError(
            f"{spec} cannot be exported: {type(problem).__name__}: {_first_lines(problem)}",
            "a network of tensor operations alone, the same ones for every batch size and length",
            "leave branches on values and sizes out of its forward; torch.export's manual names the rest",
        ) from problem


def _first_lines(problem: Exception) -> str:
    return " ".join(line.strip() for line in str(problem).splitlines()[:3])


def metadata(trained: TrainedNetwork, example: Tensor) -> dict[str, Any]:
    """Metadata of the artefact as JSON values: classes, preprocessing, input, output and tokenizer.

    Args:
        example: Batch of the artefact's inputs.

    `geometry` is `before` where the caller applies `preprocess.resize` and `preprocess.crop`, and `none` where there is
    nothing to apply; scaling and normalisation are always inside. Texts become token ids by `tokenizer` (of the library
    tokenizers), truncated to `preprocess.max_tokens` and padded with `preprocess.pad_id`, an empty text to one token.
    No batch may be empty: without a text or a token, onnxruntime's LSTM and GRU end the whole process.
    """
    sequences, tokenizer = trained.preprocessor.makes_tokens, trained.preprocessor.tokenizer
    return {
        "metadata_version": METADATA_VERSION,
        "kdcache": version("kdcache"),
        "model": trained.spec,
        "dataset": trained.dataset,
        "classes": list(trained.classes),
        # Of an embedding there are none, and its classes are its dimensions.
        "probabilities": None if trained.embedding else "sigmoid" if trained.multi_label else "softmax",
        "preprocess": to_json(trained.preprocessor.record),
        "geometry": "before" if trained.preprocessor.has_geometry else "none",
        "input": {
            "name": INPUTS,
            "shape": ["batch", "tokens"] if sequences else ["batch", *example.shape[1:]],
            "dtype": str(example.dtype).removeprefix("torch."),
        },
        "output": {"name": LOGITS, "shape": ["batch", len(trained.classes)], "dtype": "float32"},
        "tokenizer": None if tokenizer is None else tokenizer.document,
    }
