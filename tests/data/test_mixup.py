import contextlib
import math
import random

import numpy as np
import pytest
import torch

from kdcache import StudentConfig, losses
from kdcache.core import rng
from kdcache.core.errors import DatasetError, UsageError
from kdcache.data.batch import Batch, BatchRequest
from kdcache.data.dataset import ArrayDataset
from kdcache.data.loader import batch_loader
from kdcache.data.map_dataset import as_indexed
from kdcache.data.mixup import WHOLE, Draw, Mix, parse_mix
from kdcache.data.preprocess import Preprocessor
from kdcache.data.soft_targets import SoftTargets
from kdcache.distill.objective import distillation_objective, label_objective
from kdcache.store.records import Preprocess, ViewRecipe
from tests.helpers import generator_states, probed_views, synthetic

CPU = torch.device("cpu")
KINDS = ["mixup:0.8", "cutmix:1", "uniform"]


def images(count, shape=(3, 7, 9)):
    """Random ones, each of a class of its own, so that a label names a sample."""
    pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return ArrayDataset(
        pixels, np.arange(count), name="apart", split="train", classes=tuple(f"sample {at}" for at in range(count))
    )


def mixed(count, mix, **recipe):
    return probed_views(images(count), ViewRecipe(mix=mix, **recipe))


def draws(mix, count, samples=1000):
    series = rng.key_series(0, "mix", 1)
    return [parse_mix(mix).draw(series(at), at % samples, samples) for at in range(count)]


