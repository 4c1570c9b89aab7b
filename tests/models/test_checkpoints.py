"""Checkpoints as people save them: what is read, what is refused, and by which name."""

import argparse
import io
import pathlib
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from kdcache.core.errors import CheckpointError
from kdcache.models.checkpoints import fits, load_weights, read_checkpoint
from kdcache.models.registry import build_model, weights_sha256


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential()
        network.add_module("body", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        network.add_module("head", nn.Linear(4, 2))
        network.body[1].running_mean.normal_()
        return network


WEIGHTS = small(1).state_dict()


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


def lightning(prefix, extra=None, hyper=None):
    return {
        "epoch": 4,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed(prefix), **(extra or {})},
        "loops": {"fit_loop": {"state_dict": {}}},
        "hyper_parameters": hyper or {"lr": 0.1},
    }


READ = {
    "no counters": {name: value for name, value in WEIGHTS.items() if "num_batches" not in name},
    "lightning": lightning("model."),
    "lightning with a path": lightning("net.", hyper={"data": pathlib.Path("data"), "lr": np.float32(0.1)}),
    "lightning with a loss": lightning("model.", {"criterion.weight": torch.ones(3)}),
    "lightning with a namespace": lightning("net.", hyper=argparse.Namespace(lr=0.1)),
    "compiled and wrapped": {"model": prefixed("module._orig_mod.")},
    "a script's arguments": {"model": WEIGHTS, "optimizer": {"state": {0: {}}}, "args": argparse.Namespace(lr=0.1)},
    "numpy scalars": {"model": WEIGHTS, "best": np.float64(76.1), "epoch": np.int64(3), "curve": np.zeros(3)},
    "deeper": {"checkpoint": {"model": {"state_dict": WEIGHTS}}},
    "counted": {**WEIGHTS, "total_ops": torch.zeros(1), "body.0.total_params": torch.zeros(1)},
    "with a loss": {**WEIGHTS, "criterion.weight": torch.ones(2)},
    **{
        key: {key: WEIGHTS, "epoch": 3}
        for key in ("ema", "state_dict_ema", "net", "weights", "model_state", "student", "my_own_key")
    },
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_training_scripts_are_read(tmp_path, what, legacy):
    torch.save(READ[what], tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    module = small()
    load_weights(module, tmp_path / "w.pt")
    found = module.state_dict()
    for name, value in WEIGHTS.items():
        if "num_batches" not in name:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("counted", "total_ops, body.0.total_params"),
        ("with a loss", "criterion.weight"),
        ("lightning with a loss", "criterion.weight"),
    ],
)
def test_what_is_left_out_is_named(tmp_path, capsys, what, named):
    torch.save(READ[what], tmp_path / "w.pt")
    load_weights(small(), tmp_path / "w.pt")
    assert f"not part of the model and left out: {named}" in capsys.readouterr().err


def test_a_network_with_a_wrapper_takes_the_weights_without_it(tmp_path):
    wrapped = nn.Module()
    wrapped.model = small()
    torch.save(WEIGHTS, tmp_path / "w.pt")
    load_weights(wrapped, tmp_path / "w.pt")
    assert torch.equal(wrapped.model.head.weight, WEIGHTS["head.weight"])


SEVERAL = {
    "entries": ({"student": WEIGHTS, "teacher": prefixed("module.backbone.", small(2).state_dict())}, "student"),
    "an average": ({"state_dict": WEIGHTS, "state_dict_ema": small(2).state_dict()}, "state_dict"),
    "prefixes": (
        {"state_dict": prefixed("student.") | prefixed("teacher.", small(2).state_dict())},
        "state_dict.student",
    ),
}


@pytest.mark.parametrize("what", SEVERAL)
def test_of_several_that_fit_the_user_chooses(tmp_path, what):
    content, key = SEVERAL[what]
    torch.save(content, tmp_path / "w.pt")
    module = small()
    with pytest.raises(CheckpointError, match=f"several sets of weights that fit the model: {key}, ") as caught:
        load_weights(module, tmp_path / "w.pt")
    assert caught.value.remedy == f"give --checkpoint-key, such as --checkpoint-key {key}"
    load_weights(module, tmp_path / "w.pt", key=key)
    assert torch.equal(module.head.weight, WEIGHTS["head.weight"])
    with pytest.raises(CheckpointError, match="no weights under 'pupil'") as caught:
        load_weights(module, tmp_path / "w.pt", key="pupil")
    assert repr(key) in caught.value.needed


def test_a_key_is_enough_without_the_prefix_below_it(tmp_path):
    content, _ = SEVERAL["entries"]
    torch.save(content, tmp_path / "w.pt")
    module = small()
    load_weights(module, tmp_path / "w.pt", key="teacher")
    assert weights_sha256(module) == weights_sha256(small(2))


