"""A run's network answers for images and texts from outside of its dataset."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.core.command_result import Report
from kdcache.core.commands import PredictArgs
from kdcache.core.errors import DatasetError, ModelError, UsageError
from kdcache.data.dataset import IndexedDataset, Indices
from kdcache.data.folders import IMAGES, TEXTS, FileKind, LeftOut, find_files, printable
from kdcache.data.preprocess import resize
from kdcache.data.raw_input import read_image
from kdcache.models.evaluate import predict_batches
from kdcache.models.from_run import TrainedNetwork, load_trained

STDIN = "-"


class Item(NamedTuple):
    """One input: a file, or a line of stdin, which was read already."""

    name: str
    path: Path | None
    line: bytes = b""


def predict(settings: PredictArgs) -> Report:
    """Let the best checkpoint of a run answer for files, for those in folders, and for lines of stdin.

    Returns:
        `text` is CSV with a row for each input and rank; `data` holds the same, the probabilities unrounded. They are
        at temperature 1, and over all classes, so that those of a few ranks add up to less than 1. Where samples belong
        to any number of classes, each class has a probability of its own.

    Raises:
        UsageError: there is no such run, or an input is not of the kind that it was trained on.
        CheckpointError: the run's checkpoint is missing or damaged.
        DatasetError: an input is missing, empty, unreadable or of another size.
        ModelError: the network answers with something that is no probability.
    """
    trained = load_trained(Path(settings.run))
    if trained.embedding:
        raise UsageError(
            f"the run at {settings.run} answers with a vector",
            "a run on classes",
            "export it, or call it from Python: kdcache.models.from_run.load_trained gives the network",
        )
    _check_kind(trained, settings)
    items = [item for given in settings.inputs for item in _items(given, trained, settings.inputs)]
    inputs = GivenInputs(items, trained, resize=settings.resize_images)
    probabilities_nc = _probabilities(trained, inputs, settings)
    orders = list(np.argsort(-probabilities_nc, axis=1, kind="stable"))
    threshold = 0.5 if settings.threshold is None and trained.multi_label else settings.threshold
    if threshold is None:
        orders = [order[: settings.top] for order in orders]
    else:
        orders = [order[row[order] >= threshold] for order, row in zip(orders, probabilities_nc, strict=True)]
    predictions = [
        {
            "input": item.name,
            "answers": [{"class": trained.classes[at], "probability": float(row[at])} for at in order],
        }
        for item, row, order in zip(items, probabilities_nc, orders, strict=True)
    ]
    return Report({"run": settings.run, "predictions": predictions}, _csv(predictions))


class GivenInputs(IndexedDataset):
    """Inputs without labels, as shared inputs of the kind that a network was trained on.

    Args:
        resize: images to the size of those that it was trained on, where these had one.
    """

    def __init__(self, items: list[Item], trained: TrainedNetwork, *, resize: bool) -> None:
        super().__init__(name="the inputs", split="given", classes=trained.classes)
        self._items, self._resize = items, resize
        self.is_text, self.input_dtype = trained.is_text, trained.input_dtype
        self._shape, self._crops = trained.input_shape, trained.preprocessor.record.crop is not None
        self._mode = "RGB" if _channels(trained) == 3 else "L"

    def __len__(self) -> int:
        return len(self._items)

    def labels(self) -> None:
        return None

    def name_of(self, index: int) -> str:
        """How an input is called: its path, or `-:LINE`."""
        return self._items[index].name

    def fetch(self, indices: Indices) -> tuple[list[Tensor], Tensor]:
        read = self._text if self.is_text else self._image
        return [read(self._items[int(index)]) for index in indices], torch.zeros(len(indices), dtype=torch.int64)

    def _text(self, item: Item) -> Tensor:
        """(bytes,) uint8, UTF-8."""
        try:
            content = item.line if item.path is None else item.path.read_bytes()
            content.decode()
        except OSError as problem:
            raise DatasetError(
                f"{item.name} cannot be read: {problem.strerror or problem}", "a readable text file", "correct the path"
            ) from problem
        except UnicodeDecodeError as problem:
            raise DatasetError(
                f"{item.name} is not UTF-8: {problem}", "text in UTF-8", "convert it, with iconv for example"
            ) from problem
        return torch.from_numpy(np.frombuffer(content, np.uint8).copy())

    def _image(self, item: Item) -> Tensor:
        """(C, H, W) uint8, read as `folder:` reads it."""
        assert item.path is not None, "stdin is refused for images"
        return self._sized(read_image(item.path, self._mode), item.name)

    def _sized(self, image: Tensor, name: str) -> Tensor:
        if self._shape is None or tuple(image.shape[1:]) == self._shape[1:]:
            return image
        height, width = self._shape[1:]
        if self._resize:
            return resize(image, [height, width], "bilinear", antialias=True)
        if self._crops:
            return image
        raise DatasetError(
            f"{name} is {image.shape[1]} pixels high and {image.shape[2]} wide",
            f"{height} high and {width} wide, as the images that the network was trained on",
            "give --resize-images, which brings images to that size, or do it yourself",
        )


def _channels(trained: TrainedNetwork) -> int:
    """Of the images that a network was trained on."""
    if trained.input_shape is not None:
        return trained.input_shape[0]
    return trained.preprocessor.channels or 3  # folders of images are read as RGB


def _check_kind(trained: TrainedNetwork, settings: PredictArgs) -> None:
    """Refuse a run that takes neither images nor texts, and settings that its inputs have no use for."""
    shape, kind = trained.input_shape, f"{trained.input_dtype} of shape {trained.input_shape or '(varying)'}"
    is_image = trained.input_dtype == "uint8" and (shape is None or len(shape) == 3) and _channels(trained) in (1, 3)
    if trained.preprocessor.makes_tokens and not trained.is_text:
        kind, is_image = "token ids that its dataset made", False
    if not trained.is_text and not is_image:
        raise UsageError(
            f"the inputs of {settings.run} are {kind}",
            "a run on texts, or on images (uint8, with 1 or 3 channels)",
            "call the network from Python: kdcache.models.from_run.load_trained gives it",
        )
    if settings.resize_images and (trained.is_text or shape is None):
        what = "texts" if trained.is_text else "images of differing sizes, which its own preprocessing brings to one"
        raise UsageError(
            f"--resize-images is given, and {settings.run} was trained on {what}", "images of one size", "leave it out"
        )


def _items(given: str, trained: TrainedNetwork, all_given: tuple[str, ...]) -> Iterator[Item]:
    """The inputs that one argument names."""
    wanted = "texts" if trained.is_text else "images"
    if not given:  # for Path it is the current folder
        raise UsageError(
            "an input has an empty name", "a file, a folder, or - for stdin", "see whether a variable is unset"
        )
    if given == STDIN:
        if not trained.is_text or all_given.count(STDIN) > 1:
            what = (
                f"is given {all_given.count(STDIN)} times" if trained.is_text else "is given, and the run takes images"
            )
            raise UsageError(f"- (stdin) {what}", "one -, for a run on texts", "name files or folders instead")
        yield from _lines()
        return
    path = Path(given)
    if os.path.isdir(path):  # unlike Path.is_dir, also for names that no disk could hold
        yield from _files_in(path, TEXTS if trained.is_text else IMAGES)
        return
    if not os.path.exists(path):
        raise DatasetError(f"there is no {printable(path)}", "a file, a folder, or - for stdin", "correct the path")
    if (path.suffix.lower() in TEXTS.suffixes) != trained.is_text:
        raise UsageError(
            f"{printable(path)} is {'not a' if trained.is_text else 'a'} .txt file, and the run takes {wanted}",
            "text files (.txt)" if trained.is_text else "image files",
            "name others, or a run that takes such files",
        )
    yield Item(printable(path), path)


def _files_in(folder: Path, kind: FileKind) -> Iterator[Item]:
    """The files that `folder:` and `text-folder:` take; one that is named itself may be another image."""
    left_out = LeftOut()
    paths = find_files(str(folder), kind, left_out)
    left_out.log(printable(folder))
    if not paths:
        raise DatasetError(
            f"{printable(folder)} holds no {kind.name}",
            f"files that end in {', '.join(kind.suffixes)}",
            "name another folder",
        )
    for path in paths:
        yield Item(printable(path), Path(path))


def _lines() -> Iterator[Item]:
    """The lines of stdin, an empty one too, so that the n-th answer is the n-th line's."""
    try:
        content: bytes = b"" if sys.stdin is None else sys.stdin.buffer.read()  # None where it was closed
    except OSError as problem:
        raise DatasetError(
            f"stdin cannot be read: {problem.strerror or problem}", "one text a line", "pipe some into it"
        ) from problem
    # Not str.splitlines, which also ends lines at form feeds and at U+2028.
    lines = content.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise DatasetError("stdin holds no texts", "one text a line", "pipe some into it")
    for number, line in enumerate(lines, start=1):
        yield Item(f"{STDIN}:{number}", None, line.removesuffix(b"\r"))


