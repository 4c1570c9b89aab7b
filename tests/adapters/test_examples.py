"""The examples run as they stand, and each library trains as kdcache's own loop does."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from timm.data.loader import fast_collate
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import kdcache
from kdcache import DumpConfig, StudentConfig, dump_teacher, train_student
from kdcache.adapters.lightning import CachedDataModule, EpochSampler
from kdcache.adapters.timm import CachedDistillationTask, PackedTargets
from kdcache.adapters.transformers import DistillationTrainer
from kdcache.core.errors import UsageError
from kdcache.data.preprocess import Preprocessor
from kdcache.data.tokenizer import build_vocabulary
from kdcache.store.records import Preprocess
from kdcache.store.sampler import ExactSampler
from tests.helpers import Items, Network, answer, synthetic

ROOT = Path(__file__).parent.parent.parent
# Of the other libraries, such as one of pinned memory without a GPU.
pytestmark = pytest.mark.filterwarnings("default")

EXAMPLES = ROOT / "tests" / "examples"
WORDS = ["a", "film", "good", "bad", "fine", "dull", "and", "the", "of"]


class Brightness(nn.Module):
    """A teacher of photographs."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.head(inputs.mean(dim=(2, 3)))


class Bag(nn.Module):
    """A teacher of texts."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(dim=1))


class Reviews(list):
    classes = ("bad", "good")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs, reviews and digits, with a cache of each."""
    root = tmp_path_factory.mktemp("examples")
    random = np.random.default_rng(0)
    config = DumpConfig(device="cpu")
    for name in ("cat", "dog"):
        (root / "photos" / "train" / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / "train" / name / f"{number:02}.png")
    dump_teacher(Brightness(), ImageFolder(root / "photos" / "train"), out=root / "runs/photos.zarr", config=config)
    reviews = Reviews((" ".join(random.choice(WORDS, 5)), int(random.integers(2))) for _ in range(24))
    with open(root / "reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews])
    words = build_vocabulary([text for text, _ in reviews], 20)
    record = Preprocess(max_tokens=8, vocabulary_size=words.vocabulary_size, tokenizer_sha256=words.sha256)
    teacher = Bag(words.vocabulary_size)
    dump_teacher(
        teacher, reviews, out=root / "runs/reviews.zarr", preprocess=Preprocessor(record, words), config=config
    )
    tokens = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    transformers.BertTokenizerFast(vocab=tokens).save_pretrained(root / "tokenizer")
    answer("train-teacher", "--out", root / "t", "--model", "mlp", "--epochs", "3", "--device", "cpu")
    answer("dump-teacher", "--teacher", "mlp", "--checkpoint", root / "t/best.pt", "--out", root / "runs/digits.zarr")
    return root


@pytest.mark.parametrize("name", ["timm_task", "hf_text", "hf_images", "lightning_module"])
def test_an_example_runs(folder, monkeypatch, capsys, name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 40
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    exec(compile(source, name, "exec"), {"__name__": name})
    printed = capsys.readouterr().out.split()
    assert np.isfinite(float(printed[-1]))


@pytest.mark.parametrize("name", ["numpy_loop", "jax_loop"])
def test_an_example_runs_without_torch(folder, name):
    if name == "jax_loop" and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    source = EXAMPLES / f"{name}.py"
    assert len(source.read_text().splitlines()) <= 40
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, source], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if name == "numpy_loop":
        assert float(done.stdout.split()[5].rstrip("%")) > 80, done.stdout


# ---- the same batches give the same losses as kdcache's own loop

DATA = synthetic(40)
BATCH, EPOCHS, RATE, SEED = 16, 2, 0.5, 3
DISTILLATION = {"temperature": 3.0, "alpha": 0.7}


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(16, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1))
        return logits if labels is None else transformers.modeling_outputs.ImageClassifierOutput(logits=logits)


class OwnOrder(EpochSampler):
    """The order of kdcache's own loop."""

    def __iter__(self):
        (order,) = ExactSampler(np.arange(len(self.dataset)), SEED).runs(self.epoch)
        return iter(order.tolist())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of two views, so that a loop whose epochs do not reach the cache has other losses."""
    out = tmp_path_factory.mktemp("same") / "c.zarr"
    config = DumpConfig(device="cpu", views=2, augment="affine", encoding="float32")
    dump_teacher(Network(16, 4), DATA, out=out, config=config)
    return kdcache.open_cache(out)


@pytest.fixture(scope="module")
def expected(cache):
    """The losses of kdcache's own loop."""
    found = []
    config = StudentConfig(
        device="cpu",
        batch_size=BATCH,
        epochs=EPOCHS,
        optimizer="sgd",
        momentum=0,
        learning_rate=RATE,
        seed=SEED,
        **DISTILLATION,
    )
    train_student(Student(), DATA, cache, config=config, on_step=lambda step, parts: found.append(float(parts["loss"])))
    assert len(found) == 6
    return found


