import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

import kdcache
from kdcache import DumpConfig, StudentConfig, dump_teacher, losses, open_cache, train_student
from kdcache.core.errors import CacheMismatch, UsageError
from kdcache.data.batch import Batch
from kdcache.data.raw_input import input_crc32c
from kdcache.data.registry import open_dataset
from kdcache.data.soft_targets import SoftTargets
from kdcache.data.views import as_views
from kdcache.distill.objective import distillation_objective
from kdcache.distill.student.join_checks import check_join
from kdcache.distill.student.soft_targets import CachedTargets, DeviceSource
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.checkpoints import read_checkpoint
from kdcache.models.registry import build_model
from kdcache.store.records import Preprocess
from kdcache.store.row_source import ReadOptions
from kdcache.store.sampler import always
from tests.helpers import Items, Network, changed, live_targets, logit_source, synthetic, tensors, tree

STEPS = 200
DUMP = DumpConfig(device="cpu", batch_size=64, shard_rows=64, encoding="float32")


def config(**settings):
    return StudentConfig(**{"device": "cpu", "batch_size": 16, "epochs": 2} | settings)


def dumped(path, dataset, *, teacher=None, preprocess=None):
    teacher = teacher or Network(16, 4)
    dump_teacher(teacher, dataset, out=path, preprocess=preprocess, config=DUMP)
    return open_cache(path)


def weights_apart(first, second):
    return max(float((value - second.state_dict()[name]).abs().max()) for name, value in first.state_dict().items())


@pytest.fixture(scope="module")
def scenes():
    """Data, preprocessing, batch size and epochs of at least 200 steps."""
    digits = open_dataset("digits", split="train")
    shaped_like_mnist = synthetic(640, shape=(1, 28, 28), classes=10)
    return {
        "digits": (digits, Preprocess(mean=digits.default_mean, std=digits.default_std), 128, 17),
        "mnist-shaped": (shaped_like_mnist, Preprocess(mean=(0.1307,), std=(0.3081,)), 64, 20),
    }


def drifts(scene, folder, *, dtype, encodings):
    """How far training from a cache of each encoding strays from training with the live teacher.

    Returns:
        For each encoding the largest relative difference of a step's loss, and the largest of a final weight.
    """
    dataset, preprocess, batch_size, epochs = scene
    settings = config(batch_size=batch_size, epochs=epochs, temperature=3.0, alpha=0.7)

    def build(spec, seed):
        built = build_model(spec, num_classes=10, input_shape=dataset.input_shape, seed=seed, default=preprocess)
        return built.module.to(dtype)

    def losses_of(run):
        seen = []
        run(lambda step, parts: seen.append(float(parts["loss"])))
        assert len(seen) >= STEPS
        return np.array(seen)

    teacher, online = build("cnn", 1), build("mlp", 2)
    online_losses = losses_of(
        lambda on_step: train(
            online,
            training_data(
                dataset, preprocess, settings, join=live_targets(teacher, preprocess, classes=len(dataset.classes))
            ),
            objective=distillation_objective(settings),
            config=settings,
            on_step=on_step,
        )
    )
    assert online_losses[-10:].mean() < 0.8 * online_losses[:10].mean()
    found = {}
    for encoding in encodings:
        dump = DumpConfig(device="cpu", encoding=encoding, batch_size=100, shard_rows=256)
        dump_teacher(teacher, dataset, out=folder / encoding, preprocess=preprocess, config=dump)
        cached = build("mlp", 2)
        cached_losses = losses_of(
            lambda on_step, student=cached, path=folder / encoding: train_student(
                student, dataset, path, config=settings, on_step=on_step
            )
        )
        found[encoding] = np.abs(cached_losses / online_losses - 1).max(), weights_apart(online, cached)
    return found


@pytest.mark.parametrize("name", ["digits", "mnist-shaped"])
def test_training_from_the_cache_is_training_with_the_teacher(scenes, tmp_path, name):
    loss, weight = drifts(scenes[name], tmp_path, dtype=torch.float64, encodings=["float64"])["float64"]
    print(f"\ndrift of {name}, float64 from a float64 cache: loss {loss:.2g} relative, weights {weight:.2g}")
    assert loss < 1e-9
    assert weight < 1e-8