def _probabilities(trained: TrainedNetwork, inputs: GivenInputs, settings: PredictArgs) -> NDArray[np.float64]:
    """The softmax of the logits at temperature 1, or with several classes per sample the sigmoid, (inputs, classes)."""
    found_nc = np.empty((len(inputs), len(trained.classes)))
    for batch, on_device in predict_batches(
        trained.module, inputs, preprocess=trained.preprocessor, config=settings, title="predict", unit="inputs"
    ):
        logits_bc = on_device.cpu()
        wrong = np.flatnonzero(~torch.isfinite(logits_bc).all(dim=1).numpy())
        if len(wrong):
            raise ModelError(
                f"a logit of {inputs.name_of(int(batch.indices[wrong[0]]))} is not finite",
                "finite logits",
                "use --amp off, or see in its metrics.jsonl whether the training diverged",
            )
        # float64 has room for what softmax adds up; the logits are rounded by the network's own precision.
        logits_bc = logits_bc.float().double()
        found_bc = logits_bc.sigmoid() if trained.multi_label else logits_bc.softmax(dim=1)
        found_nc[batch.indices.numpy()] = found_bc.numpy()
    return found_nc


def _csv(predictions: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("input", "rank", "class", "probability"))
    for prediction in predictions:
        for rank, each in enumerate(prediction["answers"], start=1):
            writer.writerow((prediction["input"], rank, each["class"], f"{each['probability']:.6g}"))
    return text.getvalue().removesuffix("\n")  # the command line ends it
