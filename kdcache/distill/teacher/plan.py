"""How a dump will be computed, and what it would write."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from kdcache.core.errors import TargetExists, UsageError
from kdcache.distill.teacher.dump_manifest import build_manifest
from kdcache.distill.teacher.precision import measure_precision
from kdcache.distill.teacher.probe import TeacherProbe, find_head
from kdcache.distill.teacher.request import DumpRequest, stored_manifest
from kdcache.models.execution import AUTO, choose_execution
from kdcache.models.feature_hooks import PENULTIMATE
from kdcache.models.forward import ForwardPass
from kdcache.store.encodings.base import Encoding
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.layout import predicted_bytes
from kdcache.store.manifest import Manifest
from kdcache.store.records import NONE, ONE_CLASS
from kdcache.store.resume import find_dump
from kdcache.store.storage.base import Storage
from kdcache.store.storage.registry import open_storage

# Views of a shard that are held at once, and memory for their rows.
_MOST_VIEWS, _ROWS_MEMORY = 8, 2**30


@dataclass(frozen=True, kw_only=True)
class EncodingEstimate:
    """Size and loss of one encoding.

    Attributes:
        encoding: Spec of the encoding.
        bytes_per_row: Bytes of the logits per row, before compression.
        bytes: Bytes of the logits of the whole split, before compression.
        mean_kl: Mean KL over the measured samples in nats, by temperature.
    """

    encoding: str
    bytes_per_row: int
    bytes: int
    mean_kl: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """What a dump would write.

    Attributes:
        manifest: Manifest of the split, without results.
        existing: Manifest of the same dump that is already stored, finished or not.
        rows: Rows of the split, over all views.
        shards: Shards of the split, over all views.
        bytes: Size of the arrays without compression; where views are added, of those alone.
        free_bytes: Free space where they would be stored; None where it is not known.
        encodings: Size and loss of each encoding, as `plan_dump` measures them.
    """

    manifest: Manifest = field(repr=False)
    existing: Manifest | None = field(repr=False)
    rows: int
    shards: int
    bytes: int
    free_bytes: int | None
    encodings: tuple[EncodingEstimate, ...] = ()


class PreparedDump:
    """A request whose dataset, transform and teacher were checked, and that may be written. Nothing is written yet.

    Attributes:
        root: Storage of the cache.
        views: Views of the dataset.
        teacher: The teacher on its device.
        encoding: Encoding of the logits, with its constants.
        manifest: Manifest of the split as this request would make it, without results.
        plan: What would be written.
    """

    def __init__(self, request: DumpRequest) -> None:
        self.request, self.config, self.policy = request, request.config, request.policy
        self.root: Storage = open_storage(request.out)
        self.views = request.views
        self.encoding = self.encoding_named(self.config.encoding)
        self.teacher = request.teacher_pass()
        if self.encoding.source == PENULTIMATE:
            self.teacher.head = find_head(self.teacher.network, self.views)
            self.encoding = self.encoding.with_constants(self.teacher.head.constants)
        network = self.teacher.network
        if self.config.compile:
            self._compile(network)
        with self.teacher:
            shapes = TeacherProbe(self.teacher, self.views, self.encoding).run()
        precision = None
        if (stored := self._stored()) is not None:
            self._adopt(stored)
        else:
            self._measure(network)
            if self.config.amp != "off" and request.answers == ONE_CLASS:
                precision = measure_precision(network, self.views, self.batch_size)
        self.manifest = build_manifest(
            network,
            self.views,
            request.teacher_name or type(request.teacher).__name__,
            self.config,
            self.encoding,
            request.answers,
            {feature: shapes[feature.array] for feature in self.teacher.features},
            precision,
        )
        try:
            existing = find_dump(self.root, self.manifest, self.policy)
        except TargetExists:
            if not self.adopt_stored():
                raise
            existing = find_dump(self.root, self.manifest, self.policy)
        if existing is not None:
            self._adopt(existing)  # of a damaged manifest, too, whose rows must come out as they were
        target = existing or self.manifest
        finished = predicted_bytes(replace(target, views=target.readable_views)) if target.extending else 0
        self.plan = DumpPlan(
            manifest=target,
            existing=existing,
            rows=target.dataset.length * target.views,
            shards=target.shards * target.views,
            bytes=predicted_bytes(target) - finished,
            free_bytes=self.root.free_bytes(),
        )

    def _measure(self, network: ForwardPass) -> None:
        """Find out what the settings leave open."""
        asked = self.config
        batch_size, memory_format = choose_execution(
            network,
            self.views,
            len(self.views) * asked.views,
            batch_size=asked.batch_size,
            memory_format=asked.memory_format,
        )
        self.config = replace(asked, batch_size=batch_size, memory_format=memory_format)

    def _adopt(self, stored: Manifest) -> None:
        """Compute as the stored part of this dump was computed, in what the settings leave open."""
        asked = self.request.config
        self.config = replace(
            self.config,
            batch_size=asked.batch_size or stored.batch_size,
            memory_format=stored.memory_format if asked.memory_format == AUTO else asked.memory_format,
        )
        self.teacher.network.use_memory_format(self.config.memory_format)

    def adopt_stored(self) -> bool:
        """Compute as another worker does that created the split after this one looked; False if nothing changes.

        Two workers may have measured different batch sizes.
        """
        before = self.manifest
        if (stored := self._stored()) is not None:
            self._adopt(stored)
            self.manifest = replace(before, batch_size=self.batch_size, memory_format=self.config.memory_format)
        return self.manifest != before

    @property
    def batch_size(self) -> int:
        """Samples per batch."""
        assert self.config.batch_size is not None, "found out before"
        return self.config.batch_size

    @property
    def views_in_flight(self) -> int:
        """Views whose rows of one shard are held at once, so that each of its samples is read once for all of them."""
        if self.views.recipe.mix != NONE:
            return 1
        if self.config.views_in_flight is not None:
            return self.config.views_in_flight
        manifest = self.manifest
        per_row = sum(4 * math.prod(array.row_shape) for array in manifest.arrays) + 4 * len(self.views.dataset.classes)
        return max(1, min(_MOST_VIEWS, _ROWS_MEMORY // (per_row * min(manifest.shard_rows, len(self.views)))))

    def _compile(self, network: ForwardPass) -> None:
        if self.teacher.features or self.teacher.head is not None:
            raise UsageError(
                "--compile is given, and layers are stored beside the logits",
                "a teacher that is stored by its logits alone: a compiled network has no layers to look into",
                "leave out --compile",
            )
        network.compile()

    def _stored(self) -> Manifest | None:
        return stored_manifest(self.root, self.request.samples.split)

    def encoding_named(self, spec: str) -> Encoding:
        """An encoding for this teacher's outputs.

        Raises:
            UsageError: there is no such encoding, or not for these.
        """
        classes = len(self.request.samples.classes)
        return encoding_named(spec, classes, self.config.temperatures, answers=self.request.answers)
