"""Several teachers' caches averaged, and caches of several views behind loops that are not ours."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import kdcache
import kdcache.distill.student.train_student
from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.cli.app import app
from kdcache.core.errors import CacheIncomplete, CacheMismatch, KdcacheError, UsageError
from kdcache.data.raw_input import input_crc32c
from kdcache.distill.student.soft_targets import CachedTargets
from kdcache.store import row_source
from kdcache.store.resume import ResumePolicy
from kdcache.store.sampler import view_schedule
from kdcache.store.writer import SplitWriter
from tests.distill.test_extend import TINY, Jitter, Sums, dump, flip, learn, student
from tests.helpers import Interrupted, Items, Network, changed, synthetic, tensors

SAMPLES = synthetic(44)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of so many views and settings; made once and only read."""
    masters = {}

    def put(seed=0, views=2, augment=None, dataset=SAMPLES, **settings):
        name = repr((seed, views, vars(augment) if augment else None, id(dataset), settings))
        if name not in masters:
            masters[name] = tmp_path_factory.mktemp("made") / "c.zarr"
            dump(masters[name], views=views, teacher=Sums(seed=seed), augment=augment, dataset=dataset, **settings)
        return masters[name]

    return put


def watched(caches, **settings):
    """What each step of a training was given: view, samples and soft targets."""
    seen = []

    class Watched(CachedTargets):
        def start_epoch(self, epoch):
            super().start_epoch(epoch)
            self.now = epoch

        def __call__(self, batch):
            joined = super().__call__(batch)
            seen.append((self.now, batch.indices.numpy().copy(), joined.soft_targets.logits()))
            return joined

    with mock.patch.object(kdcache.distill.student.train_student, "CachedTargets", Watched):
        learn(caches, **settings)
    return seen


READINGS = [{"row_source": "memory"}, {"cache_on_device": True}, {"row_source": "memory", "shuffle": "window"}]


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize(
    ("weights", "shares"), [((2, 1), (2 / 3, 1 / 3)), ((), (0.5, 0.5)), ((0.1, 0.3), (0.25, 0.75))]
)
def test_the_weighted_mean_of_logits_is_what_the_student_meets(made, reading, weights, shares):
    encodings = ("float64", "float64") if "shuffle" in reading else ("float16", "float64")
    paths = [made(seed, 3, encoding=encoding) for seed, encoding in enumerate(encodings)]
    first, second = (np.stack([open_cache(p).column("logits", view) for view in range(3)]) for p in paths)
    expected = shares[0] * first.astype(np.float64) + shares[1] * second
    assert np.abs(first - second).max() > 0.1
    seen = watched(paths, cache_weights=weights, **reading)
    for epoch, indices, targets in seen:
        assert targets.dtype == torch.float64
        np.testing.assert_allclose(targets.numpy(), expected[epoch % 3][indices], rtol=1e-12)
    for epoch in range(4):
        assert sorted(np.concatenate([i for e, i, _ in seen if e == epoch])) == list(range(44))


@pytest.mark.parametrize(
    ("encodings", "dtype"), [(("float16", "float16"), torch.float32), (("float16", "float32"), torch.float32)]
)
def test_means_of_narrow_stores_are_taken_in_float32(made, encodings, dtype):
    paths = [made(seed, encoding=encoding) for seed, encoding in enumerate(encodings)]
    first, second = (open_cache(path).column("logits", 0).astype(np.float64) for path in paths)
    for _, indices, targets in watched(paths, epochs=1, cache_weights=(1, 3)):
        assert targets.dtype == dtype
        np.testing.assert_allclose(targets.numpy(), (0.25 * first + 0.75 * second)[indices], rtol=1e-6)


def test_three_caches_and_a_window_of_two(made):
    paths = [made(seed) for seed in range(3)]
    expected = np.average([open_cache(path).column("logits", 0) for path in paths], axis=0, weights=[3, 1, 2])
    for _, indices, targets in watched(paths, epochs=1, row_source="streamed", cache_weights=(3, 1, 2)):
        np.testing.assert_allclose(targets.numpy(), expected[indices], rtol=1e-12)


def weights_of(*arguments, **settings):
    return learn(*arguments, **settings).module.state_dict()


@pytest.mark.parametrize("weights", [(), (1, 1), (4, 4)])
@pytest.mark.parametrize("encoding", ["float16", "float64"])
def test_the_same_cache_twice_is_the_cache_once(made, weights, encoding):
    path = made(encoding=encoding)
    once, twice = weights_of(path), weights_of([path, path], cache_weights=weights)
    for name in once:
        assert torch.equal(once[name], twice[name])
    for name, value in weights_of([path], cache_weights=(7,)).items():
        assert torch.equal(once[name], value)


