"""Networks of the Hugging Face hub or of a local folder: of texts with their tokenizer, of images with theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.core.errors import ModelError
from kdcache.core.plugins import require_extra
from kdcache.data.preprocess import Preprocessor
from kdcache.data.tokenizer import Tokenizer
from kdcache.models.pretrained import Published, fitting_head
from kdcache.store.records import Preprocess

DEFAULT_TOKENS = 512
# Torch and Pillow resize uint8 images up to so many levels of 255 apart.
_LEVELS = 3.0
_SAMPLE = "It was 9 o'clock – a naïve, well-known <br />sentence; wasn't it?"


class SequenceClassifier(nn.Module):
    """A classifier of the library transformers, which takes token ids padded with `pad_id`."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Token ids (B, tokens) int64 to logits (B, classes)."""
        return cast(Tensor, self.model(input_ids=ids_bt, attention_mask=(ids_bt != self.pad_id).long()).logits)


class TextEncoder(nn.Module):
    """An encoder of the library transformers, whose answer is the mean of its tokens' vectors (Sentence-BERT, Reimers
    and Gurevych, 2019, arXiv 1908.10084).
    """

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Token ids (B, tokens) int64 to vectors (B, width)."""
        mask_bt = (ids_bt != self.pad_id).long()
        vectors_btd = cast(Tensor, self.model(input_ids=ids_bt, attention_mask=mask_bt).last_hidden_state)
        weights = mask_bt.unsqueeze(2).to(vectors_btd.dtype)
        return (vectors_btd * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def load_text_model(
    spec: str,
    name: str,
    classes: tuple[str, ...],
    *,
    replace_head: bool,
    max_tokens: int | None,
    encoder: bool = False,
) -> tuple[nn.Module, Preprocessor]:
    """Load a trained sequence classifier, or encoder, with its tokenizer.

    Args:
        name: Name on the hub, or a local folder written by `save_pretrained`, with its tokenizer.
        classes: Classes of the dataset.
        replace_head: Whether to initialise a new head if that of the weights has another number of classes.
        max_tokens: Maximum length of a text; None takes the classifier's, up to 512.
        encoder: Whether it is to give vectors, and not classes.

    Raises:
        ModelError: it cannot be fetched or read, takes fewer tokens, or its tokenizer is written in
            Python.
        MissingExtra: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf", spec)
    try:
        with _quiet(transformers):
            config, tokenizer, model = _loaded(transformers, name, len(classes), replace_head, encoder)
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
    module = (TextEncoder if encoder else SequenceClassifier)(model.float(), own.pad_id).eval()
    longest = record.max_tokens or 1
    try:
        with torch.no_grad():
            module(torch.full((1, longest), (own.pad_id + 1) % own.vocabulary_size))
    except (RuntimeError, IndexError) as problem:  # some take fewer tokens than their config says
        raise ModelError(
            f"{spec} fails on a text of {longest} tokens: {problem}", "as many as it takes", "give --max-tokens"
        ) from problem
    return module.train(), Preprocessor(record, own)


