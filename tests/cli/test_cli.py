import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from kdcache.cli.app import app
from tests.helpers import answer, kdcache, refused, tree

EPOCHS = ("--epochs", "3", "--device", "cpu", "--batch-size", "64", "--learning-rate", "0.003")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Teacher, cache and student of digits, made by three commands, and what each printed."""
    root = tmp_path_factory.mktemp("cli")
    paths = SimpleNamespace(root=root, teacher=root / "teacher", cache=root / "digits.zarr", student=root / "student")
    paths.teacher_answer = answer("train-teacher", "--dataset", "digits", "--out", paths.teacher, *EPOCHS)
    paths.dump = ("dump-teacher", "--dataset", "digits", "--teacher", "cnn", "--checkpoint", paths.teacher / "best.pt")
    paths.dump += ("--split", "train", "--split", "test", "--device", "cpu", "--shard-rows", "256")
    paths.dry_answer = answer(*paths.dump, "--out", paths.cache, "--dry-run")
    paths.dry_left = paths.cache.exists()
    paths.dump_answer = answer(*paths.dump, "--out", paths.cache)
    paths.learn = ("train-student", "--cache", paths.cache, "--student", "mlp", "--temperature", "3", *EPOCHS)
    paths.student_answer = answer(*paths.learn, "--out", paths.student)
    return paths


def test_the_pipeline_tells_what_a_program_needs(pipeline):
    teacher, student = pipeline.teacher_answer, pipeline.student_answer
    for found, folder in ((teacher, pipeline.teacher), (student, pipeline.student)):
        assert 0.5 < found["test_accuracy"] <= 1
        assert len(found["epoch_seconds"]) == 3
        assert found["checkpoint"] == str(folder / "best.pt")
        assert sorted(tree(folder)) == ["best.pt", "config.json", "last.pt", "metrics.jsonl", "result.json"]
        assert json.loads((folder / "result.json").read_text()) == found
        assert [set(entry) for entry in found["examples"]] == [{"sample", "true", "predicted"}] * 5
    splits = pipeline.dump_answer["splits"]
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 1437, "test": 360}
    assert splits["test"]["teacher_accuracy"] == pytest.approx(teacher["test_accuracy"], abs=2 / 360)
    assert not pipeline.dry_left
    for name, planned in pipeline.dry_answer["splits"].items():
        assert {"rows", "bytes", "shards"} <= planned.keys()
        assert (planned["rows"], planned["bytes"]) == (splits[name]["rows"], splits[name]["bytes"])
    settings = json.loads((pipeline.student / "config.json").read_text())
    assert settings["temperature"] == 3.0
    assert settings["alpha"] == 0.5
    assert settings["cache"] == [str(pipeline.cache)]


def test_evaluate_gives_the_accuracy_that_training_ended_with(pipeline):
    for name in ("teacher", "student"):
        found = answer("evaluate", "--run", pipeline.root / name, "--device", "cpu")
        reported = getattr(pipeline, f"{name}_answer")
        assert found["test_accuracy"] == reported["test_accuracy"]
        assert found["examples"] == reported["examples"]
    text = kdcache("evaluate", "--run", pipeline.student, "--split", "train", "--device", "cpu").stdout
    assert "train accuracy" in text
    assert "5 samples spread over the split, true → predicted:" in text


def test_inspect_and_compare_show_people_and_programs_the_same(pipeline):
    found = answer("inspect", pipeline.cache)
    train = found["splits"]["train"]
    assert (train["complete"], train["committed_shards"], train["shards"]) == (True, 6, 6)
    manifest = train["manifest"]
    text = kdcache("inspect", pipeline.cache).stdout
    for part in ("digits", "complete", manifest["teacher"]["weights_sha256"], manifest["dataset"]["sample_sha256"]):
        assert part in text
    rows = answer("compare", pipeline.teacher, pipeline.student)["runs"]
    assert [row["role"] for row in rows] == ["teacher", "student distilled"]
    table = kdcache("compare", pipeline.teacher, pipeline.student).stdout.splitlines()
    assert len(table) == 4
    assert f"{rows[1]['test_accuracy']:.2%}" in table[3]


def test_a_stage_done_again_does_nothing(pipeline):
    before = tree(pipeline.cache)
    again = answer(*pipeline.dump, "--out", pipeline.cache)
    assert [split["computed_rows"] for split in again["splits"].values()] == [0, 0]
    assert tree(pipeline.cache) == before


def test_the_student_alone(pipeline, tmp_path):
    learn = ("train-student", "--cache", pipeline.cache, "--student", "mlp", *EPOCHS)
    found = answer(*learn, "--no-distill", "--out", tmp_path / "alone")
    assert found["role"] == "student alone"
    assert 0.5 < found["test_accuracy"] <= 1
    entry = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[0])
    assert "kd" not in entry


def test_settings_from_a_file_with_flags_on_top(pipeline, tmp_path):
    (tmp_path / "s.toml").write_text(
        f'cache = "{pipeline.cache}"\nepochs = 1\nbatch-size = 512\ntemperature = 7\ndevice = "cpu"\n'
    )
    answer("train-student", "--config", tmp_path / "s.toml", "--out", tmp_path / "a", "--temperature", "9")
    first = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (first["temperature"], first["batch_size"], first["epochs"]) == (9.0, 512, 1)
    answer("train-student", "--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b", "--alpha", "0.25")
    second = json.loads((tmp_path / "b" / "config.json").read_text())
    assert second == first | {"out": str(tmp_path / "b"), "alpha": 0.25}


def test_resume_continues_to_the_same_numbers(pipeline, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(pipeline.student, part)
    # As a run looks that was killed before its first epoch ended: settings, and nothing else of use.
    for name in ("best.pt", "last.pt", "result.json"):
        (part / name).unlink()
    found = answer("train-student", "--out", part, "--resume")
    assert found["test_accuracy"] == pipeline.student_answer["test_accuracy"]
    metrics = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (part, pipeline.student)
    ]
    assert metrics[0] == metrics[1]
    # Where it runs may change, as on another machine, and not what it learns.
    again = answer("train-student", "--out", part, "--resume", "--workers", 1, "--input-memory", "1GiB")
    assert again["test_accuracy"] == found["test_accuracy"]
    message = refused(2, "train-student", "--out", part, "--resume", "--temperature", "1")
    assert "temperature was 3.0 and is 1.0" in message


def test_the_settings_of_a_resumed_run_serve_a_new_one(pipeline, tmp_path):
    shutil.copytree(pipeline.student, tmp_path / "old")
    answer("train-student", "--out", tmp_path / "old", "--resume")
    answer("train-student", "--config", tmp_path / "old" / "config.json", "--out", tmp_path / "new")


def test_plots(pipeline, tmp_path):
    found = answer(*pipeline.learn, "--epochs", "1", "--plots", "--out", tmp_path / "run")
    assert Path(found["confusion"]).read_bytes().startswith(b"\x89PNG")
    found = answer("evaluate", "--run", pipeline.student, "--plots", "--split", "train", "--device", "cpu")
    assert Path(found["confusion"]).read_bytes().startswith(b"\x89PNG")


def test_a_wrong_cache_is_refused_with_exit_code_4_and_leaves_the_place_free(pipeline, tmp_path, monkeypatch):
    (tmp_path / "other.py").write_text(
        "from kdcache.data.registry import open_dataset\n"
        "def data(split):\n"
        "    dataset = open_dataset('digits', split=split)\n"
        "    inputs, labels = dataset.fetch(range(len(dataset)))\n"
        "    dataset = [(image.flip(1), int(label)) for image, label in zip(inputs, labels)]\n"
        "    return type('Data', (list,), {'classes': [str(n) for n in range(10)]})(dataset)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    message = refused(4, *pipeline.learn, "--dataset", "py:other:data", "--out", "run")
    assert "'digits'" in message
    assert "'py:other:data'" in message
    # Corrected, the same command must go through.
    answer(*pipeline.learn, "--out", "run", "--epochs", "1")


@pytest.mark.parametrize("damage", ["flipped", "shortened", "removed", "ledger"])
def test_a_damaged_cache_is_refused_with_exit_code_3(pipeline, tmp_path, damage):
    shutil.copytree(pipeline.cache, tmp_path / "c")
    name = "ledger/c/0/0/0" if damage == "ledger" else "logits/c/0/2/0"
    file = tmp_path / "c" / "train" / name
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(data[:-7] if damage == "shortened" else data)
    message = refused(3, *pipeline.learn, "--cache", tmp_path / "c", "--out", tmp_path / "run")
    assert "damaged" in message
    assert ("ledger" if damage == "ledger" else "shard 2 (samples 512 to 767)") in message
    assert not (tmp_path / "run").exists()


def test_an_incomplete_cache_is_refused_with_exit_code_3(pipeline, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.writer.SplitWriter.finish", interrupt)
        assert kdcache(*pipeline.dump, "--out", tmp_path / "c").exit_code == 130
    message = refused(3, *pipeline.learn, "--cache", tmp_path / "c", "--out", tmp_path / "run")
    assert "6 of 6 shards" in message
    assert not (tmp_path / "run").exists()
    assert answer("inspect", tmp_path / "c")["splits"]["train"]["complete"] is False


def interrupt(*arguments):
    raise KeyboardInterrupt


TRAIN = ("train-teacher", "--out", "run", "--device", "cpu")
DUMP = ("dump-teacher", "--out", "c", "--device", "cpu")
STUDENT = ("train-student", "--cache", "{cache}", "--out", "run", "--device", "cpu")


@pytest.mark.parametrize(
    ("exit_code", "arguments", "parts"),
    [
        (2, (*TRAIN, "--epochs", "0"), ["--epochs is 0", "at least 1"]),
        (2, (*TRAIN, "--epochs", "many"), ["--epochs", "integer"]),
        (2, (*TRAIN, "--amp", "fp8"), ["--amp is 'fp8'", "off, bf16, fp16"]),
        (2, (*TRAIN, "--learning-rate", "-1"), ["--learning-rate is -1"]),
        (2, (*TRAIN, "--mean", "a,b"), ["--mean is 'a,b'"]),
        (2, (*TRAIN, "--mean", "0.5"), ["mean", "std"]),
        (2, (*TRAIN, "--device", "toaster"), ["--device is 'toaster'"]),
        (
            2,
            (
                *TRAIN,
                "--no-such-option",
            ),
            ["--no-such-option"],
        ),
        (2, (*TRAIN, "--config", "no.toml"), ["no.toml"]),
        (2, (*TRAIN, "--config", "bad.toml"), ["bad.toml", "epoks", "epochs"]),
        (2, (*TRAIN, "--config", "type.toml"), ["type.toml", "epochs", "'3'"]),
        (2, ("train-teacher",), ["--out is missing"]),
        (2, ("no-such-command",), ["no-such-command"]),
        (2, (*STUDENT, "--alpha", "1.5"), ["--alpha is 1.5", "at most 1"]),
        (2, (*STUDENT, "--temperature", "0"), ["--temperature is 0", "more than 0"]),
        (2, ("train-student", "--out", "run"), ["--cache is missing"]),
        (2, (*DUMP, "--encoding", "int4"), ["--encoding is 'int4'"]),
        (2, (*DUMP, "--checkpoint", "{best}", "--shard-rows", "1000"), ["--shard-rows is 1000", "512"]),
        (2, (*DUMP, "--checkpoint", "{best}", "--compression", "lzma", "--dry-run"), ["lzma"]),
        (2, DUMP, ["random weights", "--checkpoint"]),
        (2, (*DUMP, "--checkpoint", "{best}", "--views", "3"), ["3 views", "--augment"]),
        (2, (*DUMP, "--checkpoint", "{best}", "--augment", "afine"), ["'afine'", "did you mean affine?"]),
        (2, (*DUMP, "--checkpoint", "{best}", "--mix", "mixup"), ["--mix is 'mixup'", "mixup:ALPHA"]),
        (1, (*DUMP, "--checkpoint", "{best}", "--add-views", "2", "--augment", "affine"), ["no c/train to add views"]),
        (1, (*DUMP, "--checkpoint", "{best}", "--augment", "py:mine:floats"), ["gives float32", "uint8", "ToDtype"]),
        (1, (*DUMP, "--checkpoint", "{best}", "--augment", "py:mine:own_noise"), ["two looks at sample", "torch.rand"]),
        (
            1,
            (*DUMP, "--checkpoint", "{best}", "--augment", "crop-flip:5"),
            ["fails on a batch of shape (2, 1, 5, 5)", "--size"],
        ),
        (2, (*STUDENT, "--view-schedule", "random"), ["'random'", "cycle, shuffle or fixed:K"]),
        (2, (*STUDENT, "--views", "1"), ["view 1", "the cache has 1 views"]),
        (2, (*STUDENT, "--views", "0,x"), ["--views is '0,x'", "whole numbers"]),
        (2, (*STUDENT, "--cache-weights", "1,2"), ["2 --cache-weights for 1 caches"]),
        (2, (*STUDENT, "--input-memory", "much"), ["'much'", "4GiB"]),
        (2, (*TRAIN, "--resume"), ["no run at run"]),
        (2, ("evaluate", "--run", "nowhere"), ["no run at nowhere"]),
        (2, ("compare", "nowhere"), ["no run at nowhere"]),
        (1, ("train-teacher", "--out", "{teacher}"), ["already holds a run", "--resume"]),
        (1, (*TRAIN, "--model", "resnet21"), ["no model 'resnet21'", "resnet20"]),
        (1, (*TRAIN, "--dataset", "digitz"), ["no dataset 'digitz'", "digits"]),
        (1, (*TRAIN, "--dataset", "mnist", "--data-root", "empty"), ["mnist could not be read", "--download"]),
        (1, (*TRAIN, "--dataset", "folder:nowhere"), ["folder:nowhere"]),
        (1, (*DUMP, "--checkpoint", "no.pt"), ["no.pt does not exist"]),
        (1, (*DUMP, "--checkpoint", "bad.toml"), ["bad.toml cannot be read"]),
        (1, (*DUMP, "--checkpoint", "{best}", "--teacher", "mlp"), ["does not fit", "layers.1.weight"]),
        (1, (*DUMP, "--checkpoint", "{best}", "--split", "val"), ["no split 'val'"]),
        (1, ("dump-teacher", "--checkpoint", "{best}", "--out", "."), ["not a kdcache cache"]),
        (1, ("inspect", "nowhere"), ["no cache at nowhere"]),
        (1, ("inspect", "bad.toml"), ["no cache at bad.toml"]),
        (1, ("train-student", "--cache", "nowhere", "--out", "run"), ["no cache at nowhere", "dump-teacher"]),
        (1, (*STUDENT, "--student", "py:nowhere:build"), ["no module 'nowhere'"]),
        (1, (*STUDENT, "--student", "py:mine:seven_classes"), ["(2, 7)", "(2, 10)"]),
        (1, (*STUDENT, "--student", "py:mine:other_shape"), ["Sequential fails on a batch of shape (2, 1, 8, 8)"]),
        (1, (*TRAIN, "--model", "py:mine:thirteen_classes"), ["13", "10"]),
        (1, (*DUMP, "--teacher", "py:mine:seven_classes"), ["(2, 7)", "(2, 10)"]),
        (1, (*DUMP, "--teacher", "py:mine:other_shape"), ["Sequential fails on a batch of shape (2, 1, 8, 8)"]),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_words(pipeline, tmp_path, monkeypatch, exit_code, arguments, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "bad.toml").write_text("epoks = 3\n")
    (tmp_path / "type.toml").write_text("epochs = '3'\n")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def floats(): return lambda image: image / 255\n"
        "def own_noise():\n"
        "    generator = torch.Generator()\n"
        "    return lambda image: image ^ torch.randint(0, 9, image.shape, dtype=torch.uint8, generator=generator)\n"
        "def seven_classes(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
        "def thirteen_classes(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 13))\n"
        "def other_shape(): return nn.Sequential(nn.Flatten(), nn.Linear(9, 10))\n"
    )
    before = tree(pipeline.root)
    places = {"cache": pipeline.cache, "best": pipeline.teacher / "best.pt", "teacher": pipeline.teacher}
    message = refused(
        exit_code,
        *(str(argument).format(**places) for argument in arguments),
        *("--batch-size", "64") * is_run(arguments),
    )
    for part in parts:
        assert part in message
    assert tree(pipeline.root) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "bad.toml",
        "mine.py",
        "type.toml",
    ]


def is_run(arguments):
    return arguments[0] in ("train-teacher", "train-student", "dump-teacher", "evaluate")


def test_another_teacher_onto_the_same_cache(pipeline, tmp_path):
    answer("train-teacher", "--out", tmp_path / "teacher", "--epochs", "1", "--seed", "1", "--device", "cpu")
    message = refused(1, *pipeline.dump, "--checkpoint", tmp_path / "teacher" / "best.pt", "--out", pipeline.cache)
    assert "teacher.weights_sha256 is" in message


def test_resuming_from_a_cache_of_another_teacher_is_refused(pipeline, tmp_path):
    """Half of the epochs from one teacher and half from another is a run of neither."""
    answer("train-teacher", "--out", tmp_path / "teacher", "--epochs", "1", "--seed", "1", "--device", "cpu")
    answer(*pipeline.dump, "--checkpoint", tmp_path / "teacher" / "best.pt", "--out", tmp_path / "other.zarr")
    shutil.copytree(pipeline.student, tmp_path / "run")
    message = refused(2, "train-student", "--out", tmp_path / "run", "--resume", "--cache", tmp_path / "other.zarr")
    assert "cache" in message


def test_missing_plots_are_known_before_the_training(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused(1, *pipeline.learn, "--plots", "--out", tmp_path / "run")
    assert "kdcache[plots]" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def script(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "kdcache", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_a_student_is_trained_where_the_teachers_code_and_weights_are_gone(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret_teacher.py").write_text(
        "from kdcache.models.cnn import SmallCNN\n"
        "def build(num_classes):\n    return SmallCNN((1, 8, 8), num_classes)\n"
    )
    shutil.copy(pipeline.teacher / "best.pt", "weights.pt")
    teacher = ("--teacher", "py:secret_teacher:build", "--checkpoint", "weights.pt")
    found = answer("dump-teacher", *teacher, "--out", "c", "--device", "cpu", "--batch-size", "64")
    assert found["splits"]["train"]["teacher_accuracy"] > 0.5
    for path in (tmp_path / "secret_teacher.py", tmp_path / "weights.pt"):
        path.unlink()
    learnt = script(
        "train-student", "--cache", "c", "--temperature", "3", "--out", "run", "--json", *EPOCHS, folder="."
    )
    assert learnt.returncode == 0, learnt.stderr
    assert "epoch 3/3" in learnt.stderr
    # The same answers and the same seed in another process: the same student.
    assert json.loads(learnt.stdout)["test_accuracy"] == pipeline.student_answer["test_accuracy"]


def test_the_script_fails_in_words(tmp_path):
    missing = script("inspect", "gone", folder=tmp_path)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: no cache at gone")
    assert "Traceback" not in missing.stderr


def commands():
    return typer.main.get_command(app).commands


SHARED = {"--device", "--batch-size", "--workers", "--seed", "--amp", "--dataset", "--data-root", "--download"}
TRAINING = SHARED | {"--epochs", "--out", "--resume", "--plots", "--learning-rate", "--mean", "--std", "--size"}
FLAGS = {
    "train-teacher": TRAINING | {"--model"},
    "dump-teacher": SHARED | {"--teacher", "--checkpoint", "--split", "--out", "--dry-run", "--encoding"},
    "train-student": TRAINING | {"--cache", "--student", "--temperature", "--alpha", "--distill"},
    "evaluate": SHARED - {"--seed"} | {"--run", "--split", "--plots"},
    "verify": SHARED - {"--amp"} | {"--split", "--teacher", "--checkpoint", "--rows", "--tolerance"},
    "inspect": set(),
    "status": set(),
    "seal": {"--split"},
    "convert": {"--out", "--encoding"},
    "pack": {"--out"},
    "unpack": {"--out"},
    "compare": set(),
    "report": {"--out", "--cache", "--device"},
    "plot-temperature": {"--out", "--split", "--temperatures", "--sample"},
    "sweep": TRAINING - {"--plots", "--resume"}
    | {"--cache", "--student", "--temperature", "--alpha", "--objective", "--seeds", "--jobs"},
    "predict": {"--run", "--top", "--resize-images", "--device"},
    "export": {"--run", "--format", "--out", "--tolerance"},
    "bench": {"--dataset", "--teacher", "--student", "--rounds", "--device"},
    "doctor": set(),
}


def test_every_command_and_option_has_a_help_text():
    assert set(commands()) == set(FLAGS)
    for name, command in commands().items():
        assert "Example: kdcache " + name in command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), (name, parameter.name)
        text = kdcache(name, "--help").stdout
        assert "--json" in text
        for parameter in command.params:
            assert parameter.opts[0] in text or parameter.name.upper() in text


def test_flags_that_mean_the_same_are_spelled_the_same():
    switches = {}
    for name, command in commands().items():
        options = [parameter for parameter in command.params if parameter.opts[0].startswith("--")]
        assert {"--json"} | FLAGS[name] <= {option.opts[0] for option in options}
        for option in options:
            assert len(option.opts) == 1
            assert option.opts[0] in ("--json", "--help", "--" + option.name.replace("_", "-"))
            assert switches.setdefault(option.opts[0], option.is_flag) == option.is_flag


def test_without_arguments_there_is_help_and_the_version_is_told():
    assert "train-student" in kdcache("--help").stdout
    from importlib.metadata import version

    assert kdcache("--version").stdout.strip() == version("kdcache")


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_that_is_not_finite_is_refused(pipeline, value):
    message = refused(2, "train-student", "--cache", pipeline.cache, "--temperature", value, "--out", "run")
    assert "--temperature is " in message
    assert "a finite number" in message


def test_a_damaged_result_is_named(pipeline, tmp_path):
    shutil.copytree(pipeline.student, tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    assert "result.json is damaged" in refused(2, "compare", tmp_path / "run")


# ---- --debug, and what nobody foresaw


def raising(problem):
    def command(*_):
        raise problem

    return command


def test_an_unforeseen_exception_is_one_line_and_the_traceback_comes_with_debug(monkeypatch, tmp_path):
    def explore():
        return {}["a key"]

    monkeypatch.setattr("kdcache.apps.doctor.examine", lambda settings: explore())
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[0].startswith("error: unexpected KeyError: 'a key' (")
    assert f"{__file__}, line " in result.stderr
    assert result.stderr.splitlines()[1] == "  to do:  run the same command with --debug for the traceback"
    debugged = CliRunner().invoke(app, ["doctor", str(tmp_path), "--debug"])
    assert debugged.exit_code == 1
    assert "Traceback (most recent call last)" in debugged.stderr
    assert "in explore" in debugged.stderr
    assert debugged.stderr.splitlines()[-1].startswith("error: unexpected KeyError")


def test_debug_shows_the_cause_of_a_refusal(tmp_path):
    plain = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path)])
    debugged = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path), "--debug"])
    assert plain.exit_code == debugged.exit_code == 2
    assert "Traceback" not in plain.stderr
    assert "FileNotFoundError" in debugged.stderr
    assert debugged.stderr.endswith(plain.stderr)


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), SystemExit(7)])
def test_what_stops_a_command_on_purpose_is_no_defect(monkeypatch, tmp_path, problem):
    monkeypatch.setattr("kdcache.apps.doctor.examine", raising(problem))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == (7 if isinstance(problem, SystemExit) else 130)
    assert "unexpected" not in result.stderr


# ---- mistakes that need no torch


@pytest.mark.parametrize(
    ("exit_code", "arguments", "parts"),
    [
        (0, ["--help"], ["train-student"]),
        (2, ["train-student", "--cache", "c", "--out", "r", "--lr", "1"], ["--learning-rate"]),
        (2, ["train-teacher", "--out", "r", "--epochs", "0"], ["--epochs is 0"]),
        (2, ["train-teacher", "--out", "r", "--device", "toaster"], ["--device is 'toaster'", "cuda:N"]),
        (2, ["train-student", "--cache", "{cache}", "--out", "r", "--cache-memory", "much"], ["'much'", "4GiB"]),
        (1, ["train-student", "--cache", "nowhere", "--out", "r"], ["no cache at nowhere", "dump-teacher"]),
        (1, ["sweep", "--cache", "nowhere", "--out", "r"], ["no cache at nowhere"]),
        (1, ["plot-temperature", "nowhere", "--out", "r.png"], ["no cache at nowhere"]),
        (1, ["train-student", "--cache", "{cache}", "--out", "{student}"], ["already holds a run", "--resume"]),
        (1, ["train-teacher", "--out", "{teacher}"], ["already holds a run", "--resume"]),
        (1, ["dump-teacher", "--checkpoint", "{teacher}/best.pt", "--out", "{teacher}"], ["is not a kdcache cache"]),
        (1, ["dump-teacher", "--checkpoint", "nowhere.pt", "--out", "c"], ["nowhere.pt does not exist", "correct"]),
        (1, ["dump-teacher", "--checkpoint", "{teacher}", "--out", "c"], ["is a folder", ".safetensors"]),
        (1, ["train-teacher", "--tokenizer", "t.json", "--out", "r"], ["t.json does not exist", "tokenizer.json"]),
        (1, ["train-teacher", "--dataset", "mnits", "--out", "r"], ["no dataset 'mnits'", "did you mean mnist"]),
        (1, ["train-teacher", "--dataset", "folder:nowhere", "--out", "r"], ["is no folder", "correct the path"]),
        (1, ["train-teacher", "--model", "resnet21", "--out", "r"], ["no model 'resnet21'", "resnet20"]),
        (2, ["evaluate", "--run", "nowhere"], ["no run at nowhere", "train-teacher"]),
        (2, ["predict", "--run", "nowhere", "one.png"], ["no run at nowhere"]),
        (2, ["export", "--run", "nowhere", "--out", "s.pt2"], ["no run at nowhere"]),
        (2, ["report", "nowhere", "--out", "r.html"], ["no run at nowhere"]),
        (2, ["compare", "nowhere"], ["no run at nowhere"]),
    ],
)
def test_a_mistake_is_named_where_torch_cannot_even_be_imported(pipeline, tmp_path, exit_code, arguments, parts):
    given = [each.format(**vars(pipeline)) for each in arguments]
    code = "import sys; sys.modules['torch'] = None; from kdcache.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == exit_code, done.stderr
    for part in parts:
        assert part in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_names_that_are_known_without_torch_are_those_that_are_built():
    from kdcache.core.config import DATASET_NAMES, MODEL_NAMES
    from kdcache.data.registry import DATASETS
    from kdcache.models.cnn import NETWORKS
    from kdcache.models.rnn import TEXT_NETWORKS

    assert set(DATASET_NAMES) == {*DATASETS, "imdb"}
    assert set(MODEL_NAMES) == {*NETWORKS, *TEXT_NETWORKS}


ODD_MODELS = """
import torch
from torch import nn


