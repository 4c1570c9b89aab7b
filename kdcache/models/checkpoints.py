"""Weights from files and checkpoints to files. Nothing here ever runs code from a file."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core.atomic_files import durable_file
from kdcache.core.errors import CheckpointError, StorageError
from kdcache.core.plugins import require_extra

# Where training scripts put the state dict, the weights as trained before their moving average.
_NESTED = ("state_dict", "model", "model_state_dict", "model_ema")
# Left in the names by DataParallel, DistributedDataParallel, AveragedModel and by torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file's weights into a module, every one of them.

    Takes `.safetensors` and whatever `torch.save` wrote; looks inside the usual wrappers and behind the usual prefixes.

    Raises:
        CheckpointError: there is no such file, it cannot be read, it holds no weights, or they do not fit the module.
        MissingExtra: it is a `.safetensors` file and safetensors is not installed.
    """
    fit_weights(module, read_checkpoint(path), path)


def fit_weights(module: nn.Module, content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Load the weights in what `read_checkpoint` gave into a module.

    Args:
        path: where that was read, for messages.

    Raises:
        CheckpointError: it holds no weights, or they do not fit the module.
    """
    path = Path(path)
    own = module.state_dict()
    state = _unwrap(content, own, path)
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", reshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model; " + "; ".join(problems),
            f"the {len(own)} weights of the model",
            "check that the model's name and the number of classes are those of the checkpoint",
        )
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{path} does not fit the model: {problem}", "weights of this model") from problem


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds, tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds more than tensors and plain types.
        MissingExtra: it is a `.safetensors` file and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}", "a .pt, .pth or .safetensors file", "correct the path")
    try:
        if path.suffix == ".safetensors":
            content = require_extra("safetensors.torch", "safetensors", f"reading {path}").load_file(path)
        else:
            _check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as problem:
        raise _damaged(path, problem) from problem
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}", "a readable file") from problem
    except pickle.UnpicklingError as problem:
        if "global" in str(problem).lower():
            raise CheckpointError(
                f"{path} holds Python objects, and reading those would run code from the file: {_reason(problem)}",
                "a file of tensors and plain types",
                "save model.state_dict() instead of the model itself, on a machine where the file is trusted",
            ) from problem
        raise _damaged(path, problem) from problem
    except (CheckpointError, ImportError):  # MissingExtra is an ImportError
        raise
    except Exception as problem:  # zip, pickle and safetensors readers each raise errors of their own on damage
        raise _damaged(path, problem) from problem
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}", "a mapping of names to tensors", "save model.state_dict()"
        )
    return dict(content)


def _check_archive(path: Path) -> None:
    """Compare the checksums that `torch.save` left in its archive: `torch.load` itself does not."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # as torch.save wrote before version 1.6
            return
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise CheckpointError(
                f"{path} is damaged: the checksum of {name} in it does not fit its bytes",
                "the file as it was written",
                "copy or download it again; if it was saved without checksums on purpose, load and save it once more",
            )


def save_checkpoint(path: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write tensors and plain types (`str`, `int`, `float`, `bool`, `None`, lists, dicts): all of it or nothing.

    A crash at any moment leaves the old file or the new one.

    Raises:
        StorageError: the disk refused the write; the old file is still there.
    """
    with durable_file(Path(path)) as file:
        try:
            torch.save(dict(mapping), file)
        except RuntimeError as problem:
            # torch's zip writer hides the system's error, such as a full disk, behind its own.
            if isinstance(problem.__context__, OSError):
                raise problem.__context__ from problem
            raise StorageError(
                f"could not write {path}: {problem}", "a disk that takes it", "look at the disk"
            ) from problem


def _unwrap(content: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    while inner := next((content[name] for name in _NESTED if isinstance(content.get(name), Mapping)), None):
        content = inner
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds no weights, but {_first(map(str, content)) or 'nothing'}",
            f"names and tensors, as they are or under {', '.join(_NESTED)}",
            "save model.state_dict()",
        )
    state = dict(content)
    state.pop("n_averaged", None)  # AveragedModel counts here
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None):
        if all(name.startswith(prefix) for name in own):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _first(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _reason(problem: Exception) -> str:
    """The line of torch's long message that names the object."""
    lines = [line.strip() for line in str(problem).splitlines() if "global" in line.lower()]
    return lines[0][:200] if lines else type(problem).__name__


def _damaged(path: Path, problem: Exception) -> CheckpointError:
    reason = str(problem).splitlines()[0][:200] if str(problem) else ""
    return CheckpointError(
        f"{path} cannot be read as weights: {type(problem).__name__}: {reason}",
        "a whole file, as torch.save or safetensors wrote it",
        "copy or download the file again",
    )
