import os
import sys

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from kdcache.core.config import InputConfig
from kdcache.core.errors import CheckpointError, KdcacheError, MissingExtra, ModelError, StorageError
from kdcache.models.checkpoints import load_weights, read_checkpoint, save_checkpoint
from kdcache.models.cnn import NETWORKS
from kdcache.models.registry import build_model, count_parameters, weights_sha256
from kdcache.store.records import Preprocess


def build(spec, *, num_classes=10, input_shape=(3, 32, 32), seed=0, default=None, replace_head=False, **settings):
    options = {"seed": seed, "default": default, "replace_head": replace_head, "settings": InputConfig(**settings)}
    return build_model(spec, num_classes=num_classes, input_shape=input_shape, **options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 278_324),
        ("resnet56", 861_620),
        ("resnet110", 1_736_564),
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
    ],
)
def test_residual_networks_are_those_of_the_literature(name, parameters):
    assert count_parameters(build(name, num_classes=100).module) == parameters


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet20", "resnet8x4"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 48), (2, 9, 5)])
def test_networks_adapt(name, shape):
    module = build(name, num_classes=7, input_shape=shape).module
    logits = module(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_cnn_for_mnist_by_hand():
    parameters = (9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 49 * 128 + 128) + (128 * 10 + 10)
    assert count_parameters(build("cnn", input_shape=(1, 28, 28)).module) == parameters == 206_922


def test_cnn_pools_only_what_is_larger():
    for side, pooled in ((8, 2), (28, 7), (64, 7)):
        assert build("cnn", input_shape=(1, side, side)).module.classifier[1].in_features == 32 * pooled**2


def test_networks_refuse_what_they_cannot_take():
    for name in ("cnn", "resnet20"):
        with pytest.raises(ModelError, match=r"\(3, 2, 2\)"):
            build(name, input_shape=(3, 2, 2))
        with pytest.raises(ModelError, match=r"\(16,\)"):
            build(name, input_shape=(16,))
    assert build("mlp", input_shape=(16,)).module(torch.zeros(2, 16)).shape == (2, 10)


@pytest.mark.parametrize("spec", ["cnn", "torchvision:resnet18", "timm:resnet18"])
def test_initial_weights_come_from_the_seed_alone(spec):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights_sha256(build(spec).module)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert weights_sha256(build(spec).module) == first
    assert weights_sha256(build(spec, seed=1).module) != first


def test_preprocessing_of_a_checkpoint_replaces_that_of_published_weights():
    options = {"num_classes": 10, "input_shape": (3, 32, 32), "seed": 0, "fits": lambda module: True}
    recorded = Preprocess(resize=64, crop=64, mean=(0.5,) * 3, std=(1.0,) * 3)
    assert build_model("torchvision:resnet18@DEFAULT", **options).preprocess.crop == 224
    assert build_model("torchvision:resnet18@DEFAULT", recorded=recorded, **options).preprocess == recorded
    larger = build_model(
        "torchvision:resnet18@DEFAULT", recorded=recorded, settings=InputConfig(size=96), **options
    ).preprocess
    assert (larger.crop, larger.mean) == (96, recorded.mean)


def test_preprocessing_of_the_dataset_and_by_hand():
    options = {"default": Preprocess(mean=(0.1,), std=(0.2,)), "input_shape": (1, 28, 28)}
    assert build("cnn", **options).preprocess == Preprocess(mean=(0.1,), std=(0.2,))
    model = build("cnn", **options, size=16, mean=(0.5,) * 3, std=(1.0,) * 3)
    assert model.preprocess == Preprocess(resize=16, crop=16, mean=(0.5,) * 3, std=(1.0,) * 3)
    assert model.module(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    assert not model.has_weights
    # A network for RGB makes the preprocessor expand grayscale.
    assert build("torchvision:resnet18", **options).preprocess.mean == (0.1,) * 3
    assert build("timm:resnet18", input_shape=(1, 28, 28)).preprocess == Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": None}, "--size PIXELS"),
        ({"input_shape": None, "size": 8}, "--mean and --std"),
        ({"mean": (0.5,)}, "both, or neither"),
        ({"mean": (0.5,), "std": (0.0,)}, "more than 0"),
        ({"mean": (0.5,), "std": (1.0, 1.0)}, "one number a channel"),
        ({"input_shape": (5,), "size": 8}, "leave out --size"),
    ],
)
def test_preprocessing_that_cannot_be(options, message):
    with pytest.raises(KdcacheError, match=message):
        build("mlp", **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet21", "did you mean resnet20"),
        ("torchvision:resnet19", "did you mean resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier"),
        ("torchvision:resnet18@IMAGENET", "IMAGENET1K_V1, DEFAULT|one of IMAGENET1K_V1"),
        ("timm:resnet19", "did you mean resnet1"),
        ("timm:resnet18.a1_in2k", "did you mean resnet18.a1_in1k"),
    ],
)
def test_unknown_names_get_advice(spec, message):
    with pytest.raises(ModelError, match=message):
        build(spec)


