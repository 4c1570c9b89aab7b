import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kdcache.distill.losses.logits import hard_cross_entropy, kd, kd_with_labels

LN2, LN3 = math.log(2), math.log(3)


def oracle_kd(student, teacher, temperature):
    """T² · mean over the batch of Σ p (log p − log q), straight from the definition, in float64 numpy."""

    def probabilities(logits):
        powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = probabilities(teacher.numpy()), probabilities(student.numpy())
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean()


def oracle_ce(student, labels, smoothing=0.0):
    logits = student.numpy()
    log_q = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weights = np.full(logits.shape, smoothing / logits.shape[1])
    weights[np.arange(len(labels)), labels] += 1 - smoothing
    return -(weights * log_q).sum(axis=1).mean()


@st.composite
def problems(draw):
    """(student, teacher, labels, temperature), in float64."""
    batch, classes = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    student, teacher = draw(st.sampled_from([0.1, 1, 10])) * random.standard_normal((2, batch, classes))
    labels = torch.from_numpy(random.integers(0, classes, batch))
    return torch.from_numpy(student), torch.from_numpy(teacher), labels, draw(st.floats(0.5, 20))


# Worked by hand. The teacher says (1/2, 1/2) and the student (3/4, 1/4), so KL = ½ ln(½ ÷ ¾) + ½ ln(½ ÷ ¼) = ½ ln(4/3);
# at temperature 2 the student's ln 9 halves to ln 3, so the same KL counts T² = 4 times. Two rows: the mean, not the
# sum. The third case tells KL(teacher ‖ student) from its reverse: (3/4, 1/4) against (1/2, 1/2).
@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "expected"),
    [
        ([[LN3, 0.0]], [[0.0, 0.0]], 1.0, 0.5 * math.log(4 / 3)),
        ([[2 * LN3, 0.0]], [[5.0, 5.0]], 2.0, 4 * 0.5 * math.log(4 / 3)),
        ([[0.0, 0.0]], [[LN3, 0.0]], 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], 1.0, 0.25 * math.log(4 / 3)),
    ],
)
def test_kd_by_hand(student, teacher, temperature, expected):
    loss = kd(torch.tensor(student).double(), torch.tensor(teacher).double(), temperature=temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-7)


def test_cross_entropy_and_the_mix_by_hand():
    student, labels = torch.tensor([[LN3, 0.0], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0, 1])
    hard = (math.log(4 / 3) + LN2) / 2
    assert hard_cross_entropy(student, labels).item() == pytest.approx(hard)
    # alpha weighs the teacher.
    soft = 0.25 * math.log(4 / 3)
    mixed = kd_with_labels(student, torch.zeros(2, 2).double(), labels, temperature=1.0, alpha=0.9)
    assert mixed.item() == pytest.approx(0.9 * soft + 0.1 * hard)


@given(problems(), st.floats(0, 1), st.floats(0, 0.5))
def test_equal_to_the_definition_in_float64(problem, alpha, smoothing):
    student, teacher, labels, temperature = problem
    soft, hard = oracle_kd(student, teacher, temperature), oracle_ce(student, labels, smoothing)
    assert kd(student, teacher, temperature=temperature).item() == pytest.approx(soft, rel=1e-9, abs=1e-9)
    assert hard_cross_entropy(student, labels, label_smoothing=smoothing).item() == pytest.approx(hard, abs=1e-9)
    mixed = kd_with_labels(
        student, teacher, labels, temperature=temperature, alpha=alpha, label_smoothing=smoothing
    ).item()
    assert mixed == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-9, abs=1e-9)


@given(problems(), st.floats(-100, 100))
def test_laws(problem, shift):
    student, teacher, labels, temperature = problem
    loss = kd(student, teacher, temperature=temperature)
    assert kd(teacher, teacher, temperature=temperature).item() == 0
    assert loss >= -1e-12
    for moved in ((student + shift, teacher), (student, teacher - shift)):
        assert kd(*moved, temperature=temperature).item() == pytest.approx(loss.item(), rel=1e-8, abs=1e-8)
    options = {"temperature": temperature, "label_smoothing": 0.1}
    hard = hard_cross_entropy(student, labels, label_smoothing=0.1)
    assert torch.equal(kd_with_labels(student, teacher, labels, alpha=0.0, **options), hard)
    assert torch.equal(kd_with_labels(student, teacher, labels, alpha=1.0, **options), loss)


def test_the_gradient_keeps_its_size_at_high_temperature():
    # Hinton et al., 2015: with T² the gradient tends to (student − teacher) / classes for centred logits as T grows.
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64, generator=generator)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    kd(student, teacher, temperature=1e3).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 6, rtol=1e-2, atol=1e-4)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_halves_are_computed_in_float32(half, side):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 5 * torch.randn(2, 8, 10, generator=generator)
    labels = torch.arange(8)
    student = student.to(half) if side != "teacher" else student
    teacher = teacher.to(half) if side != "student" else teacher
    loss = kd_with_labels(student, teacher, labels, temperature=4.0, alpha=0.5)
    exact = kd_with_labels(student.float(), teacher.float(), labels, temperature=4.0, alpha=0.5)
    assert loss.dtype == kd(student, teacher, temperature=4.0).dtype == torch.float32
    assert hard_cross_entropy(student, labels).dtype == torch.float32
    assert torch.equal(loss, exact)


@pytest.mark.parametrize("teacher_dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float64])
def test_the_student_sets_the_precision(student_dtype, teacher_dtype):
    student, teacher = torch.ones(2, 3, dtype=student_dtype), torch.zeros(2, 3, dtype=teacher_dtype)
    assert kd(student, teacher, temperature=2.0).dtype == student_dtype
    assert hard_cross_entropy(student, torch.tensor([0, 1])).dtype == student_dtype


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_extreme_logits_leave_finite_gradients(dtype, temperature):
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    loss = kd_with_labels(student, teacher, torch.tensor([1]), temperature=temperature, alpha=0.5)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


@settings(max_examples=10)
@given(problems())
def test_gradients_are_those_of_the_formula(problem):
    student, teacher, labels, temperature = problem
    gradcheck(
        lambda logits: kd_with_labels(logits, teacher, labels, temperature=temperature, alpha=0.7),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2,), (2, 3, 1)])
def test_another_shape_is_refused_with_both(shape):
    # (1, 3) would broadcast, and every student row would follow one teacher row.
    student = torch.zeros(2, 3)
    for loss in (
        lambda teacher: kd(student, teacher, temperature=1.0),
        lambda teacher: kd_with_labels(student, teacher, torch.zeros(2).long(), temperature=1.0, alpha=0.0),
    ):
        with pytest.raises(ValueError, match="shape") as caught:
            loss(torch.zeros(shape))
        assert "(2, 3)" in str(caught.value)
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        kd(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)
