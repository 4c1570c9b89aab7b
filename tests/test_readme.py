"""Commands, Python code, options and names in the README, checked on digits instead of MNIST."""

from __future__ import annotations

import json
import re
import shlex
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import zarr
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.models import resnet18

import kdcache
from kdcache.cli.app import app
from kdcache.core.config import DumpConfig
from kdcache.data.registry import open_dataset
from tests.helpers import kdcache as run_command
from tests.helpers import synthetic
from tests.processes import together

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Code that `py:mine:…` names, as the README describes it.
MINE = """
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

def photos(split):
    return ImageFolder(f"photos/{split}")

def teacher(num_classes):
    return resnet18(num_classes=num_classes)
"""


def blocks(language):
    return [block.replace("\\\n", " ") for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)]


def commands():
    return [line for line in "\n".join(blocks("bash")).splitlines() if "kdcache " in line]


def python_block(part):
    """The one Python block that contains `part`, on digits."""
    (block,) = (block for block in blocks("python") if part in block)
    return block.replace("mnist", "digits").replace("59_999", "999").replace("num_workers=2", "num_workers=0")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, s3_server):
    """A folder in which the README's commands ran one after the other, beside the files that they name."""
    folder = tmp_path_factory.mktemp("readme")
    make_files(folder)
    assert len(commands()) >= 20
    bucket = urllib.request.Request(f"{s3_server}/my-bucket", method="PUT")
    urllib.request.urlopen(bucket, timeout=60).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        for name, value in (("REGION", "us-east-1"), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
            patch.setenv(f"AWS_{name}", value)
        patch.delitem(sys.modules, "mine", raising=False)  # another test's
        for written in commands():
            command = written.replace("mnist --download", "digits").replace("mnist", "digits")
            command = re.sub(r"--epochs \d+", "--epochs 2", command)
            piped, _, own = command.rpartition("| kdcache ")
            words = shlex.split(own.removeprefix("kdcache ").partition(" #")[0])
            result = run_command(*words, stdin=piped and f"{shlex.split(piped)[1]}\n")
            assert result.exit_code == 0, (command, result.output, result.stderr)
    return folder


def make_files(folder):
    """Photographs with a teacher of them, a drawing, reviews."""
    (folder / "mine.py").write_text(MINE)
    torch.save(resnet18(num_classes=2).state_dict(), folder / "teacher.pt")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            images = folder / "photos" / split / name
            images.mkdir(parents=True)
            for index in range(3):
                Image.fromarray(random.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)).save(
                    images / f"{index}.png"
                )
        for name, words in (("neg", "dull and bad"), ("pos", "fine and good")):
            reviews = folder / "data" / "aclImdb" / split / name
            reviews.mkdir(parents=True)
            for index in range(4):
                (reviews / f"{index}_1.txt").write_text(f"a {words} film, number {index}<br />")
    Image.fromarray(random.integers(0, 256, (30, 30), dtype=np.uint8)).save(folder / "drawing.png")


def test_a_run_folder_holds_the_files_of_the_readme(pipeline):
    names = {path.name for path in (pipeline / "runs" / "student").iterdir()}
    assert {"config.json", "metrics.jsonl", "last.pt", "best.pt", "result.json"} <= names
    assert not (pipeline / "runs" / "mine.zarr").exists()  # --dry-run


