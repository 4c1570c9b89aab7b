"""What the loop and the losses ask of a device, looked at without one."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache import StudentConfig, TrainConfig, losses
from kdcache.core.errors import KdcacheError
from kdcache.data.batch import Batch, BatchRequest
from kdcache.data.loader import batch_loader
from kdcache.data.preprocess import Preprocessor
from kdcache.data.soft_targets import SoftTargets
from kdcache.distill.objective import distillation_objective, label_objective
from kdcache.distill.optim import AveragedWeights
from kdcache.distill.run_state import RunState
from kdcache.distill.trainer import _Loop
from kdcache.distill.training_data import training_data
from kdcache.models import device
from kdcache.models.distributed import Processes
from kdcache.store.records import Preprocess
from tests.helpers import Network, synthetic


class Waits(TorchDispatchMode):
    """Collects the operations whose result the host must wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.NAMES or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


LABELS = torch.arange(6) % 4
LOSSES = {
    "hard_cross_entropy": lambda: losses.hard_cross_entropy(numbers(6, 4), LABELS, label_smoothing=0.1),
    "binary_cross_entropy": lambda: losses.binary_cross_entropy(numbers(6, 4), torch.ones(6, 4)),
    "binary_kd": lambda: losses.binary_kd(numbers(6, 4), numbers(6, 4), temperature=2.0),
    "labelled_cross_entropy": lambda: losses.labelled_cross_entropy(numbers(6, 4), LABELS - 1),
    "mixed_cross_entropy": lambda: losses.mixed_cross_entropy(numbers(6, 4), LABELS, LABELS, torch.rand(6)),
    "kd": lambda: losses.kd(numbers(6, 4), numbers(6, 4), temperature=2.0),
    "topk_kd": lambda: losses.topk_kd(
        numbers(6, 4), numbers(6, 2), torch.tensor([[0, 3]] * 6), torch.zeros(6), temperature=2.0
    ),
    "soft_cross_entropy": lambda: losses.soft_cross_entropy(numbers(6, 4), numbers(6, 4)),
    "logit_mse": lambda: losses.logit_mse(numbers(6, 4), numbers(6, 4)),
    "decoupled_kd": lambda: losses.decoupled_kd(numbers(6, 4), numbers(6, 4), LABELS, temperature=2.0),
    "dist": lambda: losses.dist(numbers(6, 4), numbers(6, 4)),
    "standardized_kd": lambda: losses.standardized_kd(numbers(6, 4), numbers(6, 4)),
    "cosine": lambda: losses.cosine(numbers(6, 5), numbers(6, 5)),
    "feature_mse": lambda: losses.feature_mse(numbers(6, 5), numbers(6, 5)),
    "attention_transfer": lambda: losses.attention_transfer(numbers(6, 2, 3, 3), numbers(6, 5, 3, 3)),
    "similarity_preserving": lambda: losses.similarity_preserving(numbers(6, 5), numbers(6, 7)),
    "relational_distance": lambda: losses.relational_distance(numbers(6, 5), numbers(6, 7)),
    "relational_angle": lambda: losses.relational_angle(numbers(6, 5), numbers(6, 7)),
    "contrastive": lambda: losses.contrastive(numbers(6, 5), numbers(6, 5), numbers(8, 5), temperature=0.1),
}


def test_every_loss_is_looked_at():
    named = {name for name in losses.__all__ if name != "kd_with_labels"}
    assert named == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_device(name):
    with Waits() as waits:
        LOSSES[name]().backward()
    assert waits.found == []


def test_what_waits_is_noticed():
    mask = torch.tensor([True, False])
    with Waits() as waits:
        mask.any().item()
        torch.ones(2)[mask]
        mask.nonzero()
    assert waits.found == ["_local_scalar_dense", "index", "nonzero"]


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1.0, "ema": 0.9}, {"optimizer": "sgd"}])
@pytest.mark.parametrize("distilled", [False, True])
def test_no_step_waits_for_the_device(monkeypatch, settings, distilled):
    """All of a step but what optimisers do with their counters, which are on the host."""
    config = TrainConfig(device="cpu", batch_size=16, **settings)
    objective = distillation_objective(StudentConfig(device="cpu")) if distilled else label_objective(0.1)
    dataset = synthetic(64)
    data = training_data(dataset, Preprocess(), config)
    loop = _Loop(Network(16, 4), data, objective, config, RunState(None, lambda _: {}, config), None, Processes())
    inputs, labels = dataset.fetch(np.arange(16))
    teacher = SoftTargets.of(torch.randn(16, 4)) if distilled else None
    batch = Batch(inputs, labels, torch.arange(16), soft_targets=teacher)
    loop._train_on(batch, 0, 0)
    monkeypatch.setattr(loop.optimizer, "step", lambda: None)
    # The counter of the average stays on the host: on a device it would be waited for.
    host = contextlib.nullcontext() if loop.average is None else _counted_in_python(monkeypatch, loop.average)
    with host, Waits() as waits:
        loop._train_on(batch, 0, 1)
    assert waits.found == []


