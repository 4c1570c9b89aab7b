"""Sequence classifiers of the Hugging Face hub or of a local folder, with their own tokenizers."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from kdcache.cache.manifest import Preprocess
from kdcache.errors import ModelError
from kdcache.plugins import require_extra
from kdcache.preprocess import Preprocessor
from kdcache.pretrained import no_weights
from kdcache.tokenizing import Tokenizer

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
        classes: of the dataset; where the classifier names the same ones, they must stand in the same order.
        replace_head: draw a new head where that of the weights has another count, to train it.
        max_tokens: instead of as many as the classifier takes, at most 512.

    Raises:
        ModelError: it cannot be fetched or read, has other classes, takes fewer tokens, or its tokenizer is written in
            Python.
        MissingExtra: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf", spec)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        new_head = replace_head and config.num_labels != len(classes)
        head = {"num_labels": len(classes), "ignore_mismatched_sizes": True} if new_head else {}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name, **head)
    except Exception as problem:  # the hub's client raises errors of several libraries
        raise no_weights(spec, problem) from problem
    if not new_head:
        _check_classes(spec, config, classes)
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
    module = SequenceClassifier(model.float(), own.pad_id)
    return module.train(), Preprocessor(record, own)


def _check_classes(spec: str, config: Any, classes: tuple[str, ...]) -> None:
    named = [str(config.id2label[at]) for at in range(config.num_labels)]
    lower, wanted = [each.lower() for each in named], [each.lower() for each in classes]
    if len(named) != len(classes) or (lower != wanted and sorted(lower) == sorted(wanted)):
        raise ModelError(
            f"{spec} answers for {len(named)} classes: {', '.join(named[:8])}",
            f"{len(classes)} classes in the dataset's order: {', '.join(classes[:8])}",
            "use a classifier of these classes, or fine-tune it with train-teacher",
        )


def _own_tokenizer(spec: str, tokenizer: Any) -> Tokenizer:
    """The tokenizer as the library tokenizers has it, which is what can be kept and hashed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if backend is None or pad_id is None:
        what = "is written in Python" if backend is None else "names no token that fills short texts"
        raise ModelError(f"the tokenizer of {spec} {what}", "a tokenizer.json with one", "take another classifier")
    own = Tokenizer(backend.to_str(), pad_id=pad_id)
    found, wanted = own.ids(_SAMPLE, DEFAULT_TOKENS).tolist(), tokenizer(_SAMPLE)["input_ids"]
    if found != wanted:
        raise ModelError(
            f"the tokenizer of {spec} gives {wanted[:12]} … and its tokenizer.json {found[:12]} … for one text",
            "a tokenizer.json that does all that the tokenizer does",
            "save it anew with tokenizer.save_pretrained",
        )
    return own
