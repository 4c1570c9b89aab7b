"""A trained network with its preprocessing as one module of tensors, and what there is to say about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]

from kdcache.core.errors import ModelError
from kdcache.core.json_records import to_json
from kdcache.data.preprocess import Preprocessor
from kdcache.models.device import floating_dtype
from kdcache.models.forward import output_logits
from kdcache.models.from_run import TrainedNetwork
from kdcache.store.manifest import Preprocess

# What the artefact calls its ends; the first is the name in `Deployable.forward` too.
INPUTS, LOGITS = "inputs", "logits"
# Of the metadata's fields.
METADATA_VERSION = 1


class Resize(nn.Module):
    """The resize of uint8 images of one size, to the bit as torch does it on a CPU.

    A runtime's own resize of uint8 rounds in its own way: onnxruntime's was up to 2 levels off, which moves logits by
    1e-2. A resize of one size is a product with a constant matrix for each of width and height, and torch's is one of
    integers: weights of 16 bits, rounded after each of the two. float64 holds all of that exactly, everywhere.

    Args:
        size: (height, width) of the images.
        target: (height, width) to bring them to.
        mode: `nearest`, `bilinear` or `bicubic`.
    """

    def __init__(self, size: tuple[int, int], target: tuple[int, int], mode: str, *, antialias: bool) -> None:
        super().__init__()
        (height, width), (target_height, target_width) = size, target
        down_ho, self.down_bits = _integer_weights(height, target_height, mode, antialias)
        across_wo, self.across_bits = _integer_weights(width, target_width, mode, antialias)
        self.register_buffer("down_oh", down_ho.T.contiguous())
        self.register_buffer("across_wo", across_wo)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """(B, C, height, width) uint8 to (B, C, *target) uint8."""
        wide = _rounded(images_bchw.double() @ self.get_buffer("across_wo"), self.across_bits)
        return _rounded(self.get_buffer("down_oh") @ wide, self.down_bits).to(torch.uint8)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Values divided by 2**bits, rounded half up, in the range of uint8."""
    return ((values + 2.0 ** (bits - 1)) * 2.0**-bits).floor().clamp(0, 255)


def _integer_weights(length: int, target: int, mode: str, antialias: bool) -> tuple[Tensor, int]:
    """Whole weights (length, target) of a resize in one direction, float64, and how many bits of them are a fraction.

    As in ATen's `_compute_index_ranges_int16_weights`: as many bits as let the largest weight stay below 2**15.
    """
    identity = torch.eye(length, dtype=torch.float64)
    weights = identity
    if target != length:
        options = {} if mode == "nearest" else {"antialias": antialias}
        weights = interpolate(identity[None, None], size=(length, target), mode=mode, **options)[0, 0]
    largest, bits = float(weights.max()), 0
    while bits < 22 and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    scaled = weights * 2.0**bits
    return scaled.sign() * (scaled.abs() + 0.5).floor(), bits


