"""Encodings by name."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.core.errors import UsageError
from kdcache.core.plugins import did_you_mean
from kdcache.core.specs import number, split_spec
from kdcache.store.encodings.base import EMBEDDINGS, LOGITS, Encoding
from kdcache.store.encodings.floats import FloatEncoding
from kdcache.store.encodings.head import HeadEncoding
from kdcache.store.encodings.quantized import QuantizedEncoding
from kdcache.store.encodings.topk import TopKEncoding
from kdcache.store.manifest import Manifest
from kdcache.store.records import EMBEDDING, ONE_CLASS, SEVERAL_CLASSES

# By name: takes the number behind the colon (None without one), the number of classes, and temperatures.
Factory = Callable[[int | None, int, tuple[float, ...]], Encoding]

DEFAULT_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def _topk(count: int | None, classes: int, temperatures: tuple[float, ...]) -> Encoding:
    if count is None:
        raise UsageError("--encoding is topk", "the number of logits to store per row", "give topk:20, for example")
    return TopKEncoding(count, classes, temperatures or DEFAULT_TEMPERATURES)


# float64 is for exact comparisons with a live teacher; float16 costs a KL of about 1e-6 and is the default.
KINDS: dict[str, Factory] = {
    "float16": lambda argument, classes, _: FloatEncoding("float16", classes),
    "float32": lambda argument, classes, _: FloatEncoding("float32", classes),
    "float64": lambda argument, classes, _: FloatEncoding("float64", classes),
    "quantized": lambda bits, classes, _: QuantizedEncoding(8 if bits is None else bits, classes),
    "topk": _topk,
    "head": lambda bits, classes, _: HeadEncoding(bits, classes),
}
# Those that keep what is no softmax, and why others do not.
_FITTING = {
    SEVERAL_CLASSES: ("float16", "float32", "float64", "head"),
    EMBEDDING: ("float16", "float32", "float64"),
}
_WHY_NOT = {
    SEVERAL_CLASSES: "which is exact for a softmax only, and the samples have any number of classes each",
    EMBEDDING: "which is for logits, and the teacher returns an embedding",
}
# What `KINDS` are called on the command line, with what stands behind the colon.
SPECS = ("float16", "float32", "float64", "quantized:BITS", "topk:K", "head", "head:BITS")


def encoding_named(
    spec: str, classes: int, temperatures: tuple[float, ...] = (), *, answers: str = ONE_CLASS
) -> Encoding:
    """The encoding of a spec `NAME` or `NAME:NUMBER`.

    Args:
        classes: Number of classes, or dimensions.
        temperatures: Temperatures of an encoding that is not for any; empty for 1, 2, 4 and 8.
        answers: What is stored, as `Manifest.answers` names it.

    Raises:
        UsageError: there is no such encoding, or not for so many classes.
    """
    name, argument = split_spec(spec)
    if name not in KINDS or (argument is not None and f"{name}:" not in " ".join(SPECS)):
        raise UsageError(f"--encoding is {spec!r}", f"one of {', '.join(SPECS)}", did_you_mean(name, list(KINDS)))
    if name not in (fitting := _FITTING.get(answers, KINDS)):
        listed = ", ".join(each for each in SPECS if each.partition(":")[0] in fitting)
        raise UsageError(f"--encoding is {spec}, {_WHY_NOT[answers]}", f"one of {listed}", "leave it out for float16")
    if answers == EMBEDDING:
        return FloatEncoding(name, classes, EMBEDDINGS)
    try:
        value = None if argument is None else number(argument, int, 1)
    except ValueError as problem:
        raise UsageError(f"--encoding is {spec!r}", f"{problem} after {name}:") from problem
    return KINDS[name](value, classes, temperatures)


def encoding_of(manifest: Manifest) -> Encoding:
    """The encoding of a cache split, without its constants."""
    spec = manifest.encoding or manifest.array(LOGITS).dtype
    classes = len(manifest.dataset.classes)
    return encoding_named(spec, classes, manifest.temperatures, answers=manifest.answers)
