"""Reading weights and writing checkpoints. No code from a file is ever run."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.core.atomic_files import durable_file
from kdcache.core.errors import CheckpointError, StorageError
from kdcache.core.plugins import require_extra
from kdcache.core.progress import log
from kdcache.models.checkpoint_formats import is_safetensors, plain_types, refuse_other_formats
from kdcache.models.state_dicts import candidates, first


def load_weights(module: nn.Module, path: str | os.PathLike[str], *, key: str | None = None) -> None:
    """Load a file's weights into a module, every one of them.

    Takes safetensors and whatever `torch.save` wrote; looks inside its entries and behind a common prefix of the names.

    Args:
        key: Entry that holds the weights, where several fit.

    Raises:
        CheckpointError: there is no such file, it cannot be read, it holds no weights, they do not fit the module, or
            several entries do.
        MissingExtra: it holds safetensors and the package safetensors is not installed.
    """
    fit_weights(module, read_checkpoint(path), path, key=key)


def fit_weights(
    module: nn.Module, content: Mapping[str, Any], path: str | os.PathLike[str], *, key: str | None = None
) -> None:
    """Load the weights in what `read_checkpoint` returned into a module. What does not fit changes nothing.

    Args:
        path: Path of the file, for messages.
        key: Entry that holds the weights, with the prefix of its names, such as `student` or
            `state_dict.model`; None takes the only one that fits.

    Raises:
        CheckpointError: it holds no weights, they do not fit the module, or several entries do.
    """
    path = Path(path)
    found = candidates(content, module)
    if not found:
        raise CheckpointError(
            f"{path} holds no weights, but {first(map(str, content)) or 'nothing'}",
            "names and tensors, as they are or in an entry such as state_dict or model",
            "save model.state_dict()",
        )
    if key is not None:
        # An entry's name alone is enough, whatever prefix its names have.
        chosen = [each for each in found if f"{each.key}.".startswith(f"{key}.")]
        if not chosen:
            raise CheckpointError(
                f"{path} has no weights under {key!r}",
                f"one of {first(dict.fromkeys(repr(each.key) for each in found), 12)}",
                "correct --checkpoint-key",
            )
        found = chosen
    fitting = [each for each in found if not each.problems]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights that fit the model: {first((each.key for each in fitting), 12)}",
            "a choice of one",
            f"give --checkpoint-key, such as --checkpoint-key {fitting[0].key or fitting[1].key}",
        )
    if not fitting:
        nearest = max(found, key=lambda each: each.matches)
        raise CheckpointError(
            f"{path} does not fit the model; " + "; ".join(nearest.problems),
            f"the {len(module.state_dict())} weights of the model",
            "check that the model's name and the number of classes are those of the checkpoint",
        )
    (best,) = fitting
    module.load_state_dict(best.state, strict=True)
    if best.extra:
        log(f"{path}: not part of the model and left out: {first(best.extra)}")


def fits(module: nn.Module, content: Mapping[str, Any], *, key: str | None = None) -> bool:
    """Whether some weights in what `read_checkpoint` returned fit a module; nothing is loaded."""
    return any(
        not each.problems and (key is None or f"{each.key}.".startswith(f"{key}."))
        for each in candidates(content, module)
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds, tensors on the CPU. No code in the file is run.

    Raises:
        CheckpointError: there is no such file, it is damaged or no checkpoint, or it holds more than tensors and plain
            types.
        MissingExtra: it holds safetensors and the package safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}", "a .pt, .pth or .safetensors file", "correct the path")
    try:
        content: Any
        if is_safetensors(path):
            content = require_extra("safetensors.torch", "safetensors", f"reading {path}").load_file(path)
        else:
            refuse_other_formats(path)
            _check_archive(path)
            # Not by its name: torch reads what is called .safetensors as such.
            with torch.serialization.safe_globals(plain_types()), open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as problem:
        raise _damaged(path, problem) from problem
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}", "a readable file") from problem
    except pickle.UnpicklingError as problem:
        if name := _foreign_object(problem):
            raise CheckpointError(
                f"{path} holds Python objects, and reading those would run code from the file: {name}",
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


def _foreign_object(problem: Exception) -> str:
    """The name of the class or function that torch refuses to load; empty where the file is damaged instead.

    Torch's own message advises to load the file unsafely, so none of it is passed on.
    """
    found = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(problem))
    return found[1] if found else ""


def _damaged(path: Path, problem: Exception) -> CheckpointError:
    reason = next(iter(str(problem).splitlines()), "")[:200]
    if isinstance(problem, pickle.UnpicklingError) or "weights_only" in str(problem):
        # Without torch's advice, which is around what it met.
        met = re.search(r"WeightsUnpickler error: (.*?)(?:\. |$)", str(problem), re.MULTILINE)
        reason = met[1][:200] if met else "not a pickle of tensors and plain types"
    return CheckpointError(
        f"{path} cannot be read as weights: {type(problem).__name__}: {reason}",
        "a whole file, as torch.save or safetensors wrote it",
        "copy or download the file again",
    )
