"""What a teacher returns: probabilities, two answers to one input, other classes or another order."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdcache.core.config import DumpConfig
from kdcache.core.errors import ModelError, TeacherOutputError, UsageError
from kdcache.core.json_records import to_json
from kdcache.distill.teacher.class_agreement import accuracy_lines, best_permutation
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.models.teacher_outputs import check_class_names, class_names, read_class_map, resolve_columns, to_logits
from kdcache.store.cache import open_cache
from kdcache.store.manifest import manifest_sha256
from kdcache.store.records import OutputRecord, TeacherRecord
from tests.helpers import answer, kdcache, refused, stored_manifest, synthetic

CONFIG = DumpConfig(device="cpu", batch_size=8, shard_rows=16, encoding="float32")


class Teacher(nn.Module):
    """A linear network with something behind it."""

    def __init__(self, behind=lambda logits: logits, classes=4, before=lambda flat: flat):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc = nn.Linear(16, classes)
        self.behind, self.before = behind, before

    def forward(self, inputs):
        return self.behind(self.fc(self.before(inputs.flatten(1))))


def softmax(logits):
    return logits.softmax(dim=1)


def dump(path, teacher, *, count=40, **options):
    return dump_teacher(teacher, synthetic(count), out=path / "c", config=options.pop("config", CONFIG), **options)


def test_probabilities_are_refused_as_logits_and_stored_as_log_p(tmp_path):
    with pytest.raises(TeacherOutputError, match="returns probabilities") as caught:
        dump(tmp_path, Teacher(softmax))
    assert "--teacher-outputs probabilities" in str(caught.value)
    assert not (tmp_path / "c").exists()
    dump(tmp_path, Teacher(softmax), outputs=OutputRecord(kind="probabilities"))
    stored = open_cache(tmp_path / "c")
    assert stored.manifest.teacher.outputs == OutputRecord(kind="probabilities")
    dump(tmp_path / "plain", Teacher())
    logits = open_cache(tmp_path / "plain" / "c").column("logits")
    np.testing.assert_allclose(stored.column("logits"), F.log_softmax(torch.tensor(logits), 1), atol=1e-5)


def test_log_probabilities_are_logits(tmp_path, capfd):
    dump(tmp_path, Teacher(lambda logits: logits.log_softmax(dim=1)))
    assert "probabilit" not in capfd.readouterr().err


@pytest.mark.parametrize("behind", [nn.Identity(), nn.Sigmoid()], ids=["logits", "sigmoid"])
def test_what_sums_to_no_1_is_no_probability(tmp_path, behind):
    with pytest.raises(TeacherOutputError, match="rows that sum to"):
        dump(tmp_path, Teacher(behind), outputs=OutputRecord(kind="probabilities"))


def test_a_teacher_that_turns_into_probabilities_after_the_probe_is_refused(tmp_path):
    def behind(logits):
        return logits.softmax(dim=1) if len(logits) > 2 else logits

    with pytest.raises(TeacherOutputError, match="returns probabilities"):
        dump(tmp_path, Teacher(behind))


def test_outputs_of_a_sigmoid_are_named(tmp_path, capfd):
    dump(tmp_path, Teacher(torch.sigmoid))
    assert "as from a sigmoid" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_probability_of_0_becomes_a_finite_logarithm(dtype):
    given = torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype)
    found = to_logits(given, OutputRecord(kind="probabilities", columns=(1, 2)))
    assert found.dtype == dtype
    assert found[0, 0] == 0
    assert found[0, 1] == torch.tensor(torch.finfo(dtype).tiny, dtype=dtype).log()
    assert to_logits(torch.tensor([[-0.1, 1.1]]), OutputRecord(kind="probabilities")).isnan().any()


@pytest.mark.parametrize("part", [0.5, 0.05])
def test_a_teacher_that_drops_out_in_eval_mode_is_refused(tmp_path, part):
    with pytest.raises(TeacherOutputError, match="between two passes over the same batch") as caught:
        dump(tmp_path, Teacher(before=lambda flat: F.dropout(flat + 3, part)))
    assert "training=self.training" in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("count", [2, 3, 40])
def test_a_teacher_whose_answer_depends_on_the_batch_is_refused(tmp_path, count):
    with pytest.raises(TeacherOutputError, match="another sample is in its batch"):
        dump(tmp_path, Teacher(before=lambda flat: F.batch_norm(flat, None, None, training=True)), count=count)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_good_teacher_of_few_samples_is_not_refused(tmp_path, count):
    assert dump(tmp_path, Teacher(), count=count).rows == count


def test_a_manifest_without_the_field_keeps_its_digest(make_manifest, tmp_path, write_split, make_rows):
    manifest = make_manifest()
    assert "outputs" not in to_json(manifest.teacher)
    write_split(tmp_path, manifest, make_rows(manifest))
    assert stored_manifest(tmp_path / "train").teacher.outputs == OutputRecord()
    mapped = replace(manifest, teacher=replace(manifest.teacher, outputs=OutputRecord(columns=(1, 0, 2))))
    assert to_json(mapped.teacher)["outputs"] == {"kind": "logits", "columns": [1, 0, 2]}
    assert manifest_sha256(mapped) != manifest_sha256(manifest)
    assert isinstance(mapped.teacher, TeacherRecord)


def test_accuracy_is_reported_and_a_permutation_named(tmp_path, capfd):
    dataset = synthetic(48)
    names = dataset.classes

    class Knows(nn.Module):
        def __init__(self, order):
            super().__init__()
            inputs, labels = dataset.fetch(np.arange(48))
            means = torch.stack([inputs[labels == c].double().mean(dim=0).flatten() / 255 for c in range(4)])
            self.register_buffer("means", means[list(order)])

        def forward(self, inputs):
            return -torch.cdist(inputs.flatten(1).double(), self.means)

    dump_teacher(Knows(range(4)), dataset, out=tmp_path / "right", config=CONFIG)
    said = capfd.readouterr().err
    assert "teacher accuracy on the first 16 samples: 100.00%" in said
    assert "warning" not in said
    dump_teacher(Knows((1, 2, 3, 0)), dataset, out=tmp_path / "rolled", config=CONFIG)
    said = capfd.readouterr().err
    assert "no better than chance (25.00% for 4 classes)" in said
    assert f"right on 100.00%: {names[0]} → {names[3]} (output 3), {names[1]} → {names[0]} (output 0)" in said
    assert "--class-map FILE" in said
    mapped = OutputRecord(columns=(3, 0, 1, 2))
    dump_teacher(Knows((1, 2, 3, 0)), dataset, out=tmp_path / "mapped", config=CONFIG, outputs=mapped)
    right, found = open_cache(tmp_path / "right"), open_cache(tmp_path / "mapped")
    np.testing.assert_allclose(found.column("logits"), right.column("logits"), atol=1e-6)
    assert found.manifest.teacher.accuracy == 1


def test_a_teacher_of_chance_gets_no_permutation():
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 2000)
    lines = accuracy_lines(
        labels, random.integers(0, 10, 2000) * 0 + (labels + 1) * (random.random(2000) < 0.1), "0123456789"
    )
    assert "→" not in "".join(lines)
    (line,) = accuracy_lines(labels, labels, "0123456789")
    assert "100.00%" in line


def test_a_permutation_of_many_classes_takes_no_matrix():
    labels = np.arange(60_000)
    found, explained = best_permutation(labels, labels[::-1].copy())
    assert explained == 1
    assert found[0] == 59_999


MATCHING = ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("POSITIVE", "NEGATIVE"), ("neg", "pos")),
        (("dog", "cat", "fox"), MATCHING),
        (("Dog", "Cat", "Fox"), MATCHING),
        (("tench", "fox", "cat", "dog"), MATCHING),
        (("a", "b"), MATCHING),
    ],
)
def test_other_classes_are_refused_by_name(names, classes):
    with pytest.raises(ModelError) as caught:
        check_class_names("it", names, classes, exact=False)
    assert f"{len(names)} classes: {names[0]}" in str(caught.value)
    assert f"dataset's order: {classes[0]}" in str(caught.value)
    assert "--class-map FILE" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("NEGATIVE", "POSITIVE"), ("neg", "pos")),
        (("Cat", "Dog", "Fox"), MATCHING),
        (("LABEL_0", "LABEL_1"), MATCHING),  # says nothing; the first batch tells how many
        (("1 star", "2 stars", "3 stars"), MATCHING),
        ((), MATCHING),
    ],
)
def test_the_same_classes_and_unknown_names_are_not_refused(names, classes):
    check_class_names(
        "it", names if len(names) != 2 or names[0] != "LABEL_0" else (*names, "LABEL_2"), classes, exact=False
    )


def test_names_are_found_where_teachers_bring_them():
    config = SimpleNamespace(id2label={1: "b", 0: "a"})
    module = nn.Linear(1, 2)
    module.config = config
    assert class_names(module, None, {}) == ("a", "b")
    assert class_names(module, None, {"kdcache": {"classes": ["c", "d"]}}) == ("c", "d")
    assert class_names(nn.Linear(1, 2), ("tench", "goldfish"), {}) == ("tench", "goldfish")
    assert class_names(nn.Linear(1, 2), None, {}) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cat": 0, "dog": 1}, "lacks 1 classes: fox"),
        ({"cat": 0, "dog": 1, "fox": 2, "cow": 3}, "names cow, which the dataset does not have"),
        ({"cat": 0, "dog": 1, "fox": 5}, "0 to 3, for the teacher's 4 outputs"),
        ({"cat": 0, "dog": 1, "fox": -1}, "0 to 3"),
        ({"cat": 0, "dog": 1, "fox": 1}, "'dog' and 'fox' the same output"),
        ({"cat": 0, "dog": 1, "fox": "foxx"}, "which no output of the teacher has"),
        ({"cat": 0, "dog": 1, "fox": True}, "maps 'fox' to True"),
        ([0, 1, 2], "holds a list"),
        ('{"cat": 0, "cat": 1, "dog": 2, "fox": 3}', "names the class 'cat' twice"),
        ("{", "is not JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_class_map_is_refused(tmp_path, content, message):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError) as caught:
        resolve_columns(read_class_map(str(path), MATCHING), ("cat", "dog", "cow", "fox"), 4)
    assert message in str(caught.value)


def test_a_class_map_takes_names_and_indices():
    assert resolve_columns({"cat": "CAT", "dog": 3, "fox": "fox"}, ("fox", "cat", "cow", "dog"), 4) == (1, 3, 0)
    with pytest.raises(UsageError, match="names no outputs"):
        resolve_columns({"cat": "cat"}, (), None)
    with pytest.raises(UsageError, match=r"outputs \[0, 1\] have"):
        resolve_columns({"cat": "crane"}, ("crane", "crane"), 2)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A teacher of digits, and the same one with 12 outputs in another order, as a plain state dict."""
    root = tmp_path_factory.mktemp("classes")
    quick = ("--device", "cpu", "--epochs", "3", "--learning-rate", "0.003")
    answer("train-teacher", "--dataset", "digits", "--model", "mlp", *quick, "--out", root / "t")
    state = torch.load(root / "t" / "best.pt", weights_only=True)["state_dict"]
    order = [11, 3, 7, 10, 1, 0, 2, 9, 4, 5, 8, 6]  # row r of the large head is output order[r] of the small one
    weight, bias = list(state)[-2:]
    rows = [min(at, 9) for at in order]
    large = dict(state) | {weight: state[weight][rows], bias: state[bias][rows]}
    torch.save(large, root / "large.pt")
    columns = {str(digit): next(at for at, row in enumerate(order) if row == digit) for digit in range(10)}
    (root / "map.json").write_text(json.dumps(columns))
    return SimpleNamespace(root=root, columns=tuple(columns.values()))


