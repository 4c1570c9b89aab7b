import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kdcache.apps import export_formats, training
from kdcache.apps.export import export
from kdcache.apps.export_formats import FORMATS, METADATA
from kdcache.apps.export_module import Deployable
from kdcache.cli.app import app
from kdcache.core import commands
from kdcache.core.errors import DatasetError, KdcacheError, MissingExtra, ModelError, TargetExists, UsageError
from kdcache.core.json_records import to_json
from kdcache.data.batch import BatchRequest
from kdcache.data.loader import batch_loader
from kdcache.data.registry import open_dataset
from kdcache.data.tokenizer import Tokenizer
from kdcache.models.from_run import load_trained
from tests.helpers import tree

BOTH = ("torch", "onnx")
TEST_DATA = os.environ.get("KDCACHE_TEST_DATA")


def teach(out, **settings):
    training.train_teacher(commands.TrainTeacherArgs(**{"out": str(out), "device": "cpu", "epochs": 1, **settings}))
    return out


def exported(run, out, form, **settings):
    suffix = FORMATS[form].suffix
    path = Path(out) / f"student{suffix}"
    report = export(commands.ExportArgs(**{"run": str(run), "format": form, "out": str(path), **settings}))
    return path, report.data


def opened(path):
    """An artefact and its metadata, by torch or onnxruntime alone."""
    if path.suffix == ".pt2":
        files = {METADATA: ""}
        with open(path, "rb") as file:
            module = torch.export.load(file, extra_files=files).module()
        return lambda inputs: module(inputs).detach().numpy(), json.loads(files[METADATA])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    return lambda inputs: session.run(None, {"inputs": inputs.numpy()})[0], facts


def write_texts(root):
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for name, words in (("neg", ["bad", "poor", "dull"]), ("pos", ["good", "fine", "great"])):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                text = " ".join(random.choice([*words, "the", "film"], random.integers(1, 30)))
                (root / split / name / f"{number}.txt").write_text(text)
    return f"text-folder:{root}"


