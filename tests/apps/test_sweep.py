import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from kdcache.analysis.matrix_plots import draw_heat_map
from kdcache.apps import sweep_workers
from kdcache.apps.bench import bench
from kdcache.apps.sweep import _rows, grid_of
from kdcache.core.commands import BenchArgs, SweepArgs
from kdcache.core.config import StudentConfig, TrainConfig
from kdcache.core.errors import UsageError
from kdcache.core.file_lock import PathLock
from kdcache.core.system import core_count
from kdcache.distill.objective import distillation_objective
from kdcache.distill.student.train_student import train_student
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.store.records import Preprocess
from tests.dying import die
from tests.helpers import answer, kdcache, live_targets, refused, synthetic, tree

QUICK = ("--epochs", "2", "--device", "cpu", "--batch-size", "64", "--learning-rate", "0.003")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A cache of digits, and a sweep of four students from it."""
    root = tmp_path_factory.mktemp("sweep")
    paths = SimpleNamespace(root=root, teacher=root / "teacher", cache=root / "digits.zarr", out=root / "sweep")
    answer("train-teacher", "--dataset", "digits", "--out", paths.teacher, *QUICK)
    paths.teach = ("--teacher", "cnn", "--checkpoint", paths.teacher / "best.pt")
    answer("dump-teacher", *paths.teach, "--split", "train", "--split", "test", "--device", "cpu", "--out", paths.cache)
    paths.command = ("sweep", "--cache", paths.cache, "--temperature", "1,4", "--alpha", "0.5,1", *QUICK)
    paths.found = answer(*paths.command, "--seeds", "2", "--out", paths.out, *paths.teach)
    return paths


def test_a_sweep_trains_every_setting_and_seed_and_sorts_them(scene):
    found = scene.found
    assert not found["failed"]
    rows = found["settings"]
    assert {(row["temperature"], row["alpha"]) for row in rows} == {(1, 0.5), (4, 0.5), (1, 1), (4, 1)}
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        results = [json.loads((scene.out / run / "result.json").read_text()) for run in row["runs"]]
        assert row["test_accuracy"] == [result["test_accuracy"] for result in results]
        assert row["score"] == pytest.approx(sum(row["val_accuracy"]) / 2)
    assert json.loads((scene.out / "sweep.json").read_text()) == {k: v for k, v in found.items() if k != "out"}
    assert (scene.out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_swept_student_is_the_one_that_train_student_makes(scene, tmp_path):
    alone = answer(
        "train-student",
        "--cache",
        scene.cache,
        "--temperature",
        4,
        "--alpha",
        1,
        "--seed",
        1,
        "--val-fraction",
        0.1,
        *QUICK,
        "--out",
        tmp_path,
    )
    swept = json.loads((scene.out / "T4-a1-seed1" / "result.json").read_text())
    assert swept["test_accuracy"] == alone["test_accuracy"]


def test_the_live_teacher_is_measured_not_guessed(scene):
    live = scene.found["live"]
    assert min(live[name] for name in ("live_epoch_seconds", "cached_epoch_seconds", "dump_seconds", "ratio")) > 0
    assert live["train_seconds"] == pytest.approx(live["ratio"] * scene.found["train_seconds"])


def test_a_finished_sweep_trains_nothing_and_a_begun_one_goes_on(scene):
    before = tree(scene.out)
    again = answer(*scene.command, "--seeds", "2", "--out", scene.out)
    assert again["settings"] == scene.found["settings"]
    kept = {name: content for name, content in tree(scene.out).items() if not name.startswith("sweep.")}
    assert all(before[name] == content for name, content in kept.items())
    (scene.out / "T1-a1-seed0" / "result.json").unlink()
    shutil.rmtree(scene.out / "T4-a1-seed0")
    assert answer(*scene.command, "--seeds", "2", "--out", scene.out)["settings"] == scene.found["settings"]


def test_a_sweep_with_other_settings_is_refused_by_name(scene):
    message = refused(2, *scene.command, "--optimizer", "sgd", "--seeds", "2", "--out", scene.out)
    assert "optimizer was 'adam' and is 'sgd'" in message


def test_a_failed_student_stops_no_other_and_is_tried_again(scene, tmp_path):
    command = ("sweep", "--cache", scene.cache, "--objective", "kd", "--objective", "kd+feature_mse", *QUICK)
    for _ in range(2):
        result = kdcache(*command, "--out", tmp_path, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert [row["finished"] for row in found["settings"]] == [1, 0]
        assert list(found["failed"]) == ["T2-kd+feature_mse-seed0"]
        assert "--features penultimate" in found["failed"]["T2-kd+feature_mse-seed0"]


def test_validation_chooses_unless_it_is_left_out(scene, tmp_path):
    command = ("sweep", "--cache", scene.cache, "--temperature", "8,2", *QUICK, "--out")
    found = answer(*command, tmp_path / "by-default")
    assert found["sorted_by"] == "validation"
    for row in found["settings"]:
        assert row["score"] == row["val_accuracy"][0] != row["test_accuracy"][0]
    assert "on the validation part" in kdcache(*command, tmp_path / "by-default").stdout
    without = (*command, tmp_path / "without", "--val-fraction", "0")
    found = answer(*without)
    assert found["sorted_by"] == "grid"
    assert [(row["temperature"], row["score"], row["val_accuracy"]) for row in found["settings"]] == [
        (8, None, []),
        (2, None, []),
    ]
    assert "in the order of the grid" in kdcache(*without).stdout
    assert (tmp_path / "without" / "sweep.png").is_file()


def test_the_test_split_never_sorts():
    def outcome(validation, test):
        return sweep_workers.Outcome(result={"test_accuracy": test}, error=None, val_accuracy=validation)

    grid = grid_of(SweepArgs(temperature=(1.0, 2.0)))
    names = [f"{point.folder}-seed0" for point in grid]
    rows = _rows(grid, [0], dict(zip(names, (outcome(0.5, 0.9), outcome(0.6, 0.1)), strict=True)))
    assert [row["temperature"] for row in rows] == [2, 1]
    rows = _rows(grid, [0], dict(zip(names, (outcome(None, 0.1), outcome(None, 0.9)), strict=True)))
    assert [row["temperature"] for row in rows] == [1, 2]


def test_a_sweep_of_mixed_inputs_has_no_validation_part_and_says_so(scene, tmp_path):
    cache = tmp_path / "mixed.zarr"
    answer("dump-teacher", *scene.teach, "--mix", "uniform", "--device", "cpu", "--out", cache)
    command = ("sweep", "--cache", cache, *QUICK, "--out", tmp_path / "sweep")
    message = refused(2, *command)
    assert "are mixed (mixup:1)" in message
    assert "give --val-fraction 0" in message
    assert not (tmp_path / "sweep").exists()
    assert answer(*command, "--val-fraction", "0")["sorted_by"] == "grid"


def test_a_student_whose_process_dies_takes_no_other_with_it(tmp_path, monkeypatch):
    several = [sweep_workers.Job(name=name, settings={"out": str(tmp_path / name)}) for name in ("one", "two")]
    monkeypatch.setattr(sweep_workers, "_train", die)
    outcomes = sweep_workers.run_all(several, tmp_path, [sweep_workers.Slot("cpu", 1)])
    assert list(outcomes) == ["one", "two"]
    assert all("its process died" in str(outcome.error) for outcome in outcomes.values())


def stay(settings, slot, log_path):
    """A student that never finishes."""
    Path(log_path).write_text(str(os.getpid()))
    time.sleep(600)


def sweep_that_stays(folder):
    sweep_workers._train = stay
    sweep_workers.run_all(
        [sweep_workers.Job(name="one", settings={"out": f"{folder}/one"})], Path(folder), [sweep_workers.Slot("cpu", 1)]
    )


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_leaves_no_process(tmp_path, number):
    # Only the parent gets the signal: a worker that went on would train beside the sweep that is run again.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # in the background it is ignored
        f"from tests.apps.test_sweep import sweep_that_stays; sweep_that_stays({str(tmp_path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as parent:
        log = tmp_path / "one.log"
        assert within(120, lambda: log.exists() and log.read_text())
        worker = int(log.read_text())
        assert alive(worker)
        parent.send_signal(number)
        ended = within(20, lambda: parent.poll() is not None and not alive(worker))
        for pid in {worker, parent.pid} if not ended else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert ended


def test_what_no_student_needs_is_refused_before_any_trains(scene, tmp_path):
    command = ("sweep", "--cache", scene.cache, *QUICK, "--out", tmp_path)
    assert "random weights" in refused(2, *command, "--teacher", "cnn")
    assert "empty --objective" in refused(2, *command, "--objective", "")
    assert "a finite number" in refused(2, *command, "--temperature", "1,inf")
    with PathLock(tmp_path):
        assert "another sweep writes to" in refused(1, *command)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_student_whose_record_is_damaged_is_named(scene):
    record = scene.out / "T4-a1-seed1" / "metrics.jsonl"
    whole = record.read_text()
    record.write_text(whole[:-9])
    try:
        message = refused(2, *scene.command, "--seeds", "2", "--out", scene.out)
    finally:
        record.write_text(whole)
    assert f"{record} is damaged" in message


def test_the_grid():
    points = grid_of(SweepArgs(temperature=(1, 2, 1), alpha=(0.5, 0.9)))
    assert [point.folder for point in points] == ["T1-a0.5", "T1-a0.9", "T2-a0.5", "T2-a0.9"]
    odd = grid_of(SweepArgs(temperature=(1.5,), objective=("kd:weight=0.5+dist", "kd:weight=0.5 +dist")))
    folders = [point.folder for point in odd]
    assert len(set(folders)) == 2
    assert not any(sign in folder for folder in folders for sign in ": ")
    assert [point.alpha for point in odd] == [None, None]


def test_slots_share_the_cores():
    assert sweep_workers.available_slots("cpu", None, 999) == [sweep_workers.Slot("cpu", 1)] * core_count()
    assert sweep_workers.available_slots("cpu", 1, 999) == [sweep_workers.Slot("cpu", core_count())]
    assert sweep_workers.available_slots("cpu", 99, 1) == [
        sweep_workers.Slot("cpu", core_count())
    ]  # a single student gets all cores
    with pytest.raises(UsageError, match="cuda"):
        sweep_workers.available_slots("cuda:77", None, 1)


def test_a_heat_map_needs_matplotlib_and_says_so(tmp_path, monkeypatch):
    rows = [{"name": "alpha 1", "temperature": 2.0, "score": 0.5}, {"name": "kd", "temperature": 4.0, "score": None}]
    assert draw_heat_map(rows, tmp_path / "a.png") == [f"heat map: {tmp_path / 'a.png'}"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (line,) = draw_heat_map(rows, tmp_path / "b.png")
    assert "kdcache[plots]" in line
    assert not (tmp_path / "b.png").exists()


def test_what_a_sweep_refuses(scene, tmp_path):
    assert "add --teacher" in refused(
        2, "sweep", "--cache", scene.cache, "--checkpoint", scene.teacher / "best.pt", "--out", tmp_path / "sweep"
    )
    assert "nothing is there" in refused(1, "sweep", "--cache", tmp_path / "no.zarr", "--out", tmp_path / "sweep")
    assert "--temperature" in refused(2, "sweep", "--cache", scene.cache, "--temperature", "0", "--out", tmp_path / "s")
    assert not (tmp_path / "sweep").exists()


def test_bench_tells_when_the_cache_has_paid(scene):
    command = ("bench", "--student", "mlp", *scene.teach, *QUICK[2:], "--rounds", "1")
    found = answer(*command)
    assert found["samples"] == 1437
    assert set(found["epoch_seconds"]) == {"labels only", "from the cache", "with the live teacher"}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["epoch_seconds"].values())
    saved = found["epoch_seconds"]["with the live teacher"][0] - found["epoch_seconds"]["from the cache"][0]
    assert found["break_even_epochs"] == pytest.approx(found["dump_seconds"] / saved)
    text = kdcache(*command, "--samples", "100").stdout
    assert "100 samples" in text
    assert "median of 1 round\n" in text
    assert "the cache has paid after" in text or "saves no time" in text


def test_bench_has_no_option_that_it_would_not_follow():
    for option in (("--objective", "dist"), ("--no-distill",), ("--views", "1"), ("--epochs", "3")):
        assert "No such option" in refused(2, "bench", *option)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row_source", "streamed"),
        ("shuffle", "window"),
        ("cache_memory", "1MiB"),
        ("cache_on_device", True),
        ("verify_inputs", "all"),
        ("optimizer", "sgd"),
        ("clip_norm", 0.5),
        ("ema", 0.9),
        ("seed", 3),
        ("batch_size", 64),
    ],
)
def test_bench_reads_the_cache_as_it_is_told(monkeypatch, name, value):
    seen = []

    def watch(student, dataset, cache, *, config, preprocess):
        seen.append(config)
        return train_student(student, dataset, cache, config=config, preprocess=preprocess)

    monkeypatch.setattr("kdcache.apps.bench.train_student", watch)
    bench(BenchArgs(teacher="mlp", samples=64, rounds=1, device="cpu", **{name: value}))
    assert {getattr(config, name) for config in seen} == {value}
    if name != "verify_inputs":
        assert {config.verify_inputs for config in seen} == {"sample"}  # what a student's training does by default


def test_a_live_teacher_shares_the_students_inputs_and_is_walked_once_an_epoch():
    walks = []

    class Teacher(nn.Sequential):
        def eval(self):
            walks.append(len(walks))
            return super().eval()

    teacher = Teacher(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))
    dataset = synthetic(40)
    live = live_targets(teacher, Preprocess(), classes=4)
    shared = []

    def objective(logits_bc, batch, epochs_done=0.0):
        shared.append(batch.inputs.device == next(teacher.parameters()).device and not batch.inputs.is_inference())
        return distillation_objective(StudentConfig())(logits_bc, batch, epochs_done)

    config = TrainConfig(epochs=2, batch_size=8, device="cpu")
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    train(student, training_data(dataset, Preprocess(), config, join=live), objective=objective, config=config)
    assert walks == [0, 1]
    assert len(shared) == 10
    assert all(shared)


def test_bench_needs_no_weights(scene):
    result = kdcache("bench", "--teacher", "resnet8x4", "--samples", "64", "--rounds", "1", *QUICK[2:])
    assert result.exit_code == 0, result.output
    assert "without a checkpoint" in result.stderr


def test_tensorboard_gets_every_epoch(scene, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = ("--out", tmp_path / "run")
    answer("train-student", "--cache", scene.cache, *QUICK, "--tensorboard", *out)
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "kd", "train_accuracy", "learning_rate"):
        seen = [(event.step, event.value) for event in log.Scalars(name)]
        assert seen == [(entry["epoch"], pytest.approx(entry[name])) for entry in entries]


def test_doctor_finds_what_is_missing(tmp_path, monkeypatch):
    found = answer("doctor", tmp_path)
    assert found["problems"] == []
    assert found["extras"]["plots"] == []
    assert found["disk"]["path"] == str(tmp_path)
    assert min(found["disk"][name] for name in ("free_bytes", "write_bytes_per_s", "read_bytes_per_s")) > 0
    assert list(tmp_path.iterdir()) == []
    from kdcache.apps import doctor

    monkeypatch.setitem(doctor.EXTRAS, "odd", ("no_such_module",))
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "numcodecs" else "1")
    result = kdcache("doctor", tmp_path)
    assert result.exit_code == 1
    assert 'missing no_such_module: pip install "kdcache[odd]"' in result.stdout
    assert "PROBLEM: numcodecs is not installed" in result.stdout


def test_doctor_knows_builds_that_do_not_belong_together(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision, "__version__", "0.26.0+cpu")
    monkeypatch.setattr("torch.__version__", "2.11.0+cu130")
    result = kdcache("doctor", tmp_path)
    assert result.exit_code == 1
    assert "torch is built for cu130, torchvision for cpu: install both from one index" in result.stdout
