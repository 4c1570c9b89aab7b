"""Conversion of a teacher's outputs to logits of the dataset's classes, and checks of outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.core.errors import ModelError, TeacherOutputError, UsageError
from kdcache.store.records import EMBEDDING, LOGITS_KIND, PROBABILITIES, OutputRecord

# Of a sum of probabilities from 1: float32 sums to within 1e-6, a narrower dtype to within some 1e-2.
_SUM_TOLERANCE, _SUM_TOLERANCE_NARROW = 1e-3, 2e-2
# Of |a − b| / (1 + max |a|) between two answers to one sample. Two passes over one batch differ by the order of sums
# at most; another batch can take another kernel, with TF32 some 1e-3 apart.
_REPEAT_TOLERANCE, _REPEAT_TOLERANCE_NARROW = 1e-4, 1e-2
_BATCH_TOLERANCE, _BATCH_TOLERANCE_NARROW = 1e-2, 1e-1

_SHOWN = 8


def to_logits(output_bk: Tensor, record: OutputRecord) -> Tensor:
    """Logits of the dataset's classes, (batch, classes), of a teacher's outputs, (batch, outputs).

    Of probabilities it is log p, with p = 0 taken as the smallest normal number of its dtype (float32: log p = −87.3);
    a negative p gives NaN, which no encoding stores.

    Raises:
        TeacherOutputError: a column of the record is not there.
    """
    if record.kind == PROBABILITIES:
        least = torch.finfo(output_bk.dtype).tiny
        output_bk = output_bk.clamp_min(least).log().masked_fill(output_bk < 0, float("nan"))
    if not record.columns:
        return output_bk
    if output_bk.ndim != 2 or output_bk.shape[1] <= max(record.columns):
        raise TeacherOutputError(
            f"the teacher returns {tuple(output_bk.shape)}, and the class map asks for output {max(record.columns)}",
            f"(batch, outputs) with at least {max(record.columns) + 1} outputs",
            "correct --class-map: outputs are counted from 0",
        )
    return output_bk[:, list(record.columns)]


def check_kind(output_bk: NDArray[Any], record: OutputRecord, *, narrow: bool) -> None:
    """Refuse probabilities that are taken for logits, and the other way round.

    Args:
        output_bk: The teacher's outputs, (rows, all of its outputs).
        narrow: Whether it was computed in a narrower dtype than float32.

    Raises:
        TeacherOutputError: it is of the other kind.
    """
    if record.kind == EMBEDDING or output_bk.ndim != 2 or output_bk.shape[1] < 2:
        return
    given, tolerance = _are_probabilities(output_bk, narrow), _SUM_TOLERANCE_NARROW if narrow else _SUM_TOLERANCE
    if given and record.kind == LOGITS_KIND:
        raise TeacherOutputError(
            f"the teacher returns probabilities: none of {len(output_bk)} rows has a negative value, and each sums to "
            f"1 within {tolerance:g}",
            "logits, from before the softmax",
            "give --teacher-outputs probabilities, which stores log p, or take the softmax out of the teacher",
        )
    if not given and record.kind == PROBABILITIES:
        sums = output_bk.sum(axis=1)
        raise TeacherOutputError(
            f"--teacher-outputs is probabilities, and the teacher returns values from {output_bk.min():.4g} to "
            f"{output_bk.max():.4g} in rows that sum to {sums.min():.4g} up to {sums.max():.4g}",
            f"no negative value, and rows that sum to 1 within {tolerance:g}",
            "leave out --teacher-outputs for a teacher of logits or log-probabilities; a sigmoid for each class is "
            "neither",
        )


def check_stored_kind(logits_nc: NDArray[Any], record: OutputRecord, *, narrow: bool) -> None:
    """`check_kind` for the rows of a shard, where every output of the teacher is stored; of chosen columns the probe
    has seen all.
    """
    if not record.columns:
        with np.errstate(over="ignore"):
            check_kind(np.exp(logits_nc) if record.kind == PROBABILITIES else logits_nc, record, narrow=narrow)


def check_same(first: NDArray[Any], second: NDArray[Any], *, sample: int, narrow: bool, other_batch: bool) -> None:
    """Refuse a teacher whose logits for one input differ.

    Args:
        first: Logits of a pass over some samples, (rows, classes).
        second: Logits of another pass over the same samples.
        sample: Index of the first row's sample, for messages.
        narrow: Whether they were computed in a narrower dtype than float32.
        other_batch: Whether the second pass was in another batch.

    Raises:
        TeacherOutputError: they differ by more than arithmetic explains.
    """
    apart = np.abs(first - second).max(axis=1) / (1 + np.abs(first).max(axis=1))
    row = int(apart.argmax())
    if other_batch:
        tolerance = _BATCH_TOLERANCE_NARROW if narrow else _BATCH_TOLERANCE
        found = "when another sample is in its batch"
        remedy = "let batch norm use its running statistics in eval mode, and ignore what pads a batch"
    else:
        tolerance = _REPEAT_TOLERANCE_NARROW if narrow else _REPEAT_TOLERANCE
        found = "between two passes over the same batch"
        remedy = "make it deterministic in eval mode, as F.dropout(x, training=self.training) or nn.Dropout are"
    if apart[row] > tolerance:
        raise TeacherOutputError(
            f"the teacher gives two answers to sample {sample + row}: its logits differ by "
            f"{np.abs(first - second)[row].max():.4g} {found} (tolerance {tolerance:g} of 1 + the largest logit)",
            "one answer to one input, whatever the batch: a cache keeps one",
            remedy,
        )


def looks_like_sigmoid(logits_nc: NDArray[Any]) -> bool:
    """Whether all values of some rows lie between 0 and 1, and the rows do not sum to 1."""
    inside = logits_nc.shape[1] > 1 and float(logits_nc.min()) >= 0 and float(logits_nc.max()) <= 1
    return inside and float(logits_nc.max()) > 0


def _are_probabilities(output_bk: NDArray[Any], narrow: bool) -> bool:
    if not float(output_bk.min()) >= 0:
        return False
    tolerance = _SUM_TOLERANCE_NARROW if narrow else _SUM_TOLERANCE
    return bool(np.abs(output_bk.sum(axis=1, dtype=np.float64) - 1).max() <= tolerance)


def class_names(module: nn.Module, published: tuple[str, ...] | None, checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a teacher's outputs, in order, where it brings some: of its checkpoint, of its published weights, or
    those in an `id2label` of a Hugging Face configuration; else empty.
    """
    if isinstance(description := checkpoint.get("kdcache"), Mapping):
        return tuple(description["classes"])
    if published is not None:
        return published
    for holder in (module, getattr(module, "model", None)):
        id2label = getattr(getattr(holder, "config", None), "id2label", None)
        if isinstance(id2label, Mapping) and id2label:
            return tuple(str(id2label[at]) for at in sorted(id2label))
    return ()


