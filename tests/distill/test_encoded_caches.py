"""Caches of every encoding: dumped, stopped, continued, verified, repaired, joined and trained from."""

import numpy as np
import pytest
import torch
from torch import nn

import kdcache
from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, plan_dump, train_student
from kdcache.core.errors import CacheDamaged, ModelError, TargetExists, TeacherOutputError, UsageError
from kdcache.store.encodings.topk import TAIL
from kdcache.store.inspect import inspect_cache
from kdcache.store.storage.registry import open_storage
from kdcache.store.verify import verify_split
from tests.helpers import Interrupted, Network, plain_forward, synthetic, tensors, tree

SAMPLES = synthetic(60)
ENCODINGS = ["quantized:8", "quantized:5", "topk:2", "head", "head:8"]
PROBED = 8  # rows of batches before the dump: see `TeacherProbe` and `find_head`


def dump(out, encoding="float32", *, teacher=None, samples=SAMPLES, stop_after=10**9, **options):
    own = {name: options.pop(name) for name in ("max_kl", "temperatures", "augment", "views") if name in options}
    config = DumpConfig(device="cpu", batch_size=8, shard_rows=16, encoding=encoding, **own)
    return dump_teacher(teacher or Network(16, 4, stop_after=stop_after), samples, out=out, config=config, **options)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    for encoding in ("float32", *ENCODINGS):
        dump(folder / encoding, encoding)
    return folder


