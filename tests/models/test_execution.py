"""How a network is run: batch size, memory format, worker processes, compilation and precision."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import kdcache.models.execution as execution
from kdcache import DumpConfig, dump_teacher, open_cache
from kdcache.core.commands import EvaluateArgs
from kdcache.core.errors import TargetExists, UsageError
from kdcache.core.options import merge
from kdcache.core.workers import Worker
from kdcache.data.preprocess import Preprocessor
from kdcache.data.views import Views, as_views
from kdcache.distill.teacher import plan
from kdcache.models import loading
from kdcache.models.execution import Execution, choose_execution
from kdcache.models.forward import ForwardPass
from kdcache.store.records import Preprocess, ViewRecipe
from kdcache.store.storage.registry import open_storage
from tests.helpers import Items, Network, answer, refused, synthetic, tree
from tests.helpers import kdcache as command

SAMPLES = synthetic(60, shape=(3, 8, 8))
CPU = torch.device("cpu")


class Convolution(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def forward_pass(module):
    return ForwardPass(module, Preprocessor(Preprocess()), CPU, classes=4)


def timed(monkeypatch, seconds):
    """Let a batch of a size in a format take so many seconds, by `seconds(size, format)`."""
    looked = []

    def found(network, inputs, *, limit):
        looked.append((len(inputs), network.memory_format))
        return seconds(len(inputs), network.memory_format)

    monkeypatch.setattr(execution, "_seconds", found)
    return looked


def chosen(module, rows=100_000, **settings):
    return choose_execution(forward_pass(module), as_views(SAMPLES), rows, **settings)


def test_the_fastest_size_and_format_are_taken(monkeypatch):
    costs = {8: 8.0, 16: 14.0, 32: 25.0, 64: 60.0, 128: 200.0, 256: 500.0}
    looked = timed(monkeypatch, lambda size, memory: costs[size] / 1e3 * (0.5 if memory == "channels-last" else 1))
    network = Convolution()
    assert chosen(network) == Execution(32, "channels-last")
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (256, "channels-last") not in looked, "a size beyond two that are slower"


def test_a_size_is_taken_for_real_gains_only(monkeypatch):
    timed(monkeypatch, lambda size, memory: size / 1000 if size < 64 else size / 1010)
    assert chosen(nn.Flatten()).batch_size == 8


def test_what_is_given_is_kept(monkeypatch):
    timed(monkeypatch, lambda size, memory: size / 1000 * (0.5 if memory == "channels-last" else 1))
    assert chosen(Convolution(), batch_size=24) == Execution(24, "channels-last")
    assert chosen(Convolution(), memory_format="contiguous").memory_format == "contiguous"
    network = Convolution()
    assert chosen(network, batch_size=3, memory_format="channels-last") == Execution(3, "channels-last")
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_short_pass_is_not_measured(monkeypatch):
    looked = timed(monkeypatch, lambda size, memory: size / 1000)
    assert chosen(Convolution(), rows=1000) == Execution(256, "contiguous")
    assert looked == [(8, "contiguous")]


def test_a_size_that_does_not_fit_ends_the_search(monkeypatch):
    def seconds(size, memory):
        if size > 16:
            raise torch.OutOfMemoryError("no room")
        return 0.01

    timed(monkeypatch, seconds)
    assert chosen(nn.Flatten(), rows=10**7).batch_size == 16


def test_what_is_measured_is_real(monkeypatch):
    """A network whose time grows with the square of the batch."""
    monkeypatch.setattr(execution, "SHORT_PASS_S", 0.0)

    class Slow(nn.Module):
        def forward(self, inputs):
            torch.randn(40 * len(inputs), 40 * len(inputs)) @ torch.randn(40 * len(inputs), 400)
            return inputs.flatten(1)[:, :4]

    assert chosen(Slow(), rows=10**6).batch_size <= 16


# ---- dumps


def sizes_of(monkeypatch, sizes):
    """Let the measurements of several dumps give these sizes, one after the other."""
    given = iter(sizes)
    monkeypatch.setattr(
        "kdcache.distill.teacher.plan.choose_execution", lambda *_, **__: Execution(next(given), "contiguous")
    )


def test_a_dump_records_what_was_measured_and_continues_with_it(tmp_path, monkeypatch):
    sizes_of(monkeypatch, [16])
    config = DumpConfig(device="cpu", shard_rows=32)
    out = tmp_path / "c.zarr"

    class Stops(Network):
        def forward(self, inputs):
            if self.rows >= 4 + 16 * 3:
                raise KeyboardInterrupt
            return super().forward(inputs)

    Stops.__name__ = "Network"
    with pytest.raises(KeyboardInterrupt):
        dump_teacher(Stops(192, 4), SAMPLES, out=out, config=config)
    dump_teacher(Network(192, 4), SAMPLES, out=out, config=config)
    assert open_cache(out).manifest.batch_size == 16
    monkeypatch.undo()
    dump_teacher(Network(192, 4), SAMPLES, out=tmp_path / "given.zarr", config=replace(config, batch_size=16))
    assert tree(out) == tree(tmp_path / "given.zarr")


def test_a_worker_takes_over_what_another_measured(tmp_path, monkeypatch):
    """Both look before either has made the split, and measure different sizes."""
    sizes_of(monkeypatch, [16, 24])
    config, out = DumpConfig(device="cpu", shard_rows=32), tmp_path / "c.zarr"
    dump_teacher(Network(192, 4), SAMPLES, out=out, config=config, worker=Worker(index=0, count=2), steal=False)
    root = open_storage(out)
    real, blind = root.folders, iter([[], []])
    monkeypatch.setattr(type(root), "folders", lambda self: next(blind, None) or real())
    dump_teacher(Network(192, 4), SAMPLES, out=out, config=config, worker=Worker(index=1, count=2), steal=False)
    monkeypatch.undo()
    assert open_cache(out).manifest.batch_size == 16


def test_a_worker_that_finds_the_split_only_when_it_creates_it_takes_over_too(tmp_path, monkeypatch):
    sizes_of(monkeypatch, [16, 24])
    config, out = DumpConfig(device="cpu", shard_rows=32), tmp_path / "c.zarr"
    dump_teacher(Network(192, 4), SAMPLES, out=out, config=config, worker=Worker(index=0, count=2), steal=False)
    real, blind = plan.stored_manifest, iter([None])
    monkeypatch.setattr(plan, "stored_manifest", lambda *given: next(blind, real(*given)))
    monkeypatch.setattr(plan, "find_dump", lambda *_: None)
    dump_teacher(Network(192, 4), SAMPLES, out=out, config=config, worker=Worker(index=1, count=2), steal=False)
    assert open_cache(out).manifest.batch_size == 16


def test_a_repair_computes_as_a_damaged_manifest_says(tmp_path, monkeypatch):
    """What is measured while the manifest cannot be read must not make other rows."""
    given = iter([Execution(16, "channels-last"), Execution(24, "contiguous")])
    monkeypatch.setattr("kdcache.distill.teacher.plan.choose_execution", lambda *_, **__: next(given))
    config, out = DumpConfig(device="cpu", shard_rows=32), tmp_path / "c.zarr"
    dump_teacher(Convolution(), SAMPLES, out=out, config=config)
    whole, attributes = tree(out), out / "train" / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"parameters": 692', '"parameters": 693'))
    (out / "train" / "logits" / "c" / "0" / "0" / "0").unlink()
    assert tree(out) != whole
    sizes = []
    real = execution.ForwardPass.raw
    monkeypatch.setattr(
        execution.ForwardPass,
        "raw",
        lambda self, inputs, samples=None: (
            sizes.append((len(inputs), self.memory_format)) or real(self, inputs, samples)
        ),
    )
    dump_teacher(Convolution(), SAMPLES, out=out, config=config, repair=True)
    assert tree(out) == whole
    assert sizes[-1] == (16, "channels-last")


def test_channels_last_is_part_of_a_dump(tmp_path):
    config = DumpConfig(device="cpu", memory_format="channels-last", batch_size=8)
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "c.zarr", config=config)
    assert open_cache(tmp_path / "c.zarr").manifest.memory_format == "channels-last"
    other = replace(config, memory_format="contiguous")
    with pytest.raises(TargetExists, match="memory_format"):
        dump_teacher(Convolution(), SAMPLES, out=tmp_path / "c.zarr", config=other)
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "c.zarr", config=replace(config, memory_format="auto"))
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "d.zarr", config=replace(config, memory_format="contiguous"))
    one, two = (open_cache(tmp_path / f"{name}.zarr").rows(range(60)) for name in "cd")
    np.testing.assert_allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("amp", ["bf16"])
def test_what_a_narrower_precision_changes_is_measured_and_kept(tmp_path, amp, capsys):
    config = DumpConfig(device="cpu", amp=amp, encoding="float32")
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "c.zarr", config=config)
    record = open_cache(tmp_path / "c.zarr").manifest.precision
    assert record.samples == 32
    assert [each.temperature for each in record.fidelity] == [1, 2, 4, 8]
    assert 0 < record.fidelity[0].mean_kl < 1e-2
    assert record.fidelity[0].mean_kl <= record.fidelity[0].max_kl
    assert f"--amp {amp} against float32 on 32 samples" in capsys.readouterr().err
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "off.zarr", config=replace(config, amp="off"))
    assert open_cache(tmp_path / "off.zarr").manifest.precision is None
    exact, narrow = (open_cache(tmp_path / name).rows(range(60)) for name in ("off.zarr", "c.zarr"))
    assert 0 < np.abs(exact - narrow).max() < 0.1


def test_a_compiled_dump_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: lambda inputs: module(inputs) + 0)
    config = DumpConfig(device="cpu", compile=True, batch_size=8)
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "c.zarr", config=config)
    assert open_cache(tmp_path / "c.zarr").manifest.compiled
    with pytest.raises(UsageError, match="--compile is given, and layers are stored"):
        dump_teacher(Convolution(), SAMPLES, out=tmp_path / "d", config=replace(config, features=("penultimate",)))


def test_a_teacher_that_cannot_be_compiled_runs_as_it_is(tmp_path, monkeypatch, capsys):
    def fails(inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda module: fails)
    dump_teacher(Convolution(), SAMPLES, out=tmp_path / "c.zarr", config=DumpConfig(device="cpu", compile=True))
    assert not open_cache(tmp_path / "c.zarr").manifest.compiled
    assert "no compiler" in capsys.readouterr().err


class Counted(Items):
    """Counts how often each sample is read."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.reads = np.zeros(len(dataset), int)

    def __getitem__(self, index):
        self.reads[index] += 1
        return super().__getitem__(index)


