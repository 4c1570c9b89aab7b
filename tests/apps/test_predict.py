import csv
import errno
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kdcache.apps import training
from kdcache.apps.export import export
from kdcache.apps.predict import _lines, predict
from kdcache.cli.app import app
from kdcache.core import commands
from kdcache.core.errors import CheckpointError, DatasetError, KdcacheError, ModelError, UsageError
from kdcache.data.registry import open_dataset
from kdcache.models.from_run import load_trained

CLASSES = ['a "quoted", name', "two\nlines"]
WORDS = {CLASSES[0]: ["bad", "poor", "dull"], CLASSES[1]: ["good", "fine", "great"]}


def teach(out, **settings):
    training.train_teacher(commands.TrainTeacherArgs(**{"out": str(out), "device": "cpu", "epochs": 1, **settings}))
    return str(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on digits, plain and brought to 12 pixels, on colour photographs of many sizes, on texts and on vectors."""
    root = tmp_path_factory.mktemp("predict")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (*random.integers(8, 20, 2), 3)
                Image.fromarray(random.integers(0, 90, size, np.uint8) + np.uint8(120 * label)).save(
                    folder / f"{number}.png"
                )
        for name, words in WORDS.items():
            folder = root / "texts" / split / name
            folder.mkdir(parents=True)
            for number in range(2 * count):
                words_here = random.choice([*words, "the", "film"], random.integers(2, 12))
                (folder / f"{number}.txt").write_text(" ".join(words_here))
    (root / "vectors.py").write_text(
        "import torch\n"
        "def floats(): return Data((torch.randn(4), number % 2) for number in range(20))\n"
        "def tokens(): return Data((torch.ones(3, dtype=torch.int64), number % 2) for number in range(20))\n"
        "class Data(list):\n    classes, vocabulary_size = ['a', 'b'], None\n"
        "class Ids(Data):\n    vocabulary_size = 9\n"
        "def ids(): return Ids(tokens())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        made = {
            "digits": teach(root / "digits", dataset="digits", model="cnn", epochs=3, learning_rate=3e-3),
            "cropped": teach(root / "cropped", dataset="digits", model="mlp", size=12),
            "photos": teach(root / "photo-run", dataset=f"folder:{root / 'photos'}", model="mlp", size=8, epochs=8),
            "texts": teach(root / "text-run", dataset=f"text-folder:{root / 'texts'}", model="gru", max_tokens=10),
            "floats": teach(root / "floats", dataset="py:vectors:floats", model="mlp"),
            "ids": teach(root / "ids", dataset="py:vectors:ids", model="gru"),
        }
    sys.modules.pop("vectors", None)
    return SimpleNamespace(root=root, **made)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen test digits as files, in two folders, and what is no image beside them."""
    folder = tmp_path_factory.mktemp("images")
    inputs, labels = open_dataset("digits", split="test").fetch(range(16))
    (folder / "deeper").mkdir()
    names = [f"{'deeper/' if at % 2 else ''}{at:02}.png" for at in range(16)]
    for name, pixels in zip(names, inputs, strict=True):
        Image.fromarray(pixels[0].numpy()).save(folder / name)
    (folder / "notes.md").write_text("not an image")
    return SimpleNamespace(folder=folder, names=names, inputs=inputs, labels=labels)


def asked(run, *inputs, **settings):
    arguments = {"run": str(run), "inputs": tuple(map(str, inputs)), "device": "cpu", **settings}
    return predict(commands.PredictArgs(**arguments))


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def expected(run, prepared):
    """What the network says, by hand."""
    trained = load_trained(run)
    with torch.no_grad():
        return trained.module(prepared).double().softmax(1).numpy()


def test_images_get_the_probabilities_of_the_same_samples(runs, images, capsys):
    report = asked(runs.digits, images.folder, top=10, batch_size=5)
    order = sorted(range(16), key=lambda at: images.folder / images.names[at])
    assert [each["input"] for each in report.data["predictions"]] == [
        str(images.folder / images.names[at]) for at in order
    ]
    wanted = expected(runs.root / "digits", (images.inputs[order] / 255 - 0.3054) / 0.3753)
    for each, probabilities in zip(report.data["predictions"], wanted, strict=True):
        found = [answer["probability"] for answer in each["answers"]]
        assert found == sorted(found, reverse=True)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        by_class = {answer["class"]: answer["probability"] for answer in each["answers"]}
        assert [by_class[str(label)] for label in range(10)] == pytest.approx(probabilities, rel=1e-4)
    best = [int(each["answers"][0]["class"]) for each in report.data["predictions"]]
    assert np.mean(np.array(best) == images.labels[order].numpy()) > 0.6
    assert "left out: files that are no images by their suffix (1: .md), such as" in capsys.readouterr().err


def test_the_csv_says_what_the_data_says(runs, images):
    report = asked(runs.digits, images.folder / images.names[0], top=99)
    found = rows(report.text)
    answers = report.data["predictions"][0]["answers"]
    assert report.data["run"] == runs.digits
    assert [row["rank"] for row in found] == [str(rank) for rank in range(1, 11)]
    assert [row["class"] for row in found] == [each["class"] for each in answers]
    assert [float(row["probability"]) for row in found] == pytest.approx(
        [each["probability"] for each in answers], rel=1e-5
    )
    assert not report.text.endswith("\n")


def test_workers_and_batches_change_nothing(runs, images):
    one = asked(runs.digits, images.folder, batch_size=1).data["predictions"]
    many = asked(runs.digits, images.folder, batch_size=16, workers=1).data["predictions"]
    for a, b in zip(one, many, strict=True):
        assert a["input"] == b["input"]
        assert [each["class"] for each in a["answers"]] == [each["class"] for each in b["answers"]]
        assert a["answers"][0]["probability"] == pytest.approx(b["answers"][0]["probability"], rel=1e-5)


def test_images_become_what_the_run_was_trained_on(runs, images, tmp_path):
    """Colours become grey, a palette becomes colours, and any size is resized and cropped as in training."""
    grey = images.inputs[0, 0].numpy()
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(tmp_path / "rgb.png")
    plain = asked(runs.digits, images.folder / images.names[0]).data["predictions"][0]["answers"]
    assert asked(runs.digits, tmp_path / "rgb.png").data["predictions"][0]["answers"] == plain
    sizes = [(30, 9), (12, 12), (9, 30)]
    for number, size in enumerate(sizes):
        Image.new("P", size, number).save(tmp_path / f"p{number}.png")
    for run in (runs.cropped, runs.photos):
        report = asked(run, *[tmp_path / f"p{number}.png" for number in range(3)])
        assert len(report.data["predictions"]) == 3
    with Image.open(next((runs.root / "photos" / "test" / "light").iterdir())) as photo:
        photo.save(tmp_path / "light.bmp")
    assert asked(runs.photos, tmp_path / "light.bmp").data["predictions"][0]["answers"][0]["class"] == "light"


def test_odd_images_are_read_as_evaluate_reads_them(runs, tmp_path):
    """The first frame, no turning by EXIF, and what is transparent as it is below."""
    random, turned = np.random.default_rng(0), Image.Exif()
    turned[274] = 6  # the orientation
    for name, mode, options in (
        ("a.tiff", "P", {"save_all": True, "append_images": [Image.new("P", (9, 14))]}),
        ("b.png", "RGBA", {}),
        ("c.png", "LA", {}),
        ("d.png", "1", {}),
        ("e.jpg", "CMYK", {}),
        ("f.png", "RGB", {"exif": turned}),
    ):
        for label in ("dark", "light"):
            folder = tmp_path / "test" / label
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(random.integers(0, 256, (14, 9, 3), np.uint8)).convert(mode)
            if "A" in mode:
                image.putalpha(Image.fromarray(random.integers(0, 256, (14, 9), np.uint8)))
            image.save(folder / name, **options)
            image.convert("RGB").save(folder / "g.GIF", format="GIF")
    trained, dataset = load_trained(runs.root / "photo-run"), open_dataset(f"folder:{tmp_path}", split="test")
    inputs, labels = dataset.fetch(range(14))
    prepared = torch.stack([trained.preprocessor.per_sample(each) for each in inputs])
    wanted = expected(runs.root / "photo-run", trained.preprocessor.per_batch(prepared, torch.float32))
    found = asked(runs.photos, tmp_path / "test").data["predictions"]
    assert [each["answers"][0]["probability"] for each in found] == pytest.approx(wanted.max(1), rel=1e-4)
    right = [each["answers"][0]["class"] == dataset.classes[label] for each, label in zip(found, labels, strict=True)]
    judged = training.evaluate(commands.EvaluateArgs(run=runs.photos, dataset=f"folder:{tmp_path}", device="cpu"))
    assert judged.data["test_accuracy"] == np.mean(right)


def test_resize_brings_images_to_the_trained_size(runs, images, tmp_path):
    large = np.kron(images.inputs[0, 0].numpy(), np.ones((4, 4), np.uint8))
    Image.fromarray(large).save(tmp_path / "large.png")
    with pytest.raises(DatasetError) as refused:
        asked(runs.digits, tmp_path / "large.png")
    for part in ("large.png", "32 pixels high and 32 wide", "8 high and 8 wide", "--resize-images"):
        assert part in str(refused.value)
    probability = asked(runs.digits, tmp_path / "large.png", resize_images=True).data["predictions"][0]["answers"][0]
    plain = asked(runs.digits, images.folder / images.names[0]).data["predictions"][0]["answers"][0]
    assert probability["class"] == plain["class"]


def test_texts_from_files_and_from_stdin(runs, tmp_path, monkeypatch):
    odd = tmp_path / 'a, "b"\n.txt'
    texts = ["good film", "", "bad\x0cpoor the dull film and so on and on and on and on"]
    odd.write_text(texts[0])
    (tmp_path / "b.txt").write_text(texts[2])
    (tmp_path / "b.png").write_text("no text")
    files = asked(runs.texts, tmp_path, top=5)
    assert [each["input"] for each in files.data["predictions"]] == [str(odd), str(tmp_path / "b.txt")]
    found = rows(files.text)
    assert [row["input"] for row in found] == [str(odd)] * 2 + [str(tmp_path / "b.txt")] * 2
    assert {row["class"] for row in found} == set(CLASSES)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join([*texts, ""]).encode())))
    lines = asked(runs.texts, "-", top=5, batch_size=2).data["predictions"]
    assert [each["input"] for each in lines] == ["-:1", "-:2", "-:3"]
    for line, file in ((lines[0], 0), (lines[2], 1)):
        wanted = files.data["predictions"][file]["answers"]
        assert [each["class"] for each in line["answers"]] == [each["class"] for each in wanted]
        assert line["answers"][0]["probability"] == pytest.approx(wanted[0]["probability"], rel=1e-5)


