"""Runs as they are stopped, continued, extended, begun anew and fail."""

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.apps.sweep_workers import Job, _finished
from kdcache.cli.options import _kept
from kdcache.core.errors import CacheBusy, ModelError, TargetExists, TrainingDiverged, UsageError
from kdcache.core.json_records import to_json
from kdcache.core.run_dir import RunFolder, read_metrics
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.checkpoints import read_checkpoint, save_checkpoint
from kdcache.models.feature_hooks import FeatureHooks, copy_module
from tests.distill.test_trainer import (
    OBJECTIVE,
    PLAIN,
    Single,
    Watcher,
    assert_equal_weights,
    config,
    fit,
    run_folder,
    without_seconds,
)
from tests.helpers import Interrupted, Network, synthetic, tree

HOLD = """
import sys
from pathlib import Path
from kdcache.core.run_dir import RunFolder
with RunFolder(Path(sys.argv[1]), {}, resume=False).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def stop(step, parts):
    raise Interrupted


# A run folder is locked.


def test_a_second_process_is_refused_and_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        before = tree(folder)
        with pytest.raises(CacheBusy) as caught:
            fit(config(), run=run_folder(folder, config()))
        assert f"another training run writes to {folder}" in caught.value.found
        assert caught.value.exit_code == 1
        assert tree(folder) == before
        child.kill()
    fit(config(epochs=1), run=run_folder(folder, config(epochs=1)))  # the lock went with its process
    assert not (folder / ".lock").exists()
    assert len(read_metrics(folder)) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_two_attempts_at_once_train_once(tmp_path, resume):
    settings = config(epochs=2)
    if resume:
        with pytest.raises(Interrupted):
            fit(settings, run=run_folder(tmp_path / "run", settings), on_step=lambda step, _: step < 6 or stop(0, {}))
    first, second = (run_folder(tmp_path / "run", settings, resume=resume) for _ in range(2))

    def meet(batch):
        with pytest.raises(CacheBusy):
            fit(settings, run=second)

    fit(settings, run=first, join=Watcher(meet))
    assert [entry["epoch"] for entry in read_metrics(tmp_path / "run")] == [1, 2]
    if not resume:  # it was made when the place was free, and is told that it is not any more
        with pytest.raises(TargetExists):
            fit(settings, run=second)
    assert len(read_metrics(tmp_path / "run")) == 2


# A run without a finished epoch is begun anew.


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_whose_first_epoch_failed_is_begun_anew_with_other_settings(tmp_path, resume):
    settings = config(epochs=2)
    broken = lambda logits, batch, epochs_done: {"loss": logits.mean() * math.nan}  # noqa: E731
    with pytest.raises(TrainingDiverged):
        fit(settings, objective=broken, run=run_folder(tmp_path / "run", settings))
    other = config(epochs=2, learning_rate=0.01, seed=3)
    fit(other, run=run_folder(tmp_path / "run", other, resume=resume))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learning_rate"] == 0.01
    assert len(read_metrics(tmp_path / "run")) == 2


def test_finished_epochs_are_not_overwritten_where_a_file_is_gone(tmp_path):
    settings = config(epochs=1)
    fit(settings, run=run_folder(tmp_path / "run", settings))
    (tmp_path / "run" / "last.pt").unlink()
    before = tree(tmp_path / "run")
    with pytest.raises(UsageError, match=r"has finished epochs, but no last\.pt"):
        run_folder(tmp_path / "run", settings, resume=True)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(TargetExists):
        run_folder(tmp_path / "run", settings)
    assert {"config.json": before["config.json"], **tree(tmp_path / "run")} == before


# More epochs extend a run.


@pytest.mark.parametrize("optional", [{}, {"schedule": "cosine", "optimizer": "sgd", "ema": 0.9, "warmup_epochs": 0.5}])
def test_more_epochs_extend_a_run_by_the_schedule_of_the_new_total(tmp_path, capsys, optional):
    short, long = config(epochs=2, **optional), config(epochs=4, **optional)
    fit(short, run=run_folder(tmp_path / "run", short))
    RunFolder(tmp_path / "run", to_json(short), resume=True).save_result({})
    rates = []
    extended, _ = fit(long, run=run_folder(tmp_path / "run", long, resume=True), module=Network(16, 4, seed=5))
    rates = [entry["learning_rate"] for entry in extended.epochs]
    whole, _ = fit(long)
    assert rates[2:] == [entry["learning_rate"] for entry in whole.epochs][2:]
    if not optional:  # one rate for all: exactly the run of four epochs
        assert without_seconds(extended.epochs) == without_seconds(whole.epochs)
        assert_equal_weights(extended.module.state_dict(), whole.module.state_dict())
    assert "extended from 2 to 4 epochs" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()  # it was that of two epochs
    best = read_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == 4
    assert_equal_weights(best["state_dict"], extended.module.state_dict())


def test_fewer_epochs_and_other_settings_are_refused_and_a_finished_run_says_so(tmp_path, capsys):
    settings = config(epochs=3)
    fit(settings, run=run_folder(tmp_path / "run", settings))
    with pytest.raises(UsageError, match="epochs was 3 and is 2"):
        run_folder(tmp_path / "run", config(epochs=2), resume=True)
    with pytest.raises(UsageError) as caught:
        run_folder(tmp_path / "run", config(epochs=5, learning_rate=0.5), resume=True)
    assert caught.value.found.endswith("with other settings: learning_rate was 0.001 and is 0.5")
    capsys.readouterr()
    folder = run_folder(tmp_path / "run", settings, resume=True)
    data = training_data(synthetic(70), PLAIN, settings)
    train(Network(16, 4), data, objective=OBJECTIVE, config=settings, run=folder)
    said = capsys.readouterr().err
    assert "all 3 epochs are finished" in said
    assert "continuing" not in said


def test_a_stopped_extension_is_continued(tmp_path):
    fit(config(epochs=1), run=run_folder(tmp_path / "run", config(epochs=1)))
    for settings in (config(epochs=3), config(epochs=3)):
        folder = run_folder(tmp_path / "run", settings, resume=True)
        with pytest.raises(Interrupted):
            fit(settings, run=folder, on_step=stop)
    settings = config(epochs=3)
    extended, _ = fit(settings, run=run_folder(tmp_path / "run", settings, resume=True))
    assert without_seconds(extended.epochs) == without_seconds(fit(settings)[0].epochs)


def test_a_sweep_does_not_take_the_result_of_fewer_epochs_for_its_own(tmp_path):
    settings = to_json(config(epochs=1))
    job = {"command": "train-student", **settings}
    folder = RunFolder(tmp_path / "run", job, resume=False)
    fit(config(epochs=1), run=folder)
    folder.save_result({"test_accuracy": 0.5})
    assert _finished(Job(name="j", settings={**settings, "out": str(tmp_path / "run")})) is not None
    assert _finished(Job(name="j", settings={**settings, "epochs": 2, "out": str(tmp_path / "run")})) is None


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    path = tmp_path_factory.mktemp("viewed") / "c"
    dataset = synthetic(64, shape=(1, 8, 8))
    dump = DumpConfig(device="cpu", batch_size=32, shard_rows=16, views=4, augment="affine")
    dump_teacher(Network(64, 4), dataset, out=path, config=dump)
    return path, dataset


def test_a_run_over_views_is_extended_to_more_of_them(viewed, tmp_path):
    path, dataset = viewed

    def student(epochs, **options):
        settings = StudentConfig(device="cpu", batch_size=16, epochs=epochs, views=options.pop("views", ()))
        return train_student(Network(64, 4), dataset, path, config=settings, out=tmp_path / "run", **options)

    student(2)
    extended = student(4, resume=True)
    assert [entry["view"] for entry in extended.epochs] == [0, 1, 2, 3]
    with pytest.raises(UsageError):
        student(5, resume=True, views=(0, 1))


# Partial caches.


def test_another_partial_state_of_a_cache_is_refused_on_resume(tmp_path):
    dataset, settings = synthetic(100), StudentConfig(device="cpu", batch_size=16, epochs=1, allow_partial=True)
    dump = DumpConfig(device="cpu", batch_size=16, shard_rows=16)

    def dump_until(rows):
        with pytest.raises(Interrupted):
            dump_teacher(Network(16, 4, stop_after=rows + 2), dataset, out=tmp_path / "c", config=dump)
        return open_cache(tmp_path / "c", allow_partial=True)

    cache = dump_until(40)
    train_student(Network(16, 4), dataset, cache, config=settings, out=tmp_path / "run")
    more = replace(settings, epochs=2)
    before = len(cache.samples())
    train_student(Network(16, 4), dataset, cache, config=more, out=tmp_path / "run", resume=True)
    later = dump_until(40)
    assert len(later.samples()) > before
    with pytest.raises(UsageError) as caught:
        train_student(Network(16, 4), dataset, later, config=more, out=tmp_path / "run", resume=True)
    assert f"samples.count was {before} and is {len(later.samples())}" in caught.value.found
    assert "samples.sha256" in caught.value.found


def test_a_teacher_resumed_on_a_dataset_that_has_grown_is_refused(tmp_path):
    settings = config(epochs=2)
    with pytest.raises(Interrupted):
        fit(settings, run=run_folder(tmp_path / "run", settings), on_step=lambda step, _: step < 6 or stop(0, {}))
    with pytest.raises(UsageError, match=r"samples\.count was 70 and is 71"):
        fit(settings, dataset=synthetic(71), run=run_folder(tmp_path / "run", settings, resume=True))


def test_a_state_of_an_older_version_is_still_continued(tmp_path, capsys):
    settings = config(epochs=1)
    fit(settings, run=run_folder(tmp_path / "run", settings))
    state = read_checkpoint(tmp_path / "run" / "last.pt")
    for name in ("samples", "epochs"):
        del state[name]
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    longer = config(epochs=2)
    result, _ = fit(longer, run=run_folder(tmp_path / "run", longer, resume=True))
    assert without_seconds(result.epochs) == without_seconds(fit(longer)[0].epochs)
    said = capsys.readouterr().err
    assert "does not record which samples" in said
    assert "extended from 1 to 2" in said


# The moving average has no hooks.


def test_the_averaged_module_has_no_hooks_of_an_objective_and_keeps_its_own(tmp_path):
    dataset = synthetic(64)
    dump = DumpConfig(device="cpu", batch_size=32, features=("penultimate", "layers.1"))
    dump_teacher(Network(16, 4), dataset, out=tmp_path / "c", config=dump)
    settings = StudentConfig(
        device="cpu",
        batch_size=16,
        epochs=1,
        ema=0.5,
        objective=("kd", "feature_mse:layer=penultimate", "feature_mse:layer=layers.1,student_layer=layers.1"),
    )
    student = Network(16, 4)
    averaged = train_student(student, dataset, tmp_path / "c", config=settings).module
    assert averaged is not student
    for module in (averaged, student):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        pickle.loads(pickle.dumps(module))


def test_a_copied_module_keeps_all_hooks_but_those_that_capture_features():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(own := lambda *_: None)
    with FeatureHooks(module, ["0", "penultimate"]) as hooks:
        copied = copy_module(module)
        assert list(copied[0]._forward_hooks.values()) == [own]
        assert not copied[0]._forward_pre_hooks
        copied(torch.ones(1, 2))
        with pytest.raises(ModelError, match="did not run"):
            hooks.take()
        module(torch.ones(1, 2))
        assert hooks.take().keys() == {"0", "penultimate"}
    assert list(module[0]._forward_hooks.values()) == [own]


# Mixed precision.


def test_clipping_under_fp16_bounds_the_gradient_before_it_was_scaled():
    settings = config(
        epochs=2, batch_size=4, optimizer="sgd", momentum=0.0, learning_rate=1.0, clip_norm=0.25, amp="fp16"
    )
    module = Single()
    objective = lambda logits, batch, epochs_done: {"loss": logits.float().mean()}  # noqa: E731
    fit(settings, module=module, dataset=synthetic(16), objective=objective)
    assert module.position.item() == pytest.approx(-0.25 * 8, abs=1e-3)


def test_a_step_that_the_scaler_leaves_out_moves_neither_schedule_nor_average():
    settings = config(
        epochs=2, batch_size=4, optimizer="sgd", momentum=0.0, learning_rate=0.5, schedule="cosine", ema=0.5,
        amp="fp16",
    )  # fmt: skip
    module, positions, calls = Single(), [], 0

    def objective(logits, batch, epochs_done):
        nonlocal calls
        calls += 1
        # The loss is finite, its gradient is not.
        weight = math.inf if calls in (1, 4) else 1.0
        return {"loss": Scaled.apply(logits.float().mean(), weight)}

    result, _ = fit(
        settings, module=module, dataset=synthetic(16), objective=objective,
        join=Watcher(lambda batch: positions.append(module.position.item())),
    )  # fmt: skip
    steps = -np.diff([*positions, module.position.item()])
    rates = [0.5 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(6)]
    assert steps == pytest.approx([0, *rates[:2], 0, *rates[2:]], abs=1e-3)
    average, position = None, 0.0
    for rate in rates:
        position -= rate
        average = position if average is None else 0.5 * average + 0.5 * position
    assert result.module.position.item() == pytest.approx(average, abs=1e-3)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, value, weight):
        context.weight = weight
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.weight, None


def test_a_gradient_that_is_finite_at_no_scale_stops_the_run(tmp_path):
    settings = config(epochs=20, batch_size=4, amp="fp16")
    objective = lambda logits, batch, epochs_done: {"loss": Scaled.apply(logits.float().mean(), math.inf)}  # noqa: E731
    with pytest.raises(TrainingDiverged, match="the gradient is not finite at epoch 11, step 1 of 4"):
        fit(settings, module=Single(), dataset=synthetic(16), objective=objective)


# Exceptions of the network.


class Fails(nn.Module):
    """Raises in training: always, on large batches, or in its backward pass."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(16, 4)

    def forward(self, inputs):
        if self.training and (self.how == "training" or (self.how == "large" and len(inputs) > 10)):
            raise KeyError("a mask that is not there")
        logits = self.layer(inputs.flatten(1))
        return logits.detach() if self.how == "backward" else logits


