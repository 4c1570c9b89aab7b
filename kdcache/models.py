"""Names to modules and the preprocessing that belongs to them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from kdcache import keys
from kdcache.cache.manifest import Preprocess
from kdcache.errors import KdcacheError, ModelError
from kdcache.networks import NETWORKS
from kdcache.plugins import PREFIX, call_with_accepted, describe, did_you_mean, require_extra, resolve
from kdcache.preprocess import INTERPOLATIONS, Preprocessor
from kdcache.records import canonical_json


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A module and how its inputs are made.

    Attributes:
        module: on the CPU, float32, in training mode as it was built.
        preprocess: from a shared input to what the module takes.
        has_weights: whether the spec brought weights, so that the module may teach as it is. A `py:` factory answers
            for its own; what it returns is taken as trained.
    """

    module: nn.Module
    preprocess: Preprocess
    spec: str
    has_weights: bool


def build_model(
    spec: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...] | None,
    seed: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    default: Preprocess | None = None,
    replace_head: bool = False,
) -> BuiltModel:
    """Build a model from its spec.

    Args:
        spec: a name of `NETWORKS`, `torchvision:NAME[@WEIGHTS]`, `timm:NAME[.TAG]` or `py:package.module:factory`.
        num_classes: classes of the dataset. Weights keep the head they were trained with, unless `replace_head`.
        input_shape: of one shared input; None where samples differ in size.
        seed: from which the initial weights are drawn; global generators are left as they were.
        mean: per channel, instead of what the weights or the dataset bring; goes with `std`.
        size: side of the square that inputs are resized and cropped to, in pixels, instead of what the weights bring.
        default: the preprocessing of a module that brings none; None scales uint8 to [0, 1] and no more.
        replace_head: draw a new head of `num_classes` where that of the weights has another count, to train it.

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
    own: Preprocess | None = None
    module: nn.Module | None = None
    with _initial_weights(seed):
        if kind == "torchvision":
            module, own = _torchvision(spec, name, num_classes, replace_head)
        elif kind == "timm":
            module, own = _timm(spec, name, num_classes, replace_head, size)
        elif spec.startswith(PREFIX):
            module = _from_factory(spec, num_classes)
        elif spec not in NETWORKS:
            raise ModelError(
                f"there is no model {spec!r}",
                f"{', '.join(NETWORKS)}, torchvision:NAME, timm:NAME or py:package.module:factory",
                did_you_mean(spec, list(NETWORKS)),
            )
        preprocess = own or preprocess
        try:
            if mean is not None and std is not None:
                preprocess = replace(preprocess, mean=mean, std=std)
            if size is not None:
                preprocess = replace(preprocess, resize=size, crop=size)
        except ValueError as problem:
            raise ModelError(f"the preprocessing of {spec} makes no sense: {problem}") from problem
        if kind in ("torchvision", "timm"):
            preprocess = _three_channels(preprocess, input_shape)
        shape = _network_input(spec, preprocess, input_shape)
        if module is None:
            module = NETWORKS[spec](shape, num_classes)
    trained = own is not None or spec.startswith(PREFIX)
    return BuiltModel(module=module, preprocess=preprocess, spec=spec, has_weights=trained)


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
        torch.default_generator.manual_seed(keys.generator_seed(seed, "model init"))
        yield


def _torchvision(spec: str, name: str, num_classes: int, replace_head: bool) -> tuple[nn.Module, Preprocess | None]:
    name, at, weights_name = name.partition("@")
    # The classifiers only: list_models without a module also names detectors and segmenters.
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ModelError(f"torchvision has no classifier {name!r}", "one it lists", did_you_mean(name, names))
    if not at:
        return torchvision.models.get_model(name, num_classes=num_classes), None
    choices = torchvision.models.get_model_weights(name)
    if weights_name not in choices.__members__:
        raise ModelError(
            f"torchvision's {name} has no weights {weights_name!r}",
            f"one of {', '.join(choices.__members__)}",
            f"torchvision:{name}@DEFAULT takes its best ones",
        )
    weights = choices[weights_name]
    progress = sys.stderr.isatty()
    try:
        if not replace_head or len(weights.meta["categories"]) == num_classes:
            module = torchvision.models.get_model(name, weights=weights, progress=progress)
        else:
            module = torchvision.models.get_model(name, num_classes=num_classes)
            _load_body(spec, module, weights.get_state_dict(progress=progress, check_hash=True))
    except KdcacheError:
        raise
    except (OSError, RuntimeError, ValueError) as problem:
        raise _no_weights(spec, problem) from problem
    presets = weights.transforms()
    return module, Preprocess(
        resize=presets.resize_size[0],
        crop=presets.crop_size[0],
        interpolation=presets.interpolation.value,
        antialias=bool(presets.antialias),
        mean=tuple(presets.mean),
        std=tuple(presets.std),
    )


def _load_body(spec: str, module: nn.Module, state: dict[str, Any]) -> None:
    """Load everything but the weights whose shape the number of classes changed."""
    own = module.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    left_out = (own.keys() | state.keys()) - fitting.keys()
    if not fitting or any(key not in own or key not in state for key in left_out):
        raise ModelError(
            f"the head of {spec} cannot be replaced: {', '.join(sorted(left_out)[:4])} are not both in the weights "
            "and in the model",
            "a model that differs from its weights in the head only",
            "take another model",
        )
    module.load_state_dict(fitting, strict=False)


def _timm(
    spec: str, name: str, num_classes: int, replace_head: bool, size: int | None
) -> tuple[nn.Module, Preprocess | None]:
    timm = require_extra("timm", "timm", spec)
    architecture, _, tag = name.partition(".")
    names = timm.list_models()
    if architecture not in names:
        raise ModelError(f"timm has no model {architecture!r}", "one it lists", did_you_mean(architecture, names))
    if not tag:
        return timm.create_model(architecture, pretrained=False, num_classes=num_classes), None
    tags = timm.list_pretrained(f"{architecture}.*")
    if name not in tags:
        raise ModelError(f"timm has no weights {name!r}", f"{architecture} with a tag", did_you_mean(name, tags))
    head = {"num_classes": num_classes} if replace_head else {}
    try:
        module = timm.create_model(name, pretrained=True, **head)
    except Exception as problem:  # the hub's client raises errors of several libraries
        raise _no_weights(spec, problem) from problem
    return module, _timm_preprocess(spec, timm.data.resolve_model_data_config(module), size)


def _timm_preprocess(spec: str, config: dict[str, Any], size: int | None) -> Preprocess:
    """timm's data config as a record. Geometry that a record cannot say is refused, unless `size` replaces it."""
    _, height, width = config["input_size"]
    interpolation = config["interpolation"]
    if size is None and (height != width or config["crop_mode"] != "center" or interpolation not in INTERPOLATIONS):
        raise ModelError(
            f"{spec} was trained with input size {height}×{width}, crop mode {config['crop_mode']!r} and "
            f"interpolation {interpolation!r}",
            f"a square, crop mode 'center' and one of {', '.join(INTERPOLATIONS)}",
            f"give --size {max(height, width)} to accept resizing the shorter side and cropping the centre",
        )
    return Preprocess(
        resize=int(height / config["crop_pct"]),
        crop=height,
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bilinear",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _from_factory(spec: str, num_classes: int) -> nn.Module:
    factory = resolve(spec, error=ModelError)
    try:
        module = call_with_accepted(factory, num_classes=num_classes)
    except KdcacheError:
        raise
    except Exception as problem:
        raise ModelError(f"{spec} fails with {describe(problem)}", "a factory that returns a module") from problem
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} returned a {type(module).__name__}", "a torch.nn.Module", "return the model itself")
    return module


def _no_weights(spec: str, problem: Exception) -> ModelError:
    return ModelError(
        f"the weights of {spec} could not be fetched: {type(problem).__name__}: {problem}",
        "a connection, or weights fetched before",
        "check the connection, or leave the weights out of the name and give a file with --checkpoint",
    )


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