@pytest.mark.parametrize(("stream", "part"), [(None, "holds no texts"), ("unreadable", "Bad file descriptor")])
def test_a_stdin_that_is_closed_or_not_to_be_read_is_named(runs, monkeypatch, stream, part):
    def read():
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(sys, "stdin", stream and SimpleNamespace(buffer=SimpleNamespace(read=read)))
    with pytest.raises(DatasetError, match=part):
        asked(runs.texts, "-")


def test_folders_are_read_through_links_and_each_once(runs, images, tmp_path):
    (tmp_path / "class").symlink_to(images.folder)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "circle").symlink_to(tmp_path)
    names = [each["input"] for each in asked(runs.digits, tmp_path).data["predictions"]]
    assert names == sorted(str(tmp_path / "class" / name) for name in images.names)


def test_a_folder_that_may_not_be_read_is_named_and_not_passed_over(runs, images, tmp_path, monkeypatch):
    (tmp_path / "shown").symlink_to(images.folder)
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DatasetError, match="closed cannot be read: Permission denied"):
        asked(runs.digits, tmp_path)


def test_data_that_has_moved_may_be_named(runs, monkeypatch):
    photos = runs.root / "photos"
    moved = photos.rename(runs.root / "moved")
    try:
        for refuse in (
            lambda: training.evaluate(commands.EvaluateArgs(run=runs.photos)),
            lambda: export(commands.ExportArgs(run=runs.photos, out=str(runs.root / "x.pt2"))),
        ):
            with pytest.raises(DatasetError, match="--dataset and --data-root say where it is"):
                refuse()
    finally:
        moved.rename(photos)


