"""Sequence classifiers of the Hugging Face hub or of a local folder, with their own tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdcache.core.errors import ModelError
from kdcache.core.plugins import require_extra
from kdcache.data.preprocess import Preprocessor
from kdcache.data.tokenizer import Tokenizer
from kdcache.store.manifest import Preprocess

DEFAULT_TOKENS = 512
_SAMPLE = "It was 9 o'clock – a naïve, well-known <br />sentence; wasn't it?"


class SequenceClassifier(nn.Module):
    """A classifier of the library transformers, which takes token ids filled up with `pad_id`."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Token ids (B, tokens) int64 to logits (B, classes)."""
        return cast(Tensor, self.model(input_ids=ids_bt, attention_mask=(ids_bt != self.pad_id).long()).logits)


def load_classifier(
    spec: str, name: str, classes: tuple[str, ...], *, replace_head: bool, max_tokens: int | None
) -> tuple[nn.Module, Preprocessor]:
    """A trained sequence classifier and how it reads text.

    Args:
        name: on the hub, or a local folder that `save_pretrained` wrote, with its tokenizer.
        classes: of the dataset.
        replace_head: draw a new head where that of the weights has another count, to train it.
        max_tokens: instead of as many as the classifier takes, at most 512.

    Raises:
        ModelError: it cannot be fetched or read, takes fewer tokens, or its tokenizer is written in
            Python.
        MissingExtra: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf", spec)
    try:
        with _quiet(transformers):
            config, tokenizer, model = _loaded(transformers, name, len(classes), replace_head)
    except Exception as problem:  # the hub's client raises errors of several libraries
        raise ModelError(
            f"{spec} could not be read or fetched: {type(problem).__name__}: {str(problem)[:300]}",
            "a folder that save_pretrained wrote, with its tokenizer, or a model of the hub and a connection",
            "check the name",
        ) from problem
    own = _own_tokenizer(spec, tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = own.pad_id  # some find the last token by it
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or DEFAULT_TOKENS)
    if max_tokens is not None and max_tokens > limit:
        raise ModelError(f"--max-tokens is {max_tokens}", f"at most {limit}, which {spec} takes")
    record = Preprocess(
        max_tokens=max_tokens or min(limit, DEFAULT_TOKENS),
        pad_id=own.pad_id,
        vocabulary_size=own.vocabulary_size,
        tokenizer_sha256=own.sha256,
    )
    module = SequenceClassifier(model.float(), own.pad_id).eval()
    longest = record.max_tokens or 1
    try:
        with torch.no_grad():
            module(torch.full((1, longest), (own.pad_id + 1) % own.vocabulary_size))
    except (RuntimeError, IndexError) as problem:  # some take fewer tokens than their config says
        raise ModelError(
            f"{spec} fails on a text of {longest} tokens: {problem}", "as many as it takes", "give --max-tokens"
        ) from problem
    return module.train(), Preprocessor(record, own)


def _loaded(transformers: Any, name: str, num_classes: int, replace_head: bool) -> tuple[Any, Any, Any]:
    """Config, tokenizer and model."""
    config = transformers.AutoConfig.from_pretrained(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    head: dict[str, Any] = {}
    if replace_head and config.num_labels != num_classes:
        head = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    return config, tokenizer, transformers.AutoModelForSequenceClassification.from_pretrained(name, **head)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """The library draws bars and tables of its own on stderr; what goes wrong it raises."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _own_tokenizer(spec: str, tokenizer: Any) -> Tokenizer:
    """The tokenizer as the library tokenizers has it, which is what can be kept and hashed."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    flaws = {
        "is written in Python": backend is None,
        "names no token that fills short texts": pad_id is None,
        "cuts texts at their beginning": tokenizer.truncation_side != "right",
    }
    for flaw, found in flaws.items():
        if found:
            raise ModelError(
                f"the tokenizer of {spec} {flaw}",
                "a tokenizer.json that names such a token and cuts texts at their end",
                "change the tokenizer and save it anew, or take another classifier",
            )
    own = Tokenizer(backend.to_str(), pad_id=pad_id)
    given, wanted = own.ids(_SAMPLE, DEFAULT_TOKENS).tolist(), tokenizer(_SAMPLE)["input_ids"]
    if given != wanted:
        raise ModelError(
            f"the tokenizer of {spec} gives {wanted[:12]} … and its tokenizer.json {given[:12]} … for one text",
            "a tokenizer.json that does all that the tokenizer does",
            "save it anew with tokenizer.save_pretrained",
        )
    return own
