"""What the README says to type runs, on digits instead of MNIST."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kdcache.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder in which the README's commands were run, one after the other."""
    folder = tmp_path_factory.mktemp("readme")
    text = "\n".join(blocks("bash")).replace("mnist --download", "digits").replace("mnist", "digits")
    text = re.sub(r"--epochs \d+", "--epochs 2", text)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("kdcache ")]
    assert len(commands) >= 7
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, (command, result.output, result.stderr)
    return folder


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


def test_the_three_lines_for_a_loop_of_ones_own_run(pipeline, monkeypatch):
    import kdcache
    from kdcache.datasets import open_dataset

    monkeypatch.chdir(pipeline)
    (block,) = (block for block in blocks("python") if "DataLoader" in block)
    scope = {"kdcache": kdcache, "dataset": open_dataset("digits", split="train"), "seen": []}
    exec("from torch.utils.data import DataLoader", scope)
    loop = block.replace("mnist", "digits").replace("num_workers=2", "num_workers=0").split("#")[0].rstrip()
    exec(f"{loop}\n    seen.append((inputs, labels, logits))", scope)
    assert sum(len(labels) for _, labels, _ in scope["seen"]) == 1437
    assert scope["seen"][0][2].shape == (128, 10)


def test_every_make_target_of_the_readme_exists():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)) - {"of", "alone"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