def test_the_order_of_caches_and_the_scale_of_weights_do_not_matter(made):
    one, two = made(0), made(1)
    first = weights_of([one, two], cache_weights=(2, 1))
    for again in (weights_of([two, one], cache_weights=(1, 2)), weights_of([one, two], cache_weights=(6, 3))):
        for name in first:
            torch.testing.assert_close(first[name], again[name], rtol=1e-10, atol=1e-12)
    other = weights_of([one, two], cache_weights=(1, 2))
    assert not torch.allclose(first["1.weight"], other["1.weight"])


def test_open_caches_and_paths_are_taken_alike(made):
    one, two = made(0), made(1)
    first = weights_of([one, str(two)])
    for name, value in weights_of((open_cache(one), open_cache(two))).items():
        assert torch.equal(first[name], value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dataset": synthetic(43)}, r"length is 44 .* 43"),
        ({"dataset": changed(SAMPLES, name="other")}, r"name is 'synthetic' .* 'other'"),
        ({"dataset": changed(SAMPLES, classes=tuple("abcd"))}, r"classes.* is .*class 0.* in the first and .*a"),
        (
            {"dataset": changed(SAMPLES, inputs=tensors(SAMPLES)[0].flip(0), labels=tensors(SAMPLES)[1][::-1].copy())},
            "sha256 is",
        ),
        ({"dataset": changed(SAMPLES, labels=1 - tensors(SAMPLES)[1].clip(0, 1))}, "labels_sha256 is"),
        ({"augment": Jitter(100)}, r"most is '256' in the first and '100' in the second"),
        ({"view_seed": 3}, r"seed is 0 in the first and 3 in the second"),
        ({"mix": "mixup:0.8"}, r"mix is .*none.* in the first and .*mixup:0.8.* in the second"),
        ({"plain_view": True}, r"plain_view is (no|false|False) in the first and (yes|true|True) in the second"),
    ],
)
def test_caches_of_other_inputs_are_refused_with_both_values(tmp_path, made, other, message):
    with pytest.raises(CacheMismatch, match=message) as caught:
        learn([made(), made(1, **other)], out=tmp_path / "run")
    assert caught.value.exit_code == 4
    assert str(made()) in str(caught.value)
    assert str(made(1, **other)) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_caches_of_different_splits_are_refused(made):
    test_split = made(1, dataset=synthetic(44, split="test"))
    with pytest.raises(CacheMismatch, match=r"split is .*train.* in the first and .*test.* in the second"):
        learn([open_cache(made()), open_cache(test_split, "test")])


class Drifting:
    """A transform that another version of its package would draw otherwise."""

    shift = 0

    def __call__(self, image):
        return (image.int() + torch.randint(0, 99, image.shape) + type(self).shift).clamp(0, 255).to(torch.uint8)