def test_lines_end_where_any_system_ends_them(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\r\n\r\ntwo\x0c\xe2\x80\xa8\nthree")))
    assert [item.line for item in _lines()] == [b"one", b"", b"two\x0c\xe2\x80\xa8", b"three"]


def test_folders_of_deeper_images_are_refused_in_training_too(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            deep = np.full((9, 9), 70_000 if name == "b" else 300, np.int32).clip(0, 65_535).astype(np.uint16)
            Image.fromarray(deep).save(tmp_path / split / name / "0.png")
    with pytest.raises(DatasetError, match="8 bits a channel"):
        training.train_teacher(
            commands.TrainTeacherArgs(out=str(tmp_path / "run"), dataset=f"folder:{tmp_path}", size=8)
        )


def test_the_command_prints_csv_or_one_json_object(runs, images):
    arguments = ["predict", "--run", runs.digits, str(images.folder), "--device", "cpu", "--top", "1"]
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 0, text.stderr
    assert len(rows(text.stdout)) == 16
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [each["answers"][0]["class"] for each in found["predictions"]] == [row["class"] for row in rows(text.stdout)]
    piped = CliRunner().invoke(app, ["predict", "--run", runs.texts, "-", "--device", "cpu"], input="good\nbad\r\n")
    assert [row["input"] for row in rows(piped.stdout)] == ["-:1", "-:1", "-:2", "-:2"]


@pytest.mark.parametrize(
    ("run", "inputs", "error", "parts"),
    [
        ("digits", [""], UsageError, ["empty name"]),
        ("digits", ["{tmp}/gone.png"], DatasetError, ["there is no", "gone.png"]),
        ("digits", ["x" * 5000], UsageError, ["a name of 5000 bytes"]),
        ("digits", ["{tmp}/empty"], DatasetError, ["empty holds no images", ".png"]),
        ("texts", ["{tmp}/empty"], DatasetError, ["empty holds no texts", ".txt"]),
        ("digits", ["{tmp}/broken.png"], DatasetError, ["broken.png cannot be read as an image"]),
        ("digits", ["{tmp}/deep.png"], DatasetError, ["deep.png is an image of mode I;16", "8 bits", "scale"]),
        ("digits", ["{tmp}/latin.txt"], UsageError, ["latin.txt is a .txt file", "takes images"]),
        ("digits", ["-"], UsageError, ["stdin", "takes images"]),
        ("texts", ["-", "-"], UsageError, ["given 2 times"]),
        ("texts", ["-"], DatasetError, ["stdin holds no texts"]),
        ("texts", ["{tmp}/deep.png"], UsageError, ["deep.png is not a .txt file", "takes texts"]),
        ("texts", ["{tmp}/latin.txt"], DatasetError, ["latin.txt is not UTF-8"]),
        ("floats", ["{tmp}/deep.png"], UsageError, ["float32 of shape (4,)", "uint8"]),
        ("ids", ["{tmp}/latin.txt"], UsageError, ["token ids"]),
        ("nowhere", ["{tmp}/deep.png"], UsageError, ["no run at"]),
    ],
)
def test_what_is_refused(runs, tmp_path, monkeypatch, run, inputs, error, parts):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(KdcacheError) as refused:
        asked(getattr(runs, run, run), *[text.format(tmp=tmp_path) for text in inputs])
    assert isinstance(refused.value, error)
    for part in parts:
        assert part in str(refused.value)
    assert refused.value.needed
    assert refused.value.remedy


@pytest.mark.parametrize(("run", "part"), [("texts", "trained on texts"), ("photos", "images of differing sizes")])
def test_resize_without_use_is_refused(runs, images, run, part):
    with pytest.raises(UsageError, match=part):
        asked(getattr(runs, run), images.folder, resize_images=True)


def test_logits_that_are_not_finite_are_named_and_not_answered(runs, images, tmp_path, monkeypatch):
    original = load_trained

    def broken(folder):
        trained = original(folder)
        trained.module.classifier[-1].bias.data[3] = torch.nan
        return trained

    monkeypatch.setattr("kdcache.apps.predict.load_trained", broken)
    with pytest.raises(ModelError, match=r"a logit of .*00\.png is not finite"):
        asked(runs.digits, images.folder / images.names[0])


def test_a_file_name_that_is_not_utf8_is_shown_with_escapes(runs, images, tmp_path):
    path = bytes(tmp_path) + b"/\xff.png"
    try:
        with open(path, "wb") as file:
            file.write((images.folder / images.names[0]).read_bytes())
    except OSError:
        pytest.skip("the disk takes UTF-8 names only")
    report = asked(runs.digits, tmp_path)
    assert report.data["predictions"][0]["input"].endswith("\\xff.png")
    report.text.encode()


@pytest.fixture
def copied(runs, tmp_path):
    """A run that may be damaged."""
    return shutil.copytree(runs.digits, tmp_path / "copied")


def test_a_run_without_a_result_is_named(runs, images, copied, capsys):
    image = images.folder / images.names[0]
    (copied / "result.json").unlink()
    assert asked(copied, image).data["predictions"] == asked(runs.digits, image).data["predictions"]
    assert f"{copied} has not come to its end" in capsys.readouterr().err
    (copied / "best.pt").unlink()
    with pytest.raises(CheckpointError) as refused:
        asked(copied, image)
    for part in (f"{copied} has no best.pt", "a finished run", "--resume"):
        assert part in str(refused.value)


@pytest.mark.parametrize("facts", [None, ["model", "classes"]])
def test_a_checkpoint_that_does_not_say_what_it_is_of(images, copied, facts):
    """As of a network that was trained from Python."""
    checkpoint = torch.load(copied / "best.pt", weights_only=True)
    torch.save({**checkpoint, "kdcache": facts}, copied / "best.pt")
    with pytest.raises(CheckpointError) as refused:
        asked(copied, images.folder)
    for part in ("does not say what it is of: model, classes", "train-student of this version", "load_weights"):
        assert part in str(refused.value)


def test_prediction_draws_nothing_and_has_no_seed(runs, images):
    result = CliRunner().invoke(app, ["predict", "--run", runs.digits, str(images.folder), "--seed", "1"])
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_a_teacher_that_augments_logs_no_views(tmp_path, capsys):
    teach(tmp_path / "run", dataset="digits", model="mlp", augment="affine")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch 1/1: loss")]
    assert "view" not in line