def scale(image):
    return image / 255


def joined(cache, **options):
    return kdcache.join(Items(DATA), cache, transform=scale, **options)


def test_timm_gives_the_losses_of_the_own_loop(cache, expected):
    # timm's collate takes uint8, which timm's loader scales on the device.
    data, student = PackedTargets(kdcache.join(Items(DATA), cache)), Student()
    task = CachedDistillationTask(student, **DISTILLATION)
    optimizer = torch.optim.SGD(task.parameters(), lr=RATE)
    sampler = OwnOrder(data, 1, 0)
    loader = DataLoader(data, BATCH, sampler=sampler, collate_fn=fast_collate)
    found = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, targets in loader:
            result = task(scale(images), targets)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            found.append(float(result["loss"]))
    assert found == pytest.approx(expected, abs=1e-6)
    assert result["output"].shape == (8, 4)


def test_targets_that_are_not_packed_are_refused():
    with pytest.raises(UsageError, match="PackedTargets"):
        CachedDistillationTask(Student())(torch.rand(5, 16), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_gives_the_losses_of_the_own_loop(tmp_path, cache, expected, accumulated):
    found = []

    class Recorded(DistillationTrainer):
        def compute_loss(self, model, inputs, **options):
            loss = super().compute_loss(model, inputs, **options)
            found.append((len(inputs["labels"]), float(loss)))
            return loss

        def _get_train_sampler(self, dataset=None):
            return OwnOrder(self.train_dataset, 1, 0)

    class Dicts(Items):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return {"pixel_values": image, "labels": label}

    data = kdcache.join(Dicts(DATA), cache, transform=scale, input_key="pixel_values", label_key="labels")
    settings = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // accumulated,
        learning_rate=RATE,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    student = Student()
    Recorded(student, settings, train_dataset=data, **DISTILLATION).train()
    if accumulated == 1:
        assert [loss for _, loss in found] == pytest.approx(expected, abs=1e-6)
    else:  # a step's loss is the mean of those of its batches, all of one size here
        assert [size for size, _ in found] == [8] * 10
        means = [
            (one + other) / 2
            for epoch in (found[:4], found[5:9])
            for (_, one), (_, other) in zip(epoch[::2], epoch[1::2], strict=True)
        ]
        assert means == pytest.approx([*expected[:2], *expected[3:5]], abs=1e-6)


def test_trainer_evaluates_without_a_teacher_and_refuses_to_train_so(tmp_path, cache):
    items = [{"pixel_values": torch.rand(1, 4, 4), "labels": 0} for _ in range(4)]
    settings = transformers.TrainingArguments(str(tmp_path), num_train_epochs=1, report_to="none", use_cpu=True)

    class WithLoss(Student):
        def forward(self, pixel_values, labels=None):
            output = super().forward(pixel_values, labels)
            output.loss = nn.functional.cross_entropy(output.logits, labels)
            return output

    trainer = DistillationTrainer(WithLoss(), settings, train_dataset=items, eval_dataset=items)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(UsageError, match=r"kdcache\.join"):
        trainer.train()


def test_lightning_gives_the_losses_of_the_own_loop(cache, expected):
    found = []

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.student = Student()

        def training_step(self, batch, step):
            images, labels, logits = batch
            loss = kdcache.losses.kd_with_labels(self.student(images), logits, labels, **DISTILLATION)
            found.append(float(loss))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    class Ordered(CachedDataModule):
        def train_dataloader(self):
            loader = super().train_dataloader()
            assert isinstance(loader.sampler, EpochSampler)
            return DataLoader(loader.dataset, BATCH, sampler=OwnOrder(loader.dataset, 1, 0))

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet).fit(
        Module(), Ordered(joined(cache), batch_size=BATCH)
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_lightnings_order_is_another_in_each_epoch_and_each_process_has_its_part(cache):
    data, orders = joined(cache), []
    for epoch in range(2):
        samplers = [EpochSampler(data, 3, rank, seed=0) for rank in range(3)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders.append([*chain(*samplers)])
        assert {*orders[-1]} == {*range(40)}
        assert len(orders[-1]) == 42  # two are repeated
    assert orders[0] != orders[1]
