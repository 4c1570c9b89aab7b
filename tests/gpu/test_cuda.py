"""What only a CUDA GPU can show; skipped without one."""

import numpy as np
import pytest
import torch

from kdcache import DumpConfig, StudentConfig, TrainConfig, dump_teacher, open_cache, train_student
from kdcache.core.errors import KdcacheError
from kdcache.data.preprocess import Preprocessor
from kdcache.data.views import as_views
from kdcache.distill.objective import label_objective
from kdcache.distill.trainer import train
from kdcache.distill.training_data import training_data
from kdcache.models import execution
from kdcache.models.device import memory_errors, move_to, resolve_device, to_host
from kdcache.models.execution import choose_execution
from kdcache.models.forward import ForwardPass
from kdcache.store.records import Preprocess
from tests.helpers import Network, synthetic

PLAIN = Preprocess()


def dumped(path, device, teacher=None, **settings):
    config = DumpConfig(device=device, batch_size=64, shard_rows=64, encoding="float32", **settings)
    dump_teacher(teacher or Network(16, 4), synthetic(200), out=path, config=config)
    return open_cache(path)


def busy(device):
    """Some work that a copy has to wait for."""
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        matrix = matrix @ matrix
        matrix /= matrix.norm()
    return matrix


@pytest.mark.parametrize("stream", ["default", "own"])
def test_the_host_reads_what_was_computed_and_nothing_before_it(stream):
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # not the current one, where there are two
    torch.cuda.set_device(0)
    side = torch.cuda.Stream(device) if stream == "own" else torch.cuda.default_stream(device)
    for _ in range(10):
        with torch.cuda.stream(side):
            value = busy(device)[:64].contiguous()
            wait = to_host(value)
        torch.cuda.set_device(0)
        found = wait()
        np.testing.assert_array_equal(found, value.cpu().numpy())


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_a_dump_on_the_second_gpu(tmp_path):
    first = dumped(tmp_path / "cpu", "cpu").column("logits")
    torch.cuda.set_device(0)
    second = dumped(tmp_path / "gpu", "cuda:1").column("logits")
    assert torch.cuda.current_device() == 1
    np.testing.assert_allclose(second, first, atol=1e-4)


def test_a_dump_on_the_gpu_equals_that_on_the_cpu(tmp_path):
    on_cpu = dumped(tmp_path / "cpu", "cpu", features=("layers.1",))
    on_gpu = dumped(tmp_path / "gpu", "cuda:0", features=("layers.1",))
    for name in ("logits", "features.layers.1"):
        np.testing.assert_allclose(on_gpu.column(name), on_cpu.column(name), atol=1e-4)
    np.testing.assert_array_equal(on_gpu.column("labels"), on_cpu.column("labels"))


def test_a_batch_size_that_does_not_fit_is_not_chosen(monkeypatch):
    monkeypatch.setattr(execution, "SHORT_PASS_S", 0.0)
    monkeypatch.setattr(execution, "_SHARE", 1e9)
    free, _ = torch.cuda.mem_get_info()

    class Hungry(torch.nn.Module):
        """Needs all free memory for 100 samples."""

        def forward(self, inputs):
            torch.empty(len(inputs) * (free // 100), dtype=torch.uint8, device=inputs.device)
            return inputs.flatten(1)[:, :4]

    device = torch.device("cuda", 0)
    network = ForwardPass(Hungry(), Preprocessor(PLAIN), device, classes=4)
    found = choose_execution(network, as_views(synthetic(200)), 10**6)
    assert found.batch_size <= 64


@pytest.mark.parametrize("settings", [{"amp": "bf16"}, {"memory_format": "channels-last"}, {"compile": True}])
def test_faster_ways_give_the_same_answers(tmp_path, settings):
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 4))
    teacher = torch.nn.Sequential(*layers)
    exact = dumped(tmp_path / "exact", "cuda:0", teacher).column("logits")
    fast = dumped(tmp_path / "fast", "cuda:0", teacher, **settings)
    np.testing.assert_allclose(fast.column("logits"), exact, atol=0.05 if "amp" in settings else 1e-3)
    assert (fast.manifest.precision is not None) == ("amp" in settings)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_learns_as_on_the_cpu(amp, workers):
    def fit(**settings):
        config = TrainConfig(batch_size=32, epochs=4, clip_norm=1.0, ema=0.9, **settings)
        network = Network(16, 4)
        network.layers[4].p = 0.0  # draws other numbers on each device
        data = training_data(synthetic(256), PLAIN, config)
        result = train(network, data, objective=label_objective(0.0), config=config)
        return [entry["loss"] for entry in result.epochs]

    np.testing.assert_allclose(fit(device="cuda:0", amp=amp, workers=workers), fit(device="cpu"), rtol=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_on_device": True},
        {"ema": 0.9, "clip_norm": 1.0, "amp": "bf16", "optimizer": "sgd", "schedule": "cosine"},
        {"objective": ("decoupled_kd", "hard_cross_entropy", "dist")},
        {"objective": ("kd", "relational_distance", "relational_angle", "contrastive:negatives=16"), "ema": 0.5},
    ],
)
def test_a_step_never_waits_for_the_device(tmp_path, settings):
    """From the second step to the last but one: allocation, constants and the check of the losses may wait."""
    cache = dumped(tmp_path / "c", "cuda:0", features=("penultimate",))
    steps = []

    def watch(step, parts):
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if step < 5 else "default")

    config = StudentConfig(device="cuda:0", batch_size=25, epochs=1, verify_inputs="off", **settings)
    try:
        train_student(Network(16, 4), synthetic(200), cache, config=config, on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(8))


def test_a_cache_on_the_device_gives_the_same_losses(tmp_path):
    cache = dumped(tmp_path / "c", "cuda:0")

    def fit(**settings):
        config = StudentConfig(device="cuda:0", batch_size=32, epochs=2, **settings)
        seen = []
        on_step = lambda step, parts: seen.append(float(parts["loss"]))  # noqa: E731
        train_student(Network(16, 4), synthetic(200), cache, config=config, on_step=on_step)
        return seen

    assert fit() == fit(cache_on_device=True)


def test_a_batch_or_a_model_that_does_not_fit_is_said_in_words():
    device = resolve_device("cuda:0")
    free, _ = torch.cuda.mem_get_info(device)
    with pytest.raises(KdcacheError, match="ran out of memory") as caught, memory_errors(64):
        torch.empty(2 * free, dtype=torch.uint8, device=device)
    assert "--batch-size 32" in caught.value.remedy
    with torch.device("meta"):
        large = torch.nn.Linear(1, free // 2)

    class TooLarge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            # Expanded: one number on the host, all of them on the device.
            self.register_buffer("weights", torch.zeros(1).expand(large.weight.numel()))

    with pytest.raises(KdcacheError, match="TooLarge was moved there"):
        move_to(TooLarge(), device)
