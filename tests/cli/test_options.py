"""Every option of every command has an effect, or is refused where it has none."""

from __future__ import annotations

import dataclasses
import sys
import typing

import numpy as np
import pytest
from PIL import Image

from kdcache.cli import early
from kdcache.cli import options as cli_options
from kdcache.cli.app import app
from kdcache.cli.options import PANELS, SETTINGS_CLASSES
from kdcache.core import commands, config, json_records, options
from kdcache.core.errors import UsageError
from kdcache.core.options import ALIASES, Settings, check_effective, flag_of, suggestion
from tests.helpers import answer, kdcache, refused

MACHINERY = {
    module.__file__ for module in (cli_options, commands, config, dataclasses, early, json_records, options)
} | {"<string>"}

# What each command is run with, so that together every setting is read. bench and sweep: tests of their own.
RUNS = {
    "train-teacher": [
        "--out {}/out --optimizer sgd --schedule step --epochs 1 --device cpu --val-fraction 0.1 --patience 3"
    ],
    "dump-teacher": [
        "--out {0}/out --checkpoint {0}/t/best.pt --features penultimate --device cpu",
        "--out {0}/out --checkpoint {0}/t/best.pt --list-layers",
    ],
    "train-student": [
        "--cache {0}/c.zarr --out {0}/out --epochs 1 --device cpu --optimizer sgd --schedule step --val-fraction 0.1 "
        "--patience 3",
        "--cache {0}/c.zarr --out {0}/features --epochs 1 --device cpu --objective feature_mse",
    ],
    "evaluate": ["--run {}/t --device cpu"],
    "inspect": ["{}/c.zarr"],
    "status": ["{}/c.zarr"],
    "seal": ["{}/c.zarr"],
    "verify": ["{0}/c.zarr --teacher cnn --checkpoint {0}/t/best.pt --device cpu --rows 8"],
    "convert": ["{0}/c.zarr --encoding topk:3 --out {0}/converted"],
    "pack": ["{0}/c.zarr --out {0}/c.zip"],
    "unpack": ["{0}/packed.zip --out {0}/unpacked"],
    "compare": ["{}/t"],
    "report": ["{0}/t {0}/s --out {0}/report.html --device cpu --train-samples 64"],
    "plot-temperature": ["{0}/c.zarr --out {0}/t.png --samples 64"],
    "predict": ["--run {0}/t {0}/seven.png --device cpu"],
    "export": ["--run {0}/t --out {0}/t.pt2"],
    "doctor": ["{}"],
    # The rest is read where a student is trained, which for a sweep is a process of its own.
    "sweep": [
        "--cache {0}/c.zarr --out {0}/sweep --epochs 1 --device cpu --optimizer sgd --schedule step --jobs 1 "
        "--checkpoint {0}/t/best.pt --teacher cnn --student mlp",
    ],
    "bench": ["--checkpoint {0}/t/best.pt --samples 64 --rounds 1 --device cpu --optimizer sgd"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a cache with features, a student of it and a picture."""
    root = tmp_path_factory.mktemp("options")
    answer("train-teacher", "--out", root / "t", "--epochs", "1", "--device", "cpu")
    answer(
        *("dump-teacher", "--checkpoint", root / "t" / "best.pt", "--out", root / "c.zarr", "--device", "cpu"),
        *("--features", "penultimate"),
    )
    answer("pack", root / "c.zarr", "--out", root / "packed.zip")
    answer("train-student", "--cache", root / "c.zarr", "--out", root / "s", "--epochs", "1", "--device", "cpu")
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(root / "seven.png")
    return root


def read_while(monkeypatch, *arguments):
    """Names of the settings that are read while a command runs, but for those that only copy them."""
    found = set()

    def read(self, name):
        if sys._getframe(1).f_code.co_filename not in MACHINERY:
            found.add(name)
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Settings, "__getattribute__", read)
        result = kdcache(*arguments)
    assert result.exit_code == 0, result.output
    return found


@pytest.mark.parametrize("command", RUNS)
def test_every_setting_of_a_command_is_read(folder, tmp_path_factory, monkeypatch, command):
    place = tmp_path_factory.mktemp(command)
    for made in folder.iterdir():
        (place / made.name).symlink_to(made)
    found = set()
    for run in RUNS[command]:
        found |= read_while(monkeypatch, command, *run.format(place).split())
    names = {each.name for each in dataclasses.fields(SETTINGS_CLASSES[command])}
    assert names - found == ({"student_layer", "save_every"} if command == "sweep" else set())


def test_every_command_is_walked_over():
    assert {command.name for command in app.registered_commands} == {*RUNS} == {*SETTINGS_CLASSES}


def conditional():
    """(command, setting) of every setting that has an effect only beside another one."""
    return [
        (command, each.name)
        for command, settings_class in SETTINGS_CLASSES.items()
        for each in dataclasses.fields(settings_class)
        if each.metadata["only_with"]
        or (settings_class.inherited_only_with and each.name not in vars(settings_class)["__annotations__"])
    ]


@pytest.mark.parametrize(("command", "name"), conditional())
def test_a_setting_that_needs_another_one_is_refused_alone(command, name):
    with pytest.raises(UsageError) as refusal:
        check_effective(SETTINGS_CLASSES[command](), [name])
    default = {each.name: each.default for each in dataclasses.fields(SETTINGS_CLASSES[command])}[name]
    flag = flag_of(name, off=default is True)
    assert refusal.value.found.startswith(f"{flag} is given without --")
    assert refusal.value.needed.startswith("--")
    assert refusal.value.remedy == f"leave {flag} out"


def test_the_other_setting_of_every_relation_exists():
    everywhere = {each.name for cls in SETTINGS_CLASSES.values() for each in dataclasses.fields(cls)}
    for settings_class in SETTINGS_CLASSES.values():
        for each in dataclasses.fields(settings_class):
            for condition in (*each.metadata["only_with"], *each.metadata["not_with"]):
                assert condition.partition("=")[0] in everywhere, condition


STUDENT = ("train-student", "--cache", "c", "--out", "run")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((*STUDENT, "--no-distill", "--objective", "kd"), ["--objective has no effect with --no-distill"]),
        ((*STUDENT, "--no-distill", "--temperature", "2"), ["--temperature has no effect with --no-distill"]),
        ((*STUDENT, "--no-distill", "--cache-on-device"), ["--cache-on-device has no effect with --no-distill"]),
        ((*STUDENT, "--objective", "kd", "--alpha", "1"), ["--alpha has no effect with --objective"]),
        ((*STUDENT, "--momentum", "0.9"), ["--momentum is given without --optimizer sgd"]),
        ((*STUDENT, "--gamma", "0.1", "--schedule", "cosine"), ["--gamma", "--schedule step"]),
        ((*STUDENT, "--config", "momentum.toml"), ["--momentum is given without --optimizer sgd"]),
        (("dump-teacher", "--out", "c", "--pool", "avg"), ["--pool is given without --features"]),
        (("dump-teacher", "--out", "c", "--view-seed", "1"), ["--view-seed", "--augment or --mix"]),
        (("dump-teacher", "--out", "c", "--dry-run", "--repair"), ["--repair has no effect with --dry-run"]),
        (("verify", "c", "--rows", "5"), ["--rows is given without --teacher"]),
        (("verify", "c", "--device", "cpu"), ["--device is given without --teacher"]),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "momentum.toml").write_text("momentum = 0.5\n")
    message = refused(2, *arguments)
    for part in (*parts, "leave --"):
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["momentum.toml"]


def test_no_distill_with_an_objective_is_refused_from_python_too():
    with pytest.raises(UsageError, match="--objective has no effect with --no-distill"):
        config.StudentConfig(distill=False, objective=("kd",))


def test_beside_what_they_need_they_are_taken():
    check_effective(commands.TrainStudentArgs(optimizer="sgd"), ["momentum"])
    check_effective(commands.DumpTeacherArgs(mix="uniform"), ["view_seed", "plain_view"])
    check_effective(commands.VerifyArgs(teacher="cnn"), ["rows", "device"])


# ---- names that other tools use


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "learning-rate"),
        ("wd", "weight-decay"),
        ("bs", "batch-size"),
        ("num_epochs", "epochs"),
        ("epoch", "epochs"),
    ],
)
def test_what_other_tools_call_an_option_is_understood(tmp_path, wrong, right):
    dashed = wrong.replace("_", "-")
    for arguments in ((f"--{dashed}", "3"), (f"--{dashed}=3",)):
        message = refused(2, *STUDENT, *arguments)
        assert f"No such option: --{dashed}" in message
        assert f"--{right}" in message
    (tmp_path / "s.toml").write_text(f"{wrong} = 3\n")
    message = refused(2, *STUDENT, "--config", tmp_path / "s.toml")
    assert f"s.toml has no setting '{wrong}'" in message
    assert f"did you mean --{right}" in message


def test_an_alias_is_no_setting_and_means_one():
    names = {each.name for cls in SETTINGS_CLASSES.values() for each in dataclasses.fields(cls)}
    assert set(ALIASES) & names == set()
    assert set(ALIASES.values()) <= names
    assert suggestion("model", commands.TrainStudentArgs) == "did you mean --student?"
    assert suggestion("no-such-thing-at-all", commands.TrainStudentArgs) == ""


# ---- the help


def test_help_is_in_panels_and_the_advanced_ones_come_last():
    text = kdcache("train-student", "--help").stdout
    headings = [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[0] == "Options"
    assert headings[-2:] == ["Reading the cache", "General"]
    assert {"Loss", "Optimisation", "Data and preprocessing", "Text"} <= set(headings)
    text = text[text.index("Options:") :]
    assert text.index("Loss:") < text.index("--temperature") < text.index("Optimisation:") < text.index("--epochs")
    assert "[default: ]" not in text
    assert text.count("[default: penultimate]") == 1


def test_every_shared_setting_has_a_panel():
    placed = [name for names in PANELS.values() for name in names]
    assert len(placed) == len(set(placed))
    for settings_class in SETTINGS_CLASSES.values():
        inherited = {each.name for each in dataclasses.fields(settings_class)} - set(
            vars(settings_class)["__annotations__"]
        )
        assert inherited - {"tensorboard"} <= set(placed)
    shown = (commands.DumpTeacherArgs, commands.TrainStudentArgs, commands.ConvertArgs)
    assert set(placed) <= {name for settings_class in shown for name in typing.get_type_hints(settings_class)}
