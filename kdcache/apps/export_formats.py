"""File formats of a traced network: writing, and loading to run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.apps.export_module import LOGITS
from kdcache.core.errors import KdcacheError, ModelError
from kdcache.core.plugins import describe

# Name of the metadata in an artefact: a file in the archive, a property of the ONNX model.
METADATA = "kdcache.json"
# Warnings of torch about every recurrent network, although its program is right.
_RECURRENT_WARNINGS = (
    (UserWarning, r"The tensor attributes? .*_flat_weights"),  # nn.RNNBase keeps a list of its parameters
    (FutureWarning, r"_check_is_size will be removed"),  # in the loops that torch.onnx.export takes shapes from
)

Runnable = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One file format.

    Attributes:
        suffix: Suffix of file names.
        modules: Packages to be installed, from the extra of the format's name.
        make: Function from a program and its metadata to the bytes of a file.
        load: Function from these bytes to a callable that returns logits.
    """

    suffix: str
    modules: tuple[str, ...] = ()
    make: Callable[[torch.export.ExportedProgram, dict[str, Any]], bytes]
    load: Callable[[bytes], Runnable]


def _make_torch(program: torch.export.ExportedProgram, facts: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(facts)})
    return file.getvalue()


def _load_torch(content: bytes) -> Runnable:
    module: Runnable = torch.export.load(io.BytesIO(content)).module()
    return module


def _make_onnx(program: torch.export.ExportedProgram, facts: dict[str, Any]) -> bytes:
    names = {at: name for at, name in enumerate(facts["input"]["shape"]) if isinstance(name, str)}
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[facts["input"]["name"]],
        output_names=[LOGITS],
        dynamic_shapes=(names,),  # only the names of the dimensions: the program is traced already
    )
    assert made is not None, "None is for the exporter without dynamo"
    proto = made.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(facts)
    content: bytes = proto.SerializeToString()
    return content


def _load_onnx(content: bytes) -> Runnable:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it writes to stderr by itself; what goes wrong is raised too
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run([LOGITS], {name: inputs.numpy()})[0])

    return run


FORMATS: dict[str, Format] = {
    "torch": Format(suffix=".pt2", make=_make_torch, load=_load_torch),
    "onnx": Format(suffix=".onnx", modules=("onnx", "onnxscript", "onnxruntime"), make=_make_onnx, load=_load_onnx),
}


@contextlib.contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Translate errors of an exporter or a runtime into ModelError."""
    try:
        yield
    except KdcacheError:
        raise
    except Exception as problem:
        raise ModelError(
            f"{what}: {describe(problem.__cause__ or problem).splitlines()[0]}",
            "a network of operations that the format has",
            "try the other --format; nothing was written",
        ) from problem


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence log messages and warnings that exporters emit although nothing is wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for category, message in _RECURRENT_WARNINGS:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logging.disable(before)
