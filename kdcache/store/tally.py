"""What is known of a split once every row was seen: the teacher's accuracy on view 0, the hash of all labels."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from kdcache.store.chunk_reader import ChunkReader
from kdcache.store.encodings.floats import LOGITS, as_floats
from kdcache.store.encodings.registry import encoding_of, logit_arrays
from kdcache.store.manifest import NONE, ChangeRecord, Manifest, recorded_sha256
from kdcache.store.writer import SplitWriter


class Tally:
    """Commits shards in order and counts their rows; what an earlier run committed is read back in its turn."""

    def __init__(self, writer: SplitWriter) -> None:
        self._writer = writer
        self._reader = ChunkReader(writer.storage, writer.manifest, writer.ledger)
        self._encoding, self._logit_arrays = encoding_of(writer.manifest), logit_arrays(writer.manifest)
        self._correct = 0
        self._labels = hashlib.sha256()
        self._next_shard = 0
        self._catch_up()

    def commit(self, view: int, shard: int, values: dict[str, NDArray[Any]]) -> None:
        """Encode and commit the rows of one shard.

        Args:
            values: By name: `logits` and features as the teacher computed them, `labels`, `input_crc32c`.

        Raises:
            TeacherOutputError: an answer that the encoding cannot hold.
            StorageError: the disk refused.
        """
        manifest = self._writer.manifest
        first = manifest.rows_of(shard).start
        encoding = self._encoding
        features = {
            feature.array: as_floats(
                values[feature.array], encoding.feature_dtype, first_sample=first, name=feature.array
            )
            for feature in manifest.features
        }
        rows = encoding.encode(values[LOGITS], first_sample=first)
        others = {name: values[name] for name in ("labels", "input_crc32c")}
        self._writer.commit(view, shard, {**rows, **features, **others})
        if view == 0:
            self._count(encoding.decode(rows), values["labels"])
            self._catch_up()

    def finish(self) -> Manifest:
        """Seal the split with what was counted; the manifest as it now stands on disk.

        Raises:
            CacheDamaged: finished rows came out otherwise than they were committed, and new bytes are not accepted.
        """
        self._writer.check_bytes()
        manifest = self._writer.manifest
        mixed = manifest.recipe.mix != NONE and not manifest.recipe.is_plain(0)
        finished = replace(
            manifest,
            dataset=replace(manifest.dataset, labels_sha256=self._labels.hexdigest()),
            teacher=replace(manifest.teacher, accuracy=None if mixed else self._correct / manifest.dataset.length),
            view_sha256=tuple(self._writer.ledger.digest(view) for view in range(manifest.views)),
            history=(*manifest.history, *self._new_bytes()),
        )
        self._writer.finish(finished)
        return finished

    def _new_bytes(self) -> list[ChangeRecord]:
        """What the history keeps of finished views whose rows were replaced by others."""
        changed = self._writer.new_digests()
        if not changed:
            return []
        before = {f"view {view}": old for view, (old, _) in changed.items()}
        after = {f"view {view}": new for view, (_, new) in changed.items()}
        before["manifest_sha256"] = recorded_sha256(self._writer.root, self._writer.manifest.dataset.split)
        return [ChangeRecord(what="bytes", before=before, after=after | self._writer.compute)]

    def _catch_up(self) -> None:
        """Count what an earlier run committed, up to the first gap."""
        committed = self._writer.ledger.committed(0)
        while self._next_shard < len(committed) and committed[self._next_shard]:
            rows = self._writer.manifest.rows_of(self._next_shard)
            encoded = {name: self._reader.span(name, 0, rows) for name in self._logit_arrays}
            self._count(self._encoding.decode(encoded), self._reader.span("labels", 0, rows))

    def _count(self, logits: NDArray[Any], labels: NDArray[Any]) -> None:
        self._correct += int((logits.argmax(axis=1) == labels).sum())
        self._labels.update(labels.astype("<i8", copy=False).tobytes())
        self._next_shard += 1
