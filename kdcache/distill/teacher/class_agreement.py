"""Accuracy of a teacher's first rows, and the class order that would explain the labels better. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.store.records import UNLABELLED

_SHOWN = 8


def accuracy_lines(labels_n: NDArray[np.int64], predicted_n: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Lines on a teacher's first predictions: its accuracy, and a warning where that is no better than
    chance or where its outputs look like the dataset's classes in another order.

    Args:
        labels_n: true classes, (n,).
        predicted_n: the teacher's top classes, (n,).
        classes: names of the dataset's.
    """
    known = labels_n != UNLABELLED
    if not known.any():
        return ["the samples are unlabelled: whether the classes are in the teacher's order cannot be checked"]
    labels_n, predicted_n = labels_n[known], predicted_n[known]
    accuracy = float((labels_n == predicted_n).mean())
    lines = [
        f"teacher accuracy on the first {len(labels_n):,} {'' if known.all() else 'labelled '}samples: {accuracy:.2%}"
    ]
    if len(classes) < 2:
        return lines
    chance = 1 / len(classes)
    permutation, explained = best_permutation(labels_n, predicted_n)
    # Half of the way from chance to 1, which an untrained teacher does not reach.
    permuted = explained >= (1 + chance) / 2 and accuracy < explained / 2
    if accuracy > chance and not permuted:
        return lines
    warning = "warning: " + (
        f"the teacher is no better than chance ({chance:.2%} for {len(classes)} classes)"
        if accuracy <= chance
        else "the teacher's classes look permuted"
    )
    if permuted:
        apart = [(true, output) for true, output in sorted(permutation.items()) if true != output]
        shown = ", ".join(f"{classes[true]} → {classes[output]} (output {output})" for true, output in apart[:_SHOWN])
        warning += (
            f"; with its outputs in another order it would be right on {explained:.2%}: {shown}"
            f"{', …' if len(apart) > _SHOWN else ''}; --class-map FILE gives each class its output"
        )
    else:
        warning += "; check the checkpoint, the preprocessing (--mean, --std, --size) and the order of its classes"
    return [*lines, warning]


def best_permutation(labels_n: NDArray[np.int64], predicted_n: NDArray[np.int64]) -> tuple[dict[int, int], float]:
    """The output of each class that most predictions agree with, and the accuracy of that assignment.

    Pairs of true class and answer are taken by their count, the largest first, each class and each output once. Memory
    grows with the samples, not with the square of the classes.

    Args:
        labels_n: true classes, (n,), n ≥ 1.
        predicted_n: answers, (n,).
    """
    pairs, counts = np.unique(np.stack([labels_n, predicted_n]), axis=1, return_counts=True)
    found: dict[int, int] = {}
    taken: set[int] = set()
    right = 0
    for at in np.argsort(-counts, kind="stable"):
        true, output = int(pairs[0, at]), int(pairs[1, at])
        if true not in found and output not in taken:
            found[true] = output
            taken.add(output)
            right += int(counts[at])
    return found, right / len(labels_n)
