"""Objectives by name: what they are told, what they need of the cache, and that they teach."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import DumpConfig, StudentConfig, dump_teacher, losses, open_cache, plan_dump, train_student
from kdcache.core.config import RuntimeConfig
from kdcache.core.errors import CacheMismatch, ModelError, UsageError
from kdcache.data.views import Views
from kdcache.distill.objective import LOSSES, parse_objectives
from kdcache.distill.teacher.spot_check import recompute_rows
from kdcache.models.checkpoints import read_checkpoint
from kdcache.models.feature_hooks import PENULTIMATE, FeatureHooks, list_layers, pool_features
from kdcache.store.inspect import inspect_cache
from kdcache.store.layout import predicted_bytes
from kdcache.store.records import ViewRecipe
from kdcache.store.storage.local import LocalStorage
from kdcache.store.verify import verify_split
from tests.helpers import Items, synthetic, tree

DATA = synthetic(150, shape=(1, 8, 8))


class Maps(nn.Module):
    """Two convolutions and two linear layers, defined in another order than they run."""

    def __init__(self, *, channels: int = 6, width: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(width, 4)
            self.conv = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3))
            self.hidden = nn.Linear(channels * 36, width)

    def forward(self, inputs):
        return self.head(self.hidden(self.conv(inputs).flatten(1)).relu())


def config(**settings):
    return StudentConfig(**{"device": "cpu", "batch_size": 32, "epochs": 2, "learning_rate": 3e-3} | settings)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Caches with features pooled and whole, uncompressed and not, and with none."""
    root = tmp_path_factory.mktemp("features")
    layers = ("conv.2", PENULTIMATE)
    for name, settings in {
        "pooled": {"features": layers},
        "whole": {"features": layers, "pool": "none"},
        "zstd": {"features": layers, "pool": "none", "compression": "zstd"},
        "plain": {},
    }.items():
        dump_teacher(
            Maps(),
            DATA,
            out=root / name,
            config=DumpConfig(device="cpu", batch_size=32, shard_rows=64, encoding="float32", **settings),
        )
    return root


def features_of(teacher, layer, pool):
    inputs, _ = DATA.fetch(np.arange(len(DATA)))
    with torch.no_grad(), FeatureHooks(teacher, [layer]) as taps:
        teacher.eval()(inputs / 255)
        return pool_features(taps.take()[layer], pool).numpy()


@pytest.mark.parametrize(("name", "pool"), [("pooled", "avg"), ("whole", "none"), ("zstd", "none")])
def test_features_are_stored_as_the_teacher_gave_them(paths, name, pool):
    cache = open_cache(paths / name)
    for layer, shape in (("conv.2", (6,) if pool == "avg" else (6, 6, 6)), (PENULTIMATE, (10,))):
        stored = cache.column(f"features.{layer}")
        assert stored.shape == (150, *shape)
        np.testing.assert_allclose(stored, features_of(Maps(), layer, pool), atol=1e-5)
    assert [(feature.layer, feature.pool) for feature in cache.manifest.features] == [
        ("conv.2", pool),
        (PENULTIMATE, pool),
    ]
    assert verify_split(LocalStorage(paths / name), "train").problems == []


def test_the_bytes_of_features_are_predicted_to_the_byte(paths):
    for name in ("pooled", "whole"):
        manifest = open_cache(paths / name).manifest
        files = {path: data for path, data in tree(paths / name / "train").items() if "/c/" in path}
        stored = sum(len(data) for path, data in files.items() if not path.startswith("ledger"))
        assert stored == predicted_bytes(manifest)
    plan = plan_dump(
        Maps(),
        DATA,
        out=paths / "not there",
        config=DumpConfig(device="cpu", features=("conv.2",), pool="none", encoding="float32", shard_rows=64),
    )
    plain = predicted_bytes(open_cache(paths / "plain").manifest)
    assert plan.bytes - plain == pytest.approx(192 * 216 * 4, rel=0.01)


@pytest.mark.parametrize("factor", [1.0, 2.0, math.nan])
def test_a_teacher_that_answers_again_is_compared_in_its_features_too(paths, factor):
    teacher = Maps()
    with torch.no_grad():  # by another factor the maps are others, and the logits are not
        teacher.conv[2].weight *= factor
        teacher.conv[2].bias *= factor
        teacher.hidden.weight /= factor
    for name in ("pooled", "whole"):
        found = recompute_rows(
            teacher,
            Views(DATA, ViewRecipe()),
            open_cache(paths / name),
            rows=40,
            execution=RuntimeConfig(device="cpu", batch_size=32),
        )
        assert (found.rows, found.same_weights) == (40, factor == 1)
        assert (found.largest_difference <= 1e-5) == (factor == 1)
        if factor == 2:
            assert found.array == "features.conv.2"