def write_photos(root, sizes):
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = random.integers(0, 256, (*sizes(random), 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def cnn(root):
    return teach(root / "cnn", dataset="digits", model="cnn")


@pytest.fixture(scope="module")
def texts(root):
    return write_texts(root / "texts")


@pytest.fixture(scope="module")
def gru(root, texts):
    return teach(root / "gru", dataset=texts, model="gru", max_tokens=20)


def logits_of(run, inputs):
    """Shared inputs after resize and crop, which are the inputs of an artefact, and the logits of a run for them."""
    trained = load_trained(run)
    images = torch.stack([trained.preprocessor.per_sample(each) for each in inputs])
    with torch.no_grad():
        return images, trained.module(trained.preprocessor.per_batch(images, torch.float32)).numpy()


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("cnn", {}),
        ("mlp", {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}),
        ("resnet8x4", {}),
        ("cnn", {"size": 20}),
        ("torchvision:squeezenet1_1", {"size": 32}),
    ],
)
def test_images_get_the_students_logits_in_batches_of_any_size(root, tmp_path, model, settings, form):
    name = f"{model}-{len(settings)}-{settings.get('size')}".replace(":", "-")
    run = root / name
    if not run.exists():
        teach(run, dataset="digits", model=model, **settings)
    path, data = exported(run, tmp_path, form)
    assert data["largest_difference"] <= 1e-4
    assert (data["samples"], data["batch_sizes"]) == (64, [1, 16])
    program, facts = opened(path)
    prepared, wanted = logits_of(run, open_dataset("digits", split="train").fetch(range(17))[0])
    for size in (1, 3, 17):
        found = program(prepared[:size])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted[:size], rtol=1e-4, atol=1e-4)
    side = settings.get("size", 8)
    assert facts["input"] == {"name": "inputs", "shape": ["batch", 1, side, side], "dtype": "uint8"}
    assert facts["output"] == {"name": "logits", "shape": ["batch", 10], "dtype": "float32"}
    assert facts["classes"] == [str(label) for label in range(10)]
    assert facts["geometry"] == ("before" if "size" in settings else "none")
    assert facts["model"] == model
    assert facts["preprocess"] == to_json(load_trained(run).preprocessor.record)
    assert facts["tokenizer"] is None
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("model", ["gru", "lstm", "gru:bidirectional=1,layers=2,hidden=8"])
def test_texts_get_the_students_logits_at_any_length(root, texts, gru, tmp_path, model, form):
    run = gru if model == "gru" else root / model
    if not run.exists():
        teach(run, dataset=texts, model=model, max_tokens=20)
    path, data = exported(run, tmp_path, form, samples=40)
    assert data["largest_difference"] <= 1e-4
    assert data["input"] == {"name": "inputs", "shape": ["batch", "tokens"], "dtype": "int64"}
    program, facts = opened(path)
    trained = load_trained(run)
    # The artefact alone tells how a text becomes token ids.
    tokenizer, record = Tokenizer(facts["tokenizer"], pad_id=facts["preprocess"]["pad_id"]), facts["preprocess"]
    assert tokenizer.sha256 == trained.preprocessor.tokenizer.sha256
    sentences = ["good", "the film was bad", "dull dull dull poor film the great fine " * 5]
    ids = [tokenizer.ids(sentence, record["max_tokens"]) for sentence in sentences]
    assert [len(each) for each in ids] == [1, 4, 20]
    alone = [program(torch.tensor(each[None]).long())[0] for each in ids]
    filled = torch.full((3, 20), record["pad_id"])
    for row, each in zip(filled, ids, strict=True):
        row[: len(each)] = torch.from_numpy(each)
    with torch.no_grad():
        wanted = trained.module(filled).numpy()
    np.testing.assert_allclose(alone, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(program(filled), wanted, rtol=1e-4, atol=1e-5)
    many = filled.repeat(6, 1)[:17]
    np.testing.assert_allclose(program(many), np.tile(wanted, (6, 1))[:17], rtol=1e-4, atol=1e-5)
    if form == "onnx":
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert model.partition(":")[0].upper() in kinds
        assert not kinds & {"Loop", "Scan"}


WITHOUT_KDCACHE = """
import sys
sys.modules["kdcache"] = None
import numpy as np
path, inputs, out = sys.argv[1:]
inputs = np.load(inputs)
if path.endswith(".pt2"):
    import torch
    module = torch.export.load(path).module()
    run = lambda batch: module(torch.from_numpy(batch)).numpy()
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    run = lambda batch: session.run(None, {"inputs": batch})[0]
np.savez(out, **{str(size): run(inputs[:size]) for size in (1, 3, 17)})
"""


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_an_artefact_runs_where_kdcache_is_not_importable(cnn, gru, texts, tmp_path, kind, form):
    run, spec = (cnn, "digits") if kind == "images" else (gru, texts)
    path, _ = exported(run, tmp_path, form)
    trained, dataset = load_trained(run), open_dataset(spec, split="train")
    requests = [BatchRequest(np.arange(17))]
    (batch,) = batch_loader(dataset, requests, preprocessor=trained.preprocessor, device=torch.device("cpu"))
    inputs = batch.inputs.long() if kind == "texts" else batch.inputs
    with torch.no_grad():
        wanted = trained.module(trained.preprocessor.per_batch(inputs, torch.float32)).numpy()
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    arguments = [str(path), str(tmp_path / "inputs.npy"), str(tmp_path / "logits.npz")]
    subprocess.run([sys.executable, "-c", WITHOUT_KDCACHE, *arguments], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "logits.npz")
    for size in (1, 3, 17):
        np.testing.assert_allclose(found[str(size)], wanted[:size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", BOTH)
def test_a_tiny_bert(root, texts, tmp_path, form):
    transformers = pytest.importorskip("transformers")
    run = root / "bert-run"
    if not run.exists():
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "bad", "poor", "good", "fine"]
        (root / "vocab.txt").write_text("\n".join(words))
        tokenizer = transformers.BertTokenizerFast(vocab=dict(zip(words, range(len(words)), strict=True)))
        tokenizer.model_max_length = 16
        tokenizer.save_pretrained(root / "bert")
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        made = transformers.BertConfig(
            vocab_size=len(words), max_position_embeddings=16, id2label={0: "neg", 1: "pos"}, **shape
        )
        transformers.BertForSequenceClassification(made).save_pretrained(root / "bert")
        teach(run, dataset=texts, model=f"hf:{root / 'bert'}")
    path, data = exported(run, tmp_path, form)
    assert data["largest_difference"] <= 1e-4
    program, _ = opened(path)
    module = load_trained(run).module
    for shape in ((1, 1), (3, 5), (2, 16)):
        ids = torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            np.testing.assert_allclose(program(ids), module(ids).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", BOTH)
def test_images_of_many_sizes_are_taken_after_resize_and_crop(tmp_path, form):
    spec = write_photos(tmp_path / "photos", lambda random: random.integers(8, 24, 2))
    run = teach(tmp_path / "run", dataset=spec, model="cnn", size=12)
    path, data = exported(run, tmp_path, form)
    assert data["geometry"] == "before"
    assert data["input"]["shape"] == ["batch", 3, 12, 12]
    program, facts = opened(path)
    assert facts["preprocess"]["resize"] == facts["preprocess"]["crop"] == 12
    prepared, wanted = logits_of(run, open_dataset(spec, split="test").shared_inputs(range(12)))
    for size in (1, 3, 12):
        np.testing.assert_allclose(program(prepared[:size]), wanted[:size], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(TEST_DATA is None, reason="KDCACHE_TEST_DATA is not set")
@pytest.mark.parametrize("form", BOTH)
def test_mnist(root, tmp_path, form):
    run = root / "mnist"
    if not run.exists():
        teach(run, dataset="mnist", model="mlp", data_root=TEST_DATA)
    _, data = exported(run, tmp_path, form, samples=500, tolerance=1e-4)
    assert data["largest_difference"] <= 1e-4
    assert data["samples"] == 500


def test_the_command_prints_one_thing_and_the_exporters_print_nothing(cnn, gru, tmp_path, capfd, caplog):
    level_before = logging.root.manager.disable
    for run, form in ((cnn, "onnx"), (gru, "torch"), (gru, "onnx")):
        out = tmp_path / f"student{FORMATS[form].suffix}"
        arguments = ["export", "--run", str(run), "--format", form, "--out", str(out)]
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["out"] == str(out)
        assert result.stderr.splitlines() == [f"exporting {'cnn' if run == cnn else 'gru'} as {form}"]
    result = CliRunner().invoke(app, arguments)
    assert "largest difference from the network on 20 samples of test, in batches of 1, 4 and 16:" in result.stdout
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.root.manager.disable == level_before


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("older", [True, False])
def test_an_artefact_that_answers_otherwise_is_not_kept(cnn, tmp_path, monkeypatch, form, older):
    """The weights change between the network's answers and the artefact's."""
    original = Deployable.__init__

    def broken(self, *arguments):
        original(self, *arguments)
        self.network.classifier[-1].bias.data[7] += 0.01

    monkeypatch.setattr(Deployable, "__init__", broken)
    out = tmp_path / f"student{FORMATS[form].suffix}"
    if older:
        out.write_text("older")
    before = tree(tmp_path)
    with pytest.raises(ModelError) as refused:
        exported(cnn, tmp_path, form)
    for part in ("differ from the network's by 0.0", "at sample", "at most 0.0001", "--tolerance", str(out)):
        assert part in str(refused.value)
    assert tree(tmp_path) == before
    with pytest.raises(ModelError):
        exported(cnn, tmp_path / "new", form)
    assert not (tmp_path / "new").exists()
    exported(cnn, tmp_path / "new", form, tolerance=0.1)


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("damage", ["bytes", "shape", "nan"])
def test_a_broken_file_is_caught_and_not_kept(cnn, tmp_path, monkeypatch, form, damage):
    format_ = FORMATS[form]
    changes = {"make": format_.make, "load": format_.load}
    if damage == "bytes":

        def make(program, facts):
            content = format_.make(program, facts)
            return content[: len(content) // 2]

        changes["make"] = make
    else:

        def load(content):
            program = format_.load(content)
            return lambda inputs: program(inputs) * torch.nan if damage == "nan" else program(inputs)[:, :9]

        changes["load"] = load
    monkeypatch.setitem(
        export_formats.FORMATS, form, export_formats.Format(suffix=format_.suffix, modules=format_.modules, **changes)
    )
    part = {"bytes": "the artefact does not run", "shape": "(1, 9)", "nan": "by nan of"}[damage]
    with pytest.raises(ModelError) as refused:
        exported(cnn, tmp_path, form)
    assert part in str(refused.value)
    assert tree(tmp_path) == {}


class Branching(nn.Module):
    """Decides by the values, which no trace can hold."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, inputs):
        return self.layers(inputs) if inputs.sum() > 0 else self.layers(-inputs)


class OneSize(nn.Module):
    """Does something else for another batch size."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, inputs):
        logits = self.layers(inputs)
        return logits + 1 if len(inputs) == 1 else logits


class Tricky(nn.Module):
    """An operation that ONNX does not have."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, inputs):
        return torch.special.bessel_j0(self.layers(inputs))


@pytest.mark.parametrize(
    ("network", "form", "parts"),
    [
        ("Branching", "torch", ["cannot be exported", "GuardOnDataDependentSymNode", "every batch size"]),
        ("OneSize", "onnx", ["cannot be exported", "Constraints violated (batch)"]),
        ("Tricky", "onnx", ["cannot be written as onnx", "bessel_j0", "try the other --format"]),
    ],
)
def test_networks_that_cannot_be_exported(root, tmp_path, network, form, parts):
    run = root / network
    teach(run, dataset="digits", model=f"py:tests.apps.test_export:{network}")
    with pytest.raises(ModelError) as refused:
        exported(run, tmp_path, form)
    for part in parts:
        assert part in str(refused.value)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        ({"format": "tflite"}, UsageError, ["--format is 'tflite'", "torch, onnx"]),
        ({"out": "a/b.onnx"}, UsageError, ["a/b.onnx, and --format is torch", "--out a/b.pt2, or --format onnx"]),
        ({"out": "a/b.pt2", "format": "onnx"}, UsageError, ["a/b.pt2, and --format is onnx", "--out a/b.onnx, or"]),
        ({"out": "a/b"}, UsageError, ["a/b, and --format is torch", "write --out a/b.pt2"]),
        ({"out": "folder.pt2"}, UsageError, ["folder.pt2, a folder", "write --out folder.pt2/student.pt2"]),
        ({"run": "nowhere"}, UsageError, ["no run at nowhere"]),
        ({"split": "val"}, DatasetError, ["no split 'val'"]),
        ({"dataset": "folder:gone"}, DatasetError, ["gone is no folder"]),
        ({"dataset": "py:other:larger"}, DatasetError, ["(1, 9, 9)", "(1, 8, 8)"]),
        ({"dataset": "py:other:nine"}, ModelError, ["10 classes", "9 classes"]),
        ({"samples": 1}, UsageError, ["--samples is 1", "at least 2"]),
        ({"out": "file/student.pt2"}, TargetExists, ["file is a file, not a folder"]),
    ],
)
def test_what_is_refused(cnn, tmp_path, monkeypatch, settings, error, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other.py").write_text(
        "import torch\n"
        "class Data(list): pass\n"
        "def make(size, classes):\n"
        "    data = Data((torch.zeros(1, size, size, dtype=torch.uint8), 0) for _ in range(4))\n"
        "    data.classes = [str(number) for number in range(classes)]\n"
        "    return data\n"
        "def larger(): return make(9, 10)\n"
        "def nine(): return make(8, 9)\n"
    )
    with pytest.raises(KdcacheError) as refused:
        export(commands.ExportArgs(**{"run": str(cnn), "out": "student.pt2", **settings}))
    assert type(refused.value) is error
    for part in parts:
        assert part in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "file",
        "folder.pt2",
        "other.py",
    ]


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named_before_anything_is_done(cnn, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"needs {module}.*\n.*kdcache\[onnx\]"):
        exported(cnn, tmp_path, "onnx")
    assert tree(tmp_path) == {}


def test_a_split_of_one_sample_is_compared_in_two_batch_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "single", raising=False)
    (tmp_path / "single.py").write_text(
        "import torch\n"
        "class Data(list): classes = ['a', 'b']\n"
        "def data(split): return Data([(torch.ones(2, 3), 0)] * (1 if split == 'test' else 6))\n"
    )
    teach(tmp_path / "run", dataset="py:single:data", model="mlp")
    _, data = exported(tmp_path / "run", tmp_path, "torch")
    assert (data["samples"], data["batch_sizes"]) == (1, [1, 2])
    assert data["input"] == {"name": "inputs", "shape": ["batch", 2, 3], "dtype": "float32"}


def test_a_network_that_diverged_is_not_taken_for_a_bad_artefact(cnn, tmp_path, monkeypatch):
    trained = load_trained(cnn)
    trained.module.classifier[-1].bias.data[3] = torch.nan
    monkeypatch.setattr("kdcache.apps.export.load_trained", lambda folder: trained)
    with pytest.raises(ModelError, match=r"the network itself gives a sample of digits.*not finite"):
        exported(cnn, tmp_path, "torch", tolerance=0.1)


def test_warnings_of_the_network_itself_are_not_swallowed(cnn, tmp_path, monkeypatch):
    original = Deployable.forward

    def warned(self, inputs):
        warnings.warn("of the network itself", UserWarning, stacklevel=2)
        return original(self, inputs)

    monkeypatch.setattr(Deployable, "forward", warned)
    with pytest.raises(ModelError, match="of the network itself"):  # warnings are errors in tests
        exported(cnn, tmp_path, "torch")


def test_an_onnx_file_is_valid_and_names_its_ends(cnn, tmp_path):
    path, _ = exported(cnn, tmp_path, "onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    graph = model.graph
    assert [each.name for each in graph.input] == ["inputs"]
    assert [each.name for each in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_scaling_and_normalisation_are_one_product_and_one_sum(cnn, tmp_path):
    path, _ = exported(cnn, tmp_path, "torch")
    with open(path, "rb") as file:
        nodes = torch.export.load(file).graph.nodes
    made = [str(node.target) for node in nodes if node.op == "call_function"]
    before_the_network = made[: made.index("aten.conv2d.default")]
    assert sorted({name for name in before_the_network if "assert" not in name and "to" not in name}) == [
        "aten.add_.Tensor",
        "aten.mul.Tensor",
    ]


def test_two_samples_are_enough(cnn, tmp_path):
    _, data = exported(cnn, tmp_path, "torch", samples=2, split="train")
    assert (data["samples"], data["batch_sizes"], data["split"]) == (2, [1, 2], "train")
    assert data["bytes"] == (tmp_path / "student.pt2").stat().st_size
