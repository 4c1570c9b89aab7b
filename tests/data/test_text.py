import gzip
import io
import json
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import google_crc32c
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import kdcache.data.token_cache
from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, train_student
from kdcache.cli.app import app
from kdcache.core.config import InputConfig
from kdcache.core.errors import CacheMismatch, DatasetError, KdcacheError, ModelError
from kdcache.data.batch import BatchRequest
from kdcache.data.loader import batch_loader
from kdcache.data.map_dataset import as_indexed
from kdcache.data.preprocess import Preprocessor
from kdcache.data.registry import open_dataset
from kdcache.data.soft_targets import SoftTargets
from kdcache.data.tokenizer import Tokenizer, build_vocabulary, read_tokenizer
from kdcache.distill.objective import distillation_objective
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models.build import build, dataset_preprocess
from kdcache.models.checkpoints import load_weights, read_checkpoint, save_checkpoint
from kdcache.models.device import evaluation_mode
from kdcache.models.rnn import build_text_network
from kdcache.store.records import Preprocess
from tests.helpers import synthetic

CPU = torch.device("cpu")
TEACHER, STUDENT = "lstm:hidden=8,embedding=8,dropout=0.1", "gru:hidden=4,embedding=4"
BRIEF = ("--epochs", "2", "--batch-size", "8", "--device", "cpu", "--learning-rate", "0.02")
STRANGE = [
    "",
    " ",
    "one",
    "Ünïcode, naïve e\u0301tude",
    "emoji 👩🏽‍🚀 and flags 🇪🇺",
    "two\r\nlines\rthree\n",
    "a NUL \0 inside\0",
    "a web page<br /><br />of lines",
    "漢字 かな 한국어 العربية",
    "\ufeffa byte order mark",
]


def reviews(count, seed, longest=12):
    """Texts of 1 to `longest` words, half of which tell the class."""
    draw = np.random.default_rng(seed)
    words = {0: ["bad", "Awful", "dull"], 1: ["good", "Fine", "lively"]}
    made = []
    for index in range(count):
        label = index % 2
        length = int(draw.integers(1, longest + 1))
        text = [
            words[label][draw.integers(3)] if draw.random() < 0.5 else f"w{draw.integers(30)}" for _ in range(length)
        ]
        made.append((" ".join(text) + f". {index}", label))
    return made


class Pairs:
    """A map-style dataset of given items."""

    def __init__(self, items, **attributes):
        self.items, self.classes = items, ["neg", "pos"]
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def indexed(items, split="train", **attributes):
    return as_indexed(Pairs(items, **attributes), name="mine", split=split)


def network_for(spec, dataset, *, training=True, **settings):
    return build(spec, dataset, InputConfig(**settings), 0, dataset_preprocess(dataset), training=training)


def reader(texts, *, max_tokens=16, size=1000):
    """The preprocessing of a network for texts."""
    tokenizer = build_vocabulary(texts, size)
    record = Preprocess(
        max_tokens=max_tokens, vocabulary_size=tokenizer.vocabulary_size, tokenizer_sha256=tokenizer.sha256
    )
    return Preprocessor(record, tokenizer)


def ids_reader(vocabulary_size=50, max_tokens=16):
    return Preprocessor(Preprocess(max_tokens=max_tokens, vocabulary_size=vocabulary_size))


def batches(dataset, preprocessor, parts, **options):
    requests = [BatchRequest(np.array(part), checksums=True) for part in parts]
    return list(batch_loader(dataset, requests, preprocessor=preprocessor, device=CPU, **options))


def write_folder(folder, made, split):
    for index, (text, label) in enumerate(made):
        place = folder / split / ("neg", "pos")[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}_{label * 9 + 1}.txt").write_bytes(text.encode())


def archive(folder, path, order=sorted):
    """A tar.gz of a folder, its members in some order."""
    with tarfile.open(path, "w:gz") as tar:
        for file in order(file for file in folder.rglob("*")):
            tar.add(file, f"{folder.name}/{file.relative_to(folder)}", recursive=False)


