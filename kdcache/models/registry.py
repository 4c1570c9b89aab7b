"""Models by name, with their preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.core import rng
from kdcache.core.config import InputConfig
from kdcache.core.errors import KdcacheError, ModelError
from kdcache.core.json_records import canonical_json
from kdcache.core.plugins import PREFIX, call_with_accepted, describe, did_you_mean, resolve
from kdcache.core.specs import split_spec
from kdcache.data.preprocess import Preprocessor
from kdcache.models.cnn import NETWORKS
from kdcache.models.huggingface import class_names, image_classifier, load_text_model
from kdcache.models.pretrained import Published, timm_model, torchvision_model
from kdcache.models.rnn import TEXT_NETWORKS, build_text_network, check_text_network
from kdcache.store.records import OutputRecord, Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A module with its preprocessing.

    Attributes:
        module: Network on the CPU, float32, in training mode.
        preprocessor: Preprocessing from shared inputs to the module's inputs.
        spec: Name that the module was built from.
        has_weights: Trained weights came with the spec; a module of a `py:` factory is taken as trained.
        outputs: Conversion from a teacher's outputs to logits.
        class_names: Names of the module's outputs; None where its weights have none.
    """

    module: nn.Module
    preprocessor: Preprocessor
    spec: str
    has_weights: bool
    outputs: OutputRecord = field(default_factory=OutputRecord)
    class_names: tuple[str, ...] | None = None

    @property
    def preprocess(self) -> Preprocess:
        """The record of the preprocessing."""
        return self.preprocessor.record


def build_model(
    spec: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...] | None,
    seed: int,
    settings: InputConfig | None = None,
    default: Preprocess | None = None,
    recorded: Preprocess | None = None,
    replace_head: bool = False,
    fits: Callable[[nn.Module], bool] | None = None,
) -> BuiltModel:
    """Build a model from its spec. Its preprocessing is, in this order, that of `settings`, `recorded`, the published
    weights or `default`.

    Args:
        spec: A name of `NETWORKS`, `torchvision:NAME[@WEIGHTS]`, `timm:NAME[.TAG]`, `hf:NAME` of an image classifier
            or `py:package.module:factory`.
        num_classes: Number of the dataset's classes. Weights keep the head they were trained with, unless
            `replace_head`.
        input_shape: Shape of one shared input; None where samples differ in size.
        seed: Seed of the initial weights; global generators are restored.
        settings: Mean, std and geometry that replace those of the model.
        default: Preprocessing of a module without its own; None only scales uint8 to [0, 1].
        recorded: Preprocessing in the checkpoint that will be loaded.
        replace_head: Initialise a new head of `num_classes` where that of the weights has another number, to train it.
        fits: Whether a checkpoint that will be loaded fits a module: published weights are then not fetched.

    Raises:
        ModelError: no such model or weights, a failed download, a factory that fails, or inputs that cannot fit.
        MissingExtra: `timm:` without timm.
    """
    settings = settings or InputConfig()
    kind, name = split_spec(spec)
    name = name or ""
    side = settings.size or settings.crop
    published = Published()
    module: nn.Module | None = None
    with _initial_weights(seed):
        if kind == "torchvision":
            published = torchvision_model(spec, name, num_classes, replace_head, fits)
        elif kind == "timm":
            published = timm_model(spec, name, num_classes, replace_head, fits, side)
        elif kind == "hf":
            published = image_classifier(spec, name, num_classes, replace_head, fits, check=side is None)
        elif spec.startswith(PREFIX):
            module = _from_factory(spec, num_classes=num_classes)
        elif spec not in NETWORKS:
            names = [*NETWORKS, *TEXT_NETWORKS]
            raise ModelError(
                f"there is no model {spec!r}",
                f"{', '.join(names)}, torchvision:NAME, timm:NAME, hf:NAME or py:package.module:factory",
                did_you_mean(kind, names),
            )
        preprocess = _with_settings(spec, recorded or published.preprocess or default or Preprocess(), settings)
        if kind in ("torchvision", "timm", "hf"):
            preprocess = _three_channels(preprocess, input_shape)
        shape = _network_input(spec, preprocess, input_shape)
        module = module or published.module or NETWORKS[spec](shape, num_classes)
    return BuiltModel(
        module=module,
        preprocessor=Preprocessor(preprocess),
        spec=spec,
        has_weights=published.preprocess is not None or spec.startswith(PREFIX),
        class_names=published.class_names,
    )


def _with_settings(spec: str, preprocess: Preprocess, settings: InputConfig) -> Preprocess:
    """A preprocessing record with the values that the user set."""
    resize, crop = settings.size or settings.resize, settings.size or settings.crop
    stretch = None if resize is None else False
    values = {"mean": settings.mean, "std": settings.std, "resize": resize, "crop": crop, "stretch": stretch}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    preprocess = replace(preprocess, **given)
    if (preprocess.crop or 0) > (preprocess.resize or preprocess.crop or 0):
        raise ModelError(
            f"the preprocessing of {spec} resizes to {preprocess.resize} pixels and crops {preprocess.crop}",
            "a crop that lies within the image",
            "give --resize and --crop, or --size, which sets both",
        )
    return preprocess


def reads_sequences(spec: str) -> bool:
    """Whether a spec names a network that only takes token ids."""
    return split_spec(spec)[0] in TEXT_NETWORKS


