"""What the README says to type runs, on digits instead of MNIST."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from tests.helpers import kdcache

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder in which the README's commands were run, one after the other, beside the files that they name."""
    folder = tmp_path_factory.mktemp("readme")
    make_files(folder)
    text = "\n".join(blocks("bash")).replace("mnist --download", "digits").replace("mnist", "digits")
    text = re.sub(r"--epochs \d+", "--epochs 2", text)
    commands = [line for line in text.splitlines() if "kdcache " in line]
    assert len(commands) >= 20
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delitem(sys.modules, "mine", raising=False)  # another test's
        for command in commands:
            piped, _, own = command.rpartition("| kdcache ")
            words = shlex.split(own.removeprefix("kdcache ").partition(" #")[0])
            result = kdcache(*words, stdin=piped and f"{shlex.split(piped)[1]}\n")
            assert result.exit_code == 0, (command, result.output, result.stderr)
    return folder


def make_files(folder):
    """What a reader has who types the README: photographs with a teacher of them, a drawing, reviews."""
    (folder / "mine.py").write_text(next(block for block in blocks("python") if "def photos" in block))
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


def test_the_pipeline_leaves_what_the_readme_says(pipeline):
    run = pipeline / "runs" / "student"
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "last.pt", "best.pt", "result.json"} <= names


def test_the_python_that_reads_a_cache_runs(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    variables = {}
    reading = [block for block in blocks("python") if "open_cache" in block or "zarr.open_group" in block]
    own_loop = [block for block in reading if "DataLoader" in block]
    for block in (block for block in reading if block not in own_loop):
        exec(block.replace("mnist", "digits").replace("59_999", "999"), {"kdcache": __import__("kdcache")}, variables)
    assert np.array_equal(variables["logits"], variables["train"]["logits"][0])
    assert variables["manifest"]["dataset"]["name"] == "digits"
    assert variables["labels"].shape == (1437,)


def test_the_python_that_runs_an_artefact(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    (block,) = (block for block in blocks("python") if "onnxruntime" in block)
    scope = {"images": np.zeros((3, 1, 8, 8), np.uint8)}
    exec(block, scope)
    assert scope["logits"].shape == (3, 10)
    assert set(scope["answers"]) <= set("0123456789")


def test_the_three_lines_for_a_loop_of_ones_own_run(pipeline, monkeypatch):
    import kdcache
    from kdcache.data.registry import open_dataset

    monkeypatch.chdir(pipeline)
    (block,) = (block for block in blocks("python") if "DataLoader" in block)
    scope = {"kdcache": kdcache, "dataset": open_dataset("digits", split="train"), "seen": []}
    exec("from torch.utils.data import DataLoader", scope)
    loop = block.replace("mnist", "digits").replace("num_workers=2", "num_workers=0").split("#")[0].rstrip()
    exec(f"{loop}\n    seen.append((inputs, labels, logits))", scope)
    (loss,) = (part for part in re.findall("`(.*?)`", README) if part.startswith("kdcache.losses.kd_with_labels"))
    inputs, labels, logits = scope["seen"][0]
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert (
        eval(loss, {"kdcache": kdcache, "student": student, "inputs": inputs, "labels": labels, "logits": logits}) > 0
    )
    assert sum(len(labels) for _, labels, _ in scope["seen"]) == 1437
    assert scope["seen"][0][2].shape == (128, 10)


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)) - {"of", "alone"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_is_in_the_readme():
    from kdcache.cli.app import app

    for command in app.registered_commands:
        assert f"kdcache {command.name}" in README or f"`{command.name}`" in README, command.name


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+\.py)`", README))
    assert len(named) >= 10
    assert all((ROOT / "tests" / name).is_file() for name in named)


def test_what_the_readme_says_of_messages_is_what_they_say():
    """Word by word, but for names, numbers and values."""
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in (ROOT / "kdcache").rglob("*.py")))
    for _ in range(2):  # braces within braces
        source = re.sub(r"\{[^{}]*\}", "…", source)
    table = README[README.index("## Troubleshooting") : README.index("## Developing")]
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for message in re.findall("`(.*?)`", row)
    ]
    assert len(messages) >= 12
    for message in messages:
        if message == "operator torchvision::nms does not exist":  # torch's own
            continue
        for part in re.split(r"…|\d+|'mnist'|timm", message):
            assert part.strip() in source, (message, part)
