"""Laws of the lossy encodings, for any finite logits."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from kdcache.core.errors import TeacherOutputError, UsageError
from kdcache.store.encodings.head import BIAS, WEIGHT
from kdcache.store.encodings.quantized import GRID
from kdcache.store.encodings.registry import encoding_named
from kdcache.store.encodings.topk import CLASSES

EXAMPLES = np.array([0, 1, -1, 1 + 2**-23, 65504, -1e38, 1e38, 1e-38, 3.25], np.float32).astype(float)


def rows_of(bound, *, low=1, high=17):
    shape = st.tuples(st.integers(1, 4), st.integers(low, high))
    examples = EXAMPLES[np.abs(EXAMPLES) <= bound].tolist()
    elements = st.one_of(st.sampled_from(examples), st.floats(-bound, bound, width=32))
    return shape.flatmap(lambda shape: arrays(np.float32, shape, elements=elements))


def tensors(rows):
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in rows.items()}


def decoded(encoding, logits, **options):
    """Decoded by numpy, which torch's decoding must equal."""
    stored = encoding.encode(logits, first_sample=0)
    for array in encoding.arrays():
        assert stored[array.name].dtype == array.dtype
        assert stored[array.name].shape == (len(logits), *array.row_shape)
    found = encoding.decode(stored, **options)
    by_torch = encoding.decode(tensors(stored), **options).numpy()
    np.testing.assert_allclose(by_torch, found, rtol=1e-6, atol=1e-6 * np.abs(found).max())
    return stored, found


@given(st.data(), st.integers(4, 8))
def test_quantized_logits_are_within_the_bound_and_the_predicted_class_is_kept(data, bits):
    logits = data.draw(rows_of(float(np.float32(1e38))))
    encoding = encoding_named(f"quantized:{bits}", logits.shape[1])
    stored, found = decoded(encoding, logits)
    step = stored[GRID][:, 2:].astype(np.float64)
    rounding = 1e-6 * np.abs(logits).max(axis=1, keepdims=True)
    assert (np.abs(found.astype(np.float64) - logits) <= step / 2 + rounding).all()
    top = logits.max(axis=1)
    np.testing.assert_array_equal(found.max(axis=1), top)
    np.testing.assert_array_equal(found == top[:, None], logits == top[:, None])
    spread = np.where(logits == top[:, None], np.nan, logits.astype(np.float64))
    with np.errstate(all="ignore"):
        ranges = [np.ptp(row[~np.isnan(row)]) if (~np.isnan(row)).any() else 0.0 for row in spread]
    np.testing.assert_allclose(step[:, 0], np.array(ranges) / (2**bits - 2), rtol=1e-6, atol=1e-38)


@given(rows_of(60000, low=2), st.data())
def test_top_k_keeps_the_predicted_class_and_the_mass_of_the_tail(logits, data):
    classes = logits.shape[1]
    count = data.draw(st.integers(1, classes - 1))
    temperature = data.draw(st.sampled_from((1.0, 4.0)))
    encoding = encoding_named(f"topk:{count}", classes, (4.0, 1.0))
    stored, found = decoded(encoding, logits, temperature=temperature)
    np.testing.assert_array_equal(found.argmax(axis=1), logits.argmax(axis=1))
    chosen = stored[CLASSES].astype(np.int64)
    assert all(len(set(row)) == count for row in chosen.tolist())
    kept = np.take_along_axis(logits, chosen, axis=1)
    others = logits.astype(np.float64)
    np.put_along_axis(others, chosen, -np.inf, axis=1)
    assert (kept.min(axis=1) >= others.max(axis=1)).all()
    # float16's rounding of the largest logit, and of a tie that is broken.
    np.testing.assert_allclose(np.take_along_axis(found, chosen, axis=1), kept, rtol=3e-3, atol=1e-3)
    exact = np.logaddexp.reduce(others / temperature, axis=1)
    tail = found.astype(np.float64)
    np.put_along_axis(tail, chosen, -np.inf, axis=1)
    rounding = 1e-3 + 1e-6 * np.abs(exact) + 1e-6 * np.abs(logits).max()
    assert (np.abs(np.logaddexp.reduce(tail / temperature, axis=1) - exact) <= rounding).all()