@pytest.mark.parametrize("share", [0, 1, 13107, WHOLE // 2, WHOLE - 1, WHOLE])
def test_a_blend_is_the_rounded_weighted_mean(share):
    # Every pair of bytes.
    one = torch.arange(256, dtype=torch.uint8).repeat(256).reshape(1, 256, 256)
    other = one.transpose(1, 2).contiguous()
    result, own = Mix(alpha=1.0, cut=False).apply(one, other, Draw(0, share, (0.0, 0.0)))
    weight = share / WHOLE
    expected = np.floor(weight * one.numpy().astype(float) + (1 - weight) * other.numpy().astype(float) + 0.5)
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy(), expected)
    assert own == weight


def test_a_blend_with_all_or_nothing_is_one_of_the_two():
    one, other = images(2).fetch([0, 1])[0]
    mixup = Mix(alpha=1.0, cut=False)
    assert torch.equal(mixup.apply(one, other, Draw(0, WHOLE, (0.5, 0.5)))[0], one)
    assert torch.equal(mixup.apply(one, other, Draw(0, 0, (0.5, 0.5)))[0], other)
    assert torch.equal(mixup.apply(one, one, Draw(0, 12345, (0.5, 0.5)))[0], one)


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 28, 28), (1, 1, 5), (1, 1, 1)])
def test_a_paste_is_the_box_of_the_paper(shape):
    one, other = torch.zeros(shape, dtype=torch.uint8), torch.full(shape, 200, dtype=torch.uint8)
    generator = np.random.default_rng(0)
    for _ in range(300):
        share = int(generator.choice([0, WHOLE, generator.integers(0, WHOLE + 1)]))
        centre = tuple(generator.random(2))
        result, own = Mix(alpha=1.0, cut=True).apply(one, other, Draw(0, share, centre))
        edges = []
        for place, length in zip(centre, shape[1:], strict=True):
            middle, cut = int(length * place), int(length * np.sqrt(1.0 - share / WHOLE))
            edges.append(np.clip([middle - cut // 2, middle + cut // 2], 0, length))
        (top, bottom), (left, right) = edges
        expected = np.zeros(shape)
        expected[:, top:bottom, left:right] = 200
        np.testing.assert_array_equal(result.numpy(), expected)
        assert own == pytest.approx(float((expected[0] == 0).mean()), abs=1e-12)


def test_neither_of_the_two_images_is_written_into():
    one, other = images(2).fetch([0, 1])[0]
    before = one.clone(), other.clone()
    for cut in (False, True):
        Mix(alpha=1.0, cut=cut).apply(one, other, Draw(0, WHOLE // 3, (0.4, 0.6)))
    assert torch.equal(one, before[0])
    assert torch.equal(other, before[1])


@pytest.mark.parametrize("samples", [2, 3, 50])
def test_a_partner_is_any_other_sample_and_never_the_sample_itself(samples):
    series = rng.key_series(0, "mix", 0)
    mix = Mix(alpha=1.0, cut=False)
    for sample in {0, 1, samples - 1}:
        partners = [mix.draw(series(at), sample, samples).partner for at in range(40 * samples)]
        assert set(partners) == set(range(samples)) - {sample}


def test_partners_are_equally_likely():
    series = rng.key_series(0, "mix", 0)
    counts = np.bincount([Mix(1.0, False).draw(series(at), 4, 11).partner for at in range(5000)], minlength=11)
    # 500 expected of each but the sample itself, with a standard deviation of 21; the draws are pinned by their keys.
    assert counts[4] == 0
    assert abs(np.delete(counts, 4) - 500).max() < 90


def test_a_sample_alone_is_mixed_with_itself():
    for mix in KINDS:
        views = mixed(1, mix)
        shared = views.fetch(0, np.array([0]))
        assert torch.equal(shared.inputs[0], images(1)[0][0])
        assert shared.partner_labels.tolist() == [0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambdas_follow_the_beta_distribution(alpha):
    mix_lambda = np.array([draw.parts for draw in draws(f"mixup:{alpha}", 4000)]) / WHOLE
    variance = 1 / (4 * (2 * alpha + 1))
    assert mix_lambda.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / len(mix_lambda)))
    assert mix_lambda.var() == pytest.approx(variance, rel=0.08)
    assert 0 <= mix_lambda.min() < mix_lambda.max() <= 1


def test_uniform_lambdas_are_uniform():
    mix_lambda = np.sort([draw.parts for draw in draws("uniform", 4000)]) / WHOLE
    assert abs(mix_lambda - (np.arange(4000) + 0.5) / 4000).max() < 0.03


def test_centres_are_uniform_and_do_not_follow_lambda():
    drawn = draws("cutmix:1", 4000)
    table = np.array([(draw.parts / WHOLE, *draw.centre) for draw in drawn])
    assert abs(table[:, 1:].mean(axis=0) - 0.5).max() < 0.02
    assert abs(np.corrcoef(table.T) - np.eye(3)).max() < 0.06


def test_golden_draws():
    # Pinned: a change makes every cache of mixed inputs useless.
    key = rng.key(0, "mix", 1, 5)
    assert parse_mix("mixup:0.8").draw(key, 5, 100) == Draw(54, 16045, (0.35485701182085894, 0.5216763455910777))
    assert parse_mix("cutmix:1").draw(key, 5, 100) == Draw(54, 7338, (0.05166818621612612, 0.6941071937584075))


@pytest.mark.parametrize("mix", KINDS)
def test_what_is_mixed_depends_on_view_and_index_alone(mix):
    views = mixed(30, mix)
    alone = [views.fetch(1, np.array([at])) for at in range(30)]
    for order in (np.arange(30), np.arange(29, -1, -1), np.array([7, 3, 7, 29, 0])):
        shared = views.fetch(1, order)
        for place, at in enumerate(order):
            assert torch.equal(shared.inputs[place], alone[at].inputs[0])
            assert shared.partner_labels[place] == alone[at].partner_labels[0]
            assert shared.mix_lambda[place] == alone[at].mix_lambda[0]
    other_view, other_seed = views.fetch(2, np.arange(30)), mixed(30, mix, seed=1).fetch(1, np.arange(30))
    here = views.fetch(1, np.arange(30))
    for other in (other_view, other_seed):
        assert (other.partner_labels != here.partner_labels).float().mean() > 0.8
        assert (other.mix_lambda != here.mix_lambda).float().mean() > 0.5


@pytest.mark.parametrize("mix", KINDS)
def test_a_mixed_input_is_made_of_the_two_augmented_ones_in_its_lambda(mix):
    dataset = images(20)
    shared = probed_views(dataset, ViewRecipe(augment="crop-flip", mix=mix)).fetch(1, np.arange(20))
    augmented = probed_views(dataset, ViewRecipe(augment="crop-flip")).fetch(1, np.arange(20)).inputs
    assert shared.mix_lambda.dtype == torch.float32
    assert shared.labels.tolist() == list(range(20))
    for at, (result, partner, share) in enumerate(
        zip(shared.inputs, shared.partner_labels.tolist(), shared.mix_lambda.tolist(), strict=True)
    ):
        one, other = augmented[at], augmented[partner]
        if mix.startswith("cutmix"):
            own, theirs = (result == one).all(0), (result == other).all(0)
            assert (own | theirs).all()
            assert (~own).float().mean() <= 1 - share + 1e-6
            assert (~theirs).float().mean() <= share + 1e-6
        else:
            blend = share * one.double() + (1 - share) * other.double()
            assert (result.double() - blend).abs().max() <= 0.5 + 1e-4


def test_mixing_leaves_the_global_generators_alone():
    views = mixed(10, "cutmix:1")
    before = generator_states()
    views.fetch(0, np.arange(10))
    assert generator_states() == before


def test_mixing_does_not_depend_on_the_global_generators():
    views = mixed(10, "mixup:1")
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        found.append(views.fetch(0, np.arange(10)).inputs)
    assert torch.equal(*found)


def test_lambdas_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        assert mixed(4, "mixup:1").fetch(0, np.arange(4)).mix_lambda.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_batch_tells_the_label_of_the_larger_part():
    batch = Batch(
        torch.zeros(4),
        torch.tensor([0, 1, 2, 3]),
        torch.arange(4),
        partner_labels=torch.tensor([4, 5, 6, 7]),
        mix_lambda=torch.tensor([1.0, 0.5, 0.49, 0.0]),
    )
    assert batch.main_labels.tolist() == [0, 1, 6, 7]
    assert batch._replace(mix_lambda=None, partner_labels=None).main_labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_partners_and_lambdas_come_through_the_loader(workers):
    views = mixed(12, "mixup:1")
    requests = [BatchRequest(np.array([5, 2, 9]), 1), BatchRequest(np.array([11]), 0)]
    loader = batch_loader(views, requests, preprocessor=Preprocessor(Preprocess()), workers=workers, device=CPU)
    for batch, request in zip(loader, requests, strict=True):
        shared = views.fetch(request.view, request.indices)
        assert torch.equal(batch.inputs, shared.inputs)
        assert torch.equal(batch.partner_labels, shared.partner_labels)
        assert torch.equal(batch.mix_lambda, shared.mix_lambda)


def test_the_mixed_loss_is_the_one_worked_out_by_hand():
    # Softmax of (ln 2, 0) is (2/3, 1/3), and of (0, 0) (1/2, 1/2).
    logits = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = losses.mixed_cross_entropy(
        logits, torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.75, 0.3], dtype=torch.float64)
    )
    expected = (0.75 * math.log(3 / 2) + 0.25 * math.log(3) + math.log(2)) / 2
    assert float(found) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mixed_loss_with_a_whole_share_is_the_cross_entropy(smoothing):
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own, partners = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([4, 4, 1, 1, 0, 0])
    for share, labels in ((1.0, own), (0.0, partners)):
        found = losses.mixed_cross_entropy(logits, own, partners, torch.full((6,), share), label_smoothing=smoothing)
        expected = losses.hard_cross_entropy(logits, labels, label_smoothing=smoothing)
        assert float(found) == pytest.approx(float(expected), rel=1e-14)


def test_the_objectives_mix_the_label_loss():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, partners, mix_lambda = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), torch.tensor([0.25, 0.5, 1.0])
    teacher = SoftTargets.of(logits.flip(0))
    batch = Batch(torch.zeros(3), labels, torch.arange(3), None, partners, mix_lambda, soft_targets=teacher)
    mixed_loss = losses.mixed_cross_entropy(logits, labels, partners, mix_lambda, label_smoothing=0.1)
    assert label_objective(0.1)(logits, batch)["loss"] == mixed_loss
    parts = distillation_objective(StudentConfig(alpha=0.3, temperature=2.0, label_smoothing=0.1))(logits, batch)
    assert parts["cross_entropy"] == mixed_loss
    soft = losses.kd(logits, logits.flip(0), temperature=2.0)
    assert float(parts["loss"]) == pytest.approx(float(0.3 * soft + 0.7 * mixed_loss), rel=1e-14)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "mixup",
        "mixup:",
        "mixup:0",
        "mixup:-1",
        "mixup:nan",
        "mixup:inf",
        "mixup:a",
        "cutmix",
        "cutmix:0",
        "uniform:1",
        "none:1",
        "Mixup:1",
        "mixup:1:2",
        "mix:1",
    ],
)
def test_a_mix_that_there_is_not_is_refused(spec):
    with pytest.raises(UsageError) as caught:
        parse_mix(spec)
    assert repr(spec) in caught.value.found
    assert "mixup:ALPHA" in caught.value.needed