def test_the_python_functions_dump_train_and_read(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    scope = {"kdcache": kdcache, "zarr": zarr, "teacher": network, "student": network, "dataset": synthetic(64)}
    exec(python_block("kdcache.dump_teacher"), scope)
    assert (scope["logits"].shape, scope["logits"].dtype) == ((3, 10), np.float16)
    assert (scope["labels"].shape, scope["labels"].dtype) == ((1437,), np.int64)
    assert np.array_equal(scope["logits"], scope["view_0"][[5, 3, 999]])
    (call,) = re.findall(r"`(cache\.epoch\(.*?\))`", README)
    batches = [*eval(call, scope)]
    assert np.array_equal(np.sort(np.concatenate([indices for indices, _ in batches])), np.arange(1437))
    assert all(np.array_equal(rows, scope["view_0"][indices]) for indices, rows in batches)


def test_the_python_code_that_runs_an_exported_student(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    scope = {"images": np.zeros((3, 1, 8, 8), np.uint8)}
    exec(python_block("onnxruntime"), scope)
    assert scope["logits"].shape == (3, 10)
    assert set(scope["answers"]) <= set("0123456789")


def test_the_five_lines_of_a_training_loop(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    scope = {"kdcache": kdcache, "DataLoader": DataLoader, "student": student, "seen": []}
    scope["dataset"] = open_dataset("digits", split="train")
    code = python_block("in DataLoader(")
    assert len(code.splitlines()) == 5
    exec(f"{code.rstrip()}\n    seen.append((labels, teacher_logits, loss))", scope)
    assert sum(len(labels) for labels, _, _ in scope["seen"]) == 1437
    assert scope["seen"][0][1].shape == (128, 10)
    assert all(loss > 0 for _, _, loss in scope["seen"])
    assert student[1].weight.grad is not None


def test_the_whole_training_loop(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    scope = {}
    exec(python_block("datasets.ImageFolder"), scope)
    assert torch.isfinite(scope["loss"])
    assert scope["images"].shape == (6, 3, 64, 64)


def test_the_lines_for_ones_own_loop_in_several_processes(pipeline, monkeypatch, tmp_path):
    """Every sample comes once in an epoch, but for the few that DistributedSampler repeats."""
    monkeypatch.chdir(pipeline)
    code = python_block("DistributedSampler").replace("...", "seen[-1].append((labels, teacher_logits))")

    def work(processes):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        scope = {"kdcache": kdcache, "torch": torch, "student": network, "prepare": None, "seen": []}
        scope |= {"dataset": open_dataset("digits", split="train"), "cache": kdcache.open_cache("runs/digits.zarr")}
        code_with_list = code.replace("    data.set_epoch", "    seen.append([]); data.set_epoch")
        exec(code_with_list, scope)
        return [sum(len(labels) for labels, _ in epoch) for epoch in scope["seen"]]

    assert together(2, work, tmp_path) == [[719] * 3] * 2  # 1,437 samples and one that is repeated


def test_removing_local_paths_keeps_the_digest(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kdcache.dump_teacher(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        open_dataset("digits", split="test"),
        out="runs/digits.zarr",
        split="test",
        config=DumpConfig(device="cpu", license="CC-BY-4.0"),
    )
    before = json.loads(run_command("inspect", "runs/digits.zarr", "--json").stdout)["sha256"]
    document = tmp_path / "runs" / "digits.zarr" / "test" / "zarr.json"
    assert '"local"' in document.read_text()
    exec(python_block('mode="r+"'), {"zarr": zarr})
    assert '"local"' not in document.read_text()
    assert json.loads(run_command("inspect", "runs/digits.zarr", "--json").stdout)["sha256"] == before
    assert run_command("verify", "runs/digits.zarr").exit_code == 0


def test_the_job_array_of_the_readme(pipeline, monkeypatch, s3_server):
    """With the variables that SLURM sets; the second job is preempted, and takes the rest when it is queued again."""
    (script,) = (block for block in blocks("sh") if "#SBATCH" in block)
    (command,) = (line for line in script.splitlines() if line.startswith("kdcache "))
    monkeypatch.chdir(pipeline)
    for name, value in (
        *(("AWS_ENDPOINT_URL", s3_server), ("AWS_REGION", "us-east-1")),
        *(("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")),
        *(("SLURM_ARRAY_TASK_COUNT", "32"), ("SLURM_ARRAY_TASK_MIN", "0"), ("SLURM_ARRAY_TASK_STEP", "1")),
    ):
        monkeypatch.setenv(name, value)
    words = shlex.split(command.replace("mnist", "digits").removeprefix("kdcache "))
    for job, options, left in ((3, ["--no-steal"], True), (1, [], False)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
        result = run_command(*words, *options, "--shard-rows", "32", "--json")
        assert result.exit_code == 0, result.stderr
        assert bool(json.loads(result.stdout)["splits"]["train"]["pending_shards"]) == left


def test_every_option_of_the_readme_exists():
    options = options_by_command()
    known = set().union(*options.values()) | {"--help", "--install-completion"}
    known |= {"--nproc-per-node", "--max-restarts", "--array", "--gres", "--requeue"}  # of launchers
    assert set(OPTION.findall(README)) - known == set()


def test_the_commands_of_the_readme_use_their_own_options():
    options = options_by_command()
    written = [*commands(), *re.findall(r"`((?:kdcache )?(?:dump|train|verify)[a-z-]* [^`]*--[^`]*)`", README)]
    assert len(written) > len(commands())
    for command in written:
        words = shlex.split(command.rpartition("| ")[2].partition(" #")[0].removeprefix("kdcache "))
        assert {word for word in words if word.startswith("--")} <= options[words[0]], command


def options_by_command():
    group = typer.main.get_command(app)
    return {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


def test_every_command_is_in_the_readme():
    for name in options_by_command():
        assert f"kdcache {name}" in README or f"`{name}`" in README, name


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_within_the_readme_has_a_section():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall(r"\]\(#([\w-]+)\)", README)
    assert len(linked) >= 8
    assert set(linked) <= anchors


def test_every_test_file_of_the_readme_exists():
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)`", README))
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


def test_the_messages_of_the_readme_are_in_the_source():
    """Word by word, but for names, numbers and values."""
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in (ROOT / "kdcache").rglob("*.py")))
    for _ in range(2):  # braces within braces
        source = re.sub(r"\{[^{}]*\}", "…", source)
    table = README[README.index("| message |") :]
    table = table[: table.index("</details>")]
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for message in re.findall("`(.*?)`", row)
    ]
    assert len(messages) >= 12
    for message in messages:
        if message == "operator torchvision::nms does not exist":  # torch's own
            continue
        for part in re.split(r"…|\d+|'mnist'|timm", message):
            assert part.strip() in source, (message, part)