def test_caches_that_saw_other_pixels_are_refused_by_checksum(tmp_path):
    for name, shift in (("one", 0), ("two", 1)):
        with mock.patch.object(Drifting, "shift", shift):
            dump(tmp_path / name, augment=Drifting(), teacher=Sums(seed=shift))
    with pytest.raises(CacheMismatch, match=r"saw different inputs of sample 0 in view 0 \(\d+ of 44 differ\)"):
        learn([tmp_path / "one", tmp_path / "two"], augment=Drifting())
    with pytest.raises(CacheMismatch, match="view 1"):
        learn([tmp_path / "one", tmp_path / "two"], augment=Drifting(), views=(1,))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), "1 --cache-weights for 2 caches"),
        ((1, 2, 3), "3 --cache-weights for 2 caches"),
        ((0, 1), "--cache-weights is 0"),
        ((1, -1), "--cache-weights is -1"),
        ((float("nan"), 1), "--cache-weights is nan"),
        ((float("inf"), 1), "--cache-weights is inf"),
        ((1e308, 1e308), "finite sum"),
    ],
)
def test_weights_that_are_no_weights(tmp_path, made, weights, message):
    with pytest.raises(UsageError, match=message):
        learn([made(), made(1)], cache_weights=weights, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_cache_at_all_is_refused_in_words():
    with pytest.raises(KdcacheError):
        learn([])


def test_the_views_that_every_cache_has_are_used(made):
    two, three = made(0, 2), made(1, 3)
    expected = [np.mean([open_cache(path).column("logits", v) for path in (two, three)], axis=0) for v in range(2)]
    for paths in ([two, three], [three, two]):
        for epoch, indices, targets in watched(paths):
            np.testing.assert_allclose(targets.numpy(), expected[epoch % 2][indices], rtol=1e-12)
        with pytest.raises(UsageError, match="view 2 is asked for"):
            learn(paths, views=(2,))


def test_a_cache_whose_extension_is_under_way_counts_with_its_finished_views(tmp_path, made):
    shutil.copytree(made(1), tmp_path / "c")
    SplitWriter(tmp_path / "c", replace(open_cache(tmp_path / "c").manifest), ResumePolicy(add_views=1)).__exit__()
    assert {epoch % 2 for epoch, *_ in watched([made(0, 3), tmp_path / "c"], epochs=3)} == {0, 1}
    with pytest.raises(UsageError, match="view 2"):
        learn([made(0, 3), tmp_path / "c"], views=(2,))


# Streams.


@pytest.mark.parametrize("window", [1, 48 << 20])
@pytest.mark.parametrize("shard_rows", [16, 8], ids=["chunks of one size", "chunks of two sizes"])
def test_streams_are_averaged_whatever_the_encoding_and_the_chunks(made, monkeypatch, window, shard_rows):
    monkeypatch.setattr(row_source, "WINDOW_BYTES", window)
    paths = [
        made(0, encoding="float16", shard_rows=16),
        made(1, encoding="float64", compression="zstd:1", shard_rows=shard_rows),
    ]
    expected = [np.mean([open_cache(path).column("logits", v).astype(float) for path in paths], axis=0) for v in (0, 1)]
    for epoch, indices, targets in watched(paths, row_source="streamed"):
        np.testing.assert_allclose(targets.numpy(), expected[epoch % 2][indices], rtol=1e-12)


def test_memory_is_what_all_caches_together_may_hold(made, capsys):
    two_views = 2 * 44 * 4 * 8
    caches = [made(seed) for seed in range(3)]
    for memory, kind in ((3 * two_views, "memory"), (3 * two_views - 1, "streamed")):
        learn(caches, cache_memory=str(memory), epochs=1)
        assert f"row source {kind} " in capsys.readouterr().err


# Partial caches.


def test_a_partial_cache_and_a_whole_one_share_what_both_have(tmp_path, made):
    with pytest.raises(Interrupted):
        dump(tmp_path / "c", teacher=Sums(seed=1, stop_after=10 + 40))
    with pytest.raises(CacheIncomplete):
        learn([made(), tmp_path / "c"])
    seen = watched(
        [made(), tmp_path / "c"], allow_partial=True, views=(0,), shuffle="window", epochs=1, row_source="streamed"
    )
    assert sorted(np.concatenate([indices for _, indices, _ in seen])) == list(range(16))


def test_a_partial_cache_and_a_whole_one_need_no_further_flags(tmp_path, made):
    with pytest.raises(Interrupted):
        dump(tmp_path / "c", teacher=Sums(seed=1, stop_after=10 + 40))
    learn([made(), tmp_path / "c"], allow_partial=True, views=(0,), epochs=1)


# Damage.


def test_damage_in_the_second_cache_is_found(tmp_path, made):
    shutil.copytree(made(1), tmp_path / "c")
    flip(tmp_path / "c" / "train/logits/c/1/1/0")
    with pytest.raises(KdcacheError, match="logits, view 1, shard 1") as caught:
        learn([made(0), tmp_path / "c"], out=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


# The command.


def kdcache_command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def tiny_caches(tmp_path_factory):
    """Two caches of one dataset, by two teachers."""
    from kdcache.models.checkpoints import save_checkpoint
    from kdcache.models.registry import build_model

    root = tmp_path_factory.mktemp("tiny")
    for name, seed, encoding in (("a", 0, "float16"), ("b", 1, "float32")):
        built = build_model("mlp", num_classes=4, input_shape=(1, 4, 4), seed=seed)
        save_checkpoint(root / f"{name}.pt", {"state_dict": built.module.state_dict()})
        command = ["dump-teacher", "--teacher", "mlp", "--checkpoint", root / f"{name}.pt", *TINY]
        command += ["--views", 2, "--encoding", encoding, "--out", root / name]
        assert kdcache_command(*command).exit_code == 0
    return root


LEARN = ("train-student", "--student", "mlp", "--device", "cpu", "--batch-size", 16, "--epochs", 2)


def last(run):
    return torch.load(run / "last.pt", weights_only=False)["state_dict"]


def assert_same_run(one, two):
    first, second = last(one), last(two)
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_the_command_averages_caches_by_flags_by_file_and_on_resume(tmp_path, tiny_caches):
    from kdcache.distill.run_state import RunState

    flags = ("--cache", tiny_caches / "a", "--cache", tiny_caches / "b", "--cache-weights", "2,1")
    assert kdcache_command(*LEARN, *flags, "--out", tmp_path / "flags").exit_code == 0
    settings = json.loads((tmp_path / "flags" / "config.json").read_text())
    assert settings["cache"] == [str(tiny_caches / "a"), str(tiny_caches / "b")]
    assert settings["cache_weights"] == [2.0, 1.0]
    (tmp_path / "list.toml").write_text(f'cache = ["{tiny_caches}/a", "{tiny_caches}/b"]\ncache-weights = [2, 1]\n')
    assert kdcache_command(*LEARN, "--config", tmp_path / "list.toml", "--out", tmp_path / "list").exit_code == 0
    assert_same_run(tmp_path / "flags", tmp_path / "list")

    def stopped(self, entry, add=RunState.add, **rest):
        add(self, entry, **rest)
        raise KeyboardInterrupt

    with mock.patch.object(RunState, "add", stopped):
        assert kdcache_command(*LEARN, *flags, "--out", tmp_path / "resumed").exit_code == 130
    result = kdcache_command("train-student", "--out", tmp_path / "resumed", "--resume")
    assert result.exit_code == 0, result.stderr
    assert_same_run(tmp_path / "flags", tmp_path / "resumed")
    other = kdcache_command("train-student", "--out", tmp_path / "resumed", "--resume", "--cache-weights", "1,2")
    assert (other.exit_code, "cache_weights" in other.stderr) == (2, True)
    fewer = kdcache_command("train-student", "--out", tmp_path / "resumed", "--resume", "--cache", tiny_caches / "a")
    assert fewer.exit_code == 2


def test_one_cache_in_a_file_is_a_text_or_a_list(tmp_path, tiny_caches):
    for name, text in (("text", f'"{tiny_caches}/a"'), ("list", f'["{tiny_caches}/a"]')):
        (tmp_path / f"{name}.toml").write_text(f"cache = {text}\nviews = [1]\nview_schedule = 'shuffle'\n")
        result = kdcache_command(*LEARN, "--config", tmp_path / f"{name}.toml", "--out", tmp_path / name)
        assert result.exit_code == 0, result.stderr
    assert_same_run(tmp_path / "text", tmp_path / "list")
    metrics = (tmp_path / "text" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["view"] for line in metrics] == [1, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cache-weights", "2"), "1 --cache-weights for 2 caches"),
        (("--cache-weights", "2,0"), "--cache-weights is 0.0"),
        (("--cache-weights", "2,x"), "--cache-weights is '2,x'"),
        (("--views", "0,2"), "view 2 is asked for"),
        (("--views", "0;1"), "--views is '0;1'"),
        (("--view-schedule", "fixed:x"), "--view-schedule is 'fixed:x'"),
    ],
)
def test_the_command_refuses_in_words(tmp_path, tiny_caches, flags, message):
    result = kdcache_command(
        *LEARN, "--cache", tiny_caches / "a", "--cache", tiny_caches / "b", *flags, "--out", tmp_path / "run"
    )
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_caches_of_other_views(tmp_path, tiny_caches):
    command = ["dump-teacher", "--teacher", "mlp", "--checkpoint", tiny_caches / "a.pt", *TINY, "--views", 2]
    assert kdcache_command(*command, "--view-seed", 5, "--out", tmp_path / "c").exit_code == 0
    result = kdcache_command(*LEARN, "--cache", tiny_caches / "a", "--cache", tmp_path / "c", "--out", tmp_path / "run")
    assert result.exit_code == 4
    assert "seed is 0 in the first and 5 in the second" in result.stderr


# Loops that are not ours.


def looked_at(loader, cache, view):
    """One pass over a loader, each item held against the cache's own rows and checksums of a view."""
    crcs, logits = cache.column("input_crc32c", view), cache.column("logits", view)
    labels, where = tensors(SAMPLES)[1], {int(crc): index for index, crc in enumerate(crcs)}
    assert len(where) == 44
    seen = []
    for images, answers, rows in loader:
        at = [where[input_crc32c(image)] for image in images]
        np.testing.assert_array_equal(answers, labels[at])
        np.testing.assert_array_equal(rows, logits[at])
        np.testing.assert_allclose(rows, Sums()(images.double() / 255).detach(), rtol=1e-6)
        seen += at
    assert sorted(seen) == list(range(44))


@pytest.mark.parametrize(
    ("workers", "context", "compression"),
    [(0, None, "none"), (0, None, "zstd:1"), (2, "fork", "none"), (2, "fork", "zstd:1"), (1, "spawn", "none")],
)
@pytest.mark.parametrize("schedule", ["cycle", "shuffle"])
def test_join_gives_what_the_teacher_saw_of_the_epochs_view(made, workers, context, compression, schedule):
    if context == "spawn" and schedule == "cycle":
        pytest.skip("each spawned worker imports torch anew")
    cache = open_cache(made(0, 3, compression=compression))
    joined = kdcache.join(Items(SAMPLES), cache, augment=Jitter(), view_schedule=schedule, seed=4)
    joined[0]
    kind = {"num_workers": workers, "multiprocessing_context": context, "persistent_workers": workers > 0}
    loader = DataLoader(joined, batch_size=8, shuffle=True, **kind)
    expected = view_schedule(schedule, (), available=3, seed=4)
    looked_at(loader, cache, expected(0))
    for epoch in (0, 1, 2, 3, 7):
        joined.set_epoch(epoch)
        looked_at(loader, cache, expected(epoch))


def test_join_of_one_fixed_view_and_of_views_there_are_not(made):
    cache = open_cache(made(0, 3))
    joined = kdcache.join(Items(SAMPLES), cache, augment=Jitter(), view_schedule="fixed:2")
    for epoch in (0, 5):
        joined.set_epoch(epoch)
        looked_at(DataLoader(joined, batch_size=8), cache, 2)
    for schedule in ("fixed:3", "cyclic"):
        with pytest.raises(UsageError):
            kdcache.join(Items(SAMPLES), cache, augment=Jitter(), view_schedule=schedule)


def test_join_refuses_mixed_inputs_and_another_transform(made):
    with pytest.raises(UsageError, match="mixed inputs"):
        kdcache.join(Items(SAMPLES), open_cache(made(mix="mixup:1")), augment=Jitter())
    with pytest.raises(CacheMismatch, match="'256' there and '9' here"):
        kdcache.join(Items(SAMPLES), open_cache(made()), augment=Jitter(9))
    with pytest.raises(UsageError, match="given as an object"):
        kdcache.join(Items(SAMPLES), open_cache(made()))


def test_join_with_a_plain_view_first(made):
    cache = open_cache(made(plain_view=True))
    joined = kdcache.join(Items(SAMPLES), cache, augment=Jitter())
    inputs, labels = tensors(SAMPLES)
    image, label, row = joined[5]
    assert torch.equal(image, inputs[5])
    assert label == labels[5]
    np.testing.assert_array_equal(row, cache.rows([5])[0])
    joined.set_epoch(1)
    looked_at(DataLoader(joined, batch_size=8), cache, 1)


class Marked(Items):
    """Items that only their own dataset gives."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, np.int32(label)


def test_join_of_a_plain_cache_gives_the_datasets_own_items(tmp_path):
    teacher, dataset = Network(16, 4), Marked(SAMPLES)
    dump_teacher(teacher, SAMPLES, out=tmp_path / "c", config=DumpConfig(device="cpu", batch_size=8))
    joined = kdcache.join(dataset, open_cache(tmp_path / "c"))
    for epoch in (0, 3):
        joined.set_epoch(epoch)
        for index in (0, 43):
            image, label, row = joined[index]
            assert type(label) is np.int32
            assert torch.equal(image, dataset[index][0])
            np.testing.assert_array_equal(row, open_cache(tmp_path / "c").rows([index])[0])
    with pytest.raises(IndexError):
        joined[44]


def test_an_ensemble_of_plain_caches_needs_no_transform(tmp_path):
    for seed in range(2):
        config = DumpConfig(device="cpu", batch_size=8, encoding="float32")
        dump_teacher(Network(16, 4, seed=seed), SAMPLES, out=tmp_path / str(seed), config=config)
    caches = [open_cache(tmp_path / str(seed)) for seed in range(2)]
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    result = train_student(module, SAMPLES, caches, config=StudentConfig(device="cpu", epochs=1, batch_size=8))
    assert "view" not in result.epochs[0]
    plain_inputs = changed(SAMPLES, inputs=tensors(SAMPLES)[0] + 1)
    dump_teacher(Network(16, 4), plain_inputs, out=tmp_path / "other", config=config)
    with pytest.raises(CacheMismatch, match=r"sha256|different inputs"):
        train_student(student(), SAMPLES, [*caches, open_cache(tmp_path / "other")], config=StudentConfig(epochs=1))