def test_specs_of_mixing():
    assert parse_mix("none") is None
    assert parse_mix("uniform") == Mix(1.0, False) == parse_mix("mixup:1")
    assert parse_mix("cutmix:0.5") == Mix(0.5, True)


class Sized:
    """Images of the sizes given, each a class of its own."""

    def __init__(self, sizes, dtype=torch.uint8):
        self.sizes, self.dtype, self.classes = sizes, dtype, [str(at) for at in range(len(sizes))]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return torch.full((1, *self.sizes[index]), index, dtype=self.dtype), index


def sized(sizes, dtype=torch.uint8):
    return as_indexed(Sized(sizes, dtype), name="sized", split="train")


def refused_in_words(error):
    assert "to be mixed" in error.needed
    assert "--mix" in error.remedy


def test_images_of_different_shapes_are_not_mixed():
    with pytest.raises(DatasetError, match=r"\(1, 4, 4\)") as caught:
        probed_views(sized([(4, 4), (5, 5), (6, 6), (4, 7)]), ViewRecipe(mix="mixup:1"))
    refused_in_words(caught.value)


def test_images_of_another_dtype_or_rank_are_not_mixed():
    for dataset in (sized([(4, 4)] * 4, torch.float32), synthetic(8, shape=(16,))):
        with pytest.raises(DatasetError) as caught:
            probed_views(dataset, ViewRecipe(mix="cutmix:1"))
        refused_in_words(caught.value)


def test_pairs_of_two_sizes_are_refused_in_words_or_given_as_they_are():
    # Within each pair one size, and in the batch two.
    views = probed_views(sized([(4, 4)] * 40), ViewRecipe(mix="mixup:1"))
    partners = views.fetch(0, np.arange(40)).partner_labels.numpy()
    first = [0, partners[0]]
    second = next([at, partners[at]] for at in range(40) if not {at, partners[at]} & set(first))
    views.dataset._dataset.sizes = [(6, 6) if at in second else (4, 4) for at in range(40)]
    with contextlib.suppress(DatasetError):
        shared = views.fetch(0, np.array([first[0], second[0]]))
        assert [tuple(image.shape) for image in shared.inputs] == [(1, 4, 4), (1, 6, 6)]
