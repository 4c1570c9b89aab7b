"""Text to token ids: a vocabulary from a training split, made and applied by the library tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.core.errors import ModelError
from kdcache.core.plugins import describe, require_extra

PAD, UNKNOWN = "[PAD]", "[UNK]"
# What tokenizer files call the token that fills short texts.
_PADS = (PAD, "<pad>", "<|padding|>", "<|pad|>", "<|endoftext|>")


class Tokenizer:
    """A tokenizer of the library tokenizers. Goes to workers as its document.

    Args:
        document: Content of a `tokenizer.json`; its truncation and padding are ignored.
        pad_id: Id of the padding token.

    Attributes:
        document: Canonical JSON without truncation and padding.
        sha256: of `document` as UTF-8: its identity.
        vocabulary_size: Exclusive upper bound of the ids.
        special_tokens: Number of tokens added to each text.

    Raises:
        MissingExtra: the library is not installed.
        ModelError: the document is not a tokenizer's.
    """

    def __init__(self, document: str, *, pad_id: int = 0) -> None:
        library = require_extra("tokenizers", "text", "text")
        try:
            self._tokenizer: Any = library.Tokenizer.from_str(document)
        except Exception as problem:  # the library raises Exception itself
            raise ModelError(f"a tokenizer cannot be read: {problem}", "the JSON of a tokenizer.json") from problem
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.pad_id = pad_id
        self.document: str = self._tokenizer.to_str()
        self.sha256 = hashlib.sha256(self.document.encode()).hexdigest()
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_tokens: int = self._tokenizer.num_special_tokens_to_add(False)
        self._max_tokens: int | None = None

    def ids(self, text: str, max_tokens: int) -> NDArray[np.int32]:
        """The token ids of a text, (n,) with n at most `max_tokens`, special tokens among them."""
        if max_tokens != self._max_tokens:
            self._tokenizer.enable_truncation(max_tokens)
            self._max_tokens = max_tokens
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.document, self.pad_id)


def _rebuild(document: str, pad_id: int) -> Tokenizer:
    return Tokenizer(document, pad_id=pad_id)


def build_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """Lower-case words and punctuation marks, the most frequent ones of some texts; ties go by the alphabet.

    Args:
        size: Size of the vocabulary with its two special tokens: padding (id 0) and unknown words (id 1).

    Raises:
        MissingExtra: the library is not installed.
    """
    library = require_extra("tokenizers", "text", "a vocabulary")
    tokenizer = library.Tokenizer(library.models.WordLevel(unk_token=UNKNOWN))
    normalizers = library.normalizers
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(library.Regex("<[^<>]*>"), " "),  # of web pages, such as the line breaks in IMDB
            normalizers.NFKC(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    trainer = library.trainers.WordLevelTrainer(vocab_size=size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, of this or of another program.

    Raises:
        ModelError: it cannot be read, or does not name a token that fills short texts.
        MissingExtra: the library is not installed.
    """
    library = require_extra("tokenizers", "text", f"reading {path}")
    try:
        document = path.read_text(encoding="utf-8")
        tokenizer = library.Tokenizer.from_str(document)
    except Exception as problem:
        raise ModelError(
            f"{path} cannot be read as a tokenizer: {describe(problem)}",
            "a tokenizer.json",
            "name the file that train-teacher wrote into its run, or that of a published model",
        ) from problem
    if tokenizer.padding is not None:
        return Tokenizer(document, pad_id=tokenizer.padding["pad_id"])
    for name in _PADS:
        if (found := tokenizer.token_to_id(name)) is not None:
            return Tokenizer(document, pad_id=found)
    raise ModelError(
        f"{path} names no token that fills short texts", f"one of {', '.join(_PADS)}, or a padding section", "add one"
    )