def test_a_class_map_chooses_and_orders_the_outputs_in_every_command(scene, tmp_path):
    teacher = ("--teacher", "mlp", "--checkpoint", scene.root / "large.pt")
    mapped = ("--class-map", scene.root / "map.json")
    plain = ("--teacher", "mlp", "--checkpoint", scene.root / "t" / "best.pt")
    first = answer("dump-teacher", *plain, "--device", "cpu", "--out", tmp_path / "plain")
    assert "does not fit" in refused(1, "dump-teacher", *teacher, "--device", "cpu", "--out", tmp_path / "no")
    found = answer("dump-teacher", *teacher, *mapped, "--device", "cpu", "--out", tmp_path / "c")
    assert found["splits"]["train"]["teacher_accuracy"] == first["splits"]["train"]["teacher_accuracy"] > 0.8
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.teacher.outputs.columns == scene.columns
    np.testing.assert_allclose(cache.column("logits"), open_cache(tmp_path / "plain").column("logits"), atol=1e-2)
    checked = answer("verify", tmp_path / "c", *teacher, "--device", "cpu", "--rows", 32)
    assert checked["whole"]
    bench = ("--samples", 64, "--rounds", 1, "--device", "cpu")
    assert answer("bench", *teacher, *mapped, *bench)["samples"] == 64
    swept = answer(
        "sweep", "--cache", tmp_path / "c", *teacher, "--epochs", 1, "--device", "cpu", "--out", tmp_path / "sweep"
    )
    assert swept["live"]["live_epoch_seconds"] > 0


def test_the_first_accuracy_is_printed(scene, tmp_path):
    plain = ("--teacher", "mlp", "--checkpoint", scene.root / "t" / "best.pt")
    said = kdcache("dump-teacher", *plain, "--device", "cpu", "--out", tmp_path / "c").stderr
    assert "train: teacher accuracy on the first 1,437 samples: " in said


SOFT = """
import torch
from torch import nn

class Soft(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(64, classes)
    def forward(self, inputs):
        return self.fc(inputs.flatten(1)).softmax(dim=1)

def soft(num_classes):
    return Soft(num_classes)
"""


def test_a_live_teacher_of_probabilities_is_refused_too(tmp_path, monkeypatch):
    (tmp_path / "soft_teacher.py").write_text(SOFT)
    monkeypatch.syspath_prepend(tmp_path)
    command = ("bench", "--teacher", "py:soft_teacher:soft", "--samples", 32, "--rounds", 1, "--device", "cpu")
    assert "--teacher-outputs probabilities" in refused(1, *command)
    assert answer(*command, "--teacher-outputs", "probabilities")["samples"] == 32
