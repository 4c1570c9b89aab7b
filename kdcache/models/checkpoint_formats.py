"""File formats of checkpoints, detected by content, and messages for files that are no checkpoints."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.core.errors import CheckpointError

_ZIP = b"PK\3\4"
# First bytes of files that are often given for weights, what they are, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "run git lfs pull in its repository"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes it", "convert its weights to a PyTorch state dict"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first, with gunzip or tar"),
    (b"GGUF", "a GGUF file of a language model", "give the weights as safetensors"),
)
_PROGRAM_REMEDY = "save the weights alone where the program is trusted: torch.save({load}, 'weights.pt')"


def is_safetensors(path: Path) -> bool:
    """Whether a file holds safetensors, or is named so and holds nothing else that is known."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] == b"{" and length <= size - 8:
            file.seek(8)
            try:
                return isinstance(json.loads(file.read(length)), dict)
            except ValueError:
                return path.suffix == ".safetensors"
    return path.suffix == ".safetensors" and not start.startswith(_ZIP) and _other_format(path) is None


def refuse_other_formats(path: Path) -> None:
    """Name what is no checkpoint for what it is.

    Raises:
        CheckpointError: a page, a pointer, a program or another library's file.
    """
    if (found := _other_format(path)) is not None:
        what, remedy = found
        raise CheckpointError(f"{path} is {what}", "weights as torch.save or safetensors wrote them", remedy)


def _other_format(path: Path) -> tuple[str, str] | None:
    """What a file is that holds no weights to read, and what to do about it."""
    with open(path, "rb") as file:
        start = file.read(256)
    for magic, what, remedy in _OTHERS:
        if start.startswith(magic):
            return what, remedy
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (HTML)", "open it to see what the server said, and download the file itself"
    return _program(path) if start.startswith(_ZIP) else None


def _program(path: Path) -> tuple[str, str] | None:
    """Whether an archive is a program of TorchScript or torch.export; its pickles would run code."""
    with zipfile.ZipFile(path) as archive:
        # Without the name of the folder that all files of the archive lie in.
        names = {name.partition("/")[2] for name in archive.namelist()} | set(archive.namelist())
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "a TorchScript program", _PROGRAM_REMEDY.format(load=f"torch.jit.load({str(path)!r}).state_dict()")
    if "archive_format" in names or any(name.endswith("exported_program.json") for name in names):
        return "a program of torch.export (.pt2)", _PROGRAM_REMEDY.format(
            load=f"dict(torch.export.load({str(path)!r}).state_dict)"
        )
    return None


def plain_types() -> list[Any]:
    """Types that training scripts leave beside the weights, and whose construction runs no code from the file."""
    multiarray = importlib.import_module("numpy._core.multiarray")
    dtypes = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}
    numpy_made = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")  # before and since numpy 2
    ]
    paths = [
        (getattr(pathlib, f"Pure{kind}"), f"{module}.{pure}{kind}")
        for kind in ("PosixPath", "WindowsPath")
        for pure in ("", "Pure")
        for module in ("pathlib", "pathlib._local")  # of Python 3.13
    ]
    return [argparse.Namespace, types.SimpleNamespace, np.dtype, np.ndarray, *dtypes, *numpy_made, *paths]