def check_reader(spec: str, *, is_text: bool) -> None:
    """Refuse a spec whose model takes neither texts nor token ids, before a vocabulary is built for it.

    Raises:
        ModelError: it takes other inputs, or has options that are not allowed.
    """
    name = split_spec(spec)[0]
    if name in TEXT_NETWORKS:
        check_text_network(spec)
    elif not spec.startswith((PREFIX, "hf:")):
        raise ModelError(
            f"{spec} takes no texts and no token ids",
            f"{', '.join(TEXT_NETWORKS)}, hf:NAME or py:package.module:factory",
            "choose one of them for this dataset",
        )
    elif has_own_tokenizer(spec) and not is_text:
        raise ModelError(
            f"{spec} brings its own tokenizer, and the dataset gives token ids",
            "texts",
            "let the dataset return the texts themselves",
        )


def has_own_tokenizer(spec: str) -> bool:
    """Whether a spec names a network with its own tokenizer."""
    return spec.startswith("hf:")


def build_text_model(
    spec: str,
    *,
    classes: tuple[str, ...],
    seed: int,
    preprocessor: Preprocessor | None,
    max_tokens: int | None = None,
    replace_head: bool = False,
    encoder: bool = False,
) -> BuiltModel:
    """Build a model that takes token ids; the counterpart of `build_model`.

    Args:
        spec: A name of `TEXT_NETWORKS`, with or without options, `hf:NAME` or `py:package.module:factory`, which is
            called with those of `num_classes`, `vocabulary_size` and `pad_id` that it takes.
        preprocessor: Preprocessing of a model without its own; for `hf:`, that of the checkpoint, if there is one.
        max_tokens: Maximum length of a text, for `hf:`.
        encoder: Whether an `hf:` model is to give vectors, and not classes.

    Raises:
        ModelError, MissingExtra: as for `build_model`, and if the model takes no token ids.
    """
    with _initial_weights(seed):
        if has_own_tokenizer(spec):
            module, own = load_text_model(
                spec,
                spec.removeprefix("hf:"),
                classes,
                replace_head=replace_head,
                max_tokens=max_tokens,
                encoder=encoder,
            )
            if preprocessor is not None and preprocessor.record != own.record:
                raise ModelError(
                    f"{spec} has another tokenizer now than the checkpoint was trained with: {own.record} instead of "
                    f"{preprocessor.record}",
                    "the tokenizer that it was trained with",
                    "give the folder its tokenizer back; the run's tokenizer.json is a copy of it",
                )
            names = None if encoder else class_names(module.get_submodule("model").config)
            return BuiltModel(module=module, preprocessor=own, spec=spec, has_weights=True, class_names=names)
        assert preprocessor is not None, "a model without a tokenizer of its own"
        record = preprocessor.record
        ids = max(record.vocabulary_size or 0, record.pad_id + 1)
        sizes = {"num_classes": len(classes), "vocabulary_size": ids, "pad_id": record.pad_id}
        module = _from_factory(spec, **sizes) if spec.startswith(PREFIX) else build_text_network(spec, **sizes)
    return BuiltModel(module=module, preprocessor=preprocessor, spec=spec, has_weights=spec.startswith(PREFIX))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, each shared one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weights_sha256(module: nn.Module) -> str:
    """Hash of names, dtypes, shapes and bytes of a module's state dict; the same on every device.

    Raises:
        ModelError: the state dict holds something that is neither a tensor nor JSON.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(canonical_json([name, str(value.dtype), list(value.shape)]))
            # Viewed as bytes, because numpy has no bfloat16.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            continue
        try:
            digest.update(canonical_json([name, value]))
        except (TypeError, ValueError) as problem:
            raise ModelError(f"{name} in the state dict is a {type(value).__name__}", "tensors or JSON") from problem
    return digest.hexdigest()


@contextmanager
def _initial_weights(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it also seeds accelerators, whose state is not restored.
        torch.default_generator.manual_seed(rng.generator_seed(seed, "model init"))
        yield


def _from_factory(spec: str, **sizes: int) -> nn.Module:
    factory = resolve(spec, error=ModelError)
    try:
        module = call_with_accepted(factory, **sizes)
    except KdcacheError:
        raise
    except Exception as problem:
        raise ModelError(f"{spec} fails with {describe(problem)}", "a factory that returns a module") from problem
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} returned a {type(module).__name__}", "a torch.nn.Module", "return the model itself")
    return module


def _three_channels(preprocess: Preprocess, input_shape: tuple[int, ...] | None) -> Preprocess:
    """Preprocessing for a network of RGB images: a mean of three channels makes it expand grayscale."""
    channels = len(preprocess.mean) or (input_shape[0] if input_shape else None)
    if channels != 1:
        return preprocess
    return replace(preprocess, mean=(preprocess.mean or (0.0,)) * 3, std=(preprocess.std or (1.0,)) * 3)


def _network_input(spec: str, preprocess: Preprocess, input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    preprocessor = Preprocessor(preprocess)
    if input_shape is not None and len(input_shape) != 3 and preprocessor.has_geometry:
        raise ModelError(
            f"{spec} resizes its inputs, and the dataset's have shape {input_shape}",
            "images of shape (channels, height, width)",
            "leave out --size, or take a model without image weights",
        )
    shape = preprocessor.output_shape(input_shape)
    if shape is None and preprocess.crop is None:
        raise ModelError(
            f"the dataset's images differ in size, and {spec} does not say which it takes",
            "one size for all inputs",
            "give --size PIXELS",
        )
    if shape is None:
        raise ModelError(
            "the dataset's images differ in size, and nothing tells how many channels they have",
            "a mean and a std, one number a channel",
            "give --mean and --std",
        )
    return shape
