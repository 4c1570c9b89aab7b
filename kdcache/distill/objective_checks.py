"""Which objectives suit a student's data, its cache and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdcache.core.config import StudentConfig
from kdcache.core.errors import UsageError
from kdcache.core.progress import log
from kdcache.data.dataset import IndexedDataset
from kdcache.distill.objective import LOSSES, ObjectiveSpec
from kdcache.models.distributed import Processes
from kdcache.store.encodings.base import Encoding, chosen_temperature
from kdcache.store.manifest import Manifest
from kdcache.store.records import NONE, ViewRecipe


def check_encoding(encoding: Encoding, specs: Sequence[ObjectiveSpec], config: StudentConfig) -> None:
    """Refuse an encoding that lacks what the objective needs.

    Args:
        specs: Terms of the objective; empty for kd and cross entropy.

    Raises:
        UsageError: a term needs whole rows, or a temperature that is not stored; or `tail` has no effect.
    """
    if encoding.dense:
        if config.tail != "other":
            raise UsageError(
                f"--tail is {config.tail}, and the cache holds {encoding.spec}, which stores every class",
                "a topk cache, whose other classes are the tail",
                "leave out --tail",
            )
        return
    temperatures = [config.temperature]
    if specs:
        temperatures = [spec.settings["temperature"] for spec in specs if spec.name == "kd"]
    if whole := [spec.name for spec in specs if spec.loss.whole_rows]:
        raise UsageError(
            f"the objective {whole[0]} compares all classes, and the cache holds {encoding.spec}",
            "an encoding that stores every class",
            "use kd, or dump with --encoding float16 or quantized:8",
        )
    for temperature in temperatures:
        chosen_temperature(encoding, temperature)


def with_default_objective(config: StudentConfig, manifest: Manifest) -> StudentConfig:
    """The settings with the objective `cosine`, where a cache holds embeddings and none is given.

    Raises:
        UsageError: the weight of the labels is given, which embeddings do not have.
    """
    if not manifest.is_embedding or not config.distill or config.objective:
        return config
    if config.alpha != StudentConfig().alpha:
        raise UsageError(
            f"--alpha {config.alpha:g} weighs the teacher against labels, and the cache holds embeddings",
            "no --alpha: the teacher's vectors are all that there is to learn",
            "leave it out",
        )
    return replace(config, objective=("cosine",))


def check_kind_of_labels(specs: Sequence[ObjectiveSpec], dataset: IndexedDataset, recipe: ViewRecipe) -> None:
    """Refuse objectives of one class per sample where there are several, and the other way round; and objectives of
    classes where the teacher answers with a vector.

    Raises:
        UsageError: an objective does not suit the labels, or multi-label inputs are mixed.
    """
    if dataset.is_embedding:
        if of_classes := [spec.name for spec in specs if not spec.loss.features]:
            raise UsageError(
                f"--objective {of_classes[0]} compares classes, and the cache holds embeddings",
                f"one of {', '.join(name for name, each in LOSSES.items() if each.features)}",
                "leave it out for cosine",
            )
        return
    kinds, several = {False: "one class", True: "any number of classes"}, dataset.multi_label
    for spec in specs:
        if not spec.loss.features and spec.loss.multi_label != several:
            fitting = [name for name, each in LOSSES.items() if each.features or each.multi_label == several]
            raise UsageError(
                f"--objective {spec.name} is for samples of {kinds[not several]}, and those of {dataset.name} have "
                f"{kinds[several]}",
                f"one of {', '.join(fitting)}",
                "softmax makes classes exclude each other; binary_kd looks at each alone",
            )
    if dataset.multi_label and recipe.mix != NONE:
        raise UsageError(
            f"the samples of {dataset.name} have any number of classes, and inputs are mixed ({recipe.mix})",
            "inputs that are not mixed",
        )


def check_unlabelled(
    labelled: int, count: int, specs: Sequence[ObjectiveSpec], config: StudentConfig, recipe: ViewRecipe
) -> None:
    """Refuse what cannot be trained on samples of which only some are labelled.

    Args:
        labelled: Labelled samples.
        count: All samples.

    Raises:
        UsageError: an objective needs labels that are not there; inputs are mixed.
    """
    found = f"{count - labelled:,} of {count:,} samples are unlabelled"
    if recipe.mix != NONE:
        raise UsageError(f"{found}, and inputs are mixed ({recipe.mix})", "labels of both parts of a mixed input")
    if one_label := [spec.name for spec in specs if spec.loss.one_label]:
        raise UsageError(
            f"{found}, and --objective {one_label[0]} needs the label of each", "labels, or another objective", "use kd"
        )
    if labelled:
        log(f"{found}: the loss of the labels is a mean over the others")
        return
    if not config.distill:
        raise UsageError(f"{found}, and --no-distill trains on labels alone", "labels", "leave out --no-distill")
    if not specs and config.alpha < 1:
        raise UsageError(
            f"{found}, and --alpha {config.alpha:g} weighs labels by {1 - config.alpha:g}",
            "the teacher alone",
            "give --alpha 1",
        )
    if needing := [spec.name for spec in specs if spec.loss.needs_labels]:
        raise UsageError(
            f"{found}, and --objective {needing[0]} needs labels", "objectives of the teacher alone", "leave it out"
        )


def check_views_per_sample(config: StudentConfig, different: int, processes: Processes) -> None:
    """Refuse several views of a sample in a batch where there are not so many, or where the batch cannot hold them.

    Args:
        different: Views that the turns of the first epoch have.

    Raises:
        UsageError: as above; several processes train together.
    """
    turns = config.views_per_sample
    if turns == 1:
        return
    if different < turns:
        raise UsageError(
            f"--views-per-sample is {turns}, and an epoch has {different} of the cache's views",
            "as many different views",
            "dump more views (--add-views), or leave out --view-schedule fixed",
        )
    if config.batch_size % turns or config.batch_size < 2 * turns:
        raise UsageError(
            f"--batch-size is {config.batch_size}, and --views-per-sample {turns}",
            "a multiple of it, for at least two samples",
            f"give --batch-size {max(config.batch_size // turns, 2) * turns}",
        )
    if not processes.alone:
        raise UsageError(
            f"--views-per-sample {turns} is given to {processes.size} processes", "one process", "leave it out"
        )


def check_accumulation(specs: Sequence[ObjectiveSpec], config: StudentConfig) -> None:
    """Refuse to compute a batch in parts where an objective compares its samples.

    Raises:
        UsageError: it does.
    """
    if config.grad_accumulation > 1 and (whole := [spec.name for spec in specs if spec.loss.across_batch]):
        raise UsageError(
            f"--grad-accumulation {config.grad_accumulation} is given, and --objective {whole[0]} compares the samples "
            "of a batch with each other",
            "the whole batch at once",
            "leave out --grad-accumulation, or give another objective",
        )
