import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kdcache.analysis.distributions import entropy, softmax
from kdcache.analysis.temperature import plot_temperature, temperature_curves
from kdcache.analysis.temperature_plot import draw_temperatures
from kdcache.core.commands import PlotTemperatureArgs
from kdcache.core.errors import CacheNotFound, MissingExtra, UsageError


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory, make_manifest, write_split):
    """A cache of made-up logits: the larger a sample's index, the surer its answer."""

    def make(length=40, classes=5, scale=1.0):
        path = tmp_path_factory.mktemp("temperature") / "cache.zarr"
        manifest = make_manifest(length=length, classes=classes, shard_rows=64)
        logits = np.random.default_rng(0).normal(size=(1, length, classes)).astype(np.float32)
        logits *= scale * (1 + np.arange(length)[:, None] / length)
        rows = {"logits": logits, "labels": np.arange(length)[None] % classes}
        rows["input_crc32c"] = np.zeros((1, length), np.uint32)
        write_split(path, manifest, rows)
        return str(path), logits[0]

    return make


@pytest.fixture(scope="module")
def cache(make_cache):
    return make_cache(scale=4.0)


def plot(path, tmp_path, **settings):
    return plot_temperature(PlotTemperatureArgs(cache=path, out=str(tmp_path / "t.png"), **settings))


def test_quantiles_are_those_of_single_samples():
    logits = np.random.default_rng(0).normal(size=(11, 4)) * 3
    found = temperature_curves(logits, np.array([1.0, 4.0]))
    for at, temperature in enumerate((1.0, 4.0)):
        top = sorted(float(softmax(row, temperature).max()) for row in logits)
        assert found.top_qt[:, at].tolist() == pytest.approx([top[1], top[5], top[9]])
        spread = sorted(float(entropy(row, temperature)) for row in logits)
        assert found.entropy_qt[:, at].tolist() == pytest.approx([spread[1], spread[5], spread[9]])


def test_the_picture_and_its_numbers(cache, tmp_path):
    path, logits = cache
    report = plot(path, tmp_path, temperatures=(8.0, 0.5, 2.0), sample=7)
    data = report.data
    with Image.open(data["picture"]) as image:
        assert image.format == "PNG"
        assert image.height > image.width > 800
    panels = data["sample"]["panels"]
    assert [panel["temperature"] for panel in panels] == [0.5, 2.0, 8.0]
    for panel in panels:
        assert panel["probabilities"] == pytest.approx(softmax(logits[7], panel["temperature"]).tolist(), rel=1e-6)
        assert panel["entropy"] == pytest.approx(float(entropy(logits[7], panel["temperature"])), rel=1e-6)
    assert (data["sample"]["index"], data["sample"]["label"]) == (7, "class 2")
    assert data["max_entropy"] == pytest.approx(math.log(5))
    assert data["samples"] == 40
    printed = {row["temperature"]: row for row in data["temperatures"]}
    assert printed[4.0]["entropy_median"] == pytest.approx(np.median(entropy(logits, 4.0)), rel=1e-6)
    assert f"{printed[4.0]['top_probability_median']:.4f}" in report.text
    curve = data["curves"]
    assert (curve[0]["temperature"], curve[-1]["temperature"]) == (pytest.approx(0.25), pytest.approx(32))
    medians = [row["entropy_median"] for row in curve]
    assert medians == sorted(medians)
    low, high = data["neither_hard_nor_flat"]
    limits = {row["temperature"]: row["entropy_median"] / math.log(5) for row in curve}
    assert all((0.1 <= share <= 0.7) == (low <= temperature <= high) for temperature, share in limits.items())
    assert f"From T = {low:.2g} to {high:.2g}" in report.text
    assert "only the accuracy of students shows" in report.text
    json.dumps(data, allow_nan=False)


def test_a_class_name_is_no_formula():
    named, panels, logits = SimpleNamespace(classes=("$x_{$", "b")), (1.0, 2.0), np.array([[1.0, 0.0]])
    drawn = draw_temperatures(named, 0, logits[0], 0, panels, temperature_curves(logits, np.array(panels)), 1)
    assert drawn.startswith(b"\x89PNG")


def test_the_sample_is_in_the_middle_unless_one_is_named(cache, tmp_path):
    path, logits = cache
    report = plot(path, tmp_path)
    order = np.argsort(entropy(logits))
    assert report.data["sample"]["index"] == order[20]
    assert len(report.data["sample"]["panels"]) == 6
    few = plot(path, tmp_path, samples=9, seed=3)
    assert few.data["samples"] == 9
    assert few.data == plot(path, tmp_path, samples=9, seed=3).data
    assert few.data["curves"] != plot(path, tmp_path, samples=9, seed=4).data["curves"]


@pytest.mark.parametrize(("classes", "scale"), [(60, 4.0), (2, 1e-6)], ids=["many classes", "all even"])
def test_caches_of_other_kinds(make_cache, tmp_path, classes, scale):
    path, _ = make_cache(classes=classes, scale=scale)
    report = plot(path, tmp_path)
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert len(report.data["sample"]["panels"][0]["probabilities"]) == classes
    assert (report.data["neither_hard_nor_flat"] is None) == (classes == 2)
    assert ("nearly uniform" in report.text) == (classes == 2)


@pytest.mark.parametrize(
    ("settings", "found", "needed", "remedy"),
    [
        ({"sample": 40}, "--sample is 40", "0 to 39", "leave it out"),
        ({"temperatures": (1.0,)}, "--temperatures has 1", "2 to 6", "0.5,1,2"),
        ({"temperatures": (2.0, 2.0)}, "--temperatures has 1", "2 to 6", "0.5,1,2"),
        ({"temperatures": tuple(range(1, 8))}, "--temperatures has 7", "2 to 6", "0.5,1,2"),
        ({"out": "t.jpg"}, "--out is 't.jpg'", ".png", "temperature.png"),
    ],
)
def test_what_cannot_be_drawn_is_refused(cache, tmp_path, settings, found, needed, remedy):
    with pytest.raises(UsageError) as problem:
        plot_temperature(PlotTemperatureArgs(cache=cache[0], **{"out": str(tmp_path / "t.png")} | settings))
    for part, expected in (
        (problem.value.found, found),
        (problem.value.needed, needed),
        (problem.value.remedy, remedy),
    ):
        assert expected in part
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(cache, make_cache, tmp_path, monkeypatch):
    with pytest.raises(CacheNotFound, match="no split 'test'"):
        plot(cache[0], tmp_path, split="test")
    with pytest.raises(UsageError, match="has 1 class"):
        plot(make_cache(classes=1)[0], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="needs matplotlib"):
        plot(cache[0], tmp_path)


def test_torch_stays_out(cache, tmp_path):
    code = "import sys; from kdcache.cli.app import app; app(standalone_mode=False); print('torch' in sys.modules)"
    arguments = ["plot-temperature", cache[0], "--out", str(tmp_path / "t.png")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
