"""What a dump is asked to do: teacher, dataset and settings, checked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from kdcache.core.config import DumpConfig
from kdcache.core.errors import CacheDamaged, TeacherOutputError, UsageError
from kdcache.data.augment import Transform
from kdcache.data.dataset import ANY_CLASS, IndexedDataset
from kdcache.data.determinism import check_deterministic
from kdcache.data.map_dataset import as_indexed
from kdcache.data.preprocess import Preprocessor, as_preprocessor
from kdcache.data.readable import ReadableDataset, find_unreadable
from kdcache.data.taught import EmbeddingDataset
from kdcache.data.views import Views
from kdcache.distill.teacher.teacher_pass import TeacherPass
from kdcache.models.device import move_to, resolve_device
from kdcache.models.embedding import embedding_width
from kdcache.models.forward import ForwardPass
from kdcache.store.manifest import Manifest, is_cache, read_manifest
from kdcache.store.records import (
    EMBEDDING,
    LOGITS_KIND,
    NONE,
    ONE_CLASS,
    SEVERAL_CLASSES,
    FeatureRecord,
    OutputRecord,
    Preprocess,
    ViewRecipe,
)
from kdcache.store.resume import ResumePolicy
from kdcache.store.storage.base import Storage
from kdcache.store.storage.registry import Location, open_storage


def _check_no_softmax(answers: str, name: str, config: DumpConfig, outputs: OutputRecord) -> None:
    """Refuse what supposes one class per sample, where samples have any number, or where vectors are stored.

    Raises:
        UsageError: a bound of the KL divergence; with several classes mixed inputs, or probabilities.
    """
    several = answers == SEVERAL_CLASSES
    refused = {
        "--max-kl": config.max_kl is not None and answers != ONE_CLASS,
        f"--mix {config.mix}": several and config.mix != NONE,
        "--teacher-outputs probabilities": several and outputs.kind != LOGITS_KIND,
    }
    for what, given in refused.items():
        if given and several:
            raise UsageError(
                f"{what} is given, and the samples of {name} have any number of classes each",
                "logits before the sigmoid, of inputs that are not mixed",
                f"leave out {what}",
            )
        if given:
            raise UsageError(
                f"{what} is given, and the teacher returns an embedding",
                "logits, between whose softmaxes there is a divergence",
                f"leave out {what}",
            )


def without_unreadable(samples: IndexedDataset, out: Location, workers: int) -> IndexedDataset:
    """A dataset without what cannot be read: as the first worker of a dump found it, or by reading everything."""
    if isinstance(samples, ReadableDataset):
        return samples
    stored = stored_manifest(open_storage(out), samples.split)
    excluded = find_unreadable(samples, workers) if stored is None else stored.dataset.excluded
    return ReadableDataset(samples, excluded)


def stored_manifest(root: Storage, split: str) -> Manifest | None:
    """The manifest of a split, if one is stored that can be read; what else is there is found out later."""
    with contextlib.suppress(CacheDamaged):
        if is_cache(root) and split in root.folders():
            return read_manifest(root, split)
    return None


@dataclass(frozen=True, kw_only=True)
class DumpRequest:
    """The arguments of `dump_teacher`, which describes them, with `policy` for what may be stored already."""

    teacher: nn.Module
    dataset: Any
    out: Location
    split: str | None = None
    teacher_name: str = ""
    preprocess: Preprocess | Preprocessor | None = None
    config: DumpConfig = field(default_factory=DumpConfig)
    augment: Transform | None = None
    outputs: OutputRecord | None = None
    policy: ResumePolicy = field(default_factory=ResumePolicy)

    @cached_property
    def samples(self) -> IndexedDataset:
        """The dataset, with the split's name.

        Raises:
            DatasetError: a stream, or a dataset that gives another input at a second look.
        """
        split = self.split or (self.dataset.split if isinstance(self.dataset, IndexedDataset) else "train")
        any_class = ANY_CLASS if self.output_record.kind == EMBEDDING else ()
        samples = as_indexed(self.dataset, name=type(self.dataset).__name__, split=split, default_classes=any_class)
        if self.config.skip_unreadable:
            samples = without_unreadable(samples, self.out, self.config.workers or 0)
        check_deterministic(samples)
        if self.output_record.kind == EMBEDDING and not samples.is_embedding:
            # Labels say nothing about a vector, so that students need none.
            samples = EmbeddingDataset(samples, embedding_width(self._forward_pass(samples), samples))
        return samples

    @property
    def output_record(self) -> OutputRecord:
        """Kind of the teacher's outputs."""
        return self.outputs or OutputRecord()

    @property
    def answers(self) -> str:
        """What the teacher says of a sample, as `Manifest.answers` names it."""
        if self.output_record.kind == EMBEDDING:
            return EMBEDDING
        return SEVERAL_CLASSES if self.samples.multi_label else ONE_CLASS

    def _forward_pass(self, samples: IndexedDataset) -> ForwardPass:
        device = resolve_device(self.config.device)
        return ForwardPass(
            move_to(self.teacher, device),
            as_preprocessor(self.preprocess or Preprocess()),
            device,
            classes=len(samples.classes),
            amp=self.config.amp,
            outputs=self.outputs,
            error=TeacherOutputError,
        )

    @cached_property
    def views(self) -> Views:
        """The views of the dataset, probed.

        Raises:
            UsageError: two augmentations, or several views that are all the plain sample.
            DatasetError: a transform that gives another input at a second look.
        """
        config = self.config
        if self.augment is not None and config.augment != NONE:
            raise UsageError(f"augment is given twice, as an object and as {config.augment!r}", "one of the two")
        recipe = ViewRecipe(augment=config.augment, mix=config.mix, seed=config.view_seed, plain_view=config.plain_view)
        _check_no_softmax(self.answers, self.samples.name, config, self.output_record)
        views = Views(self.samples, recipe, transform=self.augment)
        views.probe()
        count = config.views + self.policy.add_views
        if count > 1 and views.recipe.is_plain(1):
            raise UsageError(
                f"{count} views are asked for, with neither --augment nor --mix",
                "views that differ: the teacher would say the same of each",
                "give --augment or --mix, or leave out --views",
            )
        return views

    def teacher_pass(self) -> TeacherPass:
        """The teacher on its device."""
        layers, pool = dict.fromkeys(self.config.features), self.config.pool
        return TeacherPass(
            self._forward_pass(self.samples),
            [FeatureRecord(layer=each, pool=pool, array=f"features.{each}") for each in layers],
        )
