import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from kdcache import losses
from kdcache.analysis.calibration import LOWEST, calibrate, fit_temperature, reliability
from kdcache.analysis.distributions import entropy, kl_divergence, negative_log_likelihood, softmax
from kdcache.analysis.drawing import shorten
from kdcache.analysis.figures import confusion
from kdcache.apps import dumping, training
from kdcache.apps.report.build import make_report
from kdcache.apps.report.cost import multiply_adds
from kdcache.apps.report.metrics import evaluate_logits
from kdcache.apps.report.samples import as_png, cards, excerpt
from kdcache.cli.app import app
from kdcache.core.commands import DumpTeacherArgs, ReportArgs, TrainStudentArgs, TrainTeacherArgs
from kdcache.core.errors import CacheMismatch, CacheNotFound, CheckpointError, MissingExtra, UsageError
from tests.helpers import synthetic

PNG = b"\x89PNG\r\n\x1a\n"
logits_lists = st.lists(st.floats(-20, 20), min_size=2, max_size=6)


# ---- numbers


@given(logits=logits_lists, shift=st.floats(-50, 50), lower=st.floats(0.1, 10), factor=st.floats(1, 10))
def test_entropy_grows_with_temperature_up_to_that_of_even_classes(logits, shift, lower, factor):
    row = np.array(logits)
    assert softmax(row, lower).sum() == pytest.approx(1)
    np.testing.assert_allclose(softmax(row + shift, lower), softmax(row, lower), atol=1e-9)
    low, high = entropy(row, lower), entropy(row, lower * factor)
    assert -1e-12 <= low <= high + 1e-9
    assert high <= math.log(len(row)) + 1e-12


def test_distributions_against_values_worked_out_by_hand():
    logits = np.array([[math.log(3), 0.0]], np.float32)
    np.testing.assert_allclose(softmax(logits), [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(softmax(logits, 0.5), [[0.9, 0.1]], rtol=1e-6)
    assert entropy(np.zeros(8)) == pytest.approx(math.log(8))
    assert entropy(np.array([1000.0, 0.0])) == 0
    even = np.zeros((1, 2))
    assert kl_divergence(logits, even)[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert negative_log_likelihood(logits, np.array([1]))[0] == pytest.approx(math.log(4))
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            softmax(logits, wrong)
    with pytest.raises(ValueError, match=r"\(1, 2\) logits of a teacher, \(1, 3\)"):
        kl_divergence(logits, np.zeros((1, 3)))


def test_divergence_is_that_of_the_loss():
    teacher, student = np.random.default_rng(0).normal(size=(2, 50, 7)) * 4
    expected = losses.kd(torch.tensor(student), torch.tensor(teacher), temperature=1.0)
    assert kl_divergence(teacher, student).mean() == pytest.approx(float(expected))
    np.testing.assert_allclose(kl_divergence(teacher, teacher + 3), 0, atol=1e-12)


def test_calibration_error_worked_out_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7], [0.3, 0.7]])
    found = reliability(probabilities, np.array([0, 1, 1, 1, 1]), bins=10)
    assert found.counts_b.tolist() == [0, 0, 0, 0, 0, 0, 3, 0, 2, 0]  # a bin holds its upper edge
    assert found.ece == pytest.approx((3 * 0.3 + 2 * 0.4) / 5)
    assert np.isnan(found.confidence_b[0])
    assert found.accuracy_b[8] == 0.5


def test_perfectly_calibrated_probabilities_have_no_calibration_error():
    # Of each top probability k/20 exactly so many of 20 answers are right.
    shares = np.arange(10, 21) / 20
    probabilities = np.repeat(np.stack([shares, 1 - shares], axis=1), 20, axis=0)
    labels = np.concatenate([[0] * k + [1] * (20 - k) for k in range(10, 21)])
    assert reliability(probabilities, labels).ece == pytest.approx(0, abs=1e-12)
    assert reliability(probabilities, 1 - labels).ece > 0.4
    assert reliability(np.array([[1.0, 0.0]]), np.array([0])).counts_b[-1] == 1
    with pytest.raises(ValueError, match="0 answers and 0 labels"):
        reliability(np.zeros((0, 2)), np.zeros(0, np.int64))