def _loaded(transformers: Any, name: str, num_classes: int, replace_head: bool, encoder: bool) -> tuple[Any, Any, Any]:
    """Config, tokenizer and model."""
    config = transformers.AutoConfig.from_pretrained(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if encoder:
        return config, tokenizer, transformers.AutoModel.from_pretrained(name)
    head: dict[str, Any] = {}
    if replace_head and config.num_labels != num_classes:
        head = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    return config, tokenizer, transformers.AutoModelForSequenceClassification.from_pretrained(name, **head)


def image_classifier(
    spec: str,
    name: str,
    num_classes: int,
    replace_head: bool,
    fits: Callable[[nn.Module], bool] | None,
    *,
    check: bool,
) -> Published:
    """Load a trained image classifier with the preprocessing of its image processor.

    Args:
        name: Name on the hub, or a local folder written by `save_pretrained`, with its image processor.
        replace_head: Whether to initialise a new head if that of the weights has another number of classes.
        fits: Whether a checkpoint that will be loaded fits a network; the weights are then not read.
        check: Whether to refuse an image processor whose pixels are not reproduced; False where the user sets
            the geometry.

    Raises:
        ModelError: it cannot be fetched or read, or its image processor does what a `Preprocess` record cannot say.
        MissingExtra: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf", spec)
    try:
        with _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(name)
            processor = transformers.AutoImageProcessor.from_pretrained(name)
            build = transformers.AutoModelForImageClassification
            own_classes = count = config.num_labels
            if fits is not None:

                def built(classes: int) -> nn.Module:
                    config.num_labels = classes
                    return cast(nn.Module, build.from_config(config))

                names = class_names(config)
                module, count = fitting_head(built, fits, num_classes, own_classes)
            else:
                names = class_names(config)
                head: dict[str, Any] = {}
                if replace_head and own_classes != num_classes:
                    count, head = num_classes, {"num_labels": num_classes, "ignore_mismatched_sizes": True}
                module = build.from_pretrained(name, **head)
    except Exception as problem:  # the hub's client raises errors of several libraries
        raise ModelError(
            f"{spec} could not be read or fetched as an image classifier: {type(problem).__name__}: "
            f"{str(problem)[:300]}",
            "a folder that save_pretrained wrote, with its image processor, or a model of the hub and a connection",
            "check the name",
        ) from problem
    record = _image_preprocess(spec, processor, getattr(config, "num_channels", 3), check=check)
    return Published(module.float().train(), record, names if count == own_classes else None)


def class_names(config: Any) -> tuple[str, ...] | None:
    """The class names in a configuration of transformers; None where it only numbers them."""
    names = tuple(str(config.id2label[at]) for at in range(config.num_labels))
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _image_preprocess(spec: str, processor: Any, channels: int, *, check: bool) -> Preprocess:
    """An image processor as a record, compared with the processor itself on images."""

    def side(size: Any, what: str) -> int | None:
        return cast("int | None", getattr(size, what, None))

    resize = crop = None
    stretch = False
    size = processor.size if processor.do_resize else None
    if size is not None and side(size, "shortest_edge") and not side(size, "longest_edge"):
        resize = side(size, "shortest_edge")
        crop_part = getattr(processor, "crop_pct", None)
        if crop_part and resize:  # ConvNeXt: small images are cropped from larger ones, large ones are stretched
            crop, stretch = (resize, False) if resize < 384 else (None, True)
            resize = int(resize / crop_part) if crop else resize
    elif size is not None and side(size, "height") == side(size, "width"):
        resize, stretch = side(size, "height"), True
    if getattr(processor, "do_center_crop", False):
        crop_size = processor.crop_size
        crop = side(crop_size, "height") if side(crop_size, "height") == side(crop_size, "width") else None
    # x · factor − mean, over std, as a mean and a std of x / 255.
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if processor.do_normalize:
        mean = tuple(np.ravel(processor.image_mean).tolist())[:channels]
        std = tuple(np.ravel(processor.image_std).tolist())[:channels]
    known = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    resample = int(processor.resample) if processor.do_resize else 2
    record = Preprocess(
        resize=resize,
        crop=crop,
        stretch=stretch and resize is not None,
        interpolation=known.get(resample, "bilinear"),
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
    )
    if check:
        _check_pixels(spec, processor, record, channels)
    return record


def _check_pixels(spec: str, processor: Any, record: Preprocess, channels: int) -> None:
    """Refuse a record that does not give the pixels of an image processor, whatever the processor does besides."""
    preprocessor = Preprocessor(record)
    largest, allowed = 0.0, _LEVELS / 255 / min(record.std)
    sizes = []
    for height, width in ((61, 83), (83, 61), (400, 300)):
        rows, columns = np.mgrid[:height, :width]
        # Smooth and with edges: noise alone would hide a shift by a pixel, a gradient alone a wrong interpolation.
        plane = (127 + 60 * np.sin(rows / 5) + 60 * np.cos(columns / 7) * ((rows + columns) % 40 < 20)).astype(np.uint8)
        image = np.stack([plane, plane[::-1], plane[:, ::-1]][:channels])
        wanted = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))[0]
        found = preprocessor.per_batch(preprocessor.per_sample(torch.from_numpy(image))[None], torch.float32)[0]
        sizes.append((tuple(wanted.shape[1:]), tuple(found.shape[1:])))
        if wanted.shape != found.shape:
            largest = float("inf")
            break
        largest = max(largest, _difference(wanted, found, may_shift=record.crop is not None))
    if not largest <= allowed:
        raise ModelError(
            f"the image processor of {spec} ({type(processor).__name__}) does what a preprocessing record cannot say: "
            f"it makes {sizes[-1][0]} pixels where the record makes {sizes[-1][1]}, values up to {largest:.2g} apart",
            "resizing the shorter side or to a square (nearest, bilinear or bicubic), a square centre crop, a mean and "
            "a std",
            "give --size PIXELS (or --resize and --crop), with --mean and --std where they differ, to set it yourself",
        )


def _difference(wanted_chw: Tensor, found_chw: Tensor, *, may_shift: bool) -> float:
    """The largest difference of a pixel; of a crop with an odd margin, also one pixel aside, as each library rounds."""
    height, width = wanted_chw.shape[1] - 1, wanted_chw.shape[2] - 1
    differences = [float((wanted_chw - found_chw).abs().max())]
    for down, right in ((0, 1), (1, 0), (1, 1)) if may_shift else ():
        shifted = wanted_chw[:, down : height + down, right : width + right]
        differences.append(float((shifted - found_chw[:, :height, :width]).abs().max()))
    return min(differences)


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