@pytest.mark.parametrize("name", ["digits", "mnist-shaped"])
def test_the_drift_of_narrower_caches_is_small(scenes, tmp_path, name):
    found = drifts(scenes[name], tmp_path, dtype=torch.float32, encodings=["float32", "float16"])
    for encoding, (loss, weight) in found.items():
        print(f"\ndrift of {name}, float32 from a {encoding} cache: loss {loss:.2g} relative, weights {weight:.2g}")
        assert loss < 0.05


@pytest.mark.parametrize(("kind", "on_device"), [("memory", False), ("memory", True)])
def test_soft_targets_are_joined_by_index_and_nothing_else(tmp_path, kind, on_device):
    dataset = synthetic(100)
    cache = dumped(tmp_path / "c", dataset)
    source, _, _ = logit_source(cache, options=ReadOptions(row_source=kind))
    if on_device:
        source = DeviceSource(cache.reader, cache.logit_arrays, always(0), torch.device("cpu"))
    join = CachedTargets([cache], [source])
    join.start_epoch(0)
    for indices in (np.array([99, 0, 64, 63, 0]), np.arange(99, -1, -1)):
        inputs, labels = dataset.fetch(indices)
        joined = join(Batch(inputs, labels, torch.from_numpy(indices), None))
        np.testing.assert_array_equal(joined.soft_targets.logits().numpy(), cache.rows(indices))
        assert joined.soft_targets.logits().dtype == torch.float32


def test_the_objective_weighs_the_teacher_with_alpha():
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 1, 2, 3, 0])
    batch = Batch(torch.zeros(5), labels, torch.arange(5), soft_targets=SoftTargets.of(teacher))
    settings = config(temperature=4.0, alpha=0.3, label_smoothing=0.1)
    parts = distillation_objective(settings)(student, batch)
    soft = losses.kd(student, teacher, temperature=4.0)
    hard = losses.hard_cross_entropy(student, labels, label_smoothing=0.1)
    assert parts["kd"] == soft
    assert parts["cross_entropy"] == hard
    assert float(parts["loss"]) == pytest.approx(float(0.3 * soft + 0.7 * hard), rel=1e-12)


BASE = synthetic(60)
INPUTS, LABELS = tensors(BASE)
# Each sample goes where another of its class was, so that the labels stay as they are.
WITHIN_CLASSES = np.empty(60, np.int64)
for _label in range(4):
    _members = np.flatnonzero(_label == LABELS)
    WITHIN_CLASSES[_members] = np.roll(_members, 1)
