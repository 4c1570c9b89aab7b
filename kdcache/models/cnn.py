"""Small networks built from an input shape and a number of classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.core.errors import ModelError


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers: 206,922 parameters for MNIST, and at home with 8×8 digits.

    Args:
        input_shape: Shape (C, H, W) with H and W of at least 4.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = _image_shape("cnn", input_shape, smallest=4)
        pooled = (min(7, height // 4), min(7, width // 4))
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            # Identity where it can be: the adaptive pool has no deterministic backward on CUDA.
            nn.Identity() if pooled == (height // 4, width // 4) else nn.AdaptiveAvgPool2d(pooled),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * pooled[0] * pooled[1], 128), nn.ReLU(), nn.Linear(128, num_classes)
        )

    def forward(self, inputs_bchw: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        return cast(Tensor, self.classifier(self.features(inputs_bchw)))


class MLP(nn.Module):
    """One hidden layer of 128. Takes inputs of any shape."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        features = torch.Size(input_shape).numel()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, ...) to logits (B, classes)."""
        return cast(Tensor, self.layers(inputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, inputs_bchw: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(inputs_bchw)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(inputs_bchw))


class CifarResNet(nn.Module):
    """The residual network for 32×32 images on which the distillation literature reports (He et al. 2016, section 4.2).

    Args:
        input_shape: Shape (C, H, W) with H and W of at least 4; the stages have full, half and quarter resolution.
        depth: Number of layers with weights along the main path, 6n + 2.
        widths: Channels of the first convolution and of the three stages.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, *, depth: int, widths: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        channels, _, _ = _image_shape(f"resnet{depth}", input_shape, smallest=4)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        for stage, (channels_in, channels_out) in enumerate(pairwise(widths)):
            blocks = [BasicBlock(channels_in, channels_out, stride=1 if stage == 0 else 2)]
            blocks += [BasicBlock(channels_out, channels_out, stride=1) for _ in range((depth - 2) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs_bchw: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        features_bchw = self.stages(functional.relu(self.bn1(self.conv1(inputs_bchw))))
        return cast(Tensor, self.fc(features_bchw.mean((2, 3))))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *options: Any) -> None:
        """Take the names that the distillation literature's code has for these layers too."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + _own_name(name.removeprefix(prefix))] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *options)


def _own_name(name: str) -> str:
    """`layer1.0.downsample.0.weight` as `stages.0.0.shortcut.0.weight`, and `linear` as `fc`."""
    name = re.sub(r"^layer([1-3])\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    name = re.sub(r"^(stages\.\d+\.\d+)\.downsample\.", r"\1.shortcut.", name)
    return re.sub(r"^linear\.", "fc.", name)


def _image_shape(name: str, input_shape: tuple[int, ...], *, smallest: int) -> tuple[int, int, int]:
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ModelError(
            f"{name} was asked to take inputs of shape {input_shape}",
            f"images of shape (channels, height, width), at least {smallest} pixels a side",
            "take the mlp, which takes any shape, or give a larger --size",
        )
    channels, height, width = input_shape
    return channels, height, width


def _cifar_resnet(depth: int, *widths: int) -> Callable[[tuple[int, ...], int], nn.Module]:
    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        first, one, two, three = widths
        return CifarResNet(input_shape, num_classes, depth=depth, widths=(first, one, two, three))

    return build


# Name to factory (input_shape after preprocessing, num_classes) -> module.
NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "cnn": SmallCNN,
    "mlp": MLP,
    "resnet20": _cifar_resnet(20, 16, 16, 32, 64),
    "resnet56": _cifar_resnet(56, 16, 16, 32, 64),
    "resnet110": _cifar_resnet(110, 16, 16, 32, 64),
    "resnet8x4": _cifar_resnet(8, 32, 64, 128, 256),
    "resnet32x4": _cifar_resnet(32, 32, 64, 128, 256),
}
