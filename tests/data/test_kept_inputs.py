"""Inputs in shared memory: which are kept, by whom they are found, and what they cost."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import time
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from kdcache import DumpConfig, StudentConfig, dump_teacher, train_student
from kdcache.data.kept_inputs import KeptDataset, KeptInputs
from kdcache.data.map_dataset import as_indexed
from kdcache.data.taught import EmbeddingDataset
from kdcache.data.views import Views
from kdcache.models.evaluators import evaluator_of
from kdcache.models.registry import build_model
from kdcache.store.records import Preprocess, ViewRecipe
from tests.counted_reads import SAMPLES, CountedReads, reads
from tests.helpers import Items, Network, answer, probed_views, synthetic

SIZE = Preprocess(resize=8, crop=8)
ALL = np.arange(SAMPLES)
ENTRY = KeptInputs.entry_bytes(3 * 12 * 9)


@pytest.fixture
def photos(tmp_path):
    return as_indexed(CountedReads(tmp_path), name="photos", split="train")


def numbered(indices):
    """An input for each index, each of another shape."""
    return [torch.full((int(index) % 3 + 1, 4), int(index), dtype=torch.int16) for index in indices]


def all_alike(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shapes", [[(3, 2, 5)], [(4,), (0,), (2, 2, 1)], [()], [(1,) * 7], [(1,) * 8]])
def test_what_is_kept_is_what_was_made(dtype, shapes):
    kept = KeptInputs(2, 9, 10**5)
    made = [torch.rand(shapes[at % len(shapes)]).mul(200).to(dtype) for at in range(9)]
    order = np.array([8, 0, 4, 4, 1])
    for _ in range(3):
        found = kept.fetch(1, order, lambda wanted: [made[index] for index in wanted], dtype)
        assert all_alike(list(found), [made[index] for index in order])
        assert all(value.dtype == dtype for value in found)
    if len(shapes[0]) < 8:
        assert np.flatnonzero(kept.kept(1)).tolist() == [0, 1, 4, 8]
    assert not kept.kept(0).any()


def test_what_is_done_to_a_kept_input_does_not_show_in_the_next():
    kept = KeptInputs(1, 4, 10**5)
    kept.fetch(0, np.arange(4), numbered, torch.int16)
    for _ in range(2):
        found = kept.fetch(0, np.arange(4), numbered, torch.int16)
        assert all_alike(found, numbered(range(4)))
        for value in found:
            value.add_(1)


def test_each_is_made_once_and_only_what_fits_is_kept():
    asked = []

    def make(wanted):
        asked.extend(wanted.tolist())
        return [torch.full((100,), index, dtype=torch.uint8) for index in wanted.tolist()]

    kept = KeptInputs(1, 50, 20 * KeptInputs.entry_bytes(100))
    for epoch in range(3):
        for part in np.split(np.random.default_rng(epoch).permutation(50), 5):
            found = kept.fetch(0, part, make, torch.uint8)
            assert [int(value[0]) for value in found] == part.tolist()
    assert kept.kept(0).sum() == 20
    assert len(asked) == 50 + 2 * 30


def test_inputs_without_room_for_them_are_made_at_every_use(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    kept = KeptInputs(1, 50, 10**6)
    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        assert all_alike(kept.fetch(0, ALL[:50], numbered, torch.int16), numbered(range(50)))
    assert not kept.kept(0).any()
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: len(content) - 1)
    kept.fetch(0, ALL[:50], numbered, torch.int16)
    assert not kept.kept(0).any()


def fill(kept, seed, begin):
    begin.wait()
    for _ in range(3):
        for part in np.array_split(np.random.default_rng(seed).permutation(400), 20):
            assert all_alike(list(kept.fetch(1, part, numbered, torch.int16)), numbered(part))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_processes_that_fill_it_at_the_same_time_keep_each_input_once(method):
    context = get_context(method)
    kept = KeptInputs(2, 400, 10**6)
    begin = context.Event()
    # Two of them in the same order, as students of one seed are.
    workers = [context.Process(target=fill, args=(kept, seed, begin)) for seed in (0, 0, 1)]
    for worker in workers:
        worker.start()
    begin.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert kept.kept(1).all()
    assert int(kept._state[0]) - kept._start == sum(KeptInputs.entry_bytes(8 * (at % 3 + 1)) for at in range(400))
    assert all_alike(kept.fetch(1, np.arange(400), None, torch.int16), numbered(range(400)))


def hold(kept, file):
    with kept._alone():
        file.touch()
        time.sleep(60)


def test_processes_add_one_after_the_other_and_one_that_is_killed_does_not_stop_the_others(tmp_path):
    kept, context = KeptInputs(1, 5, 10**5), get_context("fork")
    worker = context.Process(target=hold, args=(kept, tmp_path / "held"))
    worker.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    waiting = context.Process(target=kept.fetch, args=(0, np.arange(3), numbered, torch.int16))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    assert not kept.kept(0).any()
    os.kill(worker.pid, signal.SIGKILL)
    waiting.join()
    assert kept.kept(0).tolist() == [True] * 3 + [False] * 2
    assert all_alike(kept.fetch(0, np.arange(5), numbered, torch.int16), numbered(range(5)))
    worker.join()
    assert kept.kept(0).all()


def test_a_copy_for_elsewhere_begins_empty():
    kept = KeptInputs(2, 5, 10**5)
    kept.fetch(1, np.arange(5), numbered, torch.int16)
    copy = pickle.loads(pickle.dumps(kept))
    assert (copy.slots, copy.samples, copy.limit_bytes) == (2, 5, 10**5)
    assert not copy.kept(1).any()


@pytest.mark.parametrize("in_memory", [True, False])
def test_it_goes_with_its_last_user(monkeypatch, in_memory):
    if not in_memory:  # as on macOS
        monkeypatch.delattr(os, "memfd_create", raising=False)
    before = len(os.listdir("/dev/fd"))
    kept = KeptInputs(1, 5, 10**5)
    assert all_alike(kept.fetch(0, np.arange(5), numbered, torch.int16), numbered(range(5)))
    assert all_alike(kept.fetch(0, np.arange(5), None, torch.int16), numbered(range(5)))
    assert len(os.listdir("/dev/fd")) > before
    del kept
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("in_memory", [True, False])
def test_which_inputs_are_kept_is_told(photos, in_memory):
    dataset = synthetic(SAMPLES, shape=(3, 12, 9)) if in_memory else photos
    plain, augmented = (probed_views(dataset, ViewRecipe(augment=name)) for name in ("none", "resized-crop-flip:9"))
    room = KeptInputs(9, SAMPLES, SAMPLES * ENTRY)
    if in_memory:
        assert plain.keep(room, [0], again=True) == "inputs are in memory as they are"
        assert "used once" in augmented.keep(room, [0, 1], again=False)
        assert not isinstance(augmented.dataset, KeptDataset)
        return
    assert plain.keep(room, [0], again=True).startswith("decoded inputs are kept in memory once they are read: about ")
    half = KeptInputs(9, SAMPLES, SAMPLES * KeptInputs.entry_bytes(3 * 10 * 9) // 2)
    line = probed_views(dataset, ViewRecipe()).keep(half, [0], again=True)
    assert 45 < int(line.split("of which ")[1].split("%")[0]) < 55
    # Too many to keep as they are augmented, so that at least none is decoded again.
    line = augmented.keep(room, range(8), again=True)
    assert "those of 8 views would take" in line
    assert "decoded inputs are kept" in line
    for view in range(3):
        found, expected = (each.fetch(view, ALL).inputs for each in (augmented, Views(photos, augmented.recipe)))
        assert all_alike(list(found), list(expected))
    assert room.kept(0).all()
    assert "kept in memory once they are made" in augmented.keep(room, [0], again=True)


def run(photos, cache, **settings):
    """Weights of a student, its scores, and how many samples were read."""
    student = build_model("cnn", num_classes=4, input_shape=(3, 8, 8), seed=0, default=SIZE).module
    config = replace(StudentConfig(device="cpu", epochs=4, batch_size=16, val_fraction=0.2), **settings)
    reads(cache.parent)
    found = train_student(student, photos, cache, preprocess=SIZE, config=config)
    scores = [{name: value for name, value in entry.items() if name != "seconds"} for entry in found.epochs]
    return [*student.state_dict().values()], scores, reads(cache.parent).total()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "resized-crop-flip:8"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_student_reads_each_sample_once_and_learns_the_same(tmp_path, photos, workers, augment):
    cache = tmp_path / "cache"
    dump = DumpConfig(device="cpu", augment=augment, views=1 if augment == "none" else 4)
    dump_teacher(Network(3 * 8 * 8, 4), photos, out=cache, preprocess=SIZE, config=dump)
    settings = {"workers": workers, "verify_inputs": "all"}
    weights, scores, often = run(photos, cache, **settings)
    kept_weights, kept_scores, once = run(photos, cache, input_memory="10MiB", **settings)
    assert all_alike(weights, kept_weights)
    assert scores == kept_scores
    assert often - once == 3 * SAMPLES
    *_, first = run(photos, cache, input_memory="10MiB", epochs=1, **settings)
    assert once == first


DATA = ("--dataset", "py:tests.counted_reads:CountedReads", "--size", 8, "--device", "cpu", "--workers", 0)


def test_the_students_of_a_sweep_share_what_is_read(tmp_path):
    cache = tmp_path / "cache"
    data = (*DATA, "--data-root", tmp_path)
    answer("train-teacher", *data, "--epochs", 1, "--out", tmp_path / "teacher")
    answer("dump-teacher", *data, "--teacher", "cnn", "--checkpoint", tmp_path / "teacher/best.pt", "--out", cache)

    def swept(*options):
        reads(tmp_path)
        out = tmp_path / str(options)
        found = answer("sweep", "--cache", cache, *DATA[2:], *options, "--out", out)
        assert not found["failed"]
        return {row["name"]: row["test_accuracy"] for row in found["settings"]}, reads(tmp_path).total()

    one = ("--temperature", 1, "--epochs", 1, "--input-memory", "10MiB")
    four = ("--temperature", "1,2", "--seeds", 2, "--epochs", 4, "--jobs", 2)
    _, alone = swept(*one)
    accuracy, often = swept(*four)
    shared_accuracy, shared = swept(*four, "--input-memory", "10MiB")
    assert accuracy == shared_accuracy
    # What each looks at to compare with the cache, and the test split, is not shared. Two students begin together, and
    # may read the same samples at the same time.
    assert 4 * alone - 3 * SAMPLES <= shared <= 4 * alone - 2 * SAMPLES
    assert often == 4 * alone + 4 * 3 * SAMPLES


def test_a_teacher_that_augments_decodes_each_sample_once(tmp_path):
    command = ("train-teacher", *DATA, "--data-root", tmp_path, "--augment", "resized-crop-flip:8", "--epochs", 5)
    one, often = answer(*command, "--out", tmp_path / "one"), reads(tmp_path).total()
    other, once = answer(*command, "--input-memory", "10MiB", "--out", tmp_path / "other"), reads(tmp_path).total()
    assert one["test_nll"] == other["test_nll"]
    assert often - once == 4 * SAMPLES


class Several(CountedReads):
    """Two classes for each image."""

    def __init__(self, data_root):
        super().__init__(data_root)
        self.targets = np.eye(4, dtype=np.uint8)[[number % 3 for number in range(SAMPLES)]] | [0, 0, 0, 1]

    def __getitem__(self, index):
        return torch.full((3, 4, 4 + index % 2), index, dtype=torch.uint8), self.targets[index]


def test_a_kept_dataset_is_what_the_dataset_is(tmp_path, photos):
    several = as_indexed(Several(tmp_path), name="s", split="train")
    unknown = as_indexed(Items(synthetic(SAMPLES)), name="s", split="train")
    vectors = EmbeddingDataset(photos, 7)
    for dataset in (photos, several, unknown, vectors):
        kept = KeptDataset(dataset, KeptInputs(1, SAMPLES, 10**6))
        assert evaluator_of(kept) is evaluator_of(dataset)
        for fact in ("classes", "multi_label", "is_embedding", "input_dtype", "input_shape"):
            assert getattr(kept, fact) == getattr(dataset, fact)
        for _ in range(2):
            (inputs, labels), (expected, answers) = kept.fetch(ALL), dataset.fetch(ALL)
            assert all_alike(list(inputs), list(expected))
            assert labels.dtype == answers.dtype
            assert torch.equal(labels, answers)


def test_several_labels_that_only_reading_tells_are_not_kept(tmp_path):
    dataset = Several(tmp_path)
    dataset.targets = [np.flatnonzero(label).tolist() for label in dataset.targets]
    views = Views(as_indexed(dataset, name="s", split="train"), ViewRecipe())
    assert "made at every use" in views.keep(KeptInputs(1, SAMPLES, 10**6), [0], again=True)
    _, labels = views.dataset.fetch([0, 1])
    assert labels.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