def test_a_teacher_is_left_as_it_was(tmp_path):
    teacher = Maps()
    dump_teacher(teacher, DATA, out=tmp_path / "c", config=DumpConfig(device="cpu", features=(PENULTIMATE, "conv.2")))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in teacher.modules())


def test_layers_are_listed_as_they_run():
    names = [name for name, _, _ in list_layers(Maps(), torch.zeros(1, 1, 8, 8))]
    assert names == ["conv.0", "conv.1", "conv.2", "conv", "hidden", "head"]
    assert list_layers(Maps(), torch.zeros(1, 1, 8, 8))[2][1:] == ("Conv2d", "6×6×6")


@pytest.mark.parametrize("layer", ["conv.9", "penultimat", ""])
def test_a_layer_that_is_not_there_is_refused(tmp_path, layer):
    with pytest.raises(ModelError, match="has no layer"):
        dump_teacher(Maps(), DATA, out=tmp_path / "c", config=DumpConfig(device="cpu", features=(layer,)))
    assert not (tmp_path / "c").exists()


SPECS = {
    "kd": "pooled",
    "soft_cross_entropy:temperature=2": "pooled",
    "logit-mse": "plain",
    "decoupled_kd:nontarget-weight=2": "plain",
    "dist": "plain",
    "standardized_kd": "plain",
    "hard_cross_entropy": "plain",
    "cosine:layer=penultimate": "pooled",
    "feature_mse:layer=penultimate": "pooled",
    "feature_mse:layer=conv.2,student-layer=conv.2": "whole",
    "attention_transfer:layer=conv.2,student-layer=conv.2,weight=100": "whole",
    "similarity_preserving:layer=conv.2": "zstd",
    "relational_distance:layer=penultimate": "whole",
    "relational_angle:layer=penultimate": "pooled",
    "contrastive:layer=penultimate,negatives=50": "pooled",
}


def first_and_last_loss(student, path, settings):
    seen = []
    train_student(student, DATA, path, config=settings, on_step=lambda step, parts: seen.append(float(parts["loss"])))
    return np.mean(seen[:5]), np.mean(seen[-5:])


@pytest.mark.parametrize("spec", SPECS)
def test_every_objective_is_learnt_and_leaves_the_student_alone(paths, spec):
    student = Maps(channels=4, width=8, seed=1)
    names = set(student.state_dict())
    first, last = first_and_last_loss(student, paths / SPECS[spec], config(objective=(spec,), epochs=8))
    assert last < first
    assert set(student.state_dict()) == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in student.modules())


def test_every_objective_is_tried():
    of_several_classes = {"binary_kd", "binary_cross_entropy"}  # in test_multi_label.py
    assert {spec.partition(":")[0].replace("-", "_") for spec in SPECS} == set(LOSSES) - of_several_classes


@pytest.mark.parametrize("settings", [{"row_source": "streamed"}, {"cache_on_device": True}])
@pytest.mark.parametrize("name", ["whole", "pooled"])
def test_features_are_those_of_the_sample_however_they_are_fed(paths, name, settings):
    """A student that is the teacher has no feature to learn, if each sample meets its own."""
    student = Maps()
    specs = ("feature_mse:layer=conv.2,student-layer=conv.2", "feature_mse:layer=penultimate")
    settings = config(objective=specs, learning_rate=1e-12, epochs=1, **settings)
    seen = []
    train_student(student, DATA, paths / name, config=settings, on_step=lambda step, parts: seen.append(parts))
    assert max(float(value) for parts in seen for value in parts.values()) < 1e-9


def test_the_sum_is_weighted_and_grows_over_the_warm_up(paths):
    seen = []
    specs = ("kd:temperature=3,weight=2", "hard_cross_entropy:weight=0.5", "logit_mse:weight=4,warmup=2")
    train_student(
        Maps(seed=1),
        DATA,
        paths / "plain",
        config=config(objective=specs),
        on_step=lambda step, parts: seen.append(parts),
    )
    steps = len(seen) // 2
    for step, parts in enumerate(seen):
        grown = step / steps / 2
        expected = 2 * parts["kd"] + 0.5 * parts["hard_cross_entropy"] + 4 * grown * parts["logit_mse"]
        torch.testing.assert_close(parts["loss"], expected)


