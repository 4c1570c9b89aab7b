import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from kdcache.core.errors import DatasetError, MissingExtra, ModelError
from kdcache.data.batch import BatchRequest
from kdcache.data.dataset import ArrayDataset
from kdcache.data.determinism import check_deterministic
from kdcache.data.loader import batch_loader
from kdcache.data.map_dataset import as_indexed
from kdcache.data.preprocess import Preprocessor
from kdcache.data.raw_input import input_crc32c
from kdcache.data.registry import _read_digits, fingerprint_labels, fingerprint_samples, open_dataset
from kdcache.store.records import Preprocess

CPU = torch.device("cpu")
needs_data = pytest.mark.skipif("KDCACHE_TEST_DATA" not in os.environ, reason="KDCACHE_TEST_DATA is not set")


class Items(Dataset):
    """A map-style dataset that counts its reads and fails where told to."""

    def __init__(self, items, **attributes):
        self.items, self.reads = items, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads.append(index)
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def images(count, *, size=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return [(data[i], i % classes) for i in range(count)]


def loader(dataset, batches, *, size=None, checksums=False, **options):
    if isinstance(batches, list):
        batches = [BatchRequest(indices, checksums=checksums) for indices in batches]
    return batch_loader(
        dataset, batches, preprocessor=Preprocessor(Preprocess(resize=size, crop=size)), device=CPU, **options
    )


def test_digits_can_be_undone_and_keep_the_order_of_the_file():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = (open_dataset("digits", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    pixels = torch.cat([part.shared_inputs(range(len(part))) for part in (train, test)])
    assert pixels.dtype == torch.uint8
    assert train.input_dtype == "uint8"
    assert train.input_shape == (1, 8, 8) == pixels.shape[1:]
    np.testing.assert_array_equal(np.round(pixels[:, 0].numpy() / 255 * 16), bunch.images)
    np.testing.assert_array_equal(np.concatenate([train.labels(), test.labels()]), bunch.target)
    assert train.classes == tuple(map(str, bunch.target_names))
    scaled = train.shared_inputs(range(1437)).double() / 255
    assert scaled.mean().item() == pytest.approx(train.default_mean[0], abs=1e-3)
    assert scaled.std().item() == pytest.approx(train.default_std[0], abs=1e-3)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra) as caught:
        open_dataset("digits", split="train")
    assert 'pip install "kdcache[demo]"' in caught.value.remedy


def test_digits_are_read_without_importing_scikit_learn_or_with_it_to_the_same(monkeypatch):
    def refuse(*args):
        raise AssertionError("scikit-learn was imported")

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.data.registry.require_extra", refuse)
        read = _read_digits()
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # another layout of the package
    for ours, theirs in zip(read, _read_digits(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@needs_data
def test_mnist_is_the_torchvision_one():
    import torchvision

    root = os.environ["KDCACHE_TEST_DATA"]
    dataset = open_dataset("mnist", split="test", data_root=root)
    theirs = torchvision.datasets.MNIST(root, train=False)
    assert len(dataset) == 10000
    assert dataset.data_root == root
    for index in (0, 17, 9999):
        image, label = theirs[index]
        inputs, labels = dataset.fetch([index])
        np.testing.assert_array_equal(inputs[0, 0].numpy(), np.asarray(image))
        assert labels.tolist() == [label]
    # Wrapped by hand, the same dataset has the same fingerprint.
    assert fingerprint_samples(as_indexed(theirs, name="mine", split="test")) == fingerprint_samples(dataset)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_files_are_named_with_both_ways_out(tmp_path, name):
    with pytest.raises(DatasetError) as caught:
        open_dataset(name, split="train", data_root=str(tmp_path))
    assert str(tmp_path) in caught.value.found
    assert "--download" in caught.value.remedy
    assert "--data-root" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_a_dataset_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DatasetError, match="no route to host"):
        open_dataset("cifar10", split="train", data_root=str(tmp_path), download=True)


def test_unknown_names_get_advice():
    with pytest.raises(DatasetError, match="did you mean cifar10"):
        open_dataset("cifar-10", split="train")
    with pytest.raises(DatasetError, match="train or test"):
        open_dataset("digits", split="val")


@pytest.fixture
def image_folder(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((6 + i, 9, 3), 40 * i + label, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_folder(image_folder):
    dataset = open_dataset(f"folder:{image_folder}", split="test")
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels().tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.input_shape is None
    assert len(dataset.default_mean) == 3
    (image,) = dataset.shared_inputs([5])
    assert image.shape == (3, 8, 9)
    assert image.unique().tolist() == [81]
    with pytest.raises(DatasetError, match=r"\(3, 6, 9\).*\(3, 7, 9\)") as caught:
        next(iter(loader(dataset, [np.array([0, 1])])))
    assert "--size" in caught.value.remedy
    (batch,) = loader(dataset, [np.array([0, 1])], size=5)
    assert batch.inputs.shape == (2, 3, 5, 5)


def test_folder_mistakes(image_folder):
    spec = f"folder:{image_folder}"
    with pytest.raises(DatasetError, match="holds train, val") as caught:
        open_dataset(spec, split="extra")
    assert "extra/CLASS/IMAGE" in caught.value.needed
    (image_folder / "val" / "emu").mkdir()
    with pytest.raises(DatasetError, match=r"2: cat, dog; .* 3: cat, dog, emu"):
        open_dataset(spec, split="train")
    (image_folder / "val" / "emu").rmdir()
    broken = image_folder / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:45])
    with pytest.raises(DatasetError, match=r"dog/1\.png"):
        open_dataset(spec, split="train").fetch([4])


def test_functions_get_what_they_take(tmp_path, monkeypatch):
    (tmp_path / "kd_my_data.py").write_text(
        "import kd_my_helper\n"
        "def load(split, *, data_root): return Pairs(split, data_root)\n"
        "class Pairs(list):\n"
        "    def __init__(self, *what):\n"
        "        super().__init__([(None, 0)]); self.classes = what\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    with pytest.raises(DatasetError, match=r"importing kd_my_data fails with .*kd_my_helper"):
        open_dataset("py:kd_my_data:load", split="train")
    (tmp_path / "kd_my_helper.py").write_text("")
    with pytest.raises(DatasetError, match="sample 0 of py:kd_my_data:load is a NoneType"):
        open_dataset("py:kd_my_data:load", split="train", data_root="there")
    monkeypatch.setattr(sys.modules["kd_my_data"].Pairs, "__getitem__", lambda self, i: (torch.zeros(2), 1))
    dataset = open_dataset("py:kd_my_data:load", split="train", data_root="there")
    assert dataset.classes == ("train", "there")
    assert dataset.default_mean == ()
    for spec, message in {
        "py:kd_my_data:laod": "did you mean load",
        "py:kd_your_data:load": "there is no module 'kd_your_data'",
        "py:kd_my_data": "py:package.module:function",
    }.items():
        with pytest.raises(DatasetError, match=message):
            open_dataset(spec, split="train")
    assert sys.path == path


def test_each_sample_is_read_once_a_fetch():
    dataset = Items(images(20), classes=["a", "b", "c"])
    indexed = as_indexed(dataset, name="mine", split="train")
    assert indexed.labels() is None
    assert indexed.input_shape == (3, 4, 4)
    dataset.reads.clear()
    (batch,) = loader(indexed, [np.array([7, 3, 3])], checksums=True)
    assert dataset.reads == [7, 3, 3]
    assert batch.indices.tolist() == [7, 3, 3]
    assert batch.labels.tolist() == [1, 0, 0]
    assert torch.equal(batch.inputs[0], dataset.items[7][0])
    assert as_indexed(indexed, name="other", split="test") is indexed


def test_inputs_of_every_kind():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    array.flags.writeable = False
    kinds = {
        "rgb": (Image.fromarray(array), (3, 4, 4)),
        "gray": (Image.fromarray(array[..., 0]), (1, 4, 4)),
        "palette": (Image.fromarray(array).convert("P"), (3, 4, 4)),
        "array": (array, (4, 4, 3)),
        "bits": (torch.zeros(5, dtype=torch.bfloat16), (5,)),
        "scalar": (torch.tensor(3.0), ()),
    }
    for name, (value, shape) in kinds.items():
        indexed = as_indexed([(value, np.int64(0))] * 2, name=name, split="train", classes=["only"])
        (batch,) = loader(indexed, [np.array([1, 0])], checksums=True)
        assert batch.inputs.shape[1:] == shape == indexed.input_shape
        assert batch.input_crc32c[0] == batch.input_crc32c[1]
    (rgb,) = as_indexed([(kinds["rgb"][0], 0)], name="x", split="train", classes=["only"]).shared_inputs([0])
    np.testing.assert_array_equal(rgb.numpy(), array.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (Items(images(6), targets=[0, 1, 2, 0, 1, 2]), [0, 1, 2, 0, 1, 2]),
        (Items(images(6), labels=torch.tensor([0, 1, 2, 0, 1, 2])), [0, 1, 2, 0, 1, 2]),
        (Subset(Items(images(6), targets=[0, 1, 2, 0, 1, 2]), [5, 0]), [2, 0]),
        (TensorDataset(torch.zeros(3, 2), torch.tensor([1, 0, 2])), [1, 0, 2]),
    ],
)
def test_labels_without_reading(dataset, labels):
    indexed = as_indexed(dataset, name="mine", split="train")
    assert indexed.labels().tolist() == labels
    assert indexed.fetch(range(len(labels)))[1].tolist() == labels
    assert indexed.classes == tuple(str(label) for label in range(3))


def test_a_target_transform_makes_targets_unknown():
    dataset = Items(
        images(6), targets=[9] * 6, target_transform=lambda label: label, classes=[("cat", "kitty"), "b", "c"]
    )
    indexed = as_indexed(dataset, name="mine", split="train")
    assert indexed.labels() is None
    assert indexed.classes[0] == "cat, kitty"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class OddLabel:
    def __index__(self):
        raise ValueError("an odd label")


class Unlisted(Items):
    @property
    def targets(self):
        raise OSError("labels.csv is lost")


class Endless(Items):
    def __len__(self):
        raise RuntimeError("no end")


def truncated_picture():
    """As Pillow opens it: the file is read when its pixels are asked for."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "PNG")
    return Image.open(io.BytesIO(whole.getvalue()[:2000]))


IMAGE = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "a stream has none"),
        ((item for item in ()), "a stream has none"),
        ([], "no samples"),
        (Items([(IMAGE, 0)]), "attribute `classes`"),
        (Items([{"x": 1}], classes="ab"), "is a dict"),
        (Items([(IMAGE, 0, 0, 0)], classes="ab"), "a tuple of 4"),
        (Items([(IMAGE, 2)], classes="ab"), "0 to 1"),
        (Items([(IMAGE, -2)], classes="ab"), "0 to 1"),
        (Items([(IMAGE, 0)] * 2, classes="ab", targets=[0, 5]), "label of sample 1 of mine is 5"),
        (Items([(IMAGE, 0)], classes="ab", targets=[1]), "is 0, and its .targets or .labels says 1"),
        (Items([(IMAGE, 0.5)], classes="ab"), "is 0.5"),
        (Items([(IMAGE, torch.zeros(3, 224, 224))], classes="ab"), r"is a Tensor of shape \(3, 224, 224\) and dtype"),
        (
            Items([(IMAGE, np.zeros((9, 9)))], classes="ab"),
            r"is a ndarray of shape \(9, 9\) and dtype float64: TypeError",
        ),
        (Items([(IMAGE, OddLabel())], classes="ab"), "ValueError: an odd label"),
        (Items([(IMAGE.to_sparse(), 0)], classes="ab"), "layout torch.sparse_coo"),
        (Items([(IMAGE.to("meta"), 0)], classes="ab"), "is a tensor on meta"),
        (
            Items([(truncated_picture(), 0)], classes="ab"),
            "sample 0 of mine is an image that cannot be decoded: OSError",
        ),
        (Items([(IMAGE, 0)], classes=7), "Items raises TypeError: 'int' object is not iterable"),
        (Unlisted([(IMAGE, 0)], classes="ab"), "Unlisted raises OSError: labels.csv is lost"),
        (Endless([(IMAGE, 0)], classes="ab"), "Endless raises RuntimeError: no end"),
        (Items([({}, 0)], classes="ab"), "is a dict"),
        (Items([(np.array(["x"]), 0)], classes="ab"), "array of <U1"),
        (Items([(Image.new("F", (2, 2)), 0)], classes="ab"), "mode F"),
        (Items([(IMAGE, 0), (IMAGE.byte(), 0)], classes="ab"), "dtype"),
        (Items([KeyError("lost")], classes="ab"), "sample 0 of mine cannot be read: Items raises KeyError: 'lost'"),
    ],
)
def test_what_is_refused(dataset, message):
    with pytest.raises(DatasetError, match=message):
        as_indexed(dataset, name="mine", split="train").fetch([0, 1])


def test_checksums_are_of_the_shared_bytes():
    image = images(1)[0][0]
    assert input_crc32c(image) == google_crc32c.value(image.numpy().tobytes())
    assert input_crc32c(image.transpose(0, 2)) == google_crc32c.value(
        image.transpose(0, 2).contiguous().numpy().tobytes()
    )
    data = torch.stack([image for image, _ in images(9, size=8)])
    memory = ArrayDataset(data, np.arange(9) % 3, name="m", split="train", classes=("a", "b", "c"))
    mapped = as_indexed(images(9, size=8), name="l", split="train", classes="abc")
    want = [input_crc32c(data[i]) for i in (8, 2)]
    for dataset in (memory, mapped):
        (batch,) = loader(dataset, [np.array([8, 2])], size=5, checksums=True)
        assert batch.input_crc32c.tolist() == want
        assert batch.inputs.shape == (2, 3, 5, 5)
        assert next(iter(loader(dataset, [np.array([8])]))).input_crc32c is None
    assert fingerprint_samples(memory) == fingerprint_samples(mapped)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.bfloat16, torch.float64])
def test_arrays_of_any_dtype(dtype):
    data = torch.randint(0, 2, (5, 2, 3)).to(dtype)
    dataset = ArrayDataset(data, np.zeros(5), name="m", split="train", classes=("a",))
    assert torch.equal(dataset.shared_inputs(np.array([4, 0])), data[[4, 0]])


def test_fingerprints_see_every_change():
    def fingerprint(data, count=64):
        return fingerprint_samples(ArrayDataset(data, np.zeros(len(data)), name="m", split="t", classes=("a",)), count)

    data = torch.stack([image for image, _ in images(9)])
    changed = data.clone()
    changed[3, 0, 0, 0] ^= 1
    different = [data, changed, data.flip(0), data.reshape(9, 3, 2, 8), data.view(torch.int8), data[:8]]
    assert len({fingerprint(each) for each in different}) == len(different)
    assert fingerprint(data, 4) != fingerprint(data, 5)
    assert fingerprint_labels([1, -2]) == hashlib.sha256(b"\1" + bytes(7) + b"\xfe" + b"\xff" * 7).hexdigest()


def test_random_samples_are_refused():
    class Random(Items):
        def __getitem__(self, index):
            return torch.rand(3), 0

    with pytest.raises(DatasetError, match="augments at random"):
        check_deterministic(as_indexed(Random([0] * 3, classes="a"), name="mine", split="train"))
    check_deterministic(as_indexed(images(20), name="mine", split="train", classes="abc"))


class Epochs:
    """Another order every time it is asked."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.epoch += 1
        yield from map(BatchRequest, np.random.default_rng(self.epoch).permutation(8).reshape(4, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_in_order_without_the_global_generator(workers):
    indexed = as_indexed(images(8), name="mine", split="train", classes="abc")
    before = torch.get_rng_state()
    batches = loader(indexed, Epochs(), workers=workers)
    assert len(batches) == 4
    assert batches.persistent_workers is (workers > 0)
    next(iter(batches))  # given up after one batch
    for epoch in (2, 3):
        order = torch.cat([batch.indices for batch in batches])
        assert order.tolist() == np.random.default_rng(epoch).permutation(8).tolist()
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_in_workers_come_out_as_they_were():
    items = Items([*images(20), KeyError("lost")], classes="abc")
    indexed = as_indexed(Subset(items, range(20)), name="mine", split="train")
    indexed._dataset = items
    caught = []
    for workers in (0, 1):
        with pytest.raises(DatasetError, match="lost") as info:
            list(loader(indexed, [np.array([0]), np.array([20])], workers=workers))
        caught.append(info.value)
    assert str(caught[0]) == str(caught[1])
    assert "Traceback" not in str(caught[1])
    assert "KeyError" in caught[1].__notes__[0]


class Fatal(Items):
    def __getitem__(self, index):
        if torch.utils.data.get_worker_info():
            os._exit(1)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_a_dataset_error():
    indexed = as_indexed(Fatal(images(3), classes="abc"), name="mine", split="train")
    with pytest.raises(DatasetError, match="died") as caught:
        list(loader(indexed, [np.array([0])], workers=1))
    assert "--workers 0" in caught.value.remedy


def test_labels_of_several_lengths_are_looked_at_sample_by_sample():
    ragged = Items([(IMAGE, 0), (IMAGE, [1, 2])], classes="ab", targets=[0, [1, 2]])
    with pytest.raises(DatasetError, match=r"the label of sample 1 of mine is \[1, 2\]"):
        as_indexed(ragged, name="mine", split="train").fetch([1])


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (3, 32, 32), (1, 28, 28), (4, 4, 3)], ids=str)
def test_images_with_their_channels_last_are_told_so(shape, capsys):
    as_indexed([(np.zeros(shape, np.uint8), 0)] * 2, name="mine", split="train", classes=["only"])
    told = "let the dataset return images channels first" in capsys.readouterr().err
    assert told == (shape[2] in (1, 3) and shape[0] > 4)


def test_a_batch_with_its_channels_last_is_told_so():
    preprocessor = Preprocessor(Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(ModelError, match=r"permute\(2, 0, 1\)"):
        preprocessor.per_batch(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.float32)
    with pytest.raises(ModelError) as caught:
        preprocessor.per_batch(torch.zeros(2, 5, 32, 32, dtype=torch.uint8), torch.float32)
    assert "permute" not in str(caught.value)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (lambda image: image, "lambda"),
        ((number for number in ()), "generator"),
        (io.BytesIO().getbuffer(), "memoryview"),
    ],
    ids=["lambda", "generator", "buffer"],
)
def test_what_cannot_go_to_a_spawned_worker_is_named(held, reason):
    indexed = as_indexed(Items(images(8), classes="abc", held=held), name="mine", split="train")
    batches = loader(indexed, [np.arange(4)], workers=1)
    batches.multiprocessing_context = "spawn"
    with pytest.raises(DatasetError, match=reason) as caught:
        next(iter(batches))
    assert "cannot be sent to worker processes" in caught.value.found
    assert "pickle" in caught.value.needed
    assert "--workers 0" in caught.value.remedy


def test_workers_that_cannot_be_started_are_named(monkeypatch):
    def refuse(process):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    batches = loader(as_indexed(images(8), name="mine", split="train", classes="abc"), [np.arange(4)], workers=1)
    with pytest.raises(DatasetError, match=r"could not be started: .*Too many open files") as caught:
        next(iter(batches))
    assert "--workers" in caught.value.remedy


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_after_others_is_named_in_workers_too(workers):
    items = [*images(40), RuntimeError("DataLoader worker trouble of the user's own")]
    dataset = Items(items, classes="abc")
    # Never drawn by the probes, which look at some of the first 40.
    dataset.__class__ = type("Late", (Items,), {"__len__": lambda self: len(self.items) if self.late else 40})
    dataset.late = False
    indexed = as_indexed(dataset, name="mine", split="train")
    dataset.late = True
    batches = iter(loader(indexed, [np.arange(4), np.array([40])], workers=workers))
    next(batches)
    with pytest.raises(
        DatasetError, match="sample 40 of mine cannot be read: Late raises RuntimeError: DataLoader worker"
    ):
        next(batches)


def test_a_spawned_worker_imports_what_was_found_in_the_current_folder(tmp_path, monkeypatch):
    """As the console script finds it, whose path begins with its own folder and not with the current one."""
    (tmp_path / "kd_spawned_data.py").write_text(
        "import torch\n"
        "class Data(list):\n"
        "    classes = ['a']\n"
        "def load(): return Data([(torch.zeros(1, 2, 2), 0)] * 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    batches = loader(open_dataset("py:kd_spawned_data:load", split="train"), [np.arange(4)], workers=1)
    batches.multiprocessing_context = "spawn"
    assert next(iter(batches)).inputs.shape == (4, 1, 2, 2)


def test_torchvision_and_scikit_learn_are_imported_for_those_only_who_use_them():
    """They take 5 s and 2 s."""
    script = (
        "import sys\n"
        "import kdcache.data.loader, kdcache.data.text_files, kdcache.data.views\n"
        "from kdcache.data.registry import open_dataset\n"
        "open_dataset('digits', split='train')\n"
        "print([name for name in ('torchvision', 'sklearn') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
