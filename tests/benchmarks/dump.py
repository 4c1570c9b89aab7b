"""What a dump costs: beside a plain script over photographs, and beyond the teacher's bare forward pass."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

from kdcache.apps.stages import stage_lines, stage_seconds
from kdcache.core.config import DumpConfig
from kdcache.core.progress import muted
from kdcache.data.batch import consecutive_batches
from kdcache.data.dataset import IndexedDataset, WrappedDataset
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.data.registry import open_dataset
from kdcache.data.views import as_views
from kdcache.distill.teacher.dump import dump_teacher
from kdcache.models.device import evaluation_mode, floating_dtype, resolve_device, synchronize
from kdcache.models.forward import ForwardPass
from kdcache.store.cache import open_cache
from kdcache.store.records import Preprocess
from tests.benchmarks.data import IMAGE, images, network
from tests.benchmarks.stores import BATCH, logits, write_cache
from tests.benchmarks.timing import side_by_side

SAMPLES, PHOTOGRAPHS, VIEWED = 60_000, 1024, 192
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Preprocess(resize=256, crop=224, mean=MEAN, std=STD)
NETWORKS = {"resnet18": models.resnet18, "mobilenet_v3_large": models.mobilenet_v3_large}
PLAIN_BATCH, PLAIN_WORKERS = 256, 2


def run(*, rounds: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_photographs(root / "photographs", PHOTOGRAPHS)
        make_photographs(root / "few", VIEWED)
        for name, build in NETWORKS.items():
            torch.manual_seed(0)
            _against_a_script(name, build().eval(), root, rounds=rounds, device=device)
        _views(root, rounds=rounds, device=device)
    _bare(rounds=rounds, device=device)
    _appends()


def make_photographs(folder: Path, count: int) -> None:
    """JPEG files of 500 × 375 pixels, quality 90, of about the size of photographs: smooth shapes with some grain."""
    random = np.random.default_rng(0)
    (folder / "train" / "thing").mkdir(parents=True)
    for number in range(count):
        coarse = random.integers(0, 256, (12, 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        grain = random.normal(0, 8, smooth.shape)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        picture.save(folder / "train" / "thing" / f"{number:05}.jpg", quality=90)


def plain_script(teacher: nn.Module, folder: Path, out: Path, device: torch.device) -> float:
    """What a first script does: a DataLoader, the model, and a file of logits per batch."""
    steps = [v2.ToImage(), v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)]
    data = datasets.ImageFolder(str(folder / "train"), v2.Compose([*steps, v2.Normalize(MEAN, STD)]))
    loader: DataLoader[Any] = DataLoader(data, batch_size=PLAIN_BATCH, num_workers=PLAIN_WORKERS)
    out.mkdir()
    began = time.perf_counter()
    teacher.to(device).eval()
    with torch.no_grad():
        for number, (inputs, labels) in enumerate(loader):
            answers = teacher(inputs.to(device)).cpu()
            torch.save({"logits": answers, "labels": labels}, out / f"{number}.pt")
    return time.perf_counter() - began


def _photographs(folder: Path) -> IndexedDataset:
    return _Thousand(open_dataset(f"folder:{folder}", split="train"))


class _Thousand(WrappedDataset):
    """Samples of the first of 1,000 classes."""

    def __init__(self, dataset: IndexedDataset) -> None:
        super().__init__(dataset)
        self.classes = tuple(map(str, range(1000)))


def _dump(teacher: nn.Module, dataset: IndexedDataset, **settings: Any) -> float:
    """Seconds of a whole dump, what it measures first included."""
    with tempfile.TemporaryDirectory() as folder, muted():
        began = time.perf_counter()
        dump_teacher(
            teacher, dataset, out=Path(folder) / "cache.zarr", preprocess=IMAGENET, config=DumpConfig(**settings)
        )
        seconds = time.perf_counter() - began
        teacher.to(memory_format=torch.contiguous_format)
        return seconds


def _against_a_script(name: str, teacher: nn.Module, root: Path, *, rounds: int, device: str) -> None:
    target, dataset = resolve_device(device), _photographs(root / "photographs")

    def script() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return plain_script(teacher, root / "photographs", Path(folder) / "out", target)

    speedup = {"resnet18": "1.8", "mobilenet_v3_large": "3"}[name]
    side_by_side(
        {
            f"plain script (batch {PLAIN_BATCH})": script,
            "dump, defaults": lambda: _dump(teacher, dataset, device=device),
            "dump, --amp bf16": lambda: _dump(teacher, dataset, device=device, amp="bf16"),
        },
        rounds=rounds,
        what=f"{name} over {PHOTOGRAPHS} photographs at 224 pixels, {target}",
        target={"dump, defaults": f"target ≤ {1 / float(speedup):.2f} (a speed-up of {speedup})"},
        samples=PHOTOGRAPHS,
    )
    _stages(teacher, dataset, target)


def _stages(teacher: nn.Module, dataset: IndexedDataset, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder, muted():
        path = Path(folder) / "cache.zarr"
        dump_teacher(teacher, dataset, out=path, preprocess=IMAGENET, config=DumpConfig(device=str(device)))
        cache = open_cache(path)
        network = ForwardPass(teacher, Preprocessor(IMAGENET), device, classes=len(dataset.classes))
        network.use_memory_format(cache.manifest.memory_format)
        found = stage_seconds(network, as_views(dataset), cache, Path(folder))
    print("\n".join(f"  {line}" for line in stage_lines(found)))


def _views(root: Path, *, rounds: int, device: str) -> None:
    """Eight views of each photograph, read once, against a read for each."""
    torch.manual_seed(0)
    teacher, dataset = models.mobilenet_v3_small(), _photographs(root / "few")
    common: dict[str, Any] = {"device": device, "views": 8, "augment": "resized-crop-flip"}
    fixed = common | {"batch_size": 256, "memory_format": "contiguous", "workers": 0}
    side_by_side(
        {
            "batch 256, a read per view": lambda: _dump(teacher, dataset, **fixed, views_in_flight=1),
            "batch 256, one read": lambda: _dump(teacher, dataset, **fixed),
            "dump, defaults": lambda: _dump(teacher, dataset, **common),
        },
        rounds=rounds,
        what=f"mobilenet_v3_small over 8 views of {VIEWED} photographs",
        target={"dump, defaults": "target ≤ 0.67"},
    )


def _bare(*, rounds: int, device: str) -> None:
    """A small network over samples in memory, against its forward pass alone."""
    dataset, teacher = images(SAMPLES), network("cnn")
    config = DumpConfig(device=device, batch_size=256, memory_format="contiguous", workers=0)
    target_device = resolve_device(device)
    preprocessor = Preprocessor(IMAGE)
    batches = consecutive_batches(np.arange(SAMPLES), 256)

    def bare() -> float:
        began = time.perf_counter()
        module = teacher.to(target_device)
        with evaluation_mode(module):
            for batch in batch_loader(dataset, batches, preprocessor=preprocessor, device=target_device):
                module(preprocessor.per_batch(batch.to(target_device).inputs, floating_dtype(module)))
        synchronize(target_device)
        return time.perf_counter() - began

    def dumped() -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.zarr"
            return dump_teacher(teacher, dataset, out=path, preprocess=IMAGE, config=config).seconds

    side_by_side(
        {"bare forward pass": bare, "dump": dumped},
        rounds=rounds,
        what=f"a cnn teacher over {SAMPLES:,} MNIST-shaped samples, batch {config.batch_size}, {target_device}",
        target={"dump": "target ≤ 1.05"},
    )


def _appends() -> None:
    """Whole shards against what a loop that writes each batch as it comes would do to the same layout."""
    import zarr

    rows, classes = 32_768, 1000
    with tempfile.TemporaryDirectory() as folder:
        buffered = rows / write_cache(Path(folder) / "buffered.zarr", rows=rows, classes=classes, compression="none")
        some = 4096
        write_cache(Path(folder) / "appended.zarr", rows=rows, classes=classes, compression="none")
        array = zarr.open_group(Path(folder) / "appended.zarr", mode="r+")["train/logits"]
        values = logits(range(some), classes)
        began = time.perf_counter()
        for start in range(0, some, BATCH):
            array[0, start : start + BATCH] = values[start : start + BATCH]
        appended = some / (time.perf_counter() - began)
    print(
        f"writing {classes} classes: whole shards, flushed, {buffered:,.0f} rows/s; batches of {BATCH} into the same "
        f"layout {appended:,.0f} rows/s: × {buffered / appended:.0f}  target ≥ 40"
    )