def check_class_names(spec: str, names: Sequence[str], classes: Sequence[str], *, exact: bool) -> None:
    """Refuse a teacher whose named outputs are not the dataset's classes in their order.

    Names that have nothing in common, such as `LABEL_0`, say nothing, and their number is left to the first batch.

    Args:
        names: Names of the teacher's outputs; empty where it has none.
        exact: Whether the names must be the dataset's own, as in a checkpoint of kdcache.

    Raises:
        ModelError: another number, or the same classes in another order.
    """
    if not names or (not exact and len(names) == len(classes) and all(re.fullmatch(r"LABEL_\d+", n) for n in names)):
        return
    wrong = tuple(names) != tuple(classes) if exact else len(names) != len(classes)
    matched = _match(names, classes)
    if not wrong and (matched is None or matched == list(range(len(names)))):
        return
    example = {name: names[matched[at]] if matched else at for at, name in enumerate(classes[:3])}
    raise ModelError(
        f"{spec} answers for {len(names)} classes: {_listed(names)}",
        f"{len(classes)} classes in the dataset's order: {_listed(classes)}",
        "give --class-map FILE, a JSON object from each class of the dataset to the teacher's class or the index of "
        f"its output, as {json.dumps(example, ensure_ascii=False)[:-1]}{', …' if len(classes) > 3 else ''}}}; or take "
        "a teacher of these classes",
    )