def student_config(**settings):
    return StudentConfig(
        **{"device": "cpu", "epochs": 2, "batch_size": 16, "temperature": 4.0, "alpha": 1.0} | settings
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_stopped_dump_continues_to_the_same_bytes(tmp_path, caches, encoding):
    with pytest.raises(Interrupted):
        dump(tmp_path / "c", encoding, stop_after=PROBED + 40)
    assert 0 < dump(tmp_path / "c", encoding).computed_rows < 60
    assert tree(tmp_path / "c") == tree(caches / encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_damaged_byte_is_found_and_repaired(tmp_path, encoding):
    path = tmp_path / "c"
    dump(path, encoding)
    assert verify_split(open_storage(path), "train").problems == []
    whole = tree(path)
    arrays = {name.split("/")[1] for name in whole if "/c/" in name} - {"ledger"}
    assert "facts" in arrays
    for array in sorted(arrays):
        file = sorted((path / "train" / array / "c").rglob("*"))[-1]
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
        problems = verify_split(open_storage(path), "train").problems
        assert len(problems) == 1, array
        assert array in problems[0]
        dump(path, encoding, repair=True)
        assert tree(path) == whole, array


def test_a_damaged_constant_is_refused_by_name(tmp_path):
    dump(tmp_path / "c", "head")
    file = tmp_path / "c" / "train" / "logits.weight" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CacheDamaged, match=r"logits\.weight"):
        open_cache(tmp_path / "c")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_recorded_fidelity_is_that_of_the_rows(caches, encoding):
    cache = open_cache(caches / encoding)
    teacher = plain_forward(Network(16, 4), tensors(SAMPLES)[0]).astype(np.float64)
    changed = cache.rows(range(60)).argmax(axis=1) != teacher.argmax(axis=1)
    assert cache.manifest.changed_predictions == changed.sum()
    for record in cache.manifest.fidelity:
        temperature = record.temperature
        stored = cache.rows(range(60), temperature=temperature).astype(np.float64)
        p, q = (torch.from_numpy(each / temperature).log_softmax(1) for each in (teacher, stored))
        kl = (p.exp() * (p - q)).sum(1).numpy()
        assert record.mean_kl == pytest.approx(kl.mean(), rel=1e-2, abs=1e-9)
        assert record.max_kl == pytest.approx(kl.max(), rel=1e-2, abs=1e-9)
        assert record.mean_kl <= record.max_kl
        assert record.p99_kl <= record.max_kl
    assert [record.temperature for record in cache.manifest.fidelity] == [1, 2, 4, 8]
    assert cache.manifest.teacher.accuracy == np.mean(cache.rows(range(60)).argmax(axis=1) == cache.column("labels"))
    assert "mean KL in nats" in inspect_cache(caches / encoding).text


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reading", [{}, {"row_source": "streamed"}, {"cache_on_device": True}])
def test_a_student_learns_as_from_whole_logits(caches, encoding, reading):
    losses = {}
    for name in ("float32", encoding):
        seen = []
        train_student(
            Network(16, 4, seed=1),
            SAMPLES,
            caches / name,
            config=student_config(shuffle="window", **reading) if reading else student_config(),
            on_step=lambda step, parts, seen=seen: seen.append(float(parts["loss"])),
        )
        losses[name] = np.array(seen)
    if encoding == "topk:2":  # a lower bound of the same
        assert (losses[encoding] <= losses["float32"] + 1e-6).all()
    else:
        np.testing.assert_allclose(losses[encoding], losses["float32"], rtol=0.15, atol=2e-3)


def test_both_tails_train_and_the_uniform_one_is_the_decoded_row(caches):
    first = {}
    for tail in ("other", "uniform"):
        train_student(
            Network(16, 4, seed=1),
            SAMPLES,
            caches / "topk:2",
            config=student_config(tail=tail, epochs=1),
            on_step=lambda step, parts, tail=tail: first.setdefault(tail, float(parts["kd"])),
        )
    assert first["other"] < first["uniform"]


@pytest.mark.parametrize(
    ("cache", "settings", "found", "remedy"),
    [
        ("topk:2", {"temperature": 3.0}, "the temperature is 3", "--temperatures 1,2,4,8,3"),
        ("topk:2", {"objective": ("logit_mse",)}, "the objective logit_mse compares all classes", "use kd"),
        ("topk:2", {"objective": ("kd", "dist:weight=0.1")}, "the objective dist compares all classes", "use kd"),
        ("topk:2", {"objective": ("kd:temperature=5",)}, "the temperature is 5", "1,2,4,8,5"),
        ("head", {"tail": "uniform"}, "--tail is uniform, and the cache holds head", "leave out --tail"),
    ],
)
def test_what_an_encoding_cannot_give_is_refused_before_the_first_step(caches, cache, settings, found, remedy):
    with pytest.raises(UsageError) as caught:
        train_student(Network(16, 4), SAMPLES, caches / cache, config=student_config(**settings))
    assert found in caught.value.found
    assert remedy in caught.value.remedy


def test_several_encodings_are_averaged_as_logits(caches):
    paths = [caches / "float32", caches / "quantized:8"]
    result = train_student(Network(16, 4, seed=1), SAMPLES, paths, config=student_config())
    assert np.isfinite(result.epochs[-1]["loss"])


def test_join_decodes_at_a_temperature(caches):
    cache = open_cache(caches / "topk:2")
    joined = kdcache.join(SAMPLES, cache, temperature=4.0)
    assert torch.equal(joined[7][2], torch.from_numpy(cache.rows([7], temperature=4.0)[0]))
    assert not torch.equal(joined[7][2], torch.from_numpy(cache.rows([7])[0]))
    with pytest.raises(UsageError, match="the temperature is 3"):
        kdcache.join(SAMPLES, cache, temperature=3.0)


def test_the_temperatures_are_part_of_the_dump(tmp_path):
    dump(tmp_path / "c", "topk:2", temperatures=(4.0, 1.0))
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.temperatures == (1.0, 4.0)
    assert cache.reader.rows(TAIL, 0, np.arange(3)).shape == (3, 2)
    with pytest.raises(TargetExists, match="temperatures"):
        dump(tmp_path / "c", "topk:2", temperatures=(1.0, 2.0))


def test_a_loss_above_the_bound_stops_the_dump_and_names_what_satisfies_it(tmp_path):
    with pytest.raises(TeacherOutputError) as caught:
        dump(tmp_path / "c", "topk:1", max_kl=1e-4)
    assert "topk:1 loses a mean KL of" in caught.value.found
    assert "at most 0.0001" in caught.value.needed
    spec = caught.value.remedy.split("--encoding ")[1].split(",")[0]
    dump(tmp_path / "other", spec, max_kl=1e-4)
    assert max(each.mean_kl for each in open_cache(tmp_path / "other").manifest.fidelity) <= 1e-4


class Scaled(nn.Module):
    """A network whose logits are not those of its last linear layer."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Flatten(), nn.Linear(16, 4)

    def forward(self, inputs):
        return 2 * self.last(self.body(inputs))


@pytest.mark.parametrize(
    ("teacher", "found"),
    [
        (Scaled, "took last for the layer that the logits come from"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 4, 1), nn.Flatten()), "runs none"),
    ],
)
def test_a_teacher_without_a_linear_head_is_refused_by_the_layer(tmp_path, teacher, found):
    with pytest.raises(ModelError) as caught:
        dump(tmp_path / "c", "head", teacher=teacher())
    assert found in caught.value.found
    assert "quantized:8" in caught.value.remedy
    assert not (tmp_path / "c").exists()


def test_a_dry_run_compares_all_encodings(tmp_path):
    config = DumpConfig(device="cpu", batch_size=8, encoding="topk:3")
    plan = plan_dump(Network(16, 4), SAMPLES, out=tmp_path / "c", config=config)
    found = {each.encoding: each for each in plan.encodings}
    assert {"float32", "float16", "quantized:8", "head", "topk:3"} <= found.keys()
    assert "topk:20" not in found  # of four classes
    assert found["float16"].bytes_per_row == 8
    assert found["topk:3"].bytes_per_row == 3 * 2 + 3 * 2 + 4 * 4
    assert found["float32"].mean_kl["1"] == 0
    assert all(each.bytes >= 60 * each.bytes_per_row for each in plan.encodings)
    assert not (tmp_path / "c").exists()


def test_views_are_added_to_an_encoded_cache(tmp_path):
    shared = {"augment": "affine", "samples": synthetic(60, shape=(1, 4, 4))}
    dump(tmp_path / "four", "quantized:6", views=3, **shared)
    dump(tmp_path / "c", "quantized:6", views=2, **shared)
    dump(tmp_path / "c", "quantized:6", views=2, add_views=1, **shared)
    assert tree(tmp_path / "c") == tree(tmp_path / "four")
