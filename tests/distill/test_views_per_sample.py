"""Several views of each sample in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.core.errors import UsageError
from kdcache.data.views import Views
from kdcache.distill.trainer import _Loop
from tests.helpers import Items, Network, answer, synthetic

SAMPLES = synthetic(22, shape=(1, 4, 4))


class Counted(Items):
    def __init__(self, dataset):
        super().__init__(dataset)
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("views") / "c.zarr"
    config = DumpConfig(device="cpu", augment="crop-flip", views=5, features=("penultimate",), encoding="float32")
    dump_teacher(Network(16, 4), SAMPLES, out=out, config=config)
    return out


def config(**settings):
    return StudentConfig(**{"device": "cpu", "batch_size": 8, "epochs": 2, "views_per_sample": 2} | settings)


def batches_of(monkeypatch, path, dataset=SAMPLES, **settings):
    seen = []
    real = _Loop._train_on

    def watched(self, batch, epoch, step):
        seen.append((epoch, batch))
        return real(self, batch, epoch, step)

    monkeypatch.setattr(_Loop, "_train_on", watched)
    train_student(Network(16, 4, seed=1), dataset, path, config=config(**settings))
    return seen


@pytest.mark.parametrize("settings", [{}, {"row_source": "streamed"}, {"views_per_sample": 4}, {"workers": 1}])
def test_each_input_has_the_answer_to_its_own_view(monkeypatch, path, settings):
    cache, turns = open_cache(path), settings.get("views_per_sample", 2)
    views = Views(SAMPLES, cache.manifest.recipe)
    views.probe()
    seen = batches_of(monkeypatch, path, **settings)
    for epoch in range(2):
        batches = [batch for at, batch in seen if at == epoch]
        counted = np.bincount(np.concatenate([batch.indices.numpy() for batch in batches]), minlength=22)
        assert (counted == turns).all()
        for batch in batches:
            assert len(batch.labels) <= 8
            parts = batch.indices.reshape(turns, -1)
            assert (parts == parts[0]).all()
            logits, inputs = batch.soft_targets.logits().chunk(turns), batch.inputs.chunk(turns)
            for turn in range(turns):
                view = (epoch * turns + turn) % 5
                indices = parts[turn].numpy()
                assert torch.equal(inputs[turn], torch.stack(list(views.fetch(view, indices).inputs)))
                np.testing.assert_array_equal(logits[turn], cache.rows(indices, view))


def test_a_sample_is_read_once_for_all_its_views(monkeypatch, path):
    reads = {}
    for turns in (1, 4):
        dataset = Counted(SAMPLES)
        batches_of(monkeypatch, path, dataset, views_per_sample=turns, epochs=4 // turns, verify_inputs="off")
        reads[turns] = dataset.reads
    assert reads[1] - reads[4] == 3 * 22


def test_features_and_labels_alone_come_along(monkeypatch, path):
    objective = ("feature_mse", "contrastive:negatives=4", "hard_cross_entropy")
    assert batches_of(monkeypatch, path, objective=objective)[0][1].features["features.penultimate"].shape == (8, 12)
    assert batches_of(monkeypatch, path, distill=False)[0][1].soft_targets is None


def test_the_rows_of_all_turns_share_the_memory(path, capsys):
    """22 rows of 4 logits in float32 are 352 bytes; with several views the next one is read ahead."""
    for memory, turns, source in (("704", 1, "memory"), ("704", 2, "streamed"), ("1408", 2, "memory")):
        settings = config(cache_memory=memory, views_per_sample=turns, epochs=1)
        train_student(Network(16, 4, seed=1), SAMPLES, path, config=settings)
        assert capsys.readouterr().err.count(f"row source {source}") == 1


def test_what_does_not_fit_is_refused(path):
    for settings, message in (
        ({"views_per_sample": 6, "batch_size": 12}, "an epoch has 5 of the cache's views"),
        ({"view_schedule": "fixed:1"}, "an epoch has 1 of the cache's views"),
        ({"batch_size": 9}, "give --batch-size 8"),
        ({"batch_size": 2}, "give --batch-size 4"),
    ):
        with pytest.raises(UsageError, match=message):
            train_student(Network(16, 4), SAMPLES, path, config=config(**settings))


def test_on_the_command_line(tmp_path):
    common = ("--device", "cpu", "--epochs", "1")
    answer("train-teacher", "--out", tmp_path / "t", *common)
    dump = ("dump-teacher", "--checkpoint", tmp_path / "t" / "best.pt", "--augment", "affine", "--views", "2")
    answer(*dump, "--out", tmp_path / "c.zarr", "--device", "cpu")
    learn = ("train-student", "--cache", tmp_path / "c.zarr", "--views-per-sample", "2", *common)
    assert answer(*learn, "--out", tmp_path / "s")["test_accuracy"] > 0.2
