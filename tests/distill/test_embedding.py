"""A teacher whose answer is a vector: from the dump to the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import kdcache
from kdcache import DumpConfig, StudentConfig, dump_teacher, open_cache, plan_dump, train_student
from kdcache.core.errors import CacheMismatch, CacheNotFound, KdcacheError, ModelError, UsageError
from kdcache.data.registry import open_dataset
from kdcache.data.taught import EmbeddingDataset
from kdcache.models.evaluate_embedding import evaluate_embedding, retrieval_agreement
from kdcache.models.feature_hooks import PENULTIMATE, FeatureHooks
from kdcache.models.teacher import load_teacher
from kdcache.store.convert import ConvertConfig, convert_cache
from kdcache.store.records import EMBEDDING, OutputRecord, Preprocess, ViewRecipe
from tests.helpers import Items, Network, answer, plain_forward, refused, synthetic, tensors
from tests.helpers import kdcache as command

SAMPLES, WIDTH = synthetic(90), 7
VECTOR = OutputRecord(kind=EMBEDDING)
OBJECTIVES = (
    *("cosine", "feature_mse", "similarity_preserving", "relational_distance", "relational_angle"),
    *("contrastive:negatives=30", "cosine:student-layer=penultimate"),
)


class Pairs:
    """Labelled samples that name no classes."""

    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, index):
        return tensors(SAMPLES)[0][index], int(SAMPLES.labels()[index])


def dumped(path, dataset=SAMPLES, teacher=None, **settings):
    config = DumpConfig(**{"device": "cpu", "encoding": "float32", "shard_rows": 32} | settings)
    teacher = teacher or Network(16, WIDTH)
    return dump_teacher(teacher, dataset, out=path, config=config, outputs=VECTOR)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "c.zarr"
    dumped(out)
    return out


def config(**settings):
    return StudentConfig(**{"device": "cpu", "batch_size": 16, "epochs": 12, "learning_rate": 3e-3} | settings)


@pytest.mark.parametrize("dataset", [SAMPLES, Items(SAMPLES), Pairs()], ids=["indexed", "items", "without classes"])
def test_vectors_are_stored_as_the_teacher_gave_them(tmp_path, dataset):
    dumped(tmp_path / "c.zarr", dataset)
    cache, wanted = open_cache(tmp_path / "c.zarr"), plain_forward(Network(16, WIDTH), tensors(SAMPLES)[0])
    np.testing.assert_allclose(cache.rows(np.arange(90)), wanted, rtol=1e-5, atol=1e-6)
    manifest = cache.manifest
    assert manifest.is_embedding
    assert [array.name for array in manifest.arrays] == ["embeddings", "input_crc32c", "labels"]
    assert manifest.array("embeddings").row_names == ("dimension",)
    assert (manifest.facts, manifest.fidelity, manifest.teacher.accuracy) == ((), (), None)
    assert (cache.column("labels") == -1).all()


@pytest.mark.parametrize("spec", OBJECTIVES)
def test_every_objective_of_vectors_is_learnt(path, spec):
    seen = []
    train_student(
        Network(16, WIDTH, seed=1),
        Items(SAMPLES),
        path,
        config=config(objective=(spec,)),
        on_step=lambda step, parts: seen.append(float(parts["loss"])),
    )
    assert np.mean(seen[-5:]) < 0.9 * np.mean(seen[:5])


@pytest.mark.parametrize("spec", OBJECTIVES[:5])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(path, spec):
    seen = []
    student = Linear()
    vectors = path.parent / f"{spec}.zarr"
    dumped(vectors, teacher=student)
    train_student(
        student,
        SAMPLES,
        vectors,
        config=config(objective=(spec,), learning_rate=1e-12, epochs=1),
        on_step=lambda step, parts: seen.append(float(parts["loss"])),
    )
    assert max(seen) < 1e-6


def test_the_default_is_cosine_and_the_best_epoch_is_the_most_alike(path, tmp_path):
    result = train_student(
        Network(16, WIDTH, seed=1), SAMPLES, path, config=config(val_fraction=0.2, epochs=4), out=tmp_path / "run"
    )
    assert {"cosine", "val_cosine", "val_retrieval"} <= result.epochs[0].keys()
    assert result.epochs[-1]["val_cosine"] > result.epochs[0]["val_cosine"]
    by_retrieval = config(val_fraction=0.2, epochs=1, metric="retrieval")
    train_student(Network(16, WIDTH, seed=1), SAMPLES, path, config=by_retrieval)


class Linear(nn.Linear):
    """The same in training as in evaluation."""

    def __init__(self):
        super().__init__(16, WIDTH)

    def forward(self, inputs):
        return super().forward(inputs.flatten(1))


class Whole(nn.Module):
    def forward(self, inputs):
        return inputs.float()


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (
            lambda path: train(path, objective=("kd",)),
            UsageError,
            "kd compares classes, and the cache holds embeddings",
        ),
        (lambda path: train(path, objective=("attention_transfer",)), ModelError, "attention_transfer"),
        (lambda path: train(path, alpha=0.9), UsageError, "--alpha 0.9 weighs the teacher against labels"),
        (lambda path: train(path, distill=False), UsageError, "--no-distill is given, and the cache holds embeddings"),
        (lambda path: train(path, objective=("cosine:layer=x",)), CacheMismatch, "features of x"),
        (lambda path: plan(path, encoding="topk:3"), UsageError, "topk:3, which is for logits"),
        (lambda path: plan(path, encoding="head"), UsageError, "head, which is for logits"),
        (lambda path: plan(path, max_kl=0.1), UsageError, "--max-kl is given, and the teacher returns an embedding"),
        (lambda path: plan(path, teacher=Whole()), ModelError, "one vector for each sample"),
        (
            lambda path: convert_cache(path, path / "no", ConvertConfig(encoding="quantized:8")),
            UsageError,
            "quantized:8, which is for logits",
        ),
        (lambda path: OutputRecord(kind=EMBEDDING, columns=(0,)), ValueError, "has no classes to choose"),
    ],
)
def test_what_supposes_classes_is_refused(path, act, error, match):
    with pytest.raises(error, match=match):
        act(path)


def train(path, **settings):
    train_student(Network(16, WIDTH), SAMPLES, path, config=config(**settings))


def plan(path, teacher=None, **settings):
    teacher = teacher or Network(16, WIDTH)
    plan_dump(teacher, SAMPLES, out=path.parent / "new", config=DumpConfig(device="cpu", **settings), outputs=VECTOR)


def test_another_teacher_is_not_continued_as_one_of_classes(path):
    with pytest.raises(KdcacheError, match="outputs"):
        dump_teacher(Network(16, 4), SAMPLES, out=path, config=DumpConfig(device="cpu", shard_rows=32))


def test_convert_changes_the_layout_and_the_dtype(path, tmp_path):
    convert_cache(path, tmp_path / "half.zarr", ConvertConfig(encoding="float16"))
    half, whole = open_cache(tmp_path / "half.zarr"), open_cache(path)
    np.testing.assert_allclose(half.rows([1, 2]), whole.rows([1, 2]), rtol=1e-3)
    assert half.manifest.is_embedding


# ---- scores


def test_retrieval_agreement_is_the_share_of_common_neighbours():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(40, 3, generator=generator), torch.randn(40, 5, generator=generator)

    def nearest(vectors, at):
        units = vectors / vectors.norm(dim=1, keepdim=True)
        order = (units @ units[at]).argsort(descending=True).tolist()
        return set([each for each in order if each != at][:10])

    shares = [len(nearest(one, at) & nearest(two, at)) / 10 for at in range(40)]
    assert retrieval_agreement(one, two) == pytest.approx(np.mean(shares), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    assert retrieval_agreement(5 * one @ rotation, one) == 1.0
    assert retrieval_agreement(one[:3], two[:3]) in (0.0, 1 / 3, 2 / 3, 1.0)
    assert np.isnan(retrieval_agreement(one[:2], two[:2]))


def test_scores_are_of_the_teachers_vectors(path):
    cache, settings = open_cache(path), config()
    dataset = EmbeddingDataset(SAMPLES, WIDTH)
    same = evaluate_embedding(Network(16, WIDTH), dataset, preprocess=Preprocess(), config=settings, teacher=cache.rows)
    assert same.scores == pytest.approx({"cosine": 1.0, "retrieval": 1.0})
    other = evaluate_embedding(
        Network(16, WIDTH, seed=3),
        dataset,
        preprocess=Preprocess(),
        config=settings,
        teacher=cache.rows,
        indices=np.arange(5, 50),
    )
    np.testing.assert_array_equal(other.teacher_nd, cache.rows(np.arange(5, 50)))
    wanted = plain_forward(Network(16, WIDTH, seed=3), tensors(SAMPLES)[0][5:50])
    np.testing.assert_allclose(other.student_nd, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="no vectors of a teacher"):
        evaluate_embedding(Network(16, WIDTH), dataset, preprocess=Preprocess(), config=settings)


def test_join_gives_the_vectors_whatever_the_labels(path):
    joined = kdcache.join(Pairs(), open_cache(path))
    value, label, vector = joined[11]
    assert torch.equal(value, tensors(SAMPLES)[0][11])
    assert label == SAMPLES.labels()[11]
    np.testing.assert_array_equal(vector, open_cache(path).rows([11])[0])


# ---- teachers by name, and the commands


def test_of_a_classifier_it_is_what_its_last_layer_takes(tmp_path):
    answer("train-teacher", "--model", "cnn", "--epochs", "1", "--out", tmp_path / "t", "--device", "cpu")
    dataset = open_dataset("digits", split="test")
    checkpoint = str(tmp_path / "t" / "best.pt")
    settings = kdcache.core.config.InputConfig()
    built = load_teacher(settings, "cnn", checkpoint, dataset, ViewRecipe(), kind=EMBEDDING)
    classifier = load_teacher(settings, "cnn", checkpoint, dataset, ViewRecipe()).module.eval()
    inputs = torch.rand(3, 1, 8, 8)
    with torch.no_grad(), FeatureHooks(classifier, [PENULTIMATE]) as hooks:
        classifier(inputs)
        wanted = hooks.take()[PENULTIMATE]
        assert torch.equal(built.module.eval()(inputs), wanted)


FACTORY = """
import torch
from torch import nn


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
"""


def test_the_pipeline_on_images_without_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_encoder.py").write_text(FACTORY)
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{number}.png")
    common = ("--device", "cpu", "--batch-size", "16")
    dump = ("dump-teacher", "--dataset", "folder:images", "--teacher", "py:own_encoder:encoder", "--task", "embedding")
    found = answer(*dump, "--split", "train", "--out", "c.zarr", *common)
    assert found["splits"]["train"]["teacher_accuracy"] is None
    learn = ("train-student", "--cache", "c.zarr", "--student", "mlp", "--epochs", "3", *common)
    unjudged = command(*learn, "--out", "unjudged")
    assert unjudged.exit_code == 0
    assert "dump it too, by --split test" in unjudged.stderr
    assert "--split test" in refused(CacheNotFound.exit_code, "evaluate", "--run", "unjudged", "--device", "cpu")
    assert "6 dimensions" in command(*dump, "--split", "test", "--out", "c.zarr", *common).stdout
    result = answer(*learn, "--out", "s", "--val-fraction", "0.2")
    assert result["test_accuracy"] is None
    assert -1 <= result["test_cosine"] <= 1
    assert 0 <= result["test_retrieval"] <= 1
    again = answer("evaluate", "--run", "s", "--device", "cpu")
    assert again["test_cosine"] == pytest.approx(result["test_cosine"], abs=1e-6)
    assert answer("evaluate", "--run", "s", "--cache", "c.zarr", "--split", "train", "--device", "cpu")["samples"] == 60
    teacher = ("--teacher", "py:own_encoder:encoder")
    assert command("verify", "c.zarr", *teacher, "--device", "cpu").exit_code == 0
    assert "an embedding of 6 dimensions" in command("inspect", "c.zarr").stdout
    assert "cosine" in command("compare", "s").stdout
    assert "answers with a vector" in refused(2, "predict", "--run", "s", "images/test/0.png")
    assert "answers with a vector" in refused(2, "report", "s", "--out", "r.html", "--device", "cpu")
    assert "holds embeddings" in refused(2, "plot-temperature", "c.zarr", "--out", "t.png")
    sweep = ("sweep", "--cache", "c.zarr", "--student", "mlp", "--epochs", "1", "--jobs", "1", *common)
    assert "--objective cosine" in refused(2, *sweep, "--out", "none")
    swept = answer(*sweep, "--objective", "cosine", "--objective", "feature_mse", "--out", "sweep")
    assert all(row["score"] is not None for row in swept["settings"])


def test_a_csv_file_needs_no_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_encoder.py").write_text(FACTORY)
    for name, head in (("bare", "path"), ("labelled", "path,label")):
        lines = [head]
        for number in range(6):
            Image.fromarray(np.full((4, 4, 3), number * 9, np.uint8)).save(f"{number}.png")
            lines.append(f"{number}.png" + (f",{number % 2}" if "," in head else ""))
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        dump = ("dump-teacher", "--dataset", f"csv:{name}.csv", "--teacher", "py:own_encoder:encoder")
        answer(*dump, "--task", "embedding", "--out", f"{name}.zarr", "--device", "cpu")
        answer("train-student", "--cache", f"{name}.zarr", "--student", "mlp", "--epochs", "1", "--out", name)


def test_a_text_model_of_hugging_face_averages_its_tokens(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from tests.data.test_text import save_classifier

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = save_classifier(tmp_path / "bert", ["neg", "pos"])
    texts = ["good film", "bad", "fine good bad film film"]
    for split in ("train", "test"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "texts" / split / f"{number}.txt").write_text(text)
    dump = (
        "dump-teacher",
        "--dataset",
        f"text-folder:{tmp_path / 'texts'}",
        "--teacher",
        spec,
        "--encoding",
        "float32",
    )
    answer(*dump, "--task", "embedding", "--out", tmp_path / "c.zarr", "--device", "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "bert").eval()
    with torch.no_grad():
        wanted = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(dim=1) for text in texts]
    np.testing.assert_allclose(open_cache(tmp_path / "c.zarr").rows([0, 1, 2]), torch.cat(wanted), atol=1e-5)
    learn = ("train-student", "--cache", tmp_path / "c.zarr", "--student", "gru:hidden=4,embedding=4", "--epochs", "1")
    answer(*learn, "--out", tmp_path / "s", "--device", "cpu")