class Deployable(nn.Module):
    """From what a user of the artefact has to logits.

    Args:
        trained: whose module is used as it is, without a copy; its weights are fixed.
        geometry_size: (height, width) of the images that `forward` resizes and crops; None where that is done before.
    """

    def __init__(self, trained: TrainedNetwork, geometry_size: tuple[int, int] | None) -> None:
        super().__init__()
        # Tracers look at the gradients of weights that could have some, and torch warns of each look.
        self.network = trained.module.requires_grad_(False)
        self._preprocessor = Preprocessor(trained.preprocessor.record, trained.preprocessor.tokenizer)
        self._dtype = floating_dtype(trained.module)
        self._crop: int | None = None
        self.resize: Resize | None = None
        if geometry_size is not None:
            record = trained.preprocessor.record
            self._crop = record.crop
            target = _resized(record, geometry_size)
            if target != geometry_size:
                self.resize = Resize(geometry_size, target, record.interpolation, antialias=record.antialias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shared inputs (B, ...), those after the geometry, or token ids (B, tokens), to logits (B, classes) float32.

        Batches must be of the size that the preprocessing was made for.
        """
        if self.resize is not None:
            inputs = self.resize(inputs)
        if self._crop is not None:
            inputs = functional.center_crop(inputs, [self._crop, self._crop])
        prepared = self._preprocessor.per_batch(inputs, self._dtype)
        return output_logits(self.network(prepared)).float()


def _resized(record: Preprocess, size: tuple[int, int]) -> tuple[int, int]:
    """The size after `Preprocess.resize`, which torchvision itself is asked for: it rounds the longer side."""
    if record.resize is None:
        return size
    if record.stretch:
        return record.resize, record.resize
    blank = torch.zeros(1, *size, dtype=torch.uint8)
    height, width = functional.resize(blank, [record.resize], interpolation=InterpolationMode.NEAREST).shape[1:]
    return height, width


def geometry_inside(trained: TrainedNetwork) -> tuple[int, int] | None:
    """(height, width) of the images that a `Deployable` can resize and crop itself.

    None where there is nothing to do, or no one way to do it: images differ in size or are of floating point.
    """
    shape = trained.input_shape
    if not trained.preprocessor.has_geometry or shape is None or trained.input_dtype != "uint8":
        return None
    return shape[1], shape[2]


def trace(
    deployable: Deployable, example: Tensor, *, max_tokens: int | None, spec: str
) -> torch.export.ExportedProgram:
    """The program of a module, for any batch size, and for sequences for any length up to `max_tokens`.

    Args:
        example: a batch of at least two inputs, because torch takes a size of 1 for a constant.
        max_tokens: None where inputs are no sequences.
        spec: names the network in a message.

    Raises:
        ModelError: the network does what cannot be traced, or does something else for another size.
    """
    dimensions = {0: torch.export.Dim("batch")}
    if max_tokens is not None and max_tokens > 1:
        dimensions[1] = torch.export.Dim("tokens", max=max_tokens)
    try:
        with torch.no_grad(), _any_length(deployable):
            # First as it is: the preprocessor then has its constants, and the program does not make them at every call.
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


@contextlib.contextmanager
def _any_length(module: nn.Module) -> Iterator[None]:
    """Trace recurrent layers for any length; torch.export otherwise takes the example's for a constant."""
    if not any(isinstance(part, (nn.LSTM, nn.GRU)) for part in module.modules()):
        yield
        return
    try:
        # What torch.onnx.export uses itself. The program then holds aten.gru and aten.lstm as they are, which ONNX has
        # operators for; the loops that are registered here tell shapes only.
        from torch.export._patches import (
            register_gru_while_loop_decomposition,
            register_lstm_while_loop_decomposition,
        )
    except ImportError as problem:
        raise ModelError(
            f"torch {torch.__version__} exports LSTM and GRU for one length of texts only",
            "a version that has torch.export._patches.register_gru_while_loop_decomposition, such as 2.15",
            "upgrade torch for the export; the run can stay as it is",
        ) from problem
    with register_gru_while_loop_decomposition(), register_lstm_while_loop_decomposition():
        yield


def _first_lines(problem: Exception) -> str:
    return " ".join(line.strip() for line in str(problem).splitlines()[:3])


def metadata(trained: TrainedNetwork, example: Tensor) -> dict[str, Any]:
    """What a user of the artefact must know, as JSON values.

    Args:
        example: a batch of what the artefact takes.

    `geometry` says whether `preprocess.resize` and `preprocess.crop` are done `inside` or must be done `before`;
    scaling and normalisation are always inside. Texts are made token ids by `tokenizer` (of the library tokenizers),
    cut to `preprocess.max_tokens` and filled up with `preprocess.pad_id`, an empty text to one token. No batch may be
    empty: without a text or a token, onnxruntime's LSTM and GRU end the whole process.
    """
    sequences, inside = trained.preprocessor.makes_tokens, geometry_inside(trained) is not None
    tokenizer = trained.preprocessor.tokenizer
    return {
        "metadata_version": METADATA_VERSION,
        "kdcache": version("kdcache"),
        "model": trained.spec,
        "dataset": trained.dataset,
        "classes": list(trained.classes),
        "preprocess": to_json(trained.preprocessor.record),
        "geometry": ("inside" if inside else "before") if trained.preprocessor.has_geometry else "none",
        "input": {
            "name": INPUTS,
            "shape": ["batch", "tokens"] if sequences else ["batch", *example.shape[1:]],
            "dtype": str(example.dtype).removeprefix("torch."),
        },
        "output": {"name": LOGITS, "shape": ["batch", len(trained.classes)], "dtype": "float32"},
        "tokenizer": None if tokenizer is None else tokenizer.document,
    }