class KeepsATable(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc, self.table = nn.Linear(64, classes), None

    def forward(self, inputs):
        logits = self.fc(inputs.flatten(1))
        if self.table is None:
            self.table = torch.linspace(0.9, 1.1, logits.shape[1])
        return logits * self.table


class FailsOnFullBatches(nn.Linear):
    def forward(self, inputs):
        if len(inputs) > 2:
            raise ValueError("expected at most two samples")
        return super().forward(inputs.flatten(1))


class Lazy(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.fc = nn.LazyConv2d(4, 3), nn.LazyLinear(classes)

    def forward(self, inputs):
        return self.fc(self.conv(inputs).relu().flatten(1))


def keeps_a_table(num_classes):
    return KeepsATable(num_classes)


def lazy(num_classes):
    return Lazy(num_classes)


def fails(num_classes):
    return FailsOnFullBatches(64, num_classes)
"""


@pytest.fixture
def odd_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_models_of_test_cli.py").write_text(ODD_MODELS)
    return "py:odd_models_of_test_cli:{}".format


@pytest.mark.parametrize("name", ["keeps_a_table", "lazy"])
@pytest.mark.parametrize("options", [(), ("--ema", "0.9", "--val-fraction", "0.2")])
def test_networks_that_change_in_their_first_forward_pass_train_and_resume(pipeline, odd_models, name, options):
    learn = (*pipeline.learn, "--student", odd_models(name), *options)
    first = answer(*learn, "--epochs", "1", "--out", "run")
    longer = answer("train-student", "--resume", "--epochs", "2", "--out", "run")
    whole = answer(*learn, "--epochs", "2", "--out", "whole")
    assert first["test_accuracy"] != longer["test_accuracy"] == whole["test_accuracy"]
    assert answer("evaluate", "--run", "run", "--device", "cpu")["test_accuracy"] == whole["test_accuracy"]


def test_a_network_that_fails_on_full_batches_is_quoted_and_leaves_no_folder(pipeline, odd_models, tmp_path):
    message = refused(1, *pipeline.learn, "--student", odd_models("fails"), "--out", "run")
    assert "FailsOnFullBatches fails at epoch 1, step 1 of 23, on a batch of shape (64, 1, 8, 8)" in message
    assert "ValueError: expected at most two samples" in message
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_given_weights_and_needs_them_no_more_once_begun(pipeline, tmp_path):
    shutil.copy(pipeline.student / "best.pt", tmp_path / "start.pt")
    start = ("--init", tmp_path / "start.pt", "--learning-rate", "1e-9", "--epochs", "1")
    found = answer(*pipeline.learn, *start, "--out", tmp_path / "run")
    assert found["test_accuracy"] == pipeline.student_answer["test_accuracy"]
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["init"] == str(tmp_path / "start.pt")
    (tmp_path / "start.pt").unlink()
    again = answer("train-student", "--resume", "--epochs", "2", "--out", tmp_path / "run")
    assert again["test_accuracy"] == found["test_accuracy"]
    other = refused(2, "train-student", "--resume", "--init", "other.pt", "--out", tmp_path / "run")
    assert "init was" in other or "other.pt does not exist" in other


def test_weights_that_do_not_fit_are_no_start(pipeline, tmp_path):
    message = refused(1, *pipeline.learn, "--init", pipeline.teacher / "best.pt", "--out", tmp_path / "run")
    assert "does not fit the model" in message
    assert not (tmp_path / "run").exists()
    message = refused(1, *pipeline.learn, "--init", tmp_path / "none.pt", "--out", tmp_path / "run")
    assert "none.pt does not exist" in message
