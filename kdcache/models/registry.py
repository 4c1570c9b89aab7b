"""Names to modules and the preprocessing that belongs to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kdcache.core import rng
from kdcache.core.errors import KdcacheError, ModelError
from kdcache.core.json_records import canonical_json
from kdcache.core.plugins import PREFIX, call_with_accepted, describe, did_you_mean, resolve
from kdcache.data.preprocess import Preprocessor
from kdcache.models.cnn import NETWORKS
from kdcache.models.huggingface import class_names, image_classifier, load_classifier
from kdcache.models.pretrained import Published, timm_model, torchvision_model
from kdcache.models.rnn import TEXT_NETWORKS, build_text_network, check_text_network
from kdcache.store.manifest import OutputRecord, Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A module and how its inputs are made.

    Attributes:
        module: on the CPU, float32, in training mode as it was built.
        preprocessor: from a shared input to what the module takes.
        has_weights: whether the spec brought weights, so that the module may teach as it is. A `py:` factory answers
            for its own; what it returns is taken as trained.
        outputs: of a teacher: how logits are made of what it returns.
        class_names: names of the module's outputs, where its weights bring some; None where they do not.
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
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    default: Preprocess | None = None,
    replace_head: bool = False,
    fits: Callable[[nn.Module], bool] | None = None,
) -> BuiltModel:
    """Build a model from its spec.

    Args:
        spec: a name of `NETWORKS`, `torchvision:NAME[@WEIGHTS]`, `timm:NAME[.TAG]`, `hf:NAME` of an image classifier
            or `py:package.module:factory`.
        num_classes: classes of the dataset. Weights keep the head they were trained with, unless `replace_head`.
        input_shape: of one shared input; None where samples differ in size.
        seed: from which the initial weights are drawn; global generators are left as they were.
        mean: per channel, instead of what the weights or the dataset bring; goes with `std`.
        size: side of the square that inputs are resized and cropped to, in pixels, instead of what the weights bring.
        resize: pixels of the shorter side after resizing, instead of `size`.
        crop: pixels of the square cropped from the centre, instead of `size`.
        default: the preprocessing of a module that brings none; None scales uint8 to [0, 1] and no more.
        replace_head: draw a new head of `num_classes` where that of the weights has another count, to train it.
        fits: whether a checkpoint that will be loaded fits a module: published weights are then not fetched.

    Raises:
        ModelError: no such model or weights, a failed download, a factory that fails, or inputs that cannot fit.
        MissingExtra: `timm:` without timm.
    """
    if (mean is None) != (std is None):
        raise ModelError(
            f"mean is {mean}, std is {std}", "both or neither", "give --mean and --std with one number a channel"
        )
    kind, _, name = spec.partition(":")
    preprocess = default or Preprocess()
    published = Published()
    module: nn.Module | None = None
    geometry_given = size is not None or crop is not None
    with _initial_weights(seed):
        if kind == "torchvision":
            published = torchvision_model(spec, name, num_classes, replace_head, fits)
        elif kind == "timm":
            published = timm_model(spec, name, num_classes, replace_head, fits, size or crop)
        elif kind == "hf":
            published = image_classifier(spec, name, num_classes, replace_head, fits, check=not geometry_given)
        elif spec.startswith(PREFIX):
            module = _from_factory(spec, num_classes=num_classes)
        elif spec not in NETWORKS:
            names = [*NETWORKS, *TEXT_NETWORKS]
            raise ModelError(
                f"there is no model {spec!r}",
                f"{', '.join(names)}, torchvision:NAME, timm:NAME, hf:NAME or py:package.module:factory",
                did_you_mean(kind, names),
            )
        module = module or published.module
        own = published.preprocess
        preprocess = own or preprocess
        try:
            if mean is not None and std is not None:
                preprocess = replace(preprocess, mean=mean, std=std)
            if size is not None:
                preprocess = replace(preprocess, resize=size, crop=size, stretch=False)
            if resize is not None:
                preprocess = replace(preprocess, resize=resize, stretch=False)
            if crop is not None:
                preprocess = replace(preprocess, crop=crop)
            if (preprocess.crop or 0) > (preprocess.resize or preprocess.crop or 0):
                raise ModelError(
                    f"the preprocessing of {spec} resizes to {preprocess.resize} pixels and crops {preprocess.crop}",
                    "a crop that lies within the image",
                    "give --resize and --crop, or --size, which sets both",
                )
        except ModelError:
            raise
        except ValueError as problem:
            raise ModelError(f"the preprocessing of {spec} makes no sense: {problem}") from problem
        if kind in ("torchvision", "timm", "hf"):
            preprocess = _three_channels(preprocess, input_shape)
        shape = _network_input(spec, preprocess, input_shape)
        if module is None:
            module = NETWORKS[spec](shape, num_classes)
    return BuiltModel(
        module=module,
        preprocessor=Preprocessor(preprocess),
        spec=spec,
        has_weights=own is not None or spec.startswith(PREFIX),
        class_names=published.class_names,
    )


def reads_sequences(spec: str) -> bool:
    """Whether a spec names a network that takes token ids and nothing else."""
    return spec.partition(":")[0] in TEXT_NETWORKS


def check_reader(spec: str, *, is_text: bool) -> None:
    """Refuse a spec whose model cannot take texts, or token ids, before a vocabulary is built for it.

    Raises:
        ModelError: it takes other inputs, or its options cannot be.
    """
    name = spec.partition(":")[0]
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
    """Whether a spec names a network that brings its tokenizer."""
    return spec.startswith("hf:")


def build_text_model(
    spec: str,
    *,
    classes: tuple[str, ...],
    seed: int,
    preprocessor: Preprocessor | None,
    max_tokens: int | None = None,
    replace_head: bool = False,
) -> BuiltModel:
    """Build a model that takes token ids, as `build_model` does the others.

    Args:
        spec: a name of `TEXT_NETWORKS`, with or without options, `hf:NAME` or `py:package.module:factory`, which is
            called with those of `num_classes`, `vocabulary_size` and `pad_id` that it takes.
        preprocessor: of a model that brings none; of `hf:`, what a checkpoint of it was trained with, if there is one.
        max_tokens: of `hf:`, instead of what it takes.

    Raises:
        ModelError, MissingExtra: as for `build_model`, and where the model takes no token ids.
    """
    with _initial_weights(seed):
        if has_own_tokenizer(spec):
            name = spec.partition(":")[2]
            module, own = load_classifier(spec, name, classes, replace_head=replace_head, max_tokens=max_tokens)
            if preprocessor is not None and preprocessor.record != own.record:
                raise ModelError(
                    f"{spec} has another tokenizer now than the checkpoint was trained with: {own.record} instead of "
                    f"{preprocessor.record}",
                    "the tokenizer that it was trained with",
                    "give the folder its tokenizer back; the run's tokenizer.json is a copy of it",
                )
            names = class_names(module.get_submodule("model").config)
            return BuiltModel(module=module, preprocessor=own, spec=spec, has_weights=True, class_names=names)
        assert preprocessor is not None, "of a model that brings none"
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
            # Reinterpreted as bytes, because numpy knows no bfloat16.
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
        # Not torch.manual_seed: that one seeds the accelerators too, and they would stay so.
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
    """Let grayscale into a network that takes RGB: a mean of three channels makes the preprocessor expand it."""
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