@given(scale=st.floats(0.05, 20))
def test_the_fitted_temperature_undoes_a_scaling(scale):
    # Labels in exactly the proportions of the probabilities, so that temperature 1 is the best of the unscaled logits.
    logits = np.log(np.array([[0.75, 0.25]] * 4 + [[0.4, 0.6]] * 5))
    labels = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1])
    assert fit_temperature(logits * scale, labels) == pytest.approx(scale, rel=1e-6)


def test_scaling_is_evaluated_on_samples_that_it_was_not_fitted_on():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 5)) * 2
    labels = np.array([random.choice(5, p=row) for row in softmax(logits)])
    found = calibrate(3 * logits, labels)
    assert found.fitted == found.evaluated == 2000
    assert found.before.counts_b.sum() == found.after.counts_b.sum() == 2000
    assert found.temperature == pytest.approx(3, rel=0.1)
    assert found.after.ece < 0.05 < found.before.ece
    assert found.nll_after < found.nll_before
    assert calibrate(3 * logits, labels).temperature == found.temperature
    assert calibrate(3 * logits, labels, seed=1).temperature != found.temperature
    right = np.eye(3)[[0, 1, 2, 0]] * 9
    assert fit_temperature(right, np.array([0, 1, 2, 0])) == pytest.approx(LOWEST, rel=1e-6)
    with pytest.raises(ValueError, match="1 samples"):
        calibrate(right[:1], np.array([0]))


def test_accuracy_its_error_and_classes_without_samples():
    logits = np.array([[2.0, 1, 0], [2, 1, 0], [0, 3, 0], [0, 3, 0]])
    found = evaluate_logits("who", logits, np.array([0, 1, 1, 1]), 0)
    assert found.confusion_cc.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert found.accuracy == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found.class_accuracy_c[:2].tolist() == [1, pytest.approx(2 / 3)]
    assert np.isnan(found.class_accuracy_c[2])
    assert evaluate_logits("who", logits[:1], np.array([0]), 0).calibration is None


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.product = nn.Bilinear(4, 4, 2)

    def forward(self, inputs):
        return self.product(inputs, inputs)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(8, 4), (1, 8), 32),
        (nn.Conv2d(2, 3, 3), (1, 2, 6, 6), 2 * 3 * 9 * 16),
        (nn.GRU(8, 16, batch_first=True), (1, 5, 8), 5 * 3 * 16 * (8 + 16)),
        (nn.LSTM(8, 16, 2, bidirectional=True), (5, 1, 8), 5 * 2 * 4 * 16 * ((8 + 16) + (32 + 16))),
        # Four projections, the scores and their sum, two layers of the network behind them.
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (1, 5, 16), 5 * 4 * 256 + 2 * 400 + 2 * 5 * 512),
        (Bilinear(), (1, 4), 0),
    ],
    ids=["linear", "conv", "gru", "lstm", "transformer", "bilinear, for which torch has no formula"],
)
def test_multiply_adds_by_hand(module, shape, expected):
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    assert multiply_adds(module.eval(), torch.randn(shape)) == expected
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_a_name_is_no_formula():
    name = "$x_{$"
    assert confusion("c", name, np.eye(2, dtype=np.int64), (name, "b"), 0.5).png.startswith(PNG)


def test_long_names_keep_both_ends():
    assert shorten("class number 12", 15) == "class number 12"
    assert shorten("class number 12", 9) == "clas…r 12"


def test_small_scores_are_told_apart():
    logits = np.zeros((2, 4))
    student = logits + np.array([[0.05, 0, 0, 0], [0.1, 0, 0, 0]])
    found = cards(synthetic(2), student, logits, np.array([0, 1]), 2)
    assert [card.score for card in found] == ["KL 0.00095", "KL 0.00024"]