def test_one_kd_is_the_loss_that_has_its_name(paths):
    cache, inputs = open_cache(paths / "plain"), []
    student = Maps(seed=1)
    before = Maps(seed=1).eval()
    seen = []
    settings = config(objective=("kd:temperature=3",), epochs=1, batch_size=150)
    train_student(student, DATA, cache, config=settings, on_step=lambda step, parts: seen.append(parts["kd"]))
    inputs, _ = DATA.fetch(np.arange(150))
    with torch.no_grad():
        expected = losses.kd(before(inputs / 255), torch.from_numpy(cache.column("logits")), temperature=3)
    torch.testing.assert_close(seen[0], expected)


def test_a_run_with_projections_is_resumed_exactly_and_exports_the_student_alone(paths, tmp_path):
    specs = ("hard_cross_entropy", "feature_mse:layer=penultimate", "contrastive:layer=penultimate,negatives=20")
    settings = config(objective=specs, epochs=4)
    whole, halves = Maps(width=8, seed=1), Maps(width=8, seed=1)
    train_student(whole, DATA, paths / "pooled", config=settings, out=tmp_path / "whole")

    def stop(step, parts):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(halves, DATA, paths / "pooled", config=settings, out=tmp_path / "halves", on_step=stop)
    again = Maps(width=8, seed=1)
    train_student(again, DATA, paths / "pooled", config=settings, out=tmp_path / "halves", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert set(read_checkpoint(tmp_path / "whole" / "best.pt")["state_dict"]) == set(Maps().state_dict())
    assert read_checkpoint(tmp_path / "whole" / "last.pt")["objective"]


@pytest.mark.parametrize(
    ("name", "spec", "error", "parts"),
    [
        ("plain", "feature_mse", CacheMismatch, ["holds no features", "--features penultimate"]),
        ("plain", "attention_transfer:layer=conv.2", CacheMismatch, ["--features conv.2 --pool none"]),
        ("pooled", "feature_mse:layer=hidden", CacheMismatch, ["features of conv.2, penultimate", "--features hidden"]),
        ("pooled", "feature_mse", UsageError, ["which features", "layer=conv.2"]),
        ("pooled", "attention_transfer:layer=conv.2", ModelError, ["(10,)", "(6,)", "--student-layer"]),
        ("whole", "feature_mse:layer=conv.2", ModelError, ["(10,)", "(6, 6, 6)"]),
        ("pooled", "feature_mse:layer=conv.2,student-layer=nothing", ModelError, ["no layer 'nothing'"]),
        ("plain", "kdd", UsageError, ["'kdd'", "kd"]),
        ("plain", "kd:temprature=2", UsageError, ["'temprature'", "temperature"]),
        ("plain", "kd:temperature=warm", UsageError, ["'warm'", "a number"]),
        ("plain", "kd:temperature=0", UsageError, ["temperature is '0'", "above 0"]),
        ("plain", "kd:weight=-1", UsageError, ["weight is '-1'", "from 0"]),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(paths, tmp_path, name, spec, error, parts):
    student = Maps()
    with pytest.raises(error) as caught:
        train_student(student, DATA, paths / name, config=config(objective=(spec,)), out=tmp_path / "run")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in student.modules())


def test_contrastive_needs_features_that_can_be_drawn(paths):
    settings = config(objective=("contrastive:layer=penultimate",), row_source="streamed")
    with pytest.raises(UsageError, match="draws negatives from the whole cache"):
        train_student(Maps(), DATA, paths / "pooled", config=settings)


def test_a_dataset_of_items_learns_from_features_too(paths):
    specs = ("feature_mse:layer=penultimate",)
    cache = open_cache(paths / "pooled")
    record = cache.manifest.dataset
    items = Items(DATA)
    items.classes = list(record.classes)
    losses_of = {}
    for name, dataset in (("array", DATA), ("items", items)):
        seen = losses_of[name] = []
        settings = config(objective=specs)
        train_student(
            Maps(seed=1),
            dataset,
            cache,
            config=settings,
            on_step=lambda _, p, seen=seen: seen.append(p["loss"]),
        )
    assert torch.equal(torch.stack(losses_of["array"]), torch.stack(losses_of["items"]))


def test_the_temperature_is_the_settings_unless_the_objective_has_its_own():
    settings = config(temperature=5.0)
    kd, own, contrastive = parse_objectives(("kd", "kd:temperature=2", "contrastive"), settings)
    assert (kd.settings, own.settings, contrastive.settings) == (
        {"temperature": 5.0},
        {"temperature": 2.0},
        {"temperature": 0.1},
    )


def test_inspect_tells_of_features(paths):
    assert "conv.2 (6×6×6), pool none; penultimate (10), pool none" in inspect_cache(paths / "whole").text
    assert re.search(r"features +none", inspect_cache(paths / "plain").text)