def kdcache_command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def answer(*arguments):
    result = kdcache_command(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(exit_code, *arguments):
    result = kdcache_command(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "needed:" in result.stderr
    return result.stderr


def weights(folder):
    return read_checkpoint(folder / "best.pt")["state_dict"]


def same_weights(first, second):
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def imdb(tmp_path_factory):
    """A data root as the reviews are published, but small; with reviews without a label beside them."""
    root = tmp_path_factory.mktemp("imdb")
    for split, seed in (("train", 1), ("test", 2)):
        write_folder(root / "aclImdb", reviews(40, seed), split)
        (root / "aclImdb" / split / "urls_pos.txt").write_text("http://example.invalid")
    (root / "aclImdb" / "train" / "unsup").mkdir()
    (root / "aclImdb" / "train" / "unsup" / "0_0.txt").write_text("nobody knows")
    (root / "aclImdb" / "README").write_text("of the reviews")
    return root


@pytest.fixture(scope="module")
def pipeline(imdb, tmp_path_factory):
    """Teacher, cache and student of texts, made by three commands, and what each printed."""
    root = tmp_path_factory.mktemp("text")
    paths = SimpleNamespace(root=root, teacher=root / "teacher", cache=root / "c.zarr", student=root / "student")
    data = ("--data-root", imdb)
    paths.teach = ("train-teacher", "--dataset", "imdb", *data, "--model", TEACHER, "--max-tokens", 10, *BRIEF)
    paths.teacher_answer = answer(*paths.teach, "--out", paths.teacher)
    paths.dump = ("dump-teacher", "--dataset", "imdb", *data, "--teacher", TEACHER, "--device", "cpu")
    paths.dump += ("--split", "train", "--split", "test", "--checkpoint", paths.teacher / "best.pt")
    paths.dump_answer = answer(*paths.dump, "--out", paths.cache)
    paths.learn = ("train-student", "--cache", paths.cache, "--student", STUDENT, *BRIEF)
    paths.shorter = ("--vocabulary-size", 12, "--max-tokens", 5)
    paths.student_answer = answer(*paths.learn, *paths.shorter, "--out", paths.student)
    return paths


def described(folder):
    return read_checkpoint(folder / "best.pt")["kdcache"]


def test_the_pipeline_of_texts(pipeline):
    assert {name: split["rows"] for name, split in pipeline.dump_answer["splits"].items()} == {"train": 40, "test": 40}
    teacher, student = described(pipeline.teacher), described(pipeline.student)
    record = open_cache(pipeline.cache, "train").manifest.teacher.preprocess
    assert (record.max_tokens, record.tokenizer_sha256) == (10, teacher["preprocess"]["tokenizer_sha256"])
    assert student["preprocess"]["max_tokens"] == 5
    assert student["preprocess"]["vocabulary_size"] == 12 < teacher["preprocess"]["vocabulary_size"]
    assert student["preprocess"]["tokenizer_sha256"] != record.tokenizer_sha256
    for folder, facts, found in (
        (pipeline.teacher, teacher, pipeline.teacher_answer),
        (pipeline.student, student, pipeline.student_answer),
    ):
        assert (folder / "tokenizer.json").read_text() == facts["tokenizer"]
        again = answer("evaluate", "--run", folder, "--device", "cpu")
        assert again["test_accuracy"] == found["test_accuracy"]
        assert again["examples"] == found["examples"]
    splits = pipeline.dump_answer["splits"]
    assert splits["test"]["teacher_accuracy"] == pipeline.teacher_answer["test_accuracy"]
    assert pipeline.teacher_answer["test_accuracy"] > 0.8
    verified = answer("verify", pipeline.cache, "--teacher", TEACHER, "--checkpoint", pipeline.teacher / "best.pt")
    for split in verified["splits"].values():
        assert split["recomputed"]["same_weights"]
        assert split["recomputed"]["largest_difference"] < 1e-3
    assert [part["computed_rows"] for part in answer(*pipeline.dump, "--out", pipeline.cache)["splits"].values()] == [
        0,
        0,
    ]


def test_the_teacher_in_the_cache_is_the_network_of_the_checkpoint(pipeline, imdb):
    facts = described(pipeline.teacher)
    vocabulary = len(json.loads(facts["tokenizer"])["model"]["vocab"])
    network = build_text_network(TEACHER, vocabulary_size=vocabulary, num_classes=2, pad_id=0).eval()
    load_weights(network, pipeline.teacher / "best.pt")
    tokenizer = read_tokenizer(pipeline.teacher / "tokenizer.json")
    cache = open_cache(pipeline.cache, "test")
    files = sorted((imdb / "aclImdb/test/neg").iterdir()) + sorted((imdb / "aclImdb/test/pos").iterdir())
    for index, file in enumerate(files):
        ids = tokenizer.ids(file.read_text(), 10)[:10]
        with torch.no_grad():
            logits = network(torch.from_numpy(ids)[None].long())[0]
        np.testing.assert_allclose(cache.rows(np.array([index]))[0], logits, atol=2e-3)
    crcs = [google_crc32c.value(file.read_bytes()) for file in files]
    assert cache.column("input_crc32c").tolist() == crcs
    assert cache.column("labels").tolist() == [0] * 20 + [1] * 20


def test_a_run_on_texts_done_again_is_the_same(pipeline, imdb, tmp_path):
    answer(*pipeline.teach, "--out", tmp_path / "teacher")
    answer(*pipeline.learn, *pipeline.shorter, "--out", tmp_path / "student", "--workers", 1)
    assert same_weights(tmp_path / "teacher", pipeline.teacher)
    assert same_weights(tmp_path / "student", pipeline.student)


def test_a_live_teacher_reads_as_its_checkpoint_says_beside_a_student_that_reads_otherwise(pipeline, tmp_path):
    teacher = ("--teacher", TEACHER, "--checkpoint", pipeline.teacher / "best.pt", "--student", STUDENT)
    data = ("--dataset", "imdb", "--data-root", described(pipeline.teacher)["data_root"])
    shared = (*teacher, *pipeline.shorter, *BRIEF)
    assert (
        answer("bench", *data, *teacher, *pipeline.shorter, *BRIEF[2:], "--samples", 30, "--rounds", 1)["samples"] == 30
    )
    swept = answer("sweep", "--cache", pipeline.cache, *shared, "--jobs", 1, "--out", tmp_path / "sweep")
    assert swept["live"]["live_epoch_seconds"] > 0
    assert swept["failed"] == {}


def test_a_run_on_texts_is_resumed_to_the_same_weights(pipeline, tmp_path, monkeypatch):
    kept = kdcache.distill.trainer.RunFolder.add_metrics

    def stop(run, entry):
        kept(run, entry)
        if entry["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(kdcache.distill.trainer.RunFolder, "add_metrics", stop)
    stopped = kdcache_command(*pipeline.learn, *pipeline.shorter, "--out", tmp_path / "s")
    assert stopped.exit_code == 130
    monkeypatch.undo()
    assert len((tmp_path / "s" / "metrics.jsonl").read_text().splitlines()) == 1
    answer("train-student", "--out", tmp_path / "s", "--resume")
    assert same_weights(tmp_path / "s", pipeline.student)
    message = refused(2, "train-student", "--out", tmp_path / "s", "--resume", "--max-tokens", 7)
    assert "max_tokens was 5 and is 7" in message


def test_settings_of_texts_come_from_the_teacher_where_none_are_given(pipeline, tmp_path):
    found = kdcache_command(*pipeline.learn, "--epochs", 1, "--out", tmp_path / "s")
    assert "as the teacher's; 10 tokens a text" in found.stderr
    teacher, student = described(pipeline.teacher), described(tmp_path / "s")
    assert student["preprocess"] == teacher["preprocess"]
    assert student["tokenizer"] == teacher["tokenizer"]


def test_a_student_takes_a_tokenizer_from_a_file(pipeline, tmp_path):
    file = pipeline.student / "tokenizer.json"
    answer(*pipeline.learn, "--epochs", 1, "--out", tmp_path / "s", "--tokenizer", file)
    facts = described(tmp_path / "s")
    assert facts["tokenizer"] == file.read_text()
    assert (facts["preprocess"]["vocabulary_size"], facts["preprocess"]["max_tokens"]) == (12, 10)


def test_folder_and_archive_are_one_dataset(imdb, tmp_path):
    def backwards(files):
        return sorted(files, reverse=True)

    for name, order in (("a", sorted), ("b", backwards)):
        (tmp_path / name).mkdir()
        archive(imdb / "aclImdb", tmp_path / name / "aclImdb_v1.tar.gz", order)
    (tmp_path / "c").mkdir()
    for file in backwards((imdb / "aclImdb").rglob("*.txt")):
        copy = tmp_path / "c" / file.relative_to(imdb)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for split in ("train", "test"):
        first = open_dataset("imdb", split=split, data_root=str(imdb))
        assert first.classes == ("neg", "pos")
        assert first.is_text
        assert first.input_dtype == "uint8"
        assert first.labels().tolist() == [0] * 20 + [1] * 20
        texts = [bytes(text.numpy()) for text in first.shared_inputs(range(40))]
        for name in "abc":
            other = open_dataset("imdb", split=split, data_root=str(tmp_path / name))
            assert [bytes(text.numpy()) for text in other.shared_inputs(range(40))] == texts
            assert other.labels().tolist() == first.labels().tolist()
            found, wanted = network_for(STUDENT, other), network_for(STUDENT, first)
            assert found.preprocessor.tokenizer.document == wanted.preprocessor.tokenizer.document


def test_other_files_in_the_archive_are_no_reviews(imdb, tmp_path):
    shutil.copytree(imdb / "aclImdb", tmp_path / "aclImdb")
    (tmp_path / "aclImdb" / "train" / "pos" / "index.html").write_text("no review")
    archive(tmp_path / "aclImdb", tmp_path / "aclImdb_v1.tar.gz")
    folder = open_dataset("imdb", split="train", data_root=str(tmp_path))
    shutil.rmtree(tmp_path / "aclImdb")
    assert len(open_dataset("imdb", split="train", data_root=str(tmp_path))) == len(folder) == 40


def test_a_text_folder_that_moved_is_the_same_data(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / "here", reviews(12, 3), split)
    spec = f"text-folder:{tmp_path / 'here'}"
    answer("train-teacher", "--dataset", spec, "--model", STUDENT, "--out", tmp_path / "t", *BRIEF)
    dump = ("dump-teacher", "--dataset", spec, "--teacher", STUDENT, "--checkpoint", tmp_path / "t" / "best.pt")
    answer(*dump, "--out", tmp_path / "c", "--device", "cpu")
    (tmp_path / "here").rename(tmp_path / "there")
    learn = ("train-student", "--cache", tmp_path / "c", "--student", STUDENT, *BRIEF, "--out", tmp_path / "s")
    answer(*learn, "--dataset", f"text-folder:{tmp_path / 'there'}")


@pytest.mark.parametrize("text", STRANGE)
def test_a_shared_text_is_its_utf_8(tmp_path, text):
    (tmp_path / "train" / "only").mkdir(parents=True)
    (tmp_path / "train" / "only" / "0.txt").write_bytes(text.encode())
    from_file = open_dataset(f"text-folder:{tmp_path}", split="train")
    mapped = indexed([(text, 0)])
    for dataset in (from_file, mapped):
        assert dataset.is_text
        assert dataset.input_shape is None
        (value,) = dataset.shared_inputs([0])
        assert value.dtype == torch.uint8
        assert bytes(value.numpy()) == text.encode()
        (batch,) = batches(dataset, reader(STRANGE), [[0]])
        assert batch.input_crc32c.tolist() == [google_crc32c.value(text.encode())]
    ids = reader(STRANGE).token_ids(value, "it")
    assert ids.dtype == np.int32
    assert ids.tolist() == reader(STRANGE).tokenizer.ids(text, 16).tolist()


def test_a_vocabulary_is_of_the_most_frequent_words():
    tokenizer = build_vocabulary(["b b b a<br />a", "C c, ﬁ\r\nzebra", "d"], 7)
    vocabulary = json.loads(tokenizer.document)["model"]["vocab"]
    assert vocabulary == {"[PAD]": 0, "[UNK]": 1, "b": 2, "a": 3, "c": 4, ",": 5, "d": 6}
    assert tokenizer.ids("A b never C<i>d", 16).tolist() == [3, 2, 1, 4, 6]
    assert tokenizer.ids("A b never C<i>d", 2).tolist() == [3, 2]
    assert tokenizer.ids("A b never C<i>d", 16).tolist() == [3, 2, 1, 4, 6]
    assert build_vocabulary(["d C c, ﬁ", "zebra", "b b b a a"], 7).sha256 == tokenizer.sha256
    assert Tokenizer(tokenizer.document).sha256 == tokenizer.sha256
    assert build_vocabulary([""], 100).vocabulary_size == 2
    composed = build_vocabulary(["ﬁt e\u0301te"], 9)
    assert json.loads(composed.document)["model"]["vocab"].keys() == {"[PAD]", "[UNK]", "fit", "éte"}
    assert composed.ids("FIT Éte", 9).tolist() == composed.ids("ﬁt e\u0301te", 9).tolist()


def test_a_tokenizer_is_the_same_however_it_cuts_and_fills():
    document = json.loads(build_vocabulary(["a b c d e f g h i"], 20).document)
    assert document["truncation"] is document["padding"] is None
    cutting = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    filling = {"strategy": {"Fixed": 12}, "direction": "Left", "pad_to_multiple_of": None}
    filling |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    given = Tokenizer(json.dumps(document | {"truncation": cutting, "padding": filling}))
    assert given.sha256 == Tokenizer(json.dumps(document)).sha256
    assert len(given.ids("a b c d e f g h i", 7)) == 7
    assert len(given.ids("a b", 7)) == 2


@pytest.mark.parametrize(
    "spec", ["lstm", "lstm:bidirectional=0", "gru", "gru:bidirectional=1,layers=2", "lstm:layers=2"]
)
def test_padding_changes_nothing(spec):
    torch.manual_seed(0)
    options = "hidden=5,embedding=3,dropout=0.5"
    spec = f"{spec}{',' if ':' in spec else ':'}{options}"
    network = build_text_network(spec, vocabulary_size=20, num_classes=3, pad_id=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 20, (length,), generator=generator) for length in (0, 1, 2, 7, 7, 11)]
    with torch.no_grad():
        longest = torch.zeros(len(texts), 16, dtype=torch.int64)
        for row, text in zip(longest, texts, strict=True):
            row[: len(text)] = text
        together = [network(longest[:, :width]) for width in (11, 12, 16)]
        for index, text in enumerate(texts):
            alone = network(longest[index : index + 1, : max(1, len(text))])[0]
            for answers in together:
                torch.testing.assert_close(answers[index], alone, rtol=0, atol=1e-14)
        shuffled = network(longest[[5, 0, 3]])
        torch.testing.assert_close(shuffled, together[2][[5, 0, 3]], rtol=0, atol=1e-14)
        assert (together[0][3] - together[0][4]).abs().max() > 1e-4


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_both_directions_are_torchs_own(cell):
    name = cell.__name__.lower()
    network = build_text_network(
        f"{name}:hidden=5,embedding=3,bidirectional=1", vocabulary_size=20, num_classes=3, pad_id=0
    )
    network = network.double().eval()
    theirs = cell(3, 5, batch_first=True, bidirectional=True).double()
    forwards, backwards = network.forwards.state_dict(), network.backwards.state_dict()
    theirs.load_state_dict(forwards | {f"{key}_reverse": value for key, value in backwards.items()})
    ids = torch.tensor([[4, 9, 2, 2, 17]])
    with torch.no_grad():
        states, _ = theirs(network.embedding(ids))
        wanted = network.classifier(states.mean(dim=1))
        padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
        torch.testing.assert_close(network(ids), wanted, rtol=0, atol=1e-14)
        torch.testing.assert_close(network(padded), wanted, rtol=0, atol=1e-14)


def test_options_set_the_size():
    network = build_text_network(
        "lstm:hidden=6,embedding=5,dropout=0.3,layers=2,bidirectional=0", vocabulary_size=9, num_classes=3, pad_id=0
    )
    assert network.embedding.weight.shape == (9, 5)
    assert (network.forwards.hidden_size, network.forwards.num_layers, network.forwards.dropout) == (6, 2, 0.3)
    assert network.backwards is None
    assert network.classifier.weight.shape == (3, 6)
    assert network.dropout.p == 0.3
    default = build_text_network("lstm", vocabulary_size=9, num_classes=3, pad_id=0)
    assert default.classifier.weight.shape == (3, 2 * default.forwards.hidden_size)


class LiveReader:
    """The join of online distillation, of a teacher that tokenises on its own."""

    def __init__(self, teacher, dataset, preprocessor):
        self.teacher, self.dataset, self.preprocessor = teacher, dataset, preprocessor

    def start_epoch(self, epoch):
        """A live teacher has nothing to prepare."""

    def __call__(self, batch):
        (seen,) = batches(self.dataset, self.preprocessor, [batch.indices.numpy()])
        with evaluation_mode(self.teacher):
            answers = self.teacher(seen.inputs.long())
        return batch._replace(soft_targets=SoftTargets.of(answers.clone()))


@pytest.mark.parametrize(
    ("dtype", "encoding", "bound"), [(torch.float64, "float64", 1e-10), (torch.float32, "float32", 1e-4)]
)
def test_training_from_a_cache_of_texts_is_training_with_the_teacher(tmp_path, dtype, encoding, bound):
    made = reviews(60, 5)
    dataset = indexed(made)
    texts = [text for text, _ in made]
    teachers, students = reader(texts), reader(texts, max_tokens=6, size=20)
    settings = StudentConfig(device="cpu", batch_size=7, epochs=4, temperature=3.0, alpha=0.7, learning_rate=0.01)

    def network(spec, preprocessor):
        torch.manual_seed(3)
        size = preprocessor.record.vocabulary_size
        return build_text_network(spec, vocabulary_size=size, num_classes=2, pad_id=0).to(dtype)

    teacher = network(TEACHER, teachers)
    dump_teacher(
        teacher,
        dataset,
        out=tmp_path / "c",
        preprocess=teachers,
        config=DumpConfig(device="cpu", batch_size=9, shard_rows=32, encoding=encoding),
    )
    losses = {"cached": [], "online": []}
    modules = {name: network(STUDENT, students) for name in losses}

    def on_step(name):
        return lambda step, parts: losses[name].append(float(parts["loss"]))

    train_student(
        modules["cached"], dataset, tmp_path / "c", preprocess=students, config=settings, on_step=on_step("cached")
    )
    train(
        modules["online"],
        training_data(dataset, students, settings, join=LiveReader(teacher, dataset, teachers)),
        objective=distillation_objective(settings),
        config=settings,
        on_step=on_step("online"),
    )
    assert len(losses["cached"]) == 36
    assert losses["cached"][-1] < losses["cached"][0]
    drift = np.abs(np.array(losses["cached"]) / losses["online"] - 1).max()
    print(f"\ndrift on texts, {encoding}: {drift:.2g}")
    assert drift < bound
    for name, value in modules["cached"].state_dict().items():
        torch.testing.assert_close(value, modules["online"].state_dict()[name], rtol=0, atol=bound)


def token_items(count=20, *, low=1, triples=False):
    draw = np.random.default_rng(0)
    items = [(draw.integers(low, 50, 1 + index % 9).tolist(), index % 2) for index in range(count)]
    return [(index, *item) for index, item in enumerate(items)] if triples else items


def test_token_ids_come_in_every_form():
    want = [ids for ids, _ in token_items()]
    forms = {
        "lists": lambda ids: ids,
        "int64": np.array,
        "int16": lambda ids: np.array(ids, np.int16),
        "uint8": lambda ids: np.array(ids, np.uint8),
        "tensors": lambda ids: torch.tensor(ids, dtype=torch.int32),
    }
    for form in forms.values():
        for triples in (False, True):
            items = [(*item[:-2], form(item[-2]), item[-1]) for item in token_items(triples=triples)]
            dataset = indexed(items, vocabulary_size=50)
            assert not dataset.is_text
            assert dataset.vocabulary_size == 50
            (batch,) = batches(dataset, ids_reader(), [[7, 0, 3, 3]])
            assert batch.inputs.dtype == torch.int32
            for row, index in zip(batch.inputs.tolist(), (7, 0, 3, 3), strict=True):
                assert row == want[index] + [0] * (len(row) - len(want[index]))
            assert batch.inputs.shape == (4, 8)
            assert batch.labels.tolist() == [1, 0, 1, 1]
            (cut,) = batches(dataset, ids_reader(max_tokens=3), [[7, 0]])
            assert cut.inputs.tolist() == [want[7][:3], [*want[0], 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_token_ids_may_be_unsigned(dtype):
    items = [(np.array(ids, dtype), label) for ids, label in token_items()]
    (batch,) = batches(indexed(items, vocabulary_size=50), ids_reader(), [[3]])
    assert batch.inputs.tolist() == [token_items()[3][0]]


def test_a_token_0_is_a_token():
    items = [([4, 7, 8], 0), ([4, 7, 8, 0], 1)]
    dataset = indexed(items, vocabulary_size=50)
    built = network_for("lstm:hidden=4,embedding=4", dataset)
    with evaluation_mode(built.module):
        (batch,) = batches(dataset, built.preprocessor, [[0, 1]])
        logits = built.module(batch.inputs.long())
    assert not torch.equal(logits[0], logits[1])


def test_a_text_that_names_the_padding_is_read_to_its_end():
    texts = ["good film [PAD] dull end", "good film [PAD] dull start", "words"]
    dataset = indexed([(text, index % 2) for index, text in enumerate(texts)])
    built = network_for("gru:hidden=4,embedding=4,bidirectional=1", dataset)
    built.module.forwards.requires_grad_(False).weight_ih_l0.zero_()
    (batch,) = batches(dataset, built.preprocessor, [[0, 1]])
    with evaluation_mode(built.module):
        first, second = built.module(batch.inputs.long())
    assert not torch.equal(first, second)


def test_token_ids_through_the_commands(tmp_path, monkeypatch):
    (tmp_path / "kd_ids.py").write_text(
        "class Ids(list):\n    classes, vocabulary_size = ('neg', 'pos'), 50\n"
        "def load(split):\n    return Ids((i, [1 + i % 2, 3 + i % 40, 5], i % 2) for i in range(20))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "kd_ids", raising=False)
    data = ("--dataset", "py:kd_ids:load")
    answer("train-teacher", *data, "--model", STUDENT, "--out", "t", *BRIEF)
    assert not (tmp_path / "t" / "tokenizer.json").exists()
    answer("dump-teacher", *data, "--teacher", STUDENT, "--checkpoint", "t/best.pt", "--out", "c", "--device", "cpu")
    assert open_cache("c").manifest.teacher.preprocess.vocabulary_size == 50
    answer("train-student", "--cache", "c", "--student", STUDENT, "--out", "s", *BRIEF)
    answer("evaluate", "--run", "s")
    assert answer("verify", "c", "--teacher", STUDENT, "--checkpoint", "t/best.pt")["whole"]
    message = refused(1, "train-student", "--cache", "c", "--student", STUDENT, "--out", "x", "--vocabulary-size", 9)
    assert "gives token ids" in message
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def many():
    """Texts of many lengths, strange ones among them, and how a network reads them."""
    made = [
        (text, index % 2) for index, text in enumerate([*STRANGE, *(text for text, _ in reviews(30, 7, longest=40))])
    ]
    return indexed(made), reader([text for text, _ in made])


def seen(loaded):
    return [
        (batch.indices.tolist(), batch.inputs.tolist(), batch.labels.tolist(), batch.input_crc32c.tolist())
        for batch in loaded
    ]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_texts_are_the_same_with_workers_and_memory(many, monkeypatch, kept, workers):
    dataset, preprocessor = many
    parts = [[3, 0, 39], [0], [0, 0, 3], [17], [39, 20, 3, 1], [1, 3]]
    wanted = []
    for part in parts:
        texts = [bytes(dataset[index][0].numpy()).decode() for index in part]
        rows = [preprocessor.tokenizer.ids(text, 16).tolist() for text in texts]
        longest = max(1, *map(len, rows))
        wanted.append([row + [0] * (longest - len(row)) for row in rows])
    assert {len(rows[0]) for rows in wanted} > {16}
    if not kept:
        monkeypatch.setattr(kdcache.data.token_cache, "KEPT_BYTES", 0)
    requests = [BatchRequest(np.array(part), checksums=True) for part in parts]
    loader = batch_loader(dataset, requests, preprocessor=preprocessor, workers=workers, device=CPU)
    for _epoch in range(3):
        found = seen(loader)
        assert [inputs for _, inputs, _, _ in found] == wanted
        assert [indices for indices, _, _, _ in found] == parts
        crcs = [google_crc32c.value(bytes(dataset[index][0].numpy())) for part in parts for index in part]
        assert [crc for *_, some in found for crc in some] == crcs


def itself(batch):
    return batch


def test_spawned_workers_read_the_same_texts(many):
    dataset, preprocessor = many
    requests = [BatchRequest(np.array(part), checksums=True) for part in ([3, 0, 39], [0, 3], [17])]
    here = batch_loader(dataset, requests, preprocessor=preprocessor, device=CPU)
    spawned = DataLoader(
        here.dataset, batch_sampler=requests, num_workers=1, multiprocessing_context="spawn", collate_fn=itself
    )
    assert seen(batch for batches in spawned for batch in batches) == seen(here)


def test_a_part_of_the_texts_is_held_out(pipeline, tmp_path):
    answer(*pipeline.learn, "--out", tmp_path / "s", "--val-fraction", 0.25)
    entries = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["val_accuracy"] in [count / 10 for count in range(11)] for entry in entries)


TEXTS = reviews(24, 11)
LOWERED = [
    (text[:-1] + chr(ord(text[-1]) ^ 1), label) if index == 5 else (text, label)
    for index, (text, label) in enumerate(TEXTS)
]
WITHIN = [TEXTS[index - 2] for index in range(24)]
CHANGED = {
    "one byte": (LOWERED, ["sample 5", "is not what the teacher saw", "crc32c"]),
    "order within classes": (WITHIN, ["the samples are in another order", "crc32c"]),
    "order": (TEXTS[::-1], ["the same labels in another order"]),
    "label": ([*TEXTS[:9], (TEXTS[9][0], 0), *TEXTS[10:]], ["other labels", "sample 9 has label 0", "it has 1"]),
    "length": (TEXTS[:-1], ["length 24", "length 23"]),
    "token ids": ([([1, 2], label) for _, label in TEXTS], ["'uint8'", "'int64'"]),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_cache_of_other_texts_is_refused(tmp_path, what):
    def listed(items):
        return indexed(items, targets=[label for _, label in items], vocabulary_size=50)

    preprocessor = reader([text for text, _ in TEXTS])

    def network():
        size = preprocessor.record.vocabulary_size
        return build_text_network(STUDENT, vocabulary_size=size, num_classes=2, pad_id=0)

    config = DumpConfig(device="cpu")
    dump_teacher(network(), listed(TEXTS), out=tmp_path / "c", preprocess=preprocessor, config=config)
    settings, steps = StudentConfig(device="cpu", epochs=1), []
    options = {"preprocess": preprocessor, "config": settings, "on_step": lambda *step: steps.append(step)}
    made, parts = CHANGED[what]
    with pytest.raises(CacheMismatch) as caught:
        train_student(network(), listed(made), tmp_path / "c", **options)
    for part in parts:
        assert part in caught.value.found
    assert (caught.value.exit_code, bool(caught.value.needed), bool(caught.value.remedy)) == (4, True, True)
    assert steps == []
    train_student(network(), listed(TEXTS), tmp_path / "c", **options)
    assert steps
    with pytest.raises(ModelError, match="names the tokenizer"):
        train_student(network(), listed(TEXTS), tmp_path / "c", config=settings)


IDS = token_items()
PLAIN = {"vocabulary_size": 50}
REFUSED_DATA = {
    "ids out of the vocabulary": ([([1, 50], 0)] * 3, PLAIN, ["from 1 to 50", "0 to 49", "one more than its largest"]),
    "negative ids": ([([-3, 5], 0)] * 3, PLAIN, ["from -3 to 5", "0 to 49"]),
    "float ids": ([(np.array([1.0, 2]), 0)] * 3, PLAIN, ["float64 of shape (2,)", "integers of shape (tokens,)"]),
    "bool ids": ([(np.array([True]), 0)] * 3, PLAIN, ["bool of shape (1,)", "integers of shape (tokens,)"]),
    "pictures": ([(np.zeros((2, 3), np.int64), 0)] * 3, PLAIN, ["shape (2, 3)", "integers of shape (tokens,)"]),
    "an index that is another": (
        [(index + 1, *item) for index, item in enumerate(IDS)],
        PLAIN,
        ["the index, is ", "asked for"],
    ),
    "an index that is text": (
        [(str(index), *item) for index, item in enumerate(IDS)],
        PLAIN,
        ["the index, is a str", "asked for"],
    ),
    "no vocabulary": (IDS, {}, ["int64", "vocabulary_size", "its largest id plus one"]),
    "lone surrogates": ([("a \ud800", 0)] * 3, {}, ["UTF-8 cannot hold", "whole characters"]),
    "text and ids": ([("a", 0), ([1], 0)] * 3, PLAIN, ["is a ", "as the others are"]),
    "bytes": ([(b"a", 0)] * 3, {}, ["is a bytes", "also text"]),
}


@pytest.mark.parametrize("what", REFUSED_DATA)
def test_items_that_are_no_texts_are_refused(what):
    items, attributes, parts = REFUSED_DATA[what]
    with pytest.raises((DatasetError, ModelError)) as caught:
        network_for(STUDENT, indexed(items, **attributes))
    assert caught.value.needed
    for part in parts:
        assert part in str(caught.value)


BROKEN_DATA = {
    "ids beyond 64 bits": ([([2**70], 0)] * 3, PLAIN, []),
    "a vocabulary of none": (IDS, {"vocabulary_size": 0}, ["vocabulary_size"]),
    "a negative vocabulary": (IDS, {"vocabulary_size": -4}, ["vocabulary_size"]),
    "a vocabulary in words": (IDS, {"vocabulary_size": "50"}, ["vocabulary_size"]),
    "a vocabulary as a method": (IDS, {"vocabulary_size": lambda: 50}, ["vocabulary_size"]),
    "complex ids": ([(np.array([1j]), 0)] * 3, PLAIN, ["complex128 of shape (1,)", "integers of shape (tokens,)"]),
    "triples of images": ([(torch.zeros(1, 2, 2), 0, "path")] * 3, {}, ["(input, label)"]),
    "triples of arrays": ([(np.zeros((1, 2, 2)), 0, "path")] * 3, {}, ["(input, label)"]),
}


@pytest.mark.parametrize("what", BROKEN_DATA)
def test_odd_items_are_refused_without_a_foreign_error(what):
    items, attributes, parts = BROKEN_DATA[what]
    with pytest.raises((DatasetError, ModelError)) as caught:
        network_for(STUDENT, indexed(items, **attributes))
    assert caught.value.needed
    for part in parts:
        assert part in str(caught.value)


def test_an_id_out_of_the_vocabulary_is_met_wherever_it_stands():
    dataset = indexed([*IDS[:-1], ([50], 0)], vocabulary_size=50)
    network_for(STUDENT, dataset)
    for workers in (0, 1):
        with pytest.raises(DatasetError, match="sample 19 of mine has token ids from 50 to 50"):
            batches(dataset, ids_reader(), [[0], [19]], workers=workers)


REFUSED_MODELS = {
    "cnn": ("text", {}, ["cnn takes no texts", "lstm, gru"]),
    "mlp": ("text", {}, ["mlp takes no texts", "lstm, gru"]),
    "torchvision:resnet18": ("text", {}, ["takes no texts", "lstm, gru"]),
    "lstm": ("images", {}, ["uint8 (1, 8, 8)", "a dataset of texts", "imdb or text-folder:PATH"]),
    "lstm:depth=3": ("text", {}, ["'depth'", "embedding, hidden, layers, dropout, bidirectional"]),
    "lstm:hidden=x": ("text", {}, ["hidden is 'x'", "a whole number"]),
    "lstm:hidden=0": ("text", {}, ["hidden is '0'", "1 to 65536"]),
    "lstm:dropout=1": ("text", {}, ["dropout is '1'", "0 to 0.99"]),
    "lstm:dropout=nan": ("text", {}, ["dropout is 'nan'", "0 to 0.99"]),
    "lstm:bidirectional=2": ("text", {}, ["bidirectional is '2'", "0 to 1"]),
    "lstm:": ("text", {"size": 8}, ["--size", "has no images", "leave it out"]),
    "lstm:layers=1": ("text", {"mean": (0.5,), "std": (0.5,)}, ["--mean", "has no images", "leave it out"]),
    "gru": ("ids", {"tokenizer": "t.json"}, ["gives token ids", "--tokenizer", "leave it out"]),
    "gru:": ("ids", {"vocabulary_size": 9}, ["gives token ids", "--vocabulary-size", "leave it out"]),
    "gru:layers=1": ("text", {"tokenizer": "none/t.json"}, ["none/t.json", "a tokenizer.json", "train-teacher wrote"]),
    "py:tests.data.test_text:none": ("text", {}, ["returned a int", "Module"]),
    "lstm:hidden=4": ("images", {"max_tokens": 5}, ["uint8 (1, 8, 8)", "a dataset of texts"]),
}


def none(num_classes, vocabulary_size):
    return vocabulary_size


@pytest.mark.parametrize("spec", REFUSED_MODELS)
def test_networks_that_do_not_suit_texts_are_refused(spec):
    kind, settings, parts = REFUSED_MODELS[spec]
    known = {"text": indexed(TEXTS), "ids": indexed(IDS, vocabulary_size=50), "images": synthetic(9, shape=(1, 8, 8))}
    with pytest.raises(ModelError) as caught:
        network_for(spec, known[kind], **settings)
    assert caught.value.needed
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "\x00\xff", "[1]"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match="cannot be read as a tokenizer") as caught:
        network_for(STUDENT, indexed(TEXTS), tokenizer=str(tmp_path / "t.json"))
    assert "tokenizer.json" in caught.value.needed
    assert caught.value.remedy


def test_a_tokenizer_must_name_its_padding(tmp_path):
    document = json.loads(build_vocabulary(["a b"], 9).document)
    document["model"]["vocab"] = {"[UNK]": 0, "a": 1}
    document["added_tokens"] = []
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="names no token that fills short texts"):
        read_tokenizer(tmp_path / "t.json")
    document["model"]["vocab"]["<pad>"] = 2
    (tmp_path / "t.json").write_text(json.dumps(document))
    assert read_tokenizer(tmp_path / "t.json").pad_id == 2


def test_a_preprocessor_needs_the_tokenizer_that_its_record_names():
    mine, other = reader(["a b"]), reader(["c d"])
    with pytest.raises(ModelError, match="given is none") as caught:
        Preprocessor(mine.record)
    assert mine.record.tokenizer_sha256[:16] in caught.value.found
    assert "Preprocessor(record, tokenizer)" in caught.value.remedy
    with pytest.raises(ModelError, match=f"given is {other.record.tokenizer_sha256[:16]}"):
        Preprocessor(mine.record, other.tokenizer)
    with pytest.raises(ModelError, match="names the tokenizer none"):
        Preprocessor(Preprocess(max_tokens=4, vocabulary_size=9), mine.tokenizer)


def with_tokenizer(pipeline, path, tokenizer, run="teacher"):
    checkpoint = read_checkpoint(getattr(pipeline, run) / "best.pt")
    checkpoint["kdcache"] = checkpoint["kdcache"] | {"tokenizer": tokenizer}
    save_checkpoint(path, checkpoint)
    return ("dump-teacher", "--dataset", "imdb", "--teacher", TEACHER, "--checkpoint", path, "--device", "cpu")


def test_a_teacher_without_its_tokenizer_is_refused(pipeline, imdb, tmp_path):
    data = ("--data-root", imdb, "--out", tmp_path / "c")
    dump = with_tokenizer(pipeline, tmp_path / "bare.pt", None)
    message = refused(1, *dump, *data)
    assert "its checkpoint holds none" in message
    assert "--tokenizer FILE" in message
    plain = {"state_dict": weights(pipeline.teacher)}
    save_checkpoint(tmp_path / "plain.pt", plain)
    refused(1, *dump, *data, "--checkpoint", tmp_path / "plain.pt")
    assert not (tmp_path / "c").exists()
    answer(*dump, *data, "--tokenizer", pipeline.teacher / "tokenizer.json")
    given = open_cache(tmp_path / "c").column("logits")
    np.testing.assert_array_equal(given, open_cache(pipeline.cache).column("logits"))


def test_another_tokenizer_in_the_checkpoint_is_refused(pipeline, imdb, tmp_path):
    document = json.loads(described(pipeline.teacher)["tokenizer"])
    vocabulary = document["model"]["vocab"]
    vocabulary["bad"], vocabulary["good"] = vocabulary["good"], vocabulary["bad"]
    dump = with_tokenizer(pipeline, tmp_path / "other.pt", json.dumps(document))
    message = refused(1, *dump, "--data-root", imdb, "--out", tmp_path / "c")
    assert "the checkpoint holds the tokenizer" in message
    assert described(pipeline.teacher)["preprocess"]["tokenizer_sha256"][:16] in message
    broken = with_tokenizer(pipeline, tmp_path / "broken.pt", "{")
    assert "cannot be read" in refused(1, *broken, "--data-root", imdb, "--out", tmp_path / "c")


def test_the_remedy_for_another_tokenizer_in_the_checkpoint_helps(pipeline, imdb, tmp_path):
    document = json.loads(described(pipeline.teacher)["tokenizer"]) | {"version": "1.0", "decoder": {"type": "Fuse"}}
    dump = with_tokenizer(pipeline, tmp_path / "other.pt", json.dumps(document))
    data = ("--data-root", imdb, "--out", tmp_path / "c")
    assert "--tokenizer FILE" in refused(1, *dump, *data)
    answer(*dump, *data, "--tokenizer", pipeline.teacher / "tokenizer.json")


def test_a_run_without_its_tokenizer_is_not_judged_with_another(pipeline, tmp_path):
    shutil.copytree(pipeline.student, tmp_path / "s")
    with_tokenizer(pipeline, tmp_path / "s" / "best.pt", None, "student")
    assert "tokenizer" in refused(1, "evaluate", "--run", tmp_path / "s", "--device", "cpu")


def test_a_refusal_to_resume_on_other_texts_can_be_read(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / "d", reviews(12, 3), split)
    teach = ("train-teacher", "--dataset", f"text-folder:{tmp_path / 'd'}", "--model", STUDENT, *BRIEF)
    answer(*teach, "--out", tmp_path / "t")
    (tmp_path / "d" / "train" / "neg" / "0_1.txt").write_text("unheard of")
    message = refused(2, *teach, "--out", tmp_path / "t", "--resume")
    assert len(message) < 2000


@pytest.mark.parametrize("extra", [("--augment", "affine"), ("--augment", "crop-flip"), ("--mix", "mixup:1")])
def test_texts_are_not_augmented_as_images(pipeline, tmp_path, extra):
    message = refused(1, *pipeline.teach, *extra, "--out", tmp_path / "t")
    assert "images" in message or "suits them" in message
    assert not (tmp_path / "t").exists()


def test_mistakes_in_files_are_named(imdb, tmp_path):
    def root():
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(imdb, tmp_path)
        return tmp_path

    def message(split="train"):
        with pytest.raises(DatasetError) as caught:
            open_dataset("imdb", split=split, data_root=str(tmp_path))
        assert caught.value.remedy
        return str(caught.value)

    (root() / "aclImdb/train/pos/9_9.txt").write_bytes(b"caf\xe9")
    assert re.search(r"pos/9_9\.txt is not UTF-8.*\n.*UTF-8\n.*iconv", message())
    archive(tmp_path / "aclImdb", tmp_path / "aclImdb_v1.tar.gz")
    shutil.rmtree(tmp_path / "aclImdb")
    assert "aclImdb/train/pos/9_9.txt is not UTF-8" in message()
    shutil.rmtree(root() / "aclImdb/test/pos")
    (tmp_path / "aclImdb/test/pos").mkdir()
    assert "no texts of pos in its split 'test'" in message("test")
    shutil.rmtree(root() / "aclImdb/test")
    assert "no texts of neg, pos in its split 'test'" in message("test")
    archive(tmp_path / "aclImdb", tmp_path / "aclImdb_v1.tar.gz")
    shutil.rmtree(tmp_path / "aclImdb")
    assert "no texts of neg, pos in its split 'test'" in message("test")
    assert len(open_dataset("imdb", split="train", data_root=str(tmp_path))) == 40
    path = tmp_path / "aclImdb_v1.tar.gz"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:20],
        whole[: len(whole) // 2],
        whole[:99] + b"\0" * 300 + whole[399:],
        b"x" * 99,
    ):
        path.write_bytes(damaged)
        assert "aclImdb_v1.tar.gz cannot be read" in message()
    path.unlink()
    nothing = message()
    for part in (str(tmp_path), "aclImdb/", "aclImdb_v1.tar.gz", "--download", "--data-root"):
        assert part in nothing


def test_a_changed_letter_in_the_archive_is_noticed(imdb, tmp_path):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.add(imdb / "aclImdb", "aclImdb")
        filling = tarfile.TarInfo("aclImdb/imdb.vocab")
        filling.size = 10**6
        tar.addfile(filling, io.BytesIO(b"word" * 250_000))
    stored = bytearray(gzip.compress(plain.getvalue(), compresslevel=0))
    at = stored.index(b"Awful")
    stored[at] ^= 2
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(bytes(stored))
    changed = "train" if b"/train/" in stored[at - 512 : at] else "test"
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset("imdb", split=changed, data_root=str(tmp_path))


def test_mistakes_in_text_folders_are_named(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path, reviews(6, 3), split)
    spec = f"text-folder:{tmp_path}"
    assert open_dataset(spec, split="test").classes == ("neg", "pos")
    with pytest.raises(DatasetError, match="has no split 'extra'") as caught:
        open_dataset(spec, split="extra")
    assert "extra/CLASS/TEXT.txt" in caught.value.needed
    for split in ("train", "test"):
        (tmp_path / split / "so-so").mkdir()
    with pytest.raises(DatasetError, match="no texts of so-so in its split 'train'") as caught:
        open_dataset(spec, split="train")
    assert "train/so-so/TEXT.txt" in caught.value.needed
    (tmp_path / "test" / "so-so").rmdir()
    with pytest.raises(DatasetError, match="2: neg, pos"):
        open_dataset(spec, split="train")
    with pytest.raises(DatasetError, match="is no folder"):
        open_dataset(f"text-folder:{tmp_path}/none", split="train")


def test_a_failed_download_of_the_reviews_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    with pytest.raises(DatasetError, match="corrupted") as caught:
        open_dataset("imdb", split="train", data_root=str(tmp_path), download=True)
    assert "copy aclImdb_v1.tar.gz to" in caught.value.remedy


HF_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "bad", "awful", "dull", "good", "fine", "lively", "'", "s"]


def save_classifier(folder, labels, **options):
    """A classifier with random weights and its tokenizer, as transformers keeps them."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {word: at for at, word in enumerate([*HF_WORDS, *"w0123456789", *(f"##{n}" for n in range(10))])},
            unk_token="[UNK]",
        )
    )
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named, **options).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: at for at, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield save_classifier(tmp_path_factory.mktemp("hf") / "bert", ["neg", "pos"])


def transformers_answers(bert, texts):
    import transformers

    name = bert.removeprefix("hf:")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    with torch.no_grad():
        encoded = [tokenizer(text, truncation=True, max_length=20, return_tensors="pt") for text in texts]
        return [each["input_ids"][0].tolist() for each in encoded], torch.cat(
            [model(**each).logits for each in encoded]
        )


def test_a_classifier_from_a_folder_answers_as_in_transformers(bert, imdb, tmp_path):
    dump = ("dump-teacher", "--dataset", "imdb", "--data-root", imdb, "--teacher", bert, "--device", "cpu")
    answer(*dump, "--out", tmp_path / "c", "--encoding", "float32", "--batch-size", 7)
    dataset = open_dataset("imdb", split="train", data_root=str(imdb))
    texts = [bytes(text.numpy()).decode() for text in dataset.shared_inputs(range(40))]
    ids, logits = transformers_answers(bert, texts)
    assert max(map(len, ids)) == 20
    assert min(map(len, ids)) < 12
    np.testing.assert_allclose(open_cache(tmp_path / "c").column("logits"), logits, atol=1e-5)
    assert np.ptp(logits.numpy(), axis=0).min() > 0.01
    built = network_for(bert, dataset, training=False)
    assert [
        row[row != 0].tolist() for batch in batches(dataset, built.preprocessor, [range(40)]) for row in batch.inputs
    ] == ids
    learn = ("train-student", "--cache", tmp_path / "c", "--student", STUDENT, "--out", tmp_path / "s", *BRIEF)
    answer(*learn)
    assert described(tmp_path / "s")["preprocess"]["tokenizer_sha256"] != built.preprocess.tokenizer_sha256
    assert answer("verify", tmp_path / "c", "--teacher", bert)["whole"]


def test_tokens_of_strange_texts_are_those_of_transformers(bert):
    dataset = indexed([(text, 0) for text in [*STRANGE, "bad " * 40, "[SEP] good [CLS]"]])
    built = network_for(bert, dataset, training=False)
    texts = [bytes(text.numpy()).decode() for text in dataset.shared_inputs(range(len(dataset)))]
    ids, logits = transformers_answers(bert, texts)
    found = [built.preprocessor.token_ids(text, "it").tolist() for text in dataset.shared_inputs(range(len(dataset)))]
    assert found == ids
    with evaluation_mode(built.module):
        (batch,) = batches(dataset, built.preprocessor, [range(len(dataset))])
        torch.testing.assert_close(built.module(batch.inputs.long()), logits, rtol=0, atol=1e-5)
        wider = nn.functional.pad(batch.inputs[2:3].long(), (0, 3))[:, :20]
        torch.testing.assert_close(built.module(wider)[0], logits[2], rtol=0, atol=1e-5)


def test_a_tokenizer_that_cuts_at_the_beginning_is_refused(bert, tmp_path):
    left = save_classifier(tmp_path / "left", ["neg", "pos"], truncation_side="left")
    with pytest.raises(ModelError, match="cuts texts at their beginning"):
        network_for(left, indexed([("good", 0)]), training=False)


HF_REFUSED = {
    "order": (["pos", "neg"], {}, ["2 classes: neg, pos", "in the dataset's order: pos, neg"]),
    "count": (["a", "b", "c"], {}, ["2 classes: neg, pos", "3 classes", "a, b, c"]),
    "tokens": (["neg", "pos"], {"max_tokens": 21}, ["--max-tokens is 21", "at most 20"]),
    "tokenizer": (["neg", "pos"], {"tokenizer": "t.json"}, ["has its own tokenizer", "leave it out"]),
    "vocabulary": (["neg", "pos"], {"vocabulary_size": 9}, ["has its own tokenizer", "leave it out"]),
}


@pytest.mark.parametrize("what", HF_REFUSED)
def test_a_classifier_that_does_not_suit_is_refused(bert, what):
    classes, settings, parts = HF_REFUSED[what]
    with pytest.raises(ModelError) as caught:
        network_for(bert, indexed(TEXTS, classes=classes), training=False, **settings)
    assert caught.value.needed
    for part in parts:
        assert part in str(caught.value)


def test_a_tokenizer_with_marks_needs_room_for_them(bert):
    file = bert.removeprefix("hf:") + "/tokenizer.json"
    with pytest.raises(KdcacheError, match=r"max.tokens"):
        network_for(STUDENT, indexed(TEXTS), tokenizer=file, max_tokens=1)
    assert network_for(STUDENT, indexed(TEXTS), tokenizer=file, max_tokens=3).preprocess.max_tokens == 3


@pytest.mark.parametrize("form", [list, lambda ids: np.array(ids, np.uint8)])
def test_a_classifier_of_texts_is_not_given_token_ids(bert, form):
    items = [(form(ids), label) for ids, label in IDS]
    with pytest.raises(KdcacheError) as caught:
        network_for(bert, indexed(items, vocabulary_size=50), training=False)
    assert caught.value.needed
    assert caught.value.remedy


def test_a_classifier_needs_room_for_its_marks(bert):
    with pytest.raises(ModelError, match="--max-tokens"):
        network_for(bert, indexed(TEXTS), training=False, max_tokens=1)


def test_a_missing_classifier_is_named(bert, tmp_path):
    with pytest.raises(ModelError, match="none could not be read or fetched"):
        network_for(f"hf:{tmp_path}/none", indexed(TEXTS))


def folder_of_three(folder):
    for split in ("train", "test"):
        write_folder(folder, reviews(12, 3), split)
        (folder / split / "so-so").mkdir()
        for index in range(4):
            (folder / split / "so-so" / f"{index}.txt").write_text(f"good bad {index}")
    return f"text-folder:{folder}"


@pytest.fixture(scope="module")
def tuned(bert, tmp_path_factory):
    """A run that fine-tuned a classifier for more classes, and its data."""
    root = tmp_path_factory.mktemp("tuned")
    spec = folder_of_three(root / "data")
    train = ("train-teacher", "--dataset", spec, "--model", bert, "--max-tokens", 9, *BRIEF, "--out", root / "run")
    found = kdcache_command(*train, "--json")
    assert found.exit_code == 0, found.stderr
    return SimpleNamespace(run=root / "run", data=spec, answer=json.loads(found.stdout.splitlines()[-1]))


def test_a_classifier_is_fine_tuned_for_other_classes(bert, tuned):
    facts = described(tuned.run)
    assert facts["classes"] == ["neg", "pos", "so-so"]
    assert facts["preprocess"]["max_tokens"] == 9
    state = weights(tuned.run)
    assert state["model.classifier.weight"].shape == (3, 8)
    before = network_for(bert, indexed(TEXTS)).module.state_dict()
    for name, value in state.items():
        if "classifier" not in name and value.is_floating_point():
            assert (value - before[name]).abs().max() < 0.5, name
    found = answer("evaluate", "--run", tuned.run, "--device", "cpu")
    assert found["test_accuracy"] == tuned.answer["test_accuracy"]


def test_a_classifier_fine_tuned_for_other_classes_teaches(bert, tuned, tmp_path):
    dump = ("dump-teacher", "--dataset", tuned.data, "--teacher", bert, "--checkpoint", tuned.run / "best.pt")
    answer(*dump, "--out", tmp_path / "c", "--device", "cpu")
    assert open_cache(tmp_path / "c").manifest.teacher.preprocess.max_tokens == 9


def test_a_classifier_is_fine_tuned_for_its_classes_in_another_order(bert):
    built = network_for(bert, indexed(TEXTS, classes=["pos", "neg"]), training=True)
    assert built.module.model.config.num_labels == 2


def test_a_student_may_be_a_classifier(bert, pipeline, tmp_path):
    learn = ("train-student", "--cache", pipeline.cache, "--student", bert, *BRIEF)
    answer(*learn, "--out", tmp_path / "a")
    answer(*learn, "--out", tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    answer("evaluate", "--run", tmp_path / "a", "--device", "cpu")


def test_a_folder_with_another_tokenizer_is_not_the_network_of_the_checkpoint(bert, pipeline, imdb, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(bert.removeprefix("hf:"), folder)
    data = ("--dataset", "imdb", "--data-root", imdb)
    answer("train-teacher", *data, "--model", f"hf:{folder}", *BRIEF, "--out", tmp_path / "t")
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["bad"], vocabulary["good"] = vocabulary["good"], vocabulary["bad"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    dump = ("dump-teacher", *data, "--teacher", f"hf:{folder}", "--checkpoint", tmp_path / "t" / "best.pt")
    message = refused(1, *dump, "--out", tmp_path / "c", "--device", "cpu")
    assert described(tmp_path / "t")["preprocess"]["tokenizer_sha256"][:16] in message


def test_positions_that_a_classifier_lacks_are_refused_before_the_dump(bert, tmp_path):
    import transformers

    name = tmp_path / "roberta"
    shutil.copytree(bert.removeprefix("hf:"), name)
    config = transformers.RobertaConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=20,
        pad_token_id=0,
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(name)
    dataset = indexed([("good", 0), ("bad", 1), ("fine " * 50, 1)])
    with pytest.raises(ModelError, match="fails on a text of 20 tokens") as caught:
        network_for(f"hf:{name}", dataset, training=False)
    assert "--max-tokens" in str(caught.value)
    built = network_for(f"hf:{name}", dataset, training=False, max_tokens=19)
    with evaluation_mode(built.module):
        (batch,) = batches(dataset, built.preprocessor, [[2]])
        assert torch.isfinite(built.module(batch.inputs.long())).all()


def test_recorded_sequences_are_checked():
    for broken in ({"max_tokens": 3}, {"vocabulary_size": 3}, {"max_tokens": 0, "vocabulary_size": 3}):
        with pytest.raises(ValueError, match="max_tokens"):
            Preprocess(**broken)
    assert not Preprocessor(Preprocess()).makes_tokens
    assert replace(ids_reader().record, max_tokens=2).max_tokens == 2