def test_what_a_sample_looks_like():
    assert as_png(torch.zeros(1, 8, 8, dtype=torch.uint8)).startswith(PNG)
    assert as_png(torch.zeros(3, 900, 8, dtype=torch.uint8)).startswith(PNG)
    for other in (torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8), torch.zeros(9, dtype=torch.uint8)):
        assert as_png(other) is None
    text = torch.tensor(list(("höre " * 200).encode()), dtype=torch.uint8)
    assert excerpt(text[:11]) == "höre höre"
    assert excerpt(text).endswith(" …")
    assert len(excerpt(text)) < 300


# ---- the page


class Parsed(HTMLParser):
    """A page's elements in order: (tag, attributes), its headings and its words."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.headings, self.cells, self._open = [], [], [], [], []
        self.source = Path(path).read_text()
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source"):
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            return
        self.words.append(data)
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1].append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, *first):
        (found,) = [cells for cells in self.cells if tuple(cells[: len(first)]) == first]
        return found


def check_alone(page):
    """Check that a page is well-formed, needs no other file and shows each picture once, in either colour scheme."""
    assert page._open == []
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:"), (tag, name)
    assert not re.search(r"https?://|url\(|@import", page.source)
    pictures = [each["src"] for each in page.all("img") if int(each["width"]) > 76]
    assert len(set(pictures)) == len(pictures) > 0
    assert not page.all("source")
    assert all(image["alt"] for image in page.all("img"))
    assert page.source.count("prefers-color-scheme: dark") == 1
    assert "@media print" in page.source


def train_student(root, name, **settings):
    settings = {"cache": (str(root / "digits.zarr"),), "student": "mlp", "epochs": 2, "device": "cpu"} | settings
    return training.train_student(TrainStudentArgs(out=str(root / name), **settings))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Teacher, cache and two students of digits, and their report by the command."""
    root = tmp_path_factory.mktemp("report")
    training.train_teacher(TrainTeacherArgs(out=str(root / "teacher"), epochs=2, device="cpu", learning_rate=3e-3))
    checkpoint = str(root / "teacher" / "best.pt")
    dump = DumpTeacherArgs(checkpoint=checkpoint, split=("train", "test"), out=str(root / "digits.zarr"), device="cpu")
    dumping.dump_teacher(dump)
    train_student(root, "alone", distill=False)
    train_student(root, "student", temperature=3.0, alpha=0.9, val_fraction=0.2)
    runs = [str(root / name) for name in ("teacher", "alone", "student")]
    arguments = [*runs, "--out", str(root / "all.html"), "--train-samples", "100", "--shown", "7", "--device", "cpu"]
    done = CliRunner().invoke(app, ["report", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return SimpleNamespace(
        root=root, runs=runs, data=json.loads(done.stdout), page=Parsed(root / "all.html"), stderr=done.stderr
    )


def report(study, *names, **settings):
    """A report of some runs, and its page."""
    out = study.root / "one.html"
    settings = {"device": "cpu", "out": str(out), "train_samples": 50, "shown": 3} | settings
    found = make_report(ReportArgs(runs=tuple(str(study.root / name) for name in names), **settings))
    page = Parsed(out)
    check_alone(page)
    return found, page


def test_the_page_stands_alone(study):
    check_alone(study.page)
    anchors = [attributes["href"][1:] for attributes in study.page.all("a")]
    assert anchors == [attributes["id"] for attributes in study.page.all("section")]
    assert study.data["bytes"] == (study.root / "all.html").stat().st_size < 2_000_000
    files = {str(path): path.read_bytes() for path in (study.root / "all_files").iterdir()}
    assert set(files) == set(study.data["pictures"])
    assert all(content.startswith(PNG) for content in files.values())
    names = {Path(name).name for name in files}
    assert {"curve-kd.png", "confusion-3.png", "reliability-3.png", "sample-007.png"} <= names
    assert not any(name.endswith("-dark.png") for name in names)
    assert "measuring run 3 of 3, student" in study.stderr


def test_the_summary_shows_what_runs_recorded_and_what_is_measured(study):
    page = study.page
    header = page.row("run", "test accuracy")
    for data, path in zip(study.data["runs"], study.runs, strict=True):
        result = json.loads((Path(path) / "result.json").read_text())
        row = dict(zip(header, page.row(Path(path).name, f"{data_accuracy(data)}"), strict=True))
        assert data["test_accuracy"] == result["test_accuracy"]
        assert row["role"] == result["role"]
        assert row["parameters"] == f"{result['parameters']:,}"
        assert row["checkpoint, bytes"] == f"{(Path(path) / 'best.pt').stat().st_size:,}"
        assert float(row["latency, ms"]) > 0
        assert row["multiply-adds"] == f"{data['multiply_adds']:,}"
    assert study.data["runs"][2]["multiply_adds"] == 64 * 128 + 128 * 10
    assert "Not shown, or different from the record" not in page.headings
    assert study.data["cached"] == study.data["missing"] == []
    row = page.row("temperature")
    assert row[1:] == ["–", "–", "3"]  # who has no teacher uses no temperature


def data_accuracy(data):
    share = data["test_accuracy"]
    return f"{share:.2%} ± {math.sqrt(share * (1 - share) / 360):.2%}"


def test_every_part_is_there_with_its_numbers(study):
    page, (teacher, _, student) = study.page, study.data["runs"]
    assert page.headings == [
        "Summary",
        "Training",
        "Confusion",
        "Calibration",
        "Agreement with the teacher",
        "Largest disagreements",
        "Caches",
    ]
    alts = " ".join(image["alt"] for image in page.all("img"))
    for part in (
        "Loss over",
        "Kd over",
        "Cross entropy over",
        "student validation ends at",
        "Confusion matrix of alone",
    ):
        assert part in alts
    confusion = np.array(student["confusion"])
    assert confusion.sum() == 360
    assert confusion.trace() / 360 == student["test_accuracy"]
    found = student["calibration"]
    assert (found["fitted_on"], found["judged_on"]) == (180, 180)
    calibrated = page.row("student", f"{found['ece_before']:.2%}")
    assert calibrated[2:] == [
        f"{found['ece_after']:.2%}",
        f"{found['nll_before']:.4f}",
        f"{found['nll_after']:.4f}",
        f"{found['temperature']:.3f}",
    ]
    # The run of the teacher has the logits of its cache, but for the encoding.
    for split, samples in (("test", 360), ("train", 100)):
        assert teacher["agreement"][split]["samples"] == samples
        assert teacher["agreement"][split]["same_top_class"] == 1
        assert teacher["agreement"][split]["kl"] < 1e-5 < student["agreement"][split]["kl"]
    row = page.row("student", "student distilled", "test")
    assert row[4:] == [
        f"{student['agreement']['test']['same_top_class']:.2%}",
        f"{student['agreement']['test']['kl']:.4g}",
    ]
    scores = [float(score) for score in re.findall(r"KL (\d+\.\d\d)", page.text)]
    assert len(scores) == 7
    assert scores == sorted(scores, reverse=True)
    manifest = json.loads((study.root / "digits.zarr" / "train" / "zarr.json").read_text())["attributes"]["kdcache"]
    assert manifest["sha256"] in page.text
    assert manifest["manifest"]["teacher"]["weights_sha256"] in page.text


def test_a_student_by_itself_brings_its_teacher_from_the_cache(study):
    found, page = report(study, "student")
    (cached,) = found.data["cached"]
    teacher = study.data["runs"][0]
    assert cached["test_accuracy"] == pytest.approx(teacher["test_accuracy"], abs=2 / 360)
    row = page.row("cached teacher", f"{cached['test_accuracy']:.2%}", "teacher")
    assert row[3:] == ["cnn", f"{teacher['parameters']:,}", "–", "–", "–", "–"]
    assert page.row("cached teacher", f"{cached['calibration']['ece_before']:.2%}")
    assert "student (student distilled)" in found.text


def test_a_teacher_by_itself(study):
    _, page = report(study, "teacher")
    assert page.headings == ["Summary", "Training", "Confusion", "Calibration", "Largest losses"]
    assert "largest loss of teacher" in page.text


def test_a_cache_that_is_gone_leaves_a_page_that_says_so(study, tmp_path, capsys):
    gone = tmp_path / "gone"
    shutil.copytree(study.root / "student", gone)
    config = json.loads((gone / "config.json").read_text())
    (gone / "config.json").write_text(json.dumps(config | {"cache": [str(tmp_path / "nowhere.zarr")]}))
    found, page = report(study, gone, "alone")
    (sentence,) = found.data["missing"]
    assert "gone is not compared with its teacher" in sentence
    assert sentence in page.text
    assert sentence in capsys.readouterr().err
    assert sentence in found.text
    assert page.headings[0] == "Not shown, or different from the record"
    assert "Largest losses" in page.headings
    assert set(found.data["runs"][0]["agreement"]) == set()
    assert set(found.data["runs"][1]["agreement"]) == {"test", "train"}
    found, page = report(study, gone, cache=str(study.root / "digits.zarr"))
    assert found.data["missing"] == []
    assert "Largest disagreements" in page.headings


def test_a_cache_without_a_test_split_or_without_plain_answers(study, tmp_path):
    checkpoint = str(study.root / "teacher" / "best.pt")
    for name, settings, reason in (
        ("train-only", {}, "holds no logits for the test split"),
        ("varied", {"augment": "affine", "views": 2}, "holds logits for augmented samples of the train split"),
    ):
        cache = str(tmp_path / f"{name}.zarr")
        dumping.dump_teacher(DumpTeacherArgs(checkpoint=checkpoint, out=cache, device="cpu", **settings))
        train_student(tmp_path, name, cache=(cache,), epochs=1)
        found, page = report(study, tmp_path / name)
        assert any(reason in sentence for sentence in found.data["missing"])
        assert set(found.data["runs"][0]["agreement"]) == ({"train"} if name == "train-only" else set())
        assert ("Agreement with the teacher" in page.headings) == (name == "train-only")
        assert "Largest losses" in page.headings
        assert page.row("cached teacher")[1] == "–"  # its accuracy is not one on test samples


def test_two_caches_are_one_teacher(study, tmp_path):
    shutil.copytree(study.root / "digits.zarr", tmp_path / "twin.zarr")
    caches = (str(study.root / "digits.zarr"), str(tmp_path / "twin.zarr"))
    train_student(tmp_path, "both", cache=caches, cache_weights=(2.0, 1.0), epochs=1)
    found, page = report(study, tmp_path / "both", "teacher")
    assert found.data["runs"][1]["agreement"]["test"]["kl"] < 1e-5  # the mean of a teacher with itself
    assert sum(attributes.get("id") == "cache" for attributes in page.all("section")) == 1
    with pytest.raises(UsageError, match="--cache names one cache") as problem:
        report(study, tmp_path / "both", cache=caches[0])
    assert "leave out --cache" in problem.value.remedy


def test_what_must_not_be_compared_is_refused(study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study.root / "student", other)
    checkpoint = torch.load(other / "best.pt", weights_only=True)
    torch.save(checkpoint | {"rows": [["0" * 64]]}, other / "best.pt")
    with pytest.raises(CacheMismatch, match="holds other logits than") as problem:
        report(study, other)
    assert "--cache" in problem.value.remedy
    found, _ = report(study, other, cache=str(study.root / "digits.zarr"))
    assert "was trained from other logits" in found.data["missing"][0]
    torch.save(checkpoint | {"kdcache": checkpoint["kdcache"] | {"dataset": "mnist"}}, other / "best.pt")
    with pytest.raises(UsageError, match=r"of the dataset 'digits', .*other of 'mnist'") as problem:
        report(study, "student", other)
    assert "each dataset" in problem.value.remedy
    (other / "best.pt").unlink()
    with pytest.raises(CheckpointError):
        report(study, other)
    (other / "result.json").unlink()
    with pytest.raises(UsageError, match="has not finished"):
        report(study, other)
    with pytest.raises(UsageError, match="no run at"):
        report(study, tmp_path)
    with pytest.raises(UsageError, match=r"page\.pdf") as problem:
        report(study, "student", out=str(tmp_path / "page.pdf"))
    assert "report.html" in problem.value.remedy


def test_a_cache_that_is_named_must_be_there(study, tmp_path):
    with pytest.raises(CacheNotFound, match="nothing is there"):
        report(study, "student", cache=str(tmp_path / "nowhere.zarr"))


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_a_damaged_run_is_named(study, tmp_path, name):
    shutil.copytree(study.root / "student", tmp_path / "cut")
    path = tmp_path / "cut" / name
    path.write_text(path.read_text().rstrip()[:-9])
    with pytest.raises(UsageError, match=rf"cut.{name} is damaged") as problem:
        report(study, tmp_path / "cut")
    assert "from a copy" in problem.value.remedy


def test_an_accuracy_that_is_not_what_was_recorded_is_reported(study, tmp_path):
    shutil.copytree(study.root / "student", tmp_path / "changed")
    path = tmp_path / "changed" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_accuracy": 0.123}))
    found, page = report(study, tmp_path / "changed")
    assert "changed recorded a test accuracy of 12.30%" in found.data["missing"][0]
    assert "12.30% ±" not in page.text


def test_without_matplotlib_nothing_is_measured(study, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="a report needs matplotlib"):
        report(study, "student")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Runs on texts, and on names that look like markup."""
    tmp_path = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 6), ("test", 3)):
        for name, words in (("<b>good", "fine <script>alert(1)</script> great"), ("bad", "poor & awful")):
            folder = tmp_path / "texts" / split / name
            folder.mkdir(parents=True)
            for at in range(count):
                (folder / f"{at}.txt").write_text(f"{words} " * (at + 1))
    spec = f"text-folder:{tmp_path / 'texts'}"
    common = {"epochs": 1, "device": "cpu"}
    teacher = TrainTeacherArgs(dataset=spec, model="lstm:hidden=8,embedding=8", out=str(tmp_path / "teacher"), **common)
    training.train_teacher(teacher)
    dumping.dump_teacher(
        DumpTeacherArgs(
            dataset=spec,
            teacher="lstm:hidden=8,embedding=8",
            checkpoint=str(tmp_path / "teacher" / "best.pt"),
            split=("train", "test"),
            out=str(tmp_path / "texts.zarr"),
            device="cpu",
        )
    )
    train_student(tmp_path, "student", cache=(str(tmp_path / "texts.zarr"),), student="gru", epochs=1)
    return SimpleNamespace(root=tmp_path)


def test_what_was_written_elsewhere_stays_text(texts):
    found, page = report(texts, "teacher", "student", shown=6)
    assert "fine <script>alert(1)</script> great" in page.text
    assert "✓ <b>good" in page.text
    assert len(page.all("blockquote")) == 6
    # Forwards and backwards, four gates of 8 times (8 + 8) for each token, and the layer on top.
    shape = re.search(r"one sample \(([\d]+) numbers\)", page.text)
    tokens = int(shape[1])
    assert found.data["runs"][0]["multiply_adds"] == tokens * 2 * 4 * 8 * 16 + 2 * 8 * 2


def test_without_a_test_split_there_is_what_was_recorded(texts, tmp_path):
    moved = (texts.root / "texts" / "test").rename(tmp_path / "test")
    try:
        found, page = report(texts, "student")
    finally:
        moved.rename(texts.root / "texts" / "test")
    assert "Nothing is measured on the test split" in found.data["missing"][0]
    assert page.headings[1:] == ["Summary", "Training", "Agreement with the teacher", "Caches"]
    recorded = json.loads((texts.root / "student" / "result.json").read_text())["test_accuracy"]
    assert page.row("student", f"{recorded:.2%}")[2] == "student distilled"
    assert list(found.data["runs"][0]["agreement"]) == ["train"]
    assert found.data["runs"][0]["latency_ms"] > 0