def test_a_deeper_network_of_the_same_family_does_not_fit(tmp_path):
    """Its first layers have the names and the shapes of the smaller one's."""
    deeper = build_model("resnet56", num_classes=3, input_shape=(3, 8, 8), seed=0).module
    torch.save(deeper.state_dict(), tmp_path / "w.pt")
    module = build_model("resnet20", num_classes=3, input_shape=(3, 8, 8), seed=0).module
    with pytest.raises(CheckpointError, match="unexpected: stages"):
        load_weights(module, tmp_path / "w.pt")
    torch.save({**WEIGHTS, "second_head.weight": torch.zeros(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"1 unexpected: second_head\.weight"):
        load_weights(small(), tmp_path / "w.pt")


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    module = small()
    before = weights_sha256(module)
    torch.save({"net": prefixed("module.", WEIGHTS | {"head.weight": torch.zeros(5, 4)})}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"1 of the wrong shape: head.weight \(5, 4\), not \(2, 4\)"):
        load_weights(module, tmp_path / "w.pt")
    assert weights_sha256(module) == before
    assert not fits(module, read_checkpoint(tmp_path / "w.pt"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_weights_that_are_shared_are_stored_once(tmp_path):
    saved, module = Tied(), Tied()
    save_model(saved, str(tmp_path / "w.safetensors"))
    assert len(read_checkpoint(tmp_path / "w.safetensors")) == 3
    load_weights(module, tmp_path / "w.safetensors")
    assert weights_sha256(module) == weights_sha256(saved)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ""])
def test_safetensors_are_known_by_their_content(tmp_path, suffix):
    save_file(WEIGHTS, tmp_path / f"w{suffix}")
    module = small()
    load_weights(module, tmp_path / f"w{suffix}")
    assert torch.equal(module.head.weight, WEIGHTS["head.weight"])


def test_a_file_of_torch_that_is_named_safetensors_is_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.safetensors")
    load_weights(small(), tmp_path / "w.safetensors")


def literature(state, *, shortcut, head):
    """The same weights under the names that the code of the papers has."""
    names = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "stages":
            parts[:2] = [f"layer{int(parts[1]) + 1}"]
            parts = [shortcut if part == "shortcut" else part for part in parts]
        elif parts[0] == "fc":
            parts[0] = head
        names[".".join(parts)] = value
    return names


@pytest.mark.parametrize("spec", ["resnet20", "resnet8x4"])
@pytest.mark.parametrize(("shortcut", "head"), [("downsample", "fc"), ("shortcut", "linear")])
def test_residual_networks_load_the_checkpoints_of_the_literature(tmp_path, spec, shortcut, head):
    def build(seed, classes=5):
        return build_model(spec, num_classes=classes, input_shape=(3, 8, 8), seed=seed).module.eval()

    teacher, module = build(1), build(2)
    state = literature(teacher.state_dict(), shortcut=shortcut, head=head)
    assert f"layer2.0.{shortcut}.0.weight" in state
    torch.save({"model": prefixed("module.", state), "opt": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    load_weights(module, tmp_path / "w.pth")
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(module(inputs), teacher(inputs))
    with pytest.raises(CheckpointError, match=r"model; 2 of the wrong shape: fc.weight \(5, \d+\), not \(7, \d+\)"):
        load_weights(build(0, classes=7), tmp_path / "w.pth")


def pages(path):
    path.write_text("<!DOCTYPE html><html>Virus scan warning</html>")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")


def scripted(path):
    torch.jit.save(torch.jit.trace(small().eval(), torch.zeros(1, 3)), path)


def exported(path):
    with open(path, "wb") as file:
        torch.export.save(torch.export.export(small().eval(), (torch.zeros(2, 3),)), file)


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("make", "what", "remedy"),
    [
        (pages, "a web page", "download the file itself"),
        (pointer, "a Git LFS pointer", "git lfs pull"),
        (scripted, "a TorchScript program", "torch.jit.load"),
        (exported, "a program of torch.export", "torch.export.load"),
    ],
)
def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path, make, what, remedy, suffix):
    make(tmp_path / f"w{suffix}")
    with pytest.raises(CheckpointError, match=f"is {what}") as caught:
        load_weights(small(), tmp_path / f"w{suffix}")
    assert "torch.save or safetensors" in caught.value.needed
    assert remedy in caught.value.remedy


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


class Odd:
    pass


@pytest.mark.parametrize("value", [Evil(), Odd(), nn.Linear(1, 1), np.array([Odd()], dtype=object), print])
def test_torchs_advice_to_load_unsafely_is_never_passed_on(tmp_path, value):
    torch.save({"model": WEIGHTS, "other": value}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(small(), tmp_path / "w.pt")
    assert "would run code from the file" in caught.value.found
    assert "weights_only" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)


def test_a_plain_pickle_is_refused_without_torchs_advice(tmp_path):
    for content in (pickle.dumps({"a": Odd()}, protocol=4), io.BytesIO(b"\x80\x04garbage").getvalue()):
        (tmp_path / "w.pkl").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_weights(small(), tmp_path / "w.pkl")
        assert "weights_only" not in str(caught.value)
        assert caught.value.remedy