@pytest.fixture
def offline(monkeypatch):
    """ImageNet weights without the net: a resnet18 of 1000 classes from seed 7."""
    weights = build("torchvision:resnet18", num_classes=1000, seed=7).module.state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **options: dict(weights))
    return weights


def test_torchvision_weights(offline):
    model = build("torchvision:resnet18@DEFAULT", input_shape=None)
    assert model.has_weights
    presets = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    assert model.preprocess == Preprocess(resize=256, crop=224, mean=tuple(presets.mean), std=tuple(presets.std))
    assert torch.equal(model.module.state_dict()["fc.weight"], offline["fc.weight"])
    assert build("torchvision:resnet18@IMAGENET1K_V1", size=64).preprocess.crop == 64


def test_torchvision_weights_with_another_head(offline):
    state = build("torchvision:resnet18@DEFAULT", replace_head=True).module.state_dict()
    assert state["fc.weight"].shape == (10, 512)
    assert all(torch.equal(state[name], value) for name, value in offline.items() if not name.startswith("fc."))
    kept = build("torchvision:resnet18@DEFAULT", replace_head=True, num_classes=1000).module
    assert torch.equal(kept.fc.weight, offline["fc.weight"])
    offline["layer5.weight"] = torch.zeros(1)
    with pytest.raises(ModelError, match=r"layer5\.weight"):
        build("torchvision:resnet18@DEFAULT", replace_head=True)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", refuse)
    with pytest.raises(ModelError, match="no route to host"):
        build("torchvision:resnet18@DEFAULT")
    import timm

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ModelError, match="no route to host"):
        build("timm:resnet18.a1_in1k")


def test_timm_weights_bring_their_preprocessing(monkeypatch):
    import timm

    create = timm.create_model
    calls = []

    def offline_create(name, *, pretrained, **options):
        calls.append((name, pretrained, options))
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline_create)
    model = build("timm:resnet18.a1_in1k")
    # Tested at 288 with crop_pct 1.0, trained at 224 with 0.95.
    assert (model.preprocess.crop, model.preprocess.resize, model.preprocess.interpolation) == (224, 235, "bicubic")
    assert model.has_weights
    assert model.module(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    assert build("timm:resnet18.a1_in1k", replace_head=True).module.num_classes == 10
    assert calls == [("resnet18.a1_in1k", True, {}), ("resnet18.a1_in1k", True, {"num_classes": 10})]
    assert not build("timm:resnet18").has_weights


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"kdcache\[timm\]"):
        build("timm:resnet18")


def test_factories(tmp_path, monkeypatch):
    (tmp_path / "kd_my_models.py").write_text(
        "from torch import nn\n"
        "def sized(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
        "def fixed(): return nn.Identity()\n"
        "def wrong(): return 3\n"
        "def broken(): return {}['x']\n"
    )
    monkeypatch.chdir(tmp_path)
    model = build("py:kd_my_models:sized", num_classes=4)
    assert model.module[1].out_features == 4
    assert model.has_weights
    assert isinstance(build("py:kd_my_models:fixed").module, nn.Identity)
    with pytest.raises(ModelError, match="returned a int"):
        build("py:kd_my_models:wrong")
    with pytest.raises(ModelError, match=r"KeyError: 'x' \(.*kd_my_models.py, line 5\)"):
        build("py:kd_my_models:broken")


