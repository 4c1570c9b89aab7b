"""Small networks that read token ids, sized by options in their spec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdcache.core.errors import ModelError
from kdcache.core.specs import number, split_options, split_spec


@dataclass(frozen=True, kw_only=True)
class Size:
    """Options of a recurrent network, as in `lstm:hidden=128,dropout=0.3`.

    Attributes:
        embedding: Width of a token's vector.
        hidden: Width of the state per direction.
        layers: Number of recurrent layers per direction.
        dropout: Dropout probability of the token vectors and of the averaged states.
        bidirectional: 1 reads the text backwards too.
    """

    embedding: int
    hidden: int
    layers: int = 1
    dropout: float
    bidirectional: int


class Recurrent(nn.Module):
    """Token vectors, a recurrent network over them, the mean of its states, a linear layer.

    Padding follows the tokens and changes nothing: no state of a token depends on what comes after it (the backward
    direction reads each text from its own end), and the mean is over tokens alone. So a text gets the same logits in
    any batch, without packed sequences, which exported programs cannot hold.

    Args:
        cell: `nn.LSTM` or `nn.GRU`.
        vocabulary_size: Exclusive upper bound of the token ids, padding included.
        pad_id: Id of padding, which only follows the last token.
    """

    def __init__(
        self, cell: type[nn.LSTM] | type[nn.GRU], vocabulary_size: int, num_classes: int, pad_id: int, size: Size
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocabulary_size, size.embedding, padding_idx=pad_id)
        between = size.dropout if size.layers > 1 else 0.0
        widths = {"num_layers": size.layers, "dropout": between, "batch_first": True}
        self.forwards = cell(size.embedding, size.hidden, **widths)
        self.backwards = cell(size.embedding, size.hidden, **widths) if size.bidirectional else None
        self.dropout = nn.Dropout(size.dropout)
        self.classifier = nn.Linear(size.hidden * (2 if size.bidirectional else 1), num_classes)

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Token ids (B, tokens), integers, to logits (B, classes)."""
        # All up to the last one that is no padding: a text may spell the padding token out.
        is_token_bt = (ids_bt != self.pad_id).long().flip(1).cumsum(1).flip(1) > 0
        vectors_bte = self.dropout(self.embedding(ids_bt))
        states_bth, _ = self.forwards(vectors_bte)
        if self.backwards is not None:
            count_b1 = is_token_bt.sum(dim=1, keepdim=True)
            places_t = torch.arange(ids_bt.shape[1], device=ids_bt.device)
            from_end_bt = (count_b1 - 1 - places_t).clamp(min=0)
            reversed_bte = vectors_bte.gather(1, from_end_bt.unsqueeze(2).expand_as(vectors_bte))
            backward_bth, _ = self.backwards(reversed_bte)
            # Their order differs, which a mean does not see.
            states_bth = torch.cat([states_bth, backward_bth], dim=2)
        weights_bt1 = is_token_bt.unsqueeze(2).to(states_bth.dtype)
        mean_bh = (states_bth * weights_bt1).sum(dim=1) / weights_bt1.sum(dim=1).clamp(min=1)
        return cast(Tensor, self.classifier(self.dropout(mean_bh)))


# Name to cell and default size.
TEXT_NETWORKS: dict[str, tuple[type[nn.LSTM] | type[nn.GRU], Size]] = {
    "lstm": (nn.LSTM, Size(embedding=64, hidden=64, dropout=0.5, bidirectional=1)),
    "gru": (nn.GRU, Size(embedding=16, hidden=16, dropout=0.2, bidirectional=0)),
}


# Kind and range of each option.
_BOUNDS: dict[str, tuple[type[Any], float, float]] = {
    "embedding": (int, 1, 2**16),
    "hidden": (int, 1, 2**16),
    "layers": (int, 1, 2**16),
    "dropout": (float, 0, 0.99),
    "bidirectional": (int, 0, 1),
}


def check_text_network(spec: str) -> None:
    """Refuse a spec that `build_text_network` would refuse."""
    name, options = split_spec(spec)
    _sized(spec, TEXT_NETWORKS[name][1], options)


def build_text_network(spec: str, *, vocabulary_size: int, num_classes: int, pad_id: int) -> nn.Module:
    """A network from `NAME` or `NAME:option=value,…`.

    Raises:
        ModelError: no such option, or a value that it cannot have.
    """
    name, options = split_spec(spec)
    cell, size = TEXT_NETWORKS[name]
    return Recurrent(cell, vocabulary_size, num_classes, pad_id, _sized(spec, size, options))


def _sized(spec: str, size: Size, options: str | None) -> Size:
    for key, text in split_options(options).items():
        if key not in _BOUNDS:
            raise ModelError(f"{spec} sets {key!r}", f"one of {', '.join(_BOUNDS)}", "write NAME:option=value,…")
        try:
            size = replace(size, **{key: number(text, *_BOUNDS[key])})
        except ValueError as problem:
            raise ModelError(f"{spec}: {key} is {text!r}", str(problem)) from problem
    return size
