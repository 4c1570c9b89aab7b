"""Preprocessing of texts and of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.core.config import InputConfig
from kdcache.core.errors import ModelError
from kdcache.core.progress import log
from kdcache.data.dataset import IndexedDataset
from kdcache.data.preprocess import Preprocessor
from kdcache.data.tokenizer import Tokenizer, build_vocabulary, read_tokenizer
from kdcache.store.records import Preprocess

DEFAULT_TOKENS = 256
DEFAULT_VOCABULARY = 20_000

_TEXTS_AT_ONCE = 1000


def is_sequences(dataset: IndexedDataset) -> bool:
    """Whether a dataset's samples are texts or token ids."""
    return dataset.is_text or dataset.vocabulary_size is not None


def sequence_preprocessor(
    settings: InputConfig,
    dataset: IndexedDataset,
    *,
    default: Preprocess,
    recorded: Tokenizer | None,
    may_build: bool,
) -> Preprocessor:
    """The preprocessing of a network without a tokenizer of its own.

    Args:
        settings: Settings whose `max_tokens`, `vocabulary_size` and `tokenizer` take precedence.
        default: Preprocessing whose lengths are used where settings have none.
        recorded: Tokenizer in the network's checkpoint.
        may_build: Whether `dataset` is a training split, from which a vocabulary may be built.

    Raises:
        ModelError: there is no tokenizer, or one for samples that are token ids already.
    """
    max_tokens = settings.max_tokens or default.max_tokens or DEFAULT_TOKENS
    if not dataset.is_text:
        if settings.tokenizer or settings.vocabulary_size:
            raise ModelError(
                f"{dataset.name} gives token ids, and --tokenizer or --vocabulary-size is given",
                "texts, for a tokenizer",
                "leave it out",
            )
        # Padding is an id that no sample has.
        size = dataset.vocabulary_size
        return Preprocessor(Preprocess(max_tokens=max_tokens, vocabulary_size=size, pad_id=size or 0))
    if settings.tokenizer:
        tokenizer = read_tokenizer(Path(settings.tokenizer))
    elif recorded is not None and not settings.vocabulary_size:
        tokenizer = recorded
    elif may_build:  # only then, because another split would give another vocabulary
        size = settings.vocabulary_size or default.vocabulary_size or DEFAULT_VOCABULARY
        tokenizer = build_vocabulary(_texts(dataset), size)
        same = ", as the teacher's" if tokenizer.sha256 == default.tokenizer_sha256 else ""
        log(
            f"vocabulary of {tokenizer.vocabulary_size:,} words from the {dataset.split} split of {dataset.name}, "
            f"tokenizer {tokenizer.sha256[:16]}{same}; {max_tokens} tokens a text"
        )
    else:
        raise ModelError(
            "the network's tokenizer is not known: its checkpoint holds none",
            "the tokenizer that it was trained with",
            "give --tokenizer FILE, a tokenizer.json; train-teacher writes it into its run and into its checkpoints",
        )
    return Preprocessor(
        Preprocess(
            max_tokens=max_tokens,
            pad_id=tokenizer.pad_id,
            vocabulary_size=tokenizer.vocabulary_size,
            tokenizer_sha256=tokenizer.sha256,
        ),
        tokenizer,
    )


def recorded_tokenizer(description: dict[str, Any], record: Preprocess) -> Tokenizer | None:
    """The tokenizer in the record of a checkpoint; None where it has none.

    Raises:
        ModelError: it is not the one that the recorded preprocessing names.
    """
    document = description.get("tokenizer")
    if not isinstance(document, str):
        return None
    tokenizer = Tokenizer(document, pad_id=record.pad_id)
    if tokenizer.sha256 != record.tokenizer_sha256:
        raise ModelError(
            f"the checkpoint holds the tokenizer {tokenizer.sha256[:16]}",
            f"{record.tokenizer_sha256[:16]}, which its preprocessing names",
            "use the library tokenizers in the version that wrote it, or give --tokenizer FILE",
        )
    return tokenizer


def _texts(dataset: IndexedDataset) -> Iterator[str]:
    for start in range(0, len(dataset), _TEXTS_AT_ONCE):
        for text in dataset.shared_inputs(range(start, min(start + _TEXTS_AT_ONCE, len(dataset)))):
            yield bytes(text.numpy()).decode()
