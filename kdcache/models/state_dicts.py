"""State dicts inside checkpoints: which entries hold weights, and which of them fit a module."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Entries that are not part of a network's function: thop's and AveragedModel's counters, losses and metrics.
_BESIDE = re.compile(
    r"(^|\.)(total_ops|total_params|n_averaged)$|^(\w*loss|\w*loss_fn|\w*criterion|\w*metrics?)(\.|$)", re.IGNORECASE
)
# As torch tells of a weight of another shape.
_RESHAPED = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\(\[([\d, ]*)\]\) from checkpoint, .*? torch\.Size\(\[([\d, ]*)\]\)"
)
_DEPTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One entry of a checkpoint, with names as the module has them.

    Attributes:
        key: Path of the entry, with the prefix of its names; empty for the whole file.
        state: Weights by the module's names.
        extra: Names of ignored entries, as in the file.
        problems: Reasons why it does not fit; empty where it fits.
        matches: Number of the module's names that it contains.
    """

    key: str
    state: dict[str, Any]
    extra: list[str]
    problems: list[str] = field(default_factory=list)
    matches: int = 0


def candidates(content: Mapping[str, Any], module: nn.Module) -> list[Candidate]:
    """Every entry of a checkpoint that holds tensors, tried on a module without weights; the module is not changed.

    Torch's own strict `load_state_dict` decides what fits, after a prefix common to the weights is removed (such as
    `module.` or `model.`) or added, and after weights that the module shares are filled in for each other.
    """
    own = module.state_dict(keep_vars=True)
    skeleton = _without_weights(module)
    return [
        _tried(skeleton, own, Candidate(key=key, state=state, extra=extra))
        for path, entry in _entries(content)
        for key, state, extra in _renamed(path, entry, own)
    ]


def _entries(
    content: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The mappings of names to tensors in a checkpoint, each with its path."""
    if any(isinstance(value, Tensor) for value in content.values()) and all(isinstance(name, str) for name in content):
        yield path, dict(content)
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and len(path) < _DEPTH:
            yield from _entries(value, (*path, name))


def _renamed(
    path: tuple[str, ...], entry: dict[str, Any], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Key, weights by the module's names, and what is left out, for each prefix that may make an entry fit."""
    beside = [name for name in entry if _BESIDE.search(name) and name not in own]
    weights = {name: value for name, value in entry.items() if name not in beside}
    yield ".".join(path), weights, beside
    for prefix, added in sorted(_prefixes(weights, own)):
        inside = {
            added + name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)
        }
        left = [name for name in weights if not name.startswith(prefix)]
        yield ".".join((*path, *filter(None, [prefix.removesuffix(".")]))), inside, beside + left


def _prefixes(names: Iterable[str], own: Mapping[str, Tensor]) -> set[tuple[str, str]]:
    """Prefixes to remove from a checkpoint's names and to add to the rest, so that some name is the module's."""
    heads = {name.partition(".")[0] for name in own}
    wrapper = f"{heads.pop()}." if len(heads) == 1 and not any("." not in name for name in own) else ""
    found = set()
    for anchor in (min(own, default=""), max(own, default="")):
        for added in {"", wrapper}:
            rest = anchor.removeprefix(added)
            for name in names:
                if name == rest or name.endswith(f".{rest}"):
                    prefix = name.removesuffix(rest)
                    if not (added and f".{prefix}".endswith(f".{added}")):  # the same as removing less
                        found.add((prefix, added))
    # Only one that covers most of the module: a network in parts has its anchors' names in each part.
    return {
        (prefix, added)
        for prefix, added in found - {("", "")}
        if sum(name.startswith(prefix) for name in names) * 2 >= len(own)
    }


def _tried(skeleton: nn.Module, own: Mapping[str, Tensor], candidate: Candidate) -> Candidate:
    state = _with_shared(candidate.state, own)
    seen: list[Any] = []  # missing and unexpected names, also where torch raises for a shape
    handle = skeleton.register_load_state_dict_post_hook(lambda _, names: seen.append(names))
    reshaped: list[str] = []
    other = ""
    try:
        with warnings.catch_warnings():  # of copies to weights that are not there
            warnings.simplefilter("ignore")
            skeleton.load_state_dict(state, strict=False)
    except Exception as problem:  # torch raises RuntimeError; a module's own hooks raise anything
        reshaped = [f"{name} ({given}), not ({shape})" for name, given, shape in _RESHAPED.findall(str(problem))]
        other = "" if reshaped else f"{type(problem).__name__}: {problem}"
    finally:
        handle.remove()
    missing, unexpected = seen[-1] if seen else ((), ())
    problems = [
        f"{len(names)} {what}: {first(names)}"
        for what, names in (
            ("missing", list(missing)),
            ("unexpected", list(unexpected)),
            ("of the wrong shape", reshaped),
        )
        if names
    ]
    return Candidate(
        key=candidate.key,
        state=state,
        extra=candidate.extra,
        problems=problems + ([other] if other else []),
        matches=sum(name in own for name in state),
    )


def _with_shared(state: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """A state dict in which a weight that has several names in the module is there under all of them."""
    names: dict[int, list[str]] = {}
    for name, value in own.items():
        names.setdefault(id(value), []).append(name)
    state = dict(state)
    for shared in names.values():
        if present := [name for name in shared if name in state]:
            state |= {name: state[present[0]] for name in shared if name not in state}
    return state


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights have shapes only, to try state dicts on.

    A module that cannot be copied is tried itself: a state dict that then does not fit leaves it changed.
    """
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("meta"), value.requires_grad)
        for value in module.parameters()
        if not is_lazy(value)
    }
    memo |= {id(value): value.to("meta") for value in module.buffers() if not is_lazy(value)}
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # what a user's module may hold is not known
        return module


def first(names: Iterable[str], count: int = 4) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
