"""Cards of single samples: image or text, and class probabilities."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.analysis.distributions import kl_divergence, negative_log_likelihood, softmax
from kdcache.apps.report.html import Card, ClassProbability
from kdcache.data.dataset import IndexedDataset

# Longer side of an image in pixels; a larger image is scaled down to keep the page small.
LARGEST_SIDE = 160
# Length of an excerpt in characters.
EXCERPT = 280


def disagreement(
    student_nc: NDArray[Any], teacher_nc: NDArray[Any] | None, labels_n: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Score of each sample in nats, (n,): KL(teacher ‖ student), or the student's cross entropy without a teacher."""
    if teacher_nc is None:
        return negative_log_likelihood(student_nc, labels_n)
    return kl_divergence(teacher_nc, student_nc)


def cards(
    dataset: IndexedDataset,
    student_nc: NDArray[Any],
    teacher_nc: NDArray[Any] | None,
    labels_n: NDArray[np.int64],
    shown: int,
) -> list[Card]:
    """Cards of the samples with the largest score, in descending order.

    Args:
        student_nc: Logits of the student for all samples, (n, classes).
        teacher_nc: Logits of the teacher, (n, classes); None without a teacher.
        labels_n: True classes, (n,).
        shown: Largest number of cards.
    """
    scores = disagreement(student_nc, teacher_nc, labels_n)
    order = np.argsort(-scores, kind="stable")[:shown]
    inputs = dataset.shared_inputs(order)
    what = "loss" if teacher_nc is None else "KL"
    found = []
    for index, value in zip(order.tolist(), inputs, strict=True):
        true = int(labels_n[index])
        student = softmax(student_nc[index])
        teacher = None if teacher_nc is None else softmax(teacher_nc[index])
        known = student if teacher is None else teacher
        named = dict.fromkeys([true, int(student.argmax()), int(known.argmax())])
        if len(named) == 1:  # all agree on the top class: the runner-up shows where the rest of the probability is
            named |= dict.fromkeys(np.argsort(-np.maximum(student, known), kind="stable")[:2].tolist())
        found.append(
            Card(
                index=index,
                true=dataset.classes[true],
                png=None if dataset.is_text else as_png(value),
                text=excerpt(value) if dataset.is_text else None,
                probabilities=[
                    ClassProbability(
                        label=dataset.classes[at],
                        student=float(student[at]),
                        teacher=None if teacher is None else float(teacher[at]),
                        is_true=at == true,
                    )
                    for at in named
                ],
                score=f"{what} {scores[index]:.2f}" if scores[index] >= 0.01 else f"{what} {scores[index]:.2g}",
            )
        )
    return found


def as_png(value: Tensor) -> bytes | None:
    """PNG of an image, no larger than `LARGEST_SIDE`; None for other inputs.

    Args:
        value: Shared input; an image is uint8, (1 or 3, height, width).
    """
    from PIL import Image

    if value.ndim != 3 or len(value) not in (1, 3) or str(value.dtype) != "torch.uint8" or not value.numel():
        return None
    pixels = value.numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return file.getvalue()


def excerpt(value: Tensor) -> str:
    """The beginning of a text.

    Args:
        value: Text as UTF-8, (bytes,).
    """
    text = " ".join(bytes(value.numpy()).decode(errors="replace").split())
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT].rstrip()} …"