def _counted_in_python(monkeypatch, average):
    assert average.n_averaged.device.type == "cpu"
    del average._buffers["n_averaged"]
    average.n_averaged = 1
    return contextlib.nullcontext()


def test_the_average_is_torchs():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    network = Network(16, 4)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    ours = AveragedWeights(network, 0.8)
    for _ in range(4):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network.train()(torch.randn(8, 16))
        theirs.update_parameters(network)
        ours.update(network)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


class OnSecondGpu:
    """A tensor that says it is on the second of two GPUs."""

    device, shape, dtype = torch.device("cuda:1"), (2,), torch.float32


def test_a_copy_to_the_host_is_awaited_on_the_stream_of_its_device(monkeypatch):
    seen = []

    class Host:
        def copy_(self, tensor, non_blocking):
            seen.append(("copy", non_blocking))

        def numpy(self):
            seen.append("read")
            return np.zeros(2)

    class Event:
        def record(self, stream=None):
            seen.append(("record", stream))

        def synchronize(self):
            seen.append("wait")

    @contextlib.contextmanager
    def current(device):
        seen.append(("enter", device))
        yield
        seen.append("leave")

    monkeypatch.setattr(device.torch, "empty", lambda *_, **__: Host())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    device.to_host(OnSecondGpu())()
    second = torch.device("cuda:1")
    order = [("enter", second), ("copy", True), ("record", "stream of cuda:1"), "leave", "wait", "read"]
    assert seen == order


@pytest.mark.parametrize(("name", "made_current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("auto", []), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(monkeypatch, name, made_current):
    seen = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    device.resolve_device(name)
    assert seen == made_current
    device.device_count(name)  # asks, and changes nothing
    assert seen == made_current


class Recorded(torch.Tensor):
    """A tensor that says how it was moved."""

    moves: tuple = ()

    def _moved(self, move):
        other = torch.zeros(2).as_subclass(Recorded)
        other.moves = (*self.moves, move)
        return other

    def pin_memory(self):
        return self._moved("pinned")

    def to(self, device, non_blocking):
        return self._moved((str(device), non_blocking))


def test_what_is_joined_is_pinned_with_the_batch_and_copied_without_waiting(monkeypatch):
    def value():
        return torch.zeros(2).as_subclass(Recorded)

    def join(batch):
        rows = SoftTargets([(None, {"logits": value()})])
        return batch._replace(
            inputs=value(), labels=value(), soft_targets=rows, features={"f": value()}, negatives={"f": value()}
        )

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for workers in (0, 1):
        requests = [BatchRequest(np.arange(2))] * 3
        loader = batch_loader(
            synthetic(4),
            requests,
            preprocessor=Preprocessor(Preprocess()),
            workers=workers,
            device=torch.device("cuda:1"),
            join=join,
        )
        batches = list(loader)
        assert len(batches) == 3
        for batch in batches:
            on_gpu = batch.to(torch.device("cuda:1"))
            (rows,) = (rows for _, rows in on_gpu.soft_targets._parts)
            for tensor in (on_gpu.inputs, rows["logits"], on_gpu.features["f"], on_gpu.negatives["f"]):
                assert tensor.moves == ("pinned", ("cuda:1", True))


def test_a_device_that_has_no_room_for_the_weights_is_named():
    class TooLarge(nn.Linear):
        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(KdcacheError) as caught:
        device.move_to(TooLarge(10, 10), torch.device("cuda:1"))
    assert caught.value.found == (
        "cuda:1 ran out of memory while TooLarge was moved there: CUDA out of memory. Tried to allocate 2 GiB."
    )
    assert "440 bytes" in caught.value.needed
    assert "--device" in caught.value.remedy


def test_what_a_network_keeps_of_an_evaluation_can_be_trained_with():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.table = nn.Linear(4, 4), None

        def forward(self, inputs):
            if self.table is None:
                self.table = torch.ones(4)
            return self.linear(inputs) * self.table

    module = Keeps()
    with device.evaluation_mode(module):
        assert not module(torch.ones(2, 4)).requires_grad
    module(torch.ones(2, 4)).sum().backward()
    assert not module.table.is_inference()