def read_class_map(path: str, classes: Sequence[str]) -> dict[str, int | str]:
    """The teacher's output, as its index or its class's name, for each class of a dataset, from a JSON file.

    Raises:
        UsageError: it cannot be read, is no such object, lacks a class, or names one that the dataset does not have.
    """
    needed = "a JSON object from each class of the dataset to an index or a class name of the teacher"
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as problem:
        raise UsageError(f"--class-map {path} cannot be read: {problem.strerror}", needed) from problem
    except ValueError as problem:
        raise UsageError(f"--class-map {path} is not JSON: {problem}", needed) from problem
    if not isinstance(pairs, _Pairs):
        raise UsageError(f"--class-map {path} holds a {type(pairs).__name__}", needed)
    found: dict[str, int | str] = {}
    for name, output in pairs:
        if name in found:
            raise UsageError(f"--class-map {path} names the class {name!r} twice", "each class once")
        if isinstance(output, bool) or not isinstance(output, int | str):
            raise UsageError(f"--class-map {path} maps {name!r} to {output!r}", "the index of an output, or a name")
        found[name] = output
    if len(set(classes)) != len(classes):
        raise UsageError("the dataset has two classes of one name", "names that tell its classes apart for --class-map")
    if missing := [name for name in classes if name not in found]:
        raise UsageError(f"--class-map {path} lacks {len(missing)} classes: {_listed(missing)}", needed)
    if unknown := [name for name in found if name not in classes]:
        raise UsageError(
            f"--class-map {path} names {_listed(unknown)}, which the dataset does not have",
            f"its {len(classes)} classes: {_listed(classes)}",
        )
    return {name: found[name] for name in classes}


class _Pairs(list[Any]):
    """The items of a JSON object, the same name twice included."""


def resolve_columns(class_map: Mapping[str, int | str], names: Sequence[str], outputs: int | None) -> tuple[int, ...]:
    """The column of the teacher's output for each class of a map.

    Args:
        names: Names of the teacher's outputs; empty where it has none.
        outputs: Number of outputs; None where it is unknown before the first batch.

    Raises:
        UsageError: an unknown or ambiguous name, an index out of range, or two classes with one output.
    """
    columns: dict[int, str] = {}
    for name, output in class_map.items():
        column = _column(name, output, names)
        if column < 0 or (outputs is not None and column >= outputs):
            raise UsageError(
                f"--class-map gives {name!r} the output {column}",
                f"0 to {outputs - 1}, for the teacher's {outputs} outputs" if outputs else "an index from 0",
            )
        if column in columns:
            raise UsageError(
                f"--class-map gives {columns[column]!r} and {name!r} the same output, {output!r}",
                "an output of its own for each class",
            )
        columns[column] = name
    return tuple(columns)


def _column(name: str, output: int | str, names: Sequence[str]) -> int:
    if isinstance(output, int):
        return output
    if not names:
        raise UsageError(
            f"--class-map gives {name!r} the name {output!r}, and the teacher names no outputs",
            "the index of an output, counted from 0",
        )
    at = [i for i, each in enumerate(names) if each == output]
    at = at or [i for i, each in enumerate(names) if _plain(each) == _plain(output)]
    if len(at) == 1:
        return at[0]
    if at:
        raise UsageError(f"--class-map gives {name!r} the name {output!r}, which outputs {at} have", "one of these")
    from kdcache.core.plugins import did_you_mean

    raise UsageError(
        f"--class-map gives {name!r} the name {output!r}, which no output of the teacher has",
        f"one of its {len(names)} classes: {_listed(names)}",
        did_you_mean(output, list(names)),
    )


def head_width(state: Mapping[str, Any]) -> int | None:
    """The number of outputs of a network whose weights these are: the rows of the last weight or bias."""
    for name in ("state_dict", "model", "model_state_dict", "model_ema"):
        if isinstance(inner := state.get(name), Mapping):
            return head_width(inner)
    sizes = [len(each) for each in state.values() if isinstance(each, Tensor) and each.ndim in (1, 2)]
    return sizes[-1] if sizes else None


def _match(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """The one output for each class by its name, or by how it begins (`neg`, `NEGATIVE`); None where that fails."""
    plain = list(map(_plain, names))
    found: list[int] = []
    for wanted in map(_plain, classes):
        at = [i for i, each in enumerate(plain) if each == wanted]
        at = at or [i for i, each in enumerate(plain) if each and (each.startswith(wanted) or wanted.startswith(each))]
        if len(at) != 1:
            return None
        found += at
    return found if len(set(found)) == len(found) else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