def test_a_lower_class_that_shares_the_tail_with_a_tie_does_not_come_first():
    logits = np.array([[-1e-28, 0.0, 0.0], [1.0, 3.0, 3.0], [128.5625, 128.5625, 1.0]], np.float32)
    _, found = decoded(encoding_named("topk:1", 3), logits)
    np.testing.assert_array_equal(found.argmax(axis=1), [1, 1, 0])


@pytest.mark.parametrize(("classes", "dtype"), [(3000, "uint16"), (65536, "uint16"), (70000, "uint32")])
def test_classes_are_stored_as_integers(classes, dtype):
    logits = np.zeros((2, classes))
    logits[0, [classes - 1, 2049]] = 9, 8
    logits[1, [2051, 2053]] = 9, 8
    stored = encoding_named("topk:2", classes).encode(logits, first_sample=0)
    assert stored[CLASSES].dtype == dtype
    assert stored[CLASSES].tolist() == [[classes - 1, 2049], [2051, 2053]]


@pytest.mark.parametrize(("spec", "tolerance"), [("head", 2e-3), ("head:8", 3e-2)])
def test_head_multiplies(spec, tolerance):
    draw = np.random.default_rng(0)
    weight, bias = draw.standard_normal((50, 12)).astype(np.float32), draw.standard_normal(50).astype(np.float32)
    features = draw.standard_normal((7, 12)).astype(np.float32)
    encoding = encoding_named(spec, 50).with_constants({WEIGHT: weight, BIAS: bias})
    stored = encoding.encode(features, first_sample=0)
    found = encoding.decode(stored)
    np.testing.assert_allclose(found, features @ weight.T + bias, atol=12 * tolerance)
    np.testing.assert_allclose(encoding.decode(tensors(stored)).numpy(), found, rtol=1e-4, atol=1e-5)
    assert encoding.bytes_per_row() == sum(values.nbytes for values in stored.values()) // 7


@pytest.mark.parametrize(
    ("spec", "found", "needed"),
    [
        ("quantized:3", "asks for 3 bits", "4 to 8"),
        ("quantized:9", "asks for 9 bits", "4 to 8"),
        ("quantized:x", "'quantized:x'", "a whole number"),
        ("topk", "topk", "the number of logits"),
        ("topk:10", "topk:10, and there are 10 classes", "fewer than all classes"),
        ("topk:0", "'topk:0'", "a whole number"),
        ("float16:2", "'float16:2'", "one of float16"),
        ("quantised", "'quantised'", "one of float16"),
    ],
)
def test_specs_that_are_none_are_refused(spec, found, needed):
    with pytest.raises(UsageError) as caught:
        encoding_named(spec, 10)
    assert found in caught.value.found
    assert needed in caught.value.needed


@pytest.mark.parametrize("spec", ["quantized:8", "quantized:4", "topk:2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_sample_and_class(spec, value):
    logits = np.zeros((4, 5), np.float32)
    logits[2, 1] = value
    with pytest.raises(TeacherOutputError, match="sample 102, class 1"):
        encoding_named(spec, 5).encode(logits, first_sample=100)


def test_a_temperature_that_is_not_stored_is_refused_with_the_remedy():
    encoding = encoding_named("topk:2", 5, (4.0, 1.0))
    stored = encoding.encode(np.eye(5), first_sample=0)
    with pytest.raises(UsageError) as caught:
        encoding.decode(stored, temperature=3.0)
    assert "the temperature is 3" in caught.value.found
    assert "one of 1,4" in caught.value.needed
    assert "--temperatures 1,4,3" in caught.value.remedy
    np.testing.assert_array_equal(encoding.decode(stored), encoding.decode(stored, temperature=1.0))
