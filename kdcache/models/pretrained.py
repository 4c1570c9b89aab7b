"""Published networks, and the weights and the preprocessing that come with them: torchvision's and timm's."""

from __future__ import annotations

import sys
from typing import Any

import torchvision  # type: ignore[import-untyped]
from torch import nn

from kdcache.core.errors import KdcacheError, ModelError
from kdcache.core.plugins import did_you_mean, require_extra
from kdcache.data.preprocess import INTERPOLATIONS
from kdcache.store.manifest import Preprocess


def torchvision_model(
    spec: str, name: str, num_classes: int, replace_head: bool
) -> tuple[nn.Module, Preprocess | None]:
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
        raise no_weights(spec, problem) from problem
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


def timm_model(
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
        raise no_weights(spec, problem) from problem
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


def no_weights(spec: str, problem: Exception) -> ModelError:
    return ModelError(
        f"the weights of {spec} could not be fetched: {type(problem).__name__}: {problem}",
        "a connection, or weights fetched before",
        "check the connection, or leave the weights out of the name and give a file with --checkpoint",
    )