@pytest.mark.parametrize("how", ["training", "large", "backward", "batch norm"])
def test_an_exception_of_the_network_in_a_step_is_quoted_and_leaves_no_folder(tmp_path, how):
    settings = config(epochs=2, batch_size=1 if how == "batch norm" else 16)
    module = Network(16, 4) if how == "batch norm" else Fails(how)
    with pytest.raises(ModelError) as caught:
        fit(settings, module=module, run=run_folder(tmp_path / "new" / "run", settings))
    found = caught.value.found
    assert f"{type(module).__name__} fails at epoch 1, step 1 of {70 if how == 'batch norm' else 5}" in found
    assert f"on a batch of shape ({settings.batch_size}, 1, 4, 4)" in found
    quoted = {"backward": "does not require grad", "batch norm": "more than 1 value"}
    assert quoted.get(how, "KeyError: 'a mask that is not there'") in found
    assert isinstance(caught.value.__cause__, Exception)
    assert ("--batch-size of 2" in caught.value.remedy) == (how == "batch norm")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_after_a_finished_epoch_keeps_it(tmp_path):
    settings = config(epochs=2)
    module = Fails("never")

    def break_later(step, parts):
        module.how = "training" if step == 4 else module.how

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="epoch 2, step 1"):
        fit(settings, module=module, run=run_folder(tmp_path / "run", settings), on_step=break_later)
    assert {"last.pt", "config.json", "metrics.jsonl", "notes.txt"} <= {
        each.name for each in (tmp_path / "run").iterdir()
    }


def test_what_was_in_the_folder_before_a_failed_run_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError):
        fit(config(), module=Fails("training"), run=run_folder(tmp_path, config()))
    assert list(tree(tmp_path)) == ["notes.txt"]


# What Ctrl-C leaves.


def test_what_is_said_after_an_interrupt_is_true(tmp_path):
    settings = config(epochs=2)
    run = type("Settings", (), {"out": str(tmp_path / "run")})
    for steps, said in ((2, "nothing was saved"), (7, "with --resume goes on")):
        stopping = lambda step, _, steps=steps: step < steps or stop(0, {})  # noqa: E731
        with pytest.raises(Interrupted):
            fit(settings, run=run_folder(tmp_path / "run", settings), on_step=stopping)
        assert said in _kept(run)
    assert "the same command goes on" in _kept(None)
