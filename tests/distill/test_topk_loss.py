"""`topk_kd` against brute force: the dense row that the encoding decodes to, and one class for the whole tail."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import losses
from kdcache.store.encodings.topk import CLASSES, VALUES, TopKEncoding

CLASSES_COUNT, BATCH, K = 9, 5, 3
TEMPERATURES = (1.0, 2.0, 4.0)


def logits(seed: int, *, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(BATCH, CLASSES_COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def stored():
    """Teacher logits, and what a cache holds of them; the values keep float64, so that nothing is rounded."""
    teacher = logits(0)
    encoding = TopKEncoding(K, CLASSES_COUNT, TEMPERATURES)
    rows = {name: torch.from_numpy(each) for name, each in encoding.encode(teacher.numpy(), first_sample=0).items()}
    rows[VALUES] = teacher.gather(1, rows[CLASSES].long())
    return teacher, encoding, rows


def tail_of(teacher: Tensor, rows: dict[str, Tensor], temperature: float) -> Tensor:
    """log Σ exp(z / T) of the classes that are not stored, in float64."""
    return (teacher / temperature).scatter(1, rows[CLASSES].long(), -torch.inf).logsumexp(1)


def merged(values: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of the stored classes, and of all others as one."""
    log_p = values.log_softmax(1)
    others = log_p.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, classes), others], dim=1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_uniform_is_the_kl_from_the_decoded_row(stored, temperature):
    teacher, _, rows = stored
    student, classes, tail = logits(1), rows[CLASSES].long(), tail_of(teacher, rows, temperature)
    level = temperature * (tail - np.log(CLASSES_COUNT - K))
    dense = level[:, None].repeat(1, CLASSES_COUNT).scatter(1, classes, rows[VALUES])
    found = losses.topk_kd(student, rows[VALUES], rows[CLASSES], tail, temperature=temperature, tail="uniform")
    torch.testing.assert_close(found, losses.kd(student, dense, temperature=temperature), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_other_is_the_kl_with_one_class_for_the_tail_and_a_lower_bound(stored, temperature):
    teacher, _, rows = stored
    classes, tail = rows[CLASSES].long(), tail_of(teacher, rows, temperature)
    student = logits(1).requires_grad_()
    found = losses.topk_kd(student, rows[VALUES], rows[CLASSES], tail, temperature=temperature)
    p, q = merged(teacher / temperature, classes), merged(student / temperature, classes)
    torch.testing.assert_close(found, temperature**2 * (p.exp() * (p - q)).sum(1).mean(), rtol=1e-12, atol=0)
    full = losses.kd(student, teacher, temperature=temperature)
    assert found.detach() < full.detach()
    (gradient,) = torch.autograd.grad(found, student)
    (full_gradient,) = torch.autograd.grad(full, student)
    torch.testing.assert_close(gradient.gather(1, classes), full_gradient.gather(1, classes), rtol=1e-10, atol=1e-14)


def test_a_student_that_agrees_within_the_tail_makes_the_bound_tight(stored):
    teacher, _, rows = stored
    student = teacher + 0.7 * torch.zeros_like(teacher).scatter(1, rows[CLASSES].long(), 1.0)
    tail = tail_of(teacher, rows, 2.0)
    found = losses.topk_kd(student, rows[VALUES], rows[CLASSES], tail, temperature=2.0)
    torch.testing.assert_close(found, losses.kd(student, teacher, temperature=2.0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("tail", ["other", "uniform"])
def test_its_gradient_is_right(stored, tail):
    teacher, _, rows = stored
    assert torch.autograd.gradcheck(
        lambda student: losses.topk_kd(
            student, rows[VALUES], rows[CLASSES], tail_of(teacher, rows, 2.0), temperature=2.0, tail=tail
        ),
        logits(3).requires_grad_(),
    )


@pytest.mark.parametrize("tail", ["other", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_saturated_student_has_a_finite_loss_and_gradient(stored, tail, dtype):
    teacher, _, rows = stored
    student = torch.zeros(BATCH, CLASSES_COUNT, dtype=dtype)
    student[:, 0] = 200.0
    student.requires_grad_()
    found = losses.topk_kd(
        student, rows[VALUES].half(), rows[CLASSES], tail_of(teacher, rows, 1.0).float(), temperature=1.0, tail=tail
    )
    found.backward()
    assert found.dtype == torch.float32
    assert found.isfinite()
    assert student.grad.isfinite().all()