# The name is recorded.
Counted.__name__ = "Items"


def dump_views(dataset, out, **settings):
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=32, views=5, augment="crop-flip", **settings)
    dump_teacher(Convolution(), dataset, out=out, config=config)
    return out


def test_samples_are_read_once_for_all_views(tmp_path):
    whole = tree(dump_views(Items(SAMPLES), tmp_path / "all.zarr"))
    reads = {}
    for number in (1, 2, 5, 8):
        dataset = Counted(SAMPLES)
        assert tree(dump_views(dataset, tmp_path / f"{number}.zarr", views_in_flight=number)) == whole
        reads[number] = int(np.median(dataset.reads))
    # Once for the rows and once for a check, which looks at all of so few.
    assert reads[1] - reads[5] == 2 * (5 - 1)
    assert reads[1] - reads[2] == 2 * (5 - 3)
    assert reads[8] == reads[5]


@pytest.mark.parametrize("mix", ["none", "mixup:1.0"])
def test_views_read_together_are_those_read_alone(mix):
    recipe = ViewRecipe(augment="crop-flip", mix=mix, plain_view=True, seed=3)
    views, indices = Views(SAMPLES, recipe), np.array([5, 3, 40])
    together = views.fetch_several([0, 2, 1], indices)
    for view, shared in zip([0, 2, 1], together, strict=True):
        alone = views.fetch(view, indices)
        for one, other in zip(shared.inputs, alone.inputs, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(shared.labels, alone.labels)


def darken(image):
    image //= 2  # in place
    return image


def test_a_transform_that_writes_into_its_input_does_not_reach_the_next_view():
    views, indices = Views(SAMPLES, ViewRecipe(), transform=darken), np.array([5, 3, 40])
    alone = views.fetch(1, indices).inputs
    for shared in views.fetch_several([1, 2, 3], indices):
        assert all(torch.equal(one, other) for one, other in zip(shared.inputs, alone, strict=True))


# ---- workers


@pytest.mark.parametrize(
    ("load_ms", "compute_ms", "samples", "expected"),
    [(0.01, 1, 1000, 0), (5, 1, 10_000, 2), (5, 20, 10_000, 0), (5, 20, 100, 0)],
)
def test_workers_are_started_where_loading_is_what_takes_long(monkeypatch, load_ms, compute_ms, samples, expected):
    monkeypatch.setattr(loading, "core_count", lambda: 2)
    times = [0.0, 16 * load_ms / 1e3, 0.0, 16 * compute_ms / 1e3]
    monkeypatch.setattr(loading.time, "perf_counter", itertools.chain(times, itertools.repeat(0.0)).__next__)
    assert loading.auto_workers(forward_pass(Network(192, 4)), as_views(SAMPLES), samples) == expected


# ---- the command line


def test_auto_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.toml").write_text('batch-size = "auto"\nworkers = "auto"\n')
    answer("train-teacher", "--epochs", "1", "--out", "t", "--device", "cpu")
    dump = ("dump-teacher", "--checkpoint", "t/best.pt", "--device", "cpu", "--batch-size")
    answer(*dump, "auto", "--out", "a.zarr")
    answer(*dump, "64", "--out", "b.zarr")
    assert [open_cache(name).manifest.batch_size for name in ("a.zarr", "b.zarr")] == [256, 64]
    assert "a whole number, or auto" in refused(2, *dump, "some", "--out", "c.zarr")
    assert "at least 1" in refused(2, *dump, "0", "--out", "c.zarr")
    answer("evaluate", "--run", "t", "--config", "settings.toml", "--device", "cpu")
    assert "[default: auto]" in command("dump-teacher", "--help").stdout
    assert merge(EvaluateArgs, {"run": "t", "batch_size": "auto"}).batch_size is None