def test_weights_hash_sees_names_dtypes_shapes_and_values():
    def module(weight, name="weight"):
        made = nn.Module()
        made.register_buffer(name, weight)
        return made

    ones = torch.ones(2, 3)
    changed = ones.clone()
    changed[1, 2] = 1.0000001
    different = [ones, changed, ones.reshape(3, 2), ones.bfloat16(), ones.half(), torch.ones(()), torch.ones(0)]
    hashes = {weights_sha256(module(value)) for value in different} | {weights_sha256(module(ones, "bias"))}
    assert len(hashes) == len(different) + 1
    assert weights_sha256(module(torch.ones(3, 2).t())) == weights_sha256(module(ones))


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "nesting", [(), ("state_dict",), ("model",), ("model_state_dict",), ("model_ema",), ("model", "state_dict")]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_found_in_their_wrappers(tmp_path, nesting, prefix):
    teacher, student = small(), small()
    content = {prefix + name: value for name, value in teacher.state_dict().items()}
    for name in reversed(nesting):
        content = {name: content, "epoch": 3, "n_averaged": torch.tensor(2)}
    torch.save(content, tmp_path / "w.pth")
    load_weights(student, tmp_path / "w.pth")
    assert weights_sha256(student) == weights_sha256(teacher)


def test_a_moving_average_is_loaded(tmp_path):
    teacher, student = small(), small()
    averaged = torch.optim.swa_utils.AveragedModel(teacher)
    save_checkpoint(tmp_path / "w.pt", {"model_ema": averaged.state_dict()})
    load_weights(student, tmp_path / "w.pt")
    assert weights_sha256(student) == weights_sha256(teacher)


def test_a_wrapped_module_keeps_its_prefix(tmp_path):
    wrapped = nn.Module()
    wrapped.module = small()
    save_checkpoint(tmp_path / "w.pt", wrapped.state_dict())
    load_weights(wrapped, tmp_path / "w.pt")


def test_safetensors(tmp_path, monkeypatch):
    teacher, student = small(), small()
    save_file(teacher.state_dict(), tmp_path / "w.safetensors")
    load_weights(student, tmp_path / "w.safetensors")
    assert weights_sha256(student) == weights_sha256(teacher)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtra, match=r"kdcache\[safetensors\]"):
        load_weights(student, tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_are_listed_and_not_loaded(tmp_path):
    student = small()
    before = weights_sha256(student)
    state = small().state_dict()
    del state["0.bias"]
    state |= {"2.weight": torch.zeros(5, 4), "extra": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(student, tmp_path / "w.pt")
    assert "1 missing: 0.bias" in caught.value.found
    assert "1 unexpected: extra" in caught.value.found
    assert "1 of the wrong shape: 2.weight (5, 4), not (2, 4)" in caught.value.found
    assert weights_sha256(student) == before


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("size", [0, 5, 300])
def test_damaged_files(tmp_path, suffix, size):
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(small().state_dict(), path)
    cut(path, size)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_weights(small(), path)


def test_a_flipped_byte_in_a_weight_is_found(tmp_path):
    path, weights = tmp_path / "w.pt", small().state_dict()
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    at = content.index(weights["0.weight"].numpy().tobytes())
    content[at + 5] ^= 4
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # which does not notice
    with pytest.raises(CheckpointError, match="is damaged: the checksum of"):
        load_weights(small(), path)


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(small(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_weights(small(), tmp_path)
    torch.save(small(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"run code from the file: .*Sequential") as caught:
        load_weights(small(), tmp_path / "module.pt")
    assert "state_dict()" in caught.value.remedy
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(CheckpointError, match="holds no weights, but epoch"):
        load_weights(small(), tmp_path / "epoch.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_weights(small(), tmp_path / "list.pt")


def test_checkpoints_come_back_as_they_went(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(2)}, "step": 3, "config": {"lr": 0.1, "tags": ["a", None]}})
    content = read_checkpoint(path)
    assert content["step"] == 3
    assert content["config"] == {"lr": 0.1, "tags": ["a", None]}
    assert content["model"]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_the_registry_is_only_factories():
    assert all(callable(factory) for factory in NETWORKS.values())
    assert np.unique(list(NETWORKS)).size == len(NETWORKS)