FLIPPED = np.where(np.arange(60) == 17, (LABELS + 1) % 4, LABELS)
OTHER_PIXELS = INPUTS ^ 1
OTHER = {
    "name": (changed(BASE, name="another"), ["'synthetic'", "'another'"]),
    "split": (changed(BASE, split="test"), ["'train'", "'test'"]),
    "length": (changed(BASE, inputs=INPUTS[:59], labels=LABELS[:59]), ["length 60", "length 59"]),
    "class list": (changed(BASE, classes=("class 1", "class 0", "class 2", "class 3")), ["('class 0'", "('class 1'"]),
    "more classes": (changed(BASE, classes=(*BASE.classes, "one more")), ["'class 3')", "'one more')"]),
    "labels": (
        changed(BASE, labels=FLIPPED),
        ["other labels", f"sample 17 has label {FLIPPED[17]}", f"has {LABELS[17]}", "(1 of 60 differ)"],
    ),
    "order": (
        changed(BASE, inputs=INPUTS.flip(0), labels=LABELS[::-1].copy()),
        ["the same labels in another order", f"has label {LABELS[59]}", f"has {LABELS[0]}"],
    ),
    "order within classes": (
        changed(BASE, inputs=INPUTS[WITHIN_CLASSES]),
        ["the samples are in another order", "crc32c"],
    ),
    "pixels": (changed(BASE, inputs=OTHER_PIXELS), ["is not what the teacher saw", "crc32c"]),
    "dtype": (changed(BASE, inputs=INPUTS.float()), ["'uint8'", "'float32'"]),
    "shape": (changed(BASE, inputs=INPUTS.reshape(60, 1, 2, 8)), ["(1, 4, 4)", "(1, 2, 8)"]),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return dumped(tmp_path_factory.mktemp("student") / "c.zarr", BASE)


@pytest.mark.parametrize("what", OTHER)
def test_a_cache_of_other_samples_is_refused_before_the_first_step(cache, tmp_path, what):
    dataset, parts = OTHER[what]
    steps = []
    with pytest.raises(CacheMismatch) as caught:
        train_student(
            Network(16, len(dataset.classes)),
            dataset,
            cache,
            config=config(),
            out=tmp_path / "run",
            on_step=lambda *step: steps.append(step),
        )
    for part in parts:
        assert part in caught.value.found
    assert caught.value.exit_code == 4
    assert caught.value.needed
    assert caught.value.remedy
    assert steps == []
    assert not (tmp_path / "run").exists()


def test_two_swapped_samples_among_many_are_noticed(tmp_path):
    dataset = synthetic(400)
    cache = dumped(tmp_path / "c", dataset)
    inputs, labels = tensors(dataset)
    for first, second in np.flatnonzero(labels == 0)[:10].reshape(5, 2):
        swapped = inputs.clone()
        swapped[[first, second]] = inputs[[second, first]]
        with pytest.raises(CacheMismatch, match=f"sample ({first}|{second})"):
            train_student(Network(16, 4), changed(dataset, inputs=swapped), cache, config=config(epochs=1))


@pytest.mark.parametrize("what", ["order within classes", "pixels"])
def test_a_refusal_of_pixels_shows_both_checksums(cache, what):
    dataset = OTHER[what][0]
    with pytest.raises(CacheMismatch) as caught:
        check_join(cache, as_views(dataset))
    sample = int(re.search(r"sample (\d+)", caught.value.found)[1])
    here = input_crc32c(dataset.shared_inputs([sample])[0])
    there = int(cache.column("input_crc32c")[sample])
    assert here != there
    assert f"{here:#010x} here, {there:#010x} in" in caught.value.found
    if what == "order within classes":
        assert f"are those of sample {WITHIN_CLASSES[sample]}" in caught.value.found


def test_labels_that_only_the_samples_tell_are_checked_in_every_batch(cache):
    train_student(Network(16, 4), Items(BASE), cache, config=config(epochs=1))
    steps = []
    with pytest.raises(CacheMismatch) as caught:
        train_student(
            Network(16, 4),
            Items(OTHER["labels"][0]),
            cache,
            config=config(epochs=1),
            on_step=lambda *step: steps.append(step),
        )
    assert len(steps) < 4
    assert f"sample 17 has label {FLIPPED[17]}" in caught.value.found
    assert f"it has {LABELS[17]}" in caught.value.found


def test_a_dataset_may_move_but_not_change(cache, tmp_path):
    moved = dumped(tmp_path / "c", changed(BASE, name="folder:/old/place"))
    check_join(moved, as_views(changed(BASE, name="folder:/new/place")))
    check_join(moved, as_views(changed(BASE, name="py:mine:data")))
    with pytest.raises(CacheMismatch):
        check_join(moved, as_views(changed(BASE, name="digits")))
    with pytest.raises(CacheMismatch):
        check_join(moved, as_views(changed(BASE, name="folder:/new/place", inputs=OTHER_PIXELS)))


def test_no_teacher_is_needed(cache, monkeypatch):
    def no_teacher(*args, **kwargs):
        raise AssertionError("a student asked for the teacher")

    for name in ("build_model", "_from_factory", "weights_sha256"):
        monkeypatch.setattr(f"kdcache.models.registry.{name}", no_teacher)
    monkeypatch.setattr("kdcache.models.checkpoints.read_checkpoint", no_teacher)
    monkeypatch.setitem(sys.modules, "kdcache.distill.teacher.dump", None)
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    nn.init.zeros_(student[1].weight)
    result = train_student(student, BASE, cache.url, config=config(epochs=4, alpha=1.0))
    assert result.epochs[-1]["kd"] < 0.9 * result.epochs[0]["kd"]


def test_the_teachers_preprocessing_is_taken_unless_told_otherwise(tmp_path):
    preprocess = Preprocess(mean=(0.4,), std=(0.5,))
    cache = dumped(tmp_path / "c", BASE, preprocess=preprocess)

    def first_losses(**options):
        seen = []
        train_student(
            Network(16, 4),
            BASE,
            cache,
            config=config(epochs=1),
            on_step=lambda _, parts: seen.append(float(parts["loss"])),
            **options,
        )
        return seen

    assert first_losses() == first_losses(preprocess=preprocess) != first_losses(preprocess=Preprocess())


def test_without_distillation_only_the_labels_count(cache, tmp_path):
    other = dumped(tmp_path / "other", BASE, teacher=Network(16, 4, seed=7))

    def run(cache, **settings):
        module = Network(16, 4, seed=3)
        result = train_student(module, BASE, cache, config=config(**settings))
        return module.state_dict(), result.epochs[0].keys()

    alone, names = run(cache, distill=False)
    assert "kd" not in names
    for weights in (run(other, distill=False)[0], run(cache, alpha=0.0)[0]):
        torch.testing.assert_close(weights, alone, rtol=1e-5, atol=1e-6)
    distilled, names = run(cache)
    assert {"loss", "kd", "cross_entropy"} <= names
    assert any(not torch.equal(value, alone[name]) for name, value in distilled.items())


def test_a_run_folder_holds_settings_metrics_and_weights_and_can_be_resumed(cache, tmp_path):
    module, settings = Network(16, 4), config(temperature=5.0)
    train_student(module, BASE, cache, config=settings, out=tmp_path / "run", description={"note": "x"})
    assert sorted(tree(tmp_path / "run")) == ["best.pt", "config.json", "last.pt", "metrics.jsonl"]
    best = read_checkpoint(tmp_path / "run" / "best.pt")
    assert best["note"] == "x"
    for name, value in module.state_dict().items():
        assert torch.equal(best["state_dict"][name], value)
    with pytest.raises(UsageError, match=r"temperature was 5\.0 and is 1\.0"):
        train_student(Network(16, 4), BASE, cache, config=config(temperature=1.0), out=tmp_path / "run", resume=True)
    before = tree(tmp_path / "run")
    again = Network(16, 4, seed=8)
    train_student(again, BASE, cache, config=settings, out=tmp_path / "run", resume=True)
    assert weights_apart(again, module) == 0
    assert before["metrics.jsonl"] == tree(tmp_path / "run")["metrics.jsonl"]


def test_the_package_offers_what_it_lists():
    assert sorted(kdcache.__all__) == kdcache.__all__
    assert all(getattr(kdcache, name) is not None for name in kdcache.__all__)
    with pytest.raises(AttributeError):
        kdcache.no_such_name  # noqa: B018


@pytest.mark.parametrize("settings", [{"row_source": "memory"}, {"cache_on_device": True}])
def test_however_the_cache_is_fed_the_losses_are_the_same(cache, settings):
    def run(**settings):
        seen = []
        train_student(
            Network(16, 4), BASE, cache, config=config(**settings), on_step=lambda _, parts: seen.append(parts["loss"])
        )
        return [float(loss) for loss in seen]

    assert run(**settings) == run()


def test_streamed_in_windows_each_sample_meets_its_own_teacher_row_once_an_epoch(tmp_path, monkeypatch):
    dataset = synthetic(300)
    cache = dumped(tmp_path / "c", dataset)
    met = []
    join = CachedTargets.__call__

    def spy(self, batch):
        joined = join(self, batch)
        np.testing.assert_array_equal(joined.soft_targets.logits().numpy(), cache.rows(batch.indices.numpy()))
        met.extend(batch.indices.tolist())
        return joined

    monkeypatch.setattr(CachedTargets, "__call__", spy)
    train_student(Network(16, 4), dataset, cache, config=config(row_source="streamed", epochs=2))
    assert sorted(met[:300]) == sorted(met[300:]) == list(range(300))
    assert met[:300] != met[300:]
