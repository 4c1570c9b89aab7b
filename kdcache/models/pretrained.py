"""Published networks, and the weights and the preprocessing that come with them: torchvision's and timm's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from kdcache.core.errors import KdcacheError, ModelError
from kdcache.core.plugins import describe, did_you_mean, require_extra
from kdcache.data.preprocess import INTERPOLATIONS
from kdcache.store.records import Preprocess


class Published(NamedTuple):
    """A network, the preprocessing that its weights were trained with, and the names of their classes, if any."""

    module: nn.Module | None = None
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] | None = None


def torchvision_model(
    spec: str, name: str, num_classes: int, replace_head: bool, fits: Callable[[nn.Module], bool] | None
) -> Published:
    """A classifier of torchvision.

    Args:
        fits: whether a checkpoint that will be loaded fits a network. Nothing is fetched then: of the weights that the
            spec names only the preprocessing is taken, and with a head for as many classes, their names.

    Raises:
        ModelError: no such network or weights, or a failed download.
    """
    # Here, because it takes longer to import than torch itself.
    import torchvision  # type: ignore[import-untyped]

    name, at, weights_name = name.partition("@")
    # The classifiers only: list_models without a module also names detectors and segmenters.
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ModelError(f"torchvision has no classifier {name!r}", "one it lists", did_you_mean(name, names))
    if not at:
        return Published(_constructed(spec, lambda: torchvision.models.get_model(name, num_classes=num_classes)))
    choices = torchvision.models.get_model_weights(name)
    if weights_name not in choices.__members__:
        raise ModelError(
            f"torchvision's {name} has no weights {weights_name!r}",
            f"one of {', '.join(choices.__members__)}",
            f"torchvision:{name}@DEFAULT takes its best ones",
        )
    weights = choices[weights_name]
    categories = tuple(weights.meta["categories"])
    progress = sys.stderr.isatty()
    try:
        if fits is not None:
            module, count = fitting_head(
                lambda count: torchvision.models.get_model(name, num_classes=count), fits, num_classes, len(categories)
            )
        elif not replace_head or len(categories) == num_classes:
            count = len(categories)
            module = torchvision.models.get_model(name, weights=weights, progress=progress)
        else:
            count = num_classes
            module = torchvision.models.get_model(name, num_classes=num_classes)
            _load_body(spec, module, weights.get_state_dict(progress=progress, check_hash=True))
    except KdcacheError:
        raise
    except (OSError, RuntimeError, ValueError) as problem:
        raise no_weights(spec, problem) from problem
    presets = weights.transforms()
    preprocess = Preprocess(
        resize=presets.resize_size[0],
        crop=presets.crop_size[0],
        interpolation=presets.interpolation.value,
        antialias=bool(presets.antialias),
        mean=tuple(presets.mean),
        std=tuple(presets.std),
    )
    return Published(module, preprocess, categories if count == len(categories) else None)


def fitting_head(
    build: Callable[[int], nn.Module], fits: Callable[[nn.Module], bool], num_classes: int, own_classes: int
) -> tuple[nn.Module, int]:
    """A network with a head for the dataset's classes, or for those of its weights where a checkpoint fits only that.

    Returns:
        The network and the number of classes of its head.
    """
    module = build(num_classes)
    if own_classes != num_classes and not fits(module) and fits(own := build(own_classes)):
        return own, own_classes
    return module, num_classes


def _constructed(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as problem:  # some refuse what they cannot be, each in its own way
        raise ModelError(f"{spec} cannot be built: {describe(problem)}", "a network that can be built") from problem


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
    spec: str,
    name: str,
    num_classes: int,
    replace_head: bool,
    fits: Callable[[nn.Module], bool] | None,
    size: int | None,
) -> Published:
    """A network of timm; arguments as for `torchvision_model`.

    Args:
        size: Side in pixels of the crop that replaces that of the weights.
    """
    timm = require_extra("timm", "timm", spec)
    architecture, _, tag = name.partition(".")
    names = timm.list_models()
    if architecture not in names:
        raise ModelError(f"timm has no model {architecture!r}", "one it lists", did_you_mean(architecture, names))
    if not tag:
        return Published(
            _constructed(spec, lambda: timm.create_model(architecture, pretrained=False, num_classes=num_classes))
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if name not in tags:
        raise ModelError(f"timm has no weights {name!r}", f"{architecture} with a tag", did_you_mean(name, tags))
    head = {"num_classes": num_classes} if replace_head else {}
    try:
        if fits is not None:
            own_classes = timm.get_pretrained_cfg(name).num_classes
            module, _ = fitting_head(
                lambda count: timm.create_model(name, pretrained=False, num_classes=count),
                fits,
                num_classes,
                own_classes,
            )
        else:
            module = timm.create_model(name, pretrained=True, **head)
    except Exception as problem:  # the hub's client raises errors of several libraries
        raise no_weights(spec, problem) from problem
    return Published(module, _timm_preprocess(spec, timm.data.resolve_model_data_config(module), size))


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
