"""Paths that are none, folders that are files, and counts of one: named for what they are."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kdcache.core import options
from kdcache.core.atomic_files import storage_errors
from kdcache.core.commands import DumpTeacherArgs, TrainStudentArgs
from kdcache.core.errors import CacheNotFound, StorageError, TargetExists, UsageError
from kdcache.core.json_records import counted
from kdcache.core.options import PATHS, SPECS
from kdcache.distill.teacher.dump import DumpResult, dump_teacher
from kdcache.store.cache import open_cache
from tests.helpers import Network, kdcache, refused, synthetic
from tests.make_fixture import FIXTURE

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("below", ["train", "train/logits", "nothing"])
def test_a_path_inside_a_cache_is_told_the_cache(tmp_path, below):
    shutil.copytree(FIXTURE, tmp_path / "c.zarr")
    with pytest.raises(CacheNotFound) as refusal:
        open_cache(tmp_path / "c.zarr" / below)
    assert refusal.value.remedy == f"give {tmp_path / 'c.zarr'}"
    with pytest.raises(TargetExists, match="lies inside the cache") as refusal:
        dump_teacher(Network(16, 4), synthetic(8), out=tmp_path / "c.zarr" / below)
    assert f"--out {tmp_path / 'c.zarr'} --split" in refusal.value.remedy


@pytest.mark.parametrize("url", ["ftp://bucket/c.zarr", "hdfs://b/c"])
def test_a_url_of_an_unknown_kind_is_shown_as_it_is_and_refused(url):
    for command in (["inspect", url], ["train-student", "--cache", url, "--out", "x"], ["train-teacher", "--out", url]):
        message = refused(2, *command)
        assert url in message
        assert "s3://, gs:// or az://" in message
    with pytest.raises(UsageError, match=url):
        open_cache(url)
    with pytest.raises(UsageError, match=url):
        dump_teacher(Network(16, 4), synthetic(8), out=url)


def test_a_run_is_kept_on_this_machine():
    message = refused(2, "train-teacher", "--out", "s3://bucket/run")
    assert "--out is s3://bucket/run, a URL" in message
    assert "a path on this machine" in message


def test_home_is_expanded_in_every_path_option(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = DumpTeacherArgs(out="~/c.zarr", checkpoint="~/best.pt", dataset="folder:~/pets", data_root="~/data")
    assert settings.out == f"{tmp_path}/c.zarr"
    assert (settings.checkpoint, settings.data_root) == (f"{tmp_path}/best.pt", f"{tmp_path}/data")
    assert settings.dataset == f"folder:{tmp_path}/pets"
    assert TrainStudentArgs(cache=("~/a", "b~")).cache == (f"{tmp_path}/a", "b~")
    with pytest.raises(UsageError, match="nobody-of-this-name"):
        DumpTeacherArgs(out="~nobody-of-this-name/c.zarr")


def test_options_that_are_called_paths_are_treated_as_paths():
    """An option whose help speaks of a folder, a file or weights is among those that are expanded."""
    import dataclasses

    from kdcache.core import commands

    classes = [each for each in vars(commands).values() if dataclasses.is_dataclass(each)]
    words = ("Folder ", "folder ", "a cache made", "The file", "weights: .pt", "The page", "The picture")
    for settings_class in classes:
        for each in dataclasses.fields(settings_class):
            kind = options.value_types(settings_class)[each.name].kind
            if any(word in each.metadata["help"] for word in words) and kind is str:
                assert each.name in PATHS | SPECS, (settings_class.__name__, each.name)


@pytest.mark.parametrize("command", ["dump-teacher", "train-teacher", "sweep"])
def test_a_name_that_is_too_long_is_named(command):
    message = refused(2, command, "--out", "x/" + "a" * 300)
    assert "a name of 300 bytes" in message
    assert "at most 255 bytes" in message


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_where_a_folder_is_to_be_is_named(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    message = refused(1, "train-teacher", "--epochs", 1, "--device", "cpu", "--out", f"{tmp_path}/file{below}")
    assert f"{tmp_path}/file is a file, not a folder" in message
    assert "choose another --out" in message
    with pytest.raises(TargetExists, match="is a file, not a folder"):
        dump_teacher(Network(16, 4), synthetic(8), out=f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("action", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG])
def test_what_is_not_the_disks_fault_is_not_blamed_on_it(action, code):
    with pytest.raises(StorageError) as refusal, storage_errors(action, Path("x")):
        raise OSError(code, "refused")
    words = {errno.EMFILE: "ulimit -n", errno.ENFILE: "open files", errno.ENAMETOOLONG: "shorter name"}
    assert words[code] in refusal.value.remedy
    assert "disk" not in f"{refusal.value.needed} {refusal.value.remedy}"


class HeightFirst:
    """Images as most array libraries have them: (height, width, channels)."""

    classes = ("a", "b")
    targets = (0, 1, 0, 1)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return np.full((32, 24, 3), index, np.uint8), self.targets[index]


@pytest.mark.parametrize("options", [["--model", "cnn"], ["--model", "cnn", "--size", 16], ["--model", "resnet20"]])
def test_arrays_with_channels_last_are_told_channels_first(tmp_path, options):
    command = ("train-teacher", "--dataset", "py:tests.cli.test_messages:HeightFirst", "--device", "cpu")
    message = refused(1, *command, *options, "--out", tmp_path / "run")
    assert "(32, 24, 3), which looks like (height, width, channels)" in message
    assert "channels first: (3, 32, 24)" in message
    assert "transpose(2, 0, 1)" in message


def test_layers_are_listed_without_a_place_to_write_to(tmp_path):
    found = kdcache("dump-teacher", "--list-layers", "--teacher", "cnn", "--dataset", "digits", "--out", tmp_path / "c")
    without = kdcache("dump-teacher", "--list-layers", "--teacher", "cnn", "--dataset", "digits")
    assert without.output == found.output
    assert "--out is missing" not in without.output
    assert "--out is missing" in refused(2, "dump-teacher", "--teacher", "cnn")


def test_a_finished_dump_does_not_claim_checked_bytes_and_its_result_is_short(tmp_path, capsys):
    for _ in range(2):
        result = dump_teacher(Network(16, 4), synthetic(8), out=tmp_path / "c")
    said = capsys.readouterr().err
    assert "already complete; nothing was computed, and no bytes were checked" in said
    assert f"kdcache verify {tmp_path / 'c'}" in said
    assert isinstance(result, DumpResult)
    assert len(repr(result)) < 300


def test_one_is_not_plural(tmp_path):
    assert [counted(count, "shard") for count in (0, 1, 2, 1000)] == ["0 shards", "1 shard", "2 shards", "1,000 shards"]
    assert counted(1, "box", "boxes") == "1 box"
    dump_teacher(Network(16, 4), synthetic(8), out=tmp_path / "c")
    assert "of 3 shards" not in kdcache("verify", tmp_path / "c").stdout
    assert "of 1 shard checked" in kdcache("verify", tmp_path / "c").stdout
    (tmp_path / "c/train/logits/c/0/0/0").write_bytes(b"")
    assert "1 problem;" in kdcache("verify", tmp_path / "c").stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_stamp_of_a_dump_lies_beside_the_cache_and_counts_only_with_it(tmp_path):
    run, cache = tmp_path / "teacher-cnn-5-affine", tmp_path / "cnn-5-affine.zarr"
    for folder in (run, cache):
        folder.mkdir()
    (run / "result.json").touch()

    def commands():
        arguments = ("make", "-n", "dump", f"OUT={tmp_path}", "DATASET=digits")
        return subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "dump-teacher" in commands()
    (cache / "zarr.json").touch()
    assert "dump-teacher" in commands()
    assert f"touch {tmp_path}/cnn-5-affine.zarr.dumped" in commands()
    (tmp_path / "cnn-5-affine.zarr.dumped").touch()
    assert "dump-teacher" not in commands()
    shutil.rmtree(cache)
    assert "dump-teacher" in commands()
