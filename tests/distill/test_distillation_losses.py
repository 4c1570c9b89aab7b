import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from kdcache import losses

LN2, LN3, HALF_ROOT = math.log(2), math.log(3), math.sqrt(0.5)
LOGITS = ("soft_cross_entropy", "logit_mse", "decoupled_kd", "dist", "standardized_kd")
RELATIONAL = ("similarity_preserving", "relational_distance", "relational_angle")
FEATURES = ("cosine", "feature_mse", "attention_transfer", *RELATIONAL)
ALL = (*LOGITS, *FEATURES, "contrastive", "mixed_cross_entropy")
ZERO_AT_THE_TEACHER = ("logit_mse", "decoupled_kd", "standardized_kd", *FEATURES)
OPTIONS = {
    "soft_cross_entropy": [{}, {"temperature": 0.5}, {"temperature": 4.0}],
    "decoupled_kd": [{"temperature": 1.0}, {"temperature": 3.0, "target_weight": 0.3, "nontarget_weight": 2.5}],
    "dist": [{}, {"temperature": 3.0, "inter_weight": 0.4, "intra_weight": 2.5}],
    "standardized_kd": [{}, {"temperature": 0.7}],
    "contrastive": [{"temperature": 0.07}, {"temperature": 1.5}],
    "mixed_cross_entropy": [{}, {"label_smoothing": 0.2}],
}
HALVES = (torch.float16, torch.bfloat16)


def tensor(values, dtype=torch.float64):
    """As float64 unless told, and labels as int64."""
    array = np.asarray(values)
    return torch.tensor(array, dtype=torch.int64 if array.dtype.kind == "i" else dtype)


def loss_of(name, *inputs, dtype=torch.float64, **options):
    return getattr(losses, name)(*(tensor(each, dtype) for each in inputs), **options)


def options_of(name):
    return OPTIONS.get(name, [{}])[-1]


def make_inputs(name, seed, batch=4, scale=1.0):
    """What the loss takes by position, as numpy arrays; the student first."""
    random = np.random.default_rng(seed)
    classes = 3 + seed % 4

    def normal(*shape):
        return scale * random.standard_normal(shape)

    def labels():
        return random.integers(0, classes, batch)

    def same(*shape):
        return normal(*shape), normal(*shape)

    match name:
        case "mixed_cross_entropy":
            return normal(batch, classes), labels(), labels(), random.random(batch)
        case "decoupled_kd":
            return *same(batch, classes), labels()
        case "feature_mse":
            return same(batch, 3, 2)
        case "cosine":
            return same(batch, 4)
        case "attention_transfer":
            return normal(batch, 3, 2, 3), normal(batch, 2, 2, 3)
        case "similarity_preserving" | "relational_distance" | "relational_angle":
            return normal(batch, 5), normal(batch, 2, 2)
        case "contrastive":
            return *same(batch, 4), normal(*((batch, 6, 4) if seed % 2 else (5, 4)))
    return same(batch, classes)


def with_the_teacher_as_student(inputs):
    return inputs[1], *inputs[1:]


def gradient(name, *inputs, dtype=torch.float64, **options):
    student, *others = (tensor(each, dtype) for each in inputs)
    student.requires_grad_()
    loss = getattr(losses, name)(student, *others, **options)
    loss.backward()
    return loss.detach(), student.grad


# The references: float64 numpy, straight from the definitions.


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(student, teacher):
    """KL(teacher ‖ student) of logits, the mean over rows."""
    return (softmax(teacher) * (log_softmax(teacher) - log_softmax(student))).sum(axis=-1).mean()


def reference_soft_cross_entropy(student, teacher, *, temperature=1.0):
    return -(softmax(teacher / temperature) * log_softmax(student / temperature)).sum(axis=1).mean()


def reference_mse(student, teacher):
    return sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat, strict=True)) / student.size


def reference_decoupled_kd(student, teacher, labels, *, temperature, target_weight=1.0, nontarget_weight=8.0):
    total = 0.0
    for s, t, label in zip(student / temperature, teacher / temperature, labels, strict=True):
        p, q = softmax(t), softmax(s)
        target = p[label] * np.log(p[label] / q[label])
        target += (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
        total += target_weight * target
        total += nontarget_weight * kl(np.delete(s, label)[None], np.delete(t, label)[None])
    return temperature**2 * total / len(labels)


def reference_dist(student, teacher, *, temperature=1.0, inter_weight=1.0, intra_weight=1.0):
    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a @ b) / (math.sqrt(a @ a) * math.sqrt(b @ b) + 1e-8)

    q, p = softmax(student / temperature), softmax(teacher / temperature)
    inter = np.mean([1 - pearson(a, b) for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearson(a, b) for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def reference_standardized_kd(student, teacher, *, temperature=2.0):
    student, teacher = (
        (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-7) for x in (student, teacher)
    )
    return temperature**2 * kl(student / temperature, teacher / temperature)


def reference_cosine(student, teacher):
    lengths = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    return 1 - ((student * teacher).sum(1) / lengths).mean()


def reference_attention_transfer(student, teacher):
    def attention(maps):
        squares = np.stack([np.mean([channel**2 for channel in sample], axis=0).ravel() for sample in maps])
        return np.stack([row / np.sqrt(row @ row) for row in squares])

    return np.mean((attention(student) - attention(teacher)) ** 2)


def reference_similarity_preserving(student, teacher):
    def gram(maps):
        flat = maps.reshape(len(maps), -1)
        products = np.array([[a @ b for b in flat] for a in flat])
        return np.stack([row / np.sqrt(row @ row) for row in products])

    return np.sum((gram(student) - gram(teacher)) ** 2) / len(student) ** 2


def smooth_l1(first, second):
    difference = np.abs(first - second)
    return np.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()


def reference_relational_distance(student, teacher):
    def distances(embeddings):
        flat = embeddings.reshape(len(embeddings), -1)
        between = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in flat] for a in flat])
        return between / between[between > 0].mean() if between.any() else between

    return smooth_l1(distances(student), distances(teacher))


def reference_relational_angle(student, teacher):
    def angles(embeddings):
        flat = embeddings.reshape(len(embeddings), -1)
        cosines = np.zeros((len(flat),) * 3)
        for i, j, k in np.ndindex(cosines.shape):
            a, b = flat[j] - flat[i], flat[k] - flat[i]
            lengths = np.sqrt(a @ a) * np.sqrt(b @ b)
            cosines[i, j, k] = a @ b / lengths if lengths else 0.0
        return cosines

    return smooth_l1(angles(student), angles(teacher))


def reference_contrastive(student, teacher, negatives, *, temperature):
    total = 0.0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        candidates = [t, *(negatives if negatives.ndim == 2 else negatives[i])]
        cosines = np.array([s @ c / (np.linalg.norm(s) * np.linalg.norm(c)) for c in candidates])
        total -= log_softmax(cosines / temperature)[0]
    return total / len(student)


def reference_mixed_cross_entropy(student, labels, partners, shares, *, label_smoothing=0.0):
    total = 0.0
    for row, own, partner, share in zip(log_softmax(student), labels, partners, shares, strict=True):
        weights = np.full(len(row), label_smoothing / len(row))
        weights[own] += (1 - label_smoothing) * share
        weights[partner] += (1 - label_smoothing) * (1 - share)
        total -= weights @ row
    return total / len(student)


REFERENCES = {name: globals()[f"reference_{'mse' if name.endswith('_mse') else name}"] for name in ALL}


def root(number):
    return math.sqrt(number)


E = math.exp(0.5)
BY_HAND = {
    # Teacher (1/2, 1/2), student (3/4, 1/4); at temperature 2 from ln 9, without T²; then the other way about, and a
    # second row that is even, which the mean halves.
    "soft_cross_entropy": [
        (([[LN3, 0.0]], [[7.0, 7.0]]), {}, 0.5 * math.log(4 / 3) + 0.5 * math.log(4)),
        (([[2 * LN3, 0.0]], [[0.0, 0.0]]), {"temperature": 2.0}, 0.5 * math.log(4 / 3) + 0.5 * math.log(4)),
        (([[0.0, 0.0]], [[LN3, 0.0]]), {}, LN2),
        (([[LN3, 0.0], [0.0, 0.0]], [[LN3, 0.0], [0.0, 0.0]]), {}, (0.75 * math.log(4 / 3) + 0.5 * LN2 + LN2) / 2),
    ],
    "logit_mse": [(([[1.0, 2.0], [3.0, 4.0]], [[0.0, 2.0], [3.0, 1.0]]), {}, 10 / 4)],
    # Student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4), target 0: two classes (1/4, 3/4) against (1/2, 1/2), and among
    # the others (2/3, 1/3) against (1/2, 1/2).
    "decoupled_kd": [
        (
            ([[LN2, 0.0, 0.0]], [[0.0, LN2, 0.0]], [0]),
            {"temperature": 1.0},
            0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2) + 8 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)),
        ),
        (
            ([[2 * LN2, 0.0, 0.0]], [[0.0, 2 * LN2, 0.0]], [0]),
            {"temperature": 2.0, "target_weight": 3.0, "nontarget_weight": 0.0},
            4 * 3 * (0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        ),
        (
            ([[2 * LN2, 0.0, 0.0]], [[0.0, 2 * LN2, 0.0]], [0]),
            {"temperature": 2.0, "target_weight": 0.0, "nontarget_weight": 1.0},
            4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)),
        ),
    ],
    # Rows (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4), which the teacher has in the other order: ρ is −1/2 over classes, and
    # over the batch −1, −1 and 0, as the last class is the same for all. With one row ρ over the batch is 0.
    "dist": [
        (([[LN2, 0, 0], [0, LN2, 0]], [[0, LN2, 0], [LN2, 0, 0]]), {}, 3 / 2 + 5 / 3),
        (([[LN2, 0.0, 0.0]], [[0.0, LN2, 0.0]]), {}, 3 / 2 + 1),
        (
            ([[2 * LN2, 0, 0], [0, 2 * LN2, 0]], [[0, 2 * LN2, 0], [2 * LN2, 0, 0]]),
            {"temperature": 2.0, "inter_weight": 2.0, "intra_weight": 3.0},
            4 * (2 * 3 / 2 + 3 * 5 / 3),
        ),
    ],
    # Standardised: (−1, 0, 1) and (1, −1, 0), so both have the same normaliser and KL = Σ p · (t − s) ÷ T.
    "standardized_kd": [
        (([[1.0, 2.0, 3.0]], [[30.0, 10.0, 20.0]]), {}, 4 * (2 * E - 1 / E - 1) / 2 / (E + 1 / E + 1)),
        (
            ([[1.0, 2.0, 3.0]], [[30.0, 10.0, 20.0]]),
            {"temperature": 1.0},
            (2 * math.e - 1 / math.e - 1) / (math.e + 1 / math.e + 1),
        ),
    ],
    "feature_mse": [(([[[1.0], [2.0]], [[0.0], [-2.0]]], [[[0.0], [0.0]], [[0.0], [1.0]]]), {}, 14 / 4)],
    # Cosines 0 and −1 / √2.
    "cosine": [(([[2.0, 0.0], [-1.0, 0.0]], [[0.0, 5.0], [3.0, 3.0]]), {}, 1 + HALF_ROOT / 2)],
    # Means of squares (3, 4) and (1, 0): as unit vectors (0.6, 0.8) and (1, 0).
    "attention_transfer": [
        (([[[[1.0, 0.0]], [[root(5), -root(8)]]]], [[[[-7.0, 0.0]]]]), {}, (0.4**2 + 0.8**2) / 2),
    ],
    # Rows of the student's Gram matrix (1, 0) and (0, 1), of the teacher's (√½, √½) twice.
    "similarity_preserving": [
        (([[2.0, 0.0], [0.0, 5.0]], [[3.0], [3.0]]), {}, 2 * ((1 - HALF_ROOT) ** 2 + 1 / 2) / 4),
    ],
    # Distances over their mean (1/2, 3/2, 1) and (3/4, 3/2, 3/4); then differences above 1, where smooth L1 is linear;
    # then duplicates, whose distance the mean leaves out: (0, 1, 1) against (3/4, 3/2, 3/4).
    "relational_distance": [
        (([[0.0], [1.0], [3.0]], [[0.0], [1.0], [2.0]]), {}, 2 * 2 * (0.25**2 / 2) / 9),
        (
            ([[0.0], [1.0], [2.0], [17.0]], [[17.0], [0.0], [1.0], [2.0]]),
            {},
            2 * (16 * 6 / 52 + 3 * 14 * 6 / 52 - 4 * 0.5 + (2 * 6 / 52) ** 2 / 2) / 16,
        ),
        (([[5.0], [5.0], [9.0]], [[0.0], [1.0], [2.0]]), {}, 2 * (0.75**2 + 0.5**2 + 0.25**2) / 2 / 9),
    ],
    # A right angle and two of 45° against a line, whose cosines are 1, −1 and 1.
    "relational_angle": [
        (
            ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[0.0], [1.0], [2.0]]),
            {},
            2 * (0.5 + (1 + HALF_ROOT - 0.5) + (1 - HALF_ROOT) ** 2 / 2) / 27,
        ),
    ],
    # Cosines √½ with its own, 0 and −1 with the others.
    "contrastive": [
        (
            ([[2.0, 0.0]], [[3.0, 3.0]], negatives),
            {"temperature": 0.5},
            math.log(math.exp(root(2)) + 1 + math.exp(-2)) - root(2),
        )
        for negatives in ([[0.0, 4.0], [-1.0, 0.0]], [[[0.0, 4.0], [-1.0, 0.0]]])
    ],
    # Student (3/4, 1/4); the second row is even.
    "mixed_cross_entropy": [
        (([[LN3, 0.0]], [0], [1], [0.25]), {}, 0.25 * math.log(4 / 3) + 0.75 * math.log(4)),
        (([[LN3, 0.0], [0.0, 0.0]], [0, 0], [1, 1], [1.0, 0.3]), {}, (math.log(4 / 3) + LN2) / 2),
    ],
}


@pytest.mark.parametrize(
    ("name", "inputs", "options", "expected"), [(name, *each) for name in ALL for each in BY_HAND[name]]
)
def test_by_hand(name, inputs, options, expected):
    loss = loss_of(name, *inputs, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_equal_to_the_definition_in_float64(name):
    for seed, batch, options in product(range(8), (2, 5), OPTIONS.get(name, [{}])):
        inputs = make_inputs(name, seed, batch, scale=[1.0, 10.0, 0.1, 3.0][seed % 4])
        expected = REFERENCES[name](*inputs, **options)
        assert loss_of(name, *inputs, **options).item() == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(("name", "scale"), [("dist", 1e-4), ("dist", 1e-6), ("standardized_kd", 1e-7)])
def test_the_epsilons_count_where_logits_are_almost_equal(name, scale):
    inputs = make_inputs(name, 0, scale=scale)
    assert loss_of(name, *inputs).item() == pytest.approx(REFERENCES[name](*inputs), rel=1e-6)


def test_decoupled_kd_masks_by_subtracting_1000():
    # The target's logit is so far above the others' that it outlives the mask, as it does with the authors.
    student, teacher = np.array([[5.0, 1.0, 0.0]]), np.array([[3000.0, 0.0, 1.0]])
    options = {"temperature": 2.0, "target_weight": 0.0, "nontarget_weight": 1.0}
    expected = 4 * kl(student / 2 - [[1000, 0, 0]], teacher / 2 - [[1000, 0, 0]])
    assert expected > 1000
    assert loss_of("decoupled_kd", student, teacher, [0], **options).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(4))
def test_none_is_negative_and_the_batch_has_no_order(name, seed):
    inputs, options = make_inputs(name, seed, batch=5), options_of(name)
    loss = loss_of(name, *inputs, **options)
    assert loss > 0
    order = np.random.default_rng(seed).permutation(5)
    # Negatives that all samples share have no rows for them.
    per_sample = len(inputs) if name != "contrastive" or inputs[2].ndim == 3 else 2
    shuffled = [*(each[order] for each in inputs[:per_sample]), *inputs[per_sample:]]
    assert loss_of(name, *shuffled, **options).item() == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.parametrize("name", ZERO_AT_THE_TEACHER)
@pytest.mark.parametrize("batch", [1, 4])
def test_zero_when_the_student_is_the_teacher(name, batch):
    inputs, options = with_the_teacher_as_student(make_inputs(name, 1, batch)), options_of(name)
    loss, slope = gradient(name, *inputs, **options)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert slope.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_dist_is_zero_for_the_teacher_but_for_its_epsilon():
    teacher = make_inputs("dist", 1, scale=3.0)[1]
    assert loss_of("dist", teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    # Correlation has no scale: probabilities pulled halfway to the mean correlate as well.
    p = softmax(teacher)
    assert loss_of("dist", np.log((p + p.mean()) / 2), teacher).item() == pytest.approx(0, abs=1e-5)
    # With one row there is no correlation over the batch.
    assert loss_of("dist", teacher[:1], teacher[:1], inter_weight=0.0).item() == 1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_weights_of_dist_and_decoupled_kd_take_them_apart(temperature):
    for name, first, second in (
        ("dist", "inter_weight", "intra_weight"),
        ("decoupled_kd", "target_weight", "nontarget_weight"),
    ):
        inputs = make_inputs(name, 3)

        def part(a, b, name=name, first=first, second=second, inputs=inputs):
            return loss_of(name, *inputs, temperature=temperature, **{first: a, second: b}).item()

        assert part(0.0, 0.0) == 0
        assert part(2.0, 5.0) == pytest.approx(2 * part(1.0, 0.0) + 5 * part(0.0, 1.0), rel=1e-12)
        assert min(part(1.0, 0.0), part(0.0, 1.0)) > 0
    student, teacher = make_inputs("dist", 3)
    # Over classes a row counts alone; over the batch a class does.
    rows = [
        loss_of("dist", s[None], t[None], temperature=temperature, intra_weight=0.0).item()
        for s, t in zip(student, teacher, strict=True)
    ]
    whole = loss_of("dist", student, teacher, temperature=temperature, intra_weight=0.0).item()
    assert whole == pytest.approx(np.mean(rows), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("seed", range(4))
def test_decoupled_kd_weighted_by_the_teachers_rest_is_kd(temperature, seed):
    student, teacher, labels = make_inputs("decoupled_kd", seed, batch=1)
    rest = 1 - softmax(teacher / temperature)[0, labels[0]]
    whole = loss_of("kd", student, teacher, temperature=temperature).item()
    decoupled = loss_of(
        "decoupled_kd", student, teacher, labels, temperature=temperature, target_weight=1.0, nontarget_weight=rest
    )
    assert decoupled.item() == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_cross_entropy_is_the_teachers_entropy_and_kd_without_its_factor(temperature):
    student, teacher = make_inputs("soft_cross_entropy", 5)
    p = softmax(teacher / temperature)
    entropy = -(p * np.log(p)).sum(axis=1).mean()
    excess = loss_of("soft_cross_entropy", student, teacher, temperature=temperature).item() - entropy
    assert excess == pytest.approx(loss_of("kd", student, teacher, temperature=temperature).item() / temperature**2)
    own = loss_of("soft_cross_entropy", teacher, teacher, temperature=temperature).item()
    assert own == pytest.approx(entropy, rel=1e-12)
    slope = gradient("soft_cross_entropy", teacher, teacher, temperature=temperature)[1]
    assert slope.abs().max().item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    "name", ["soft_cross_entropy", "decoupled_kd", "dist", "standardized_kd", "mixed_cross_entropy"]
)
def test_a_shift_of_a_rows_logits_changes_nothing(name):
    inputs, options = make_inputs(name, 2), options_of(name)
    loss = loss_of(name, *inputs, **options).item()
    shifts = np.array([[-50.0], [0.0], [3.0], [100.0]])
    for i in range(1 if name == "mixed_cross_entropy" else 2):
        moved = [each + shifts if i == j else each for j, each in enumerate(inputs)]
        assert loss_of(name, *moved, **options).item() == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("name", ["standardized_kd", "cosine", "attention_transfer", *RELATIONAL, "contrastive"])
def test_positive_scaling_changes_nothing(name):
    inputs, options = make_inputs(name, 2), options_of(name)
    loss = loss_of(name, *inputs, **options).item()
    for i in range(len(inputs)):
        for scale in (0.5, 40.0):
            scaled = [scale * each if i == j else each for j, each in enumerate(inputs)]
            assert loss_of(name, *scaled, **options).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["standardized_kd", "cosine", "attention_transfer", "contrastive"])
def test_each_sample_has_its_own_scale(name):
    inputs, options = make_inputs(name, 2), options_of(name)
    scales = np.array([0.5, 3.0, 1.0, 20.0]).reshape(-1, *[1] * (inputs[0].ndim - 1))
    loss = loss_of(name, *inputs, **options).item()
    assert loss_of(name, inputs[0] * scales, *inputs[1:], **options).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", RELATIONAL)
def test_relations_do_not_know_rotations_or_the_layout_of_features(name):
    student, teacher = make_inputs(name, 7)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    loss = loss_of(name, student, teacher).item()
    assert loss_of(name, student @ rotation, teacher).item() == pytest.approx(loss, rel=1e-9)
    assert loss_of(name, student, teacher.reshape(4, 4)).item() == pytest.approx(loss, rel=1e-12)
    assert loss_of(name, teacher, student).item() == pytest.approx(loss, rel=1e-12)
    if name != "similarity_preserving":
        assert loss_of(name, student + 100.0, teacher - 5.0).item() == pytest.approx(loss, rel=1e-9)


def test_contrastive_knows_no_common_rotation_and_no_order_of_negatives():
    for seed in (0, 1):
        inputs = make_inputs("contrastive", seed)
        rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
        loss = loss_of("contrastive", *inputs, temperature=0.1).item()
        turned = [each @ rotation for each in inputs]
        assert loss_of("contrastive", *turned, temperature=0.1).item() == pytest.approx(loss, rel=1e-9)
        student, teacher, negatives = inputs
        backwards = np.flip(negatives, axis=-2).copy()
        assert loss_of("contrastive", student, teacher, backwards, temperature=0.1).item() == pytest.approx(loss)


def test_contrastive_falls_as_the_student_nears_its_teacher_and_counts_negatives():
    student, teacher, negatives = make_inputs("contrastive", 0)
    values = [
        loss_of("contrastive", (1 - a) * student + a * teacher, teacher, negatives, temperature=0.1).item()
        for a in (0.0, 0.5, 1.0)
    ]
    assert values[0] > values[1] > values[2]
    # All candidates alike: a guess among one and five.
    alike = np.ones((5, 4))
    assert loss_of("contrastive", student, alike[:4], alike, temperature=0.1).item() == pytest.approx(math.log(6))
    each_its_own = np.broadcast_to(negatives, (4, *negatives.shape))
    assert loss_of("contrastive", student, teacher, each_its_own, temperature=0.1).item() == pytest.approx(values[0])


def test_attention_does_not_know_signs_or_channels():
    student, teacher = make_inputs("attention_transfer", 2)
    loss = loss_of("attention_transfer", student, teacher).item()
    assert loss_of("attention_transfer", -student[:, ::-1], teacher).item() == pytest.approx(loss, rel=1e-12)
    doubled = np.concatenate([student, student], axis=1)
    assert loss_of("attention_transfer", doubled, teacher).item() == pytest.approx(loss, rel=1e-12)


def test_shares_of_0_and_1_leave_one_label_and_partners_can_swap():
    student, labels, partners, shares = make_inputs("mixed_cross_entropy", 1)
    for share, left in ((1.0, labels), (0.0, partners)):
        hard = loss_of("hard_cross_entropy", student, left, label_smoothing=0.1).item()
        mixed = loss_of("mixed_cross_entropy", student, labels, partners, np.full(4, share), label_smoothing=0.1)
        assert mixed.item() == pytest.approx(hard, rel=1e-12)
    assert loss_of("mixed_cross_entropy", student, labels, partners, shares).item() == pytest.approx(
        loss_of("mixed_cross_entropy", student, partners, labels, 1 - shares).item(), rel=1e-12
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_are_those_of_the_formula(name, batch):
    for seed in (0, 1):
        student, *others = map(tensor, make_inputs(name, seed, batch))
        loss = partial(getattr(losses, name), **options_of(name))
        assert gradcheck(loss, (student.requires_grad_(), *others))


def torch_decoupled_kd(student, teacher, labels):
    others = ~F.one_hot(labels, student.shape[1]).bool()
    s, t = (each[others].view(len(labels), -1).log_softmax(1) for each in (student / 2, teacher / 2))
    q, p = ((each / 2).softmax(1).gather(1, labels[:, None]) for each in (student, teacher))
    target = F.binary_cross_entropy(q, p) - F.binary_cross_entropy(p, p)
    return 4 * target + 8 * 4 * F.kl_div(s, t.exp(), reduction="batchmean")


def torch_dist(student, teacher):
    q, p = student.softmax(1), teacher.softmax(1)
    pairs = [*zip(q, p, strict=True)], [*zip(q.T, p.T, strict=True)]
    return sum(1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in each]).mean() for each in pairs)


def torch_standardized_kd(student, teacher):
    s, t = ((each - each.mean(1, keepdim=True)) / each.std(1, keepdim=True) / 2 for each in (student, teacher))
    return 4 * F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")


def torch_similarity_preserving(student, teacher):
    grams = (F.normalize(each.flatten(1) @ each.flatten(1).T) for each in (student, teacher))
    return torch.linalg.matrix_norm(next(grams) - next(grams)) ** 2 / len(student) ** 2


def torch_relational_distance(student, teacher):
    s, t = (F.pdist(each.flatten(1)) for each in (student, teacher))
    return 2 * F.smooth_l1_loss(s / s.mean(), t / t.mean(), reduction="sum") / len(student) ** 2


def torch_relational_angle(student, teacher):
    def cosines(flat):
        away = flat[None] - flat[:, None]
        return F.cosine_similarity(away[:, :, None], away[:, None], dim=-1)

    return F.smooth_l1_loss(cosines(student.flatten(1)), cosines(teacher.flatten(1)))


def torch_contrastive(student, teacher, negatives):
    candidates = torch.cat([teacher[:, None], negatives.expand(len(student), *negatives.shape[-2:])], dim=1)
    cosines = F.cosine_similarity(student[:, None], candidates, dim=2)
    return F.cross_entropy(cosines / 0.1, torch.zeros(len(student)).long())


def torch_mixed_cross_entropy(student, labels, partners, shares):
    own, others = (F.one_hot(each, student.shape[1]) for each in (labels, partners))
    return F.cross_entropy(student, shares[:, None] * own + (1 - shares[:, None]) * others)


TORCH = {
    "soft_cross_entropy": (lambda s, t: torch.nn.CrossEntropyLoss()(s / 3, (t / 3).softmax(1)), {"temperature": 3.0}),
    "logit_mse": (torch.nn.MSELoss(), {}),
    "decoupled_kd": (torch_decoupled_kd, {"temperature": 2.0}),
    "dist": (torch_dist, {}),
    "standardized_kd": (torch_standardized_kd, {}),
    "cosine": (lambda s, t: torch.nn.CosineEmbeddingLoss()(s, t, torch.ones(len(s))), {}),
    "feature_mse": (torch.nn.MSELoss(), {}),
    "attention_transfer": (
        lambda s, t: F.mse_loss(*(F.normalize(each.pow(2).mean(1).flatten(1)) for each in (s, t))),
        {},
    ),
    "similarity_preserving": (torch_similarity_preserving, {}),
    "relational_distance": (torch_relational_distance, {}),
    "relational_angle": (torch_relational_angle, {}),
    "contrastive": (torch_contrastive, {"temperature": 0.1}),
    "mixed_cross_entropy": (torch_mixed_cross_entropy, {}),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_what_torch_has_in_value_and_gradient(name, seed):
    inputs = make_inputs(name, seed, batch=6, scale=2.0)
    theirs, options = TORCH[name]
    loss, slope = gradient(name, *inputs, **options)
    student, *others = map(tensor, inputs)
    expected = theirs(student.requires_grad_(), *others)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(slope, student.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("half", HALVES)
def test_halves_are_computed_in_float32(name, half):
    inputs = [tensor(each, torch.float32) for each in make_inputs(name, 1, batch=6, scale=3.0)]
    for chosen in ([0], range(1, len(inputs)), range(len(inputs))):
        halved = [each.to(half) if i in chosen and each.is_floating_point() else each for i, each in enumerate(inputs)]
        widened = [each.float() if each.is_floating_point() else each for each in halved]
        loss = getattr(losses, name)(*halved, **options_of(name))
        assert loss.dtype == torch.float32
        assert torch.equal(loss, getattr(losses, name)(*widened, **options_of(name)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_the_student_sets_the_precision(name, own):
    student, *others = make_inputs(name, 1)
    for dtype in (*HALVES, torch.float32, torch.float64):
        logits = tensor(student, own).requires_grad_()
        loss = getattr(losses, name)(logits, *(tensor(each, dtype) for each in others), **options_of(name))
        assert loss.dtype == own
        loss.backward()
        assert logits.grad.dtype == own


@pytest.mark.parametrize("name", ALL)
def test_float32_is_near_the_definition(name):
    inputs = [each.astype(np.float32) if each.dtype.kind == "f" else each for each in make_inputs(name, 4, scale=2.0)]
    loss = loss_of(name, *inputs, dtype=torch.float32, **options_of(name))
    doubles = [each.astype(np.float64) if each.dtype.kind == "f" else each for each in inputs]
    assert loss.item() == pytest.approx(REFERENCES[name](*doubles, **options_of(name)), rel=1e-4)


def extreme_inputs(name, what, batch):
    """The inputs of a loss with its first two arrays of numbers replaced."""
    inputs = list(make_inputs(name, 1, batch))
    sides = range(1 if name == "mixed_cross_entropy" else 2)
    for i in sides:
        shape = inputs[i].shape
        opposite = 1e4 * np.where((np.arange(inputs[i].size) + i) % 2, -1.0, 1.0).reshape(shape)
        match what:
            case "opposite":
                inputs[i] = opposite
            case "one hot":
                inputs[i] = np.where(np.arange(inputs[i].size).reshape(shape) % shape[-1] == i, 1e4, -1e4)
            case "equal":
                inputs[i] = np.full(shape, 0.1) if i == 0 else inputs[i]
            case "equal both":
                inputs[i] = np.full(shape, [1e4, 0.3][i])
            case "teacher equal":
                inputs[i] = np.full(shape, 0.1) if i == 1 else inputs[i]
            case "zero":
                inputs[i] = np.zeros(shape) if i == 0 else inputs[i]
            case "zero both":
                inputs[i] = np.zeros(shape)
            case "one zero row":
                inputs[i][0] = 0 if i == 0 else inputs[i][0]
            case "duplicates":
                inputs[i][-1] = inputs[i][0] if i == 0 else inputs[i][-1]
            case "duplicates both":
                inputs[i][-1] = inputs[i][0]
            case "big":
                inputs[i] = 1e4 * inputs[i]
    return inputs


EXTREMES = (
    *("opposite", "one hot", "equal", "equal both", "teacher equal", "zero", "zero both", "one zero row"),
    *("duplicates", "duplicates both", "big"),
)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("what", EXTREMES)
def test_extremes_leave_finite_gradients(name, what):
    dtypes = (*HALVES, torch.float32, torch.float64)
    for batch, options, dtype in product((1, 2, 4), OPTIONS.get(name, [{}]), dtypes):
        loss, slope = gradient(name, *extreme_inputs(name, what, batch), dtype=dtype, **options)
        assert loss.isfinite()
        # A float16 student's gradient comes back as float16, in which a large number of float32 has no place.
        assert slope.isfinite().all() or (dtype == torch.float16 and not slope.isnan().any())


def test_extreme_logits_have_the_values_of_the_definition():
    student, teacher = np.array([[1e4, -1e4, 0.0]]), np.array([[-1e4, 1e4, 0.0]])
    for dtype in (torch.float32, torch.float64):

        def value(name, *more, dtype=dtype, **options):
            return gradient(name, student, teacher, *more, dtype=dtype, **options)

        loss, slope = value("soft_cross_entropy")
        assert loss.item() == 2e4
        assert slope.tolist() == [[1.0, -1.0, 0.0]]
        assert value("logit_mse")[0].item() == pytest.approx(8e8 / 3)
        # The teacher is sure of the target, the student of the first class.
        loss, slope = value("decoupled_kd", [1], temperature=1.0, nontarget_weight=0.0)
        assert loss.item() == 2e4
        assert slope.tolist() == [[1.0, -1.0, 0.0]]
        assert value("dist", intra_weight=0.0)[0].item() == pytest.approx(1.5)
        half = math.exp(0.5) + math.exp(-0.5) + 1
        expected = 4 * (math.exp(0.5) - math.exp(-0.5)) / half
        assert value("standardized_kd")[0].item() == pytest.approx(expected)
        mixed, slope = gradient("mixed_cross_entropy", student, [0], [1], [0.25], dtype=dtype)
        assert mixed.item() == pytest.approx(0.75 * 2e4)
        assert slope.tolist() == [[0.75, -0.75, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 7, 10, 100])
@pytest.mark.parametrize("level", [0.1, 0.7, 3.3, 1e4 / 3])
def test_equal_logits_are_an_even_distribution_for_standardized_kd(dtype, classes, level):
    # Whatever is left of rounding in their mean is not to be blown up to deviation 1.
    teacher = np.random.default_rng(0).standard_normal((1, classes))
    loss = loss_of("standardized_kd", np.full((1, classes), level), teacher, dtype=dtype)
    expected = reference_standardized_kd(np.zeros((1, classes)), teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_duplicates_have_no_distance_and_no_angle():
    student, teacher = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), np.array([[0.0], [1.0], [2.0]])
    for name in ("relational_distance", "relational_angle"):
        assert loss_of(name, student, teacher).item() == pytest.approx(REFERENCES[name](student, teacher), rel=1e-9)
        alike = np.ones((3, 2))
        assert loss_of(name, alike, teacher).item() == pytest.approx(REFERENCES[name](alike, teacher), rel=1e-9)
        assert loss_of(name, alike, alike).item() == 0


def test_zero_features_point_nowhere():
    nowhere = np.zeros((2, 3))
    assert loss_of("similarity_preserving", nowhere, [[1.0], [0.0]]).item() == pytest.approx(1 / 4)
    assert loss_of("attention_transfer", np.zeros((2, 1, 1, 2)), np.ones((2, 1, 1, 2))).item() == pytest.approx(1 / 2)
    candidates = np.ones((2, 3))
    assert loss_of("contrastive", nowhere, candidates, -candidates, temperature=0.1).item() == pytest.approx(LN3)


def refused(name, inputs, *shown):
    with pytest.raises(ValueError, match="shape") as caught:
        loss_of(name, *inputs, **options_of(name))
    for shape in shown:
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("name", [*LOGITS, "cosine", "feature_mse", "contrastive"])
@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 1), (3, 3), (3,), (2, 3, 1)])
def test_another_shape_is_refused_with_both(name, shape):
    more = {"decoupled_kd": [[0, 1]], "contrastive": [np.ones((5, 3))]}.get(name, [])
    refused(name, [np.ones((2, 3)), np.ones(shape), *more], (2, 3), shape)


@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 4), (3, 3, 2, 4), (2, 3, 1, 4), (2, 3, 2, 1), (2, 3, 4, 2), (2, 3, 8), (2, 3)]
)
def test_attention_of_another_place_or_batch_is_refused_with_both(shape):
    refused("attention_transfer", [np.ones((2, 5, 2, 4)), np.ones(shape)], (2, 5, 2, 4), shape)
    refused("attention_transfer", [np.ones(shape), np.ones((2, 5, 2, 4))], (2, 5, 2, 4), shape)


@pytest.mark.parametrize("name", RELATIONAL)
@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (1, 2, 3)])
def test_another_batch_has_no_relations_and_is_refused_with_both(name, shape):
    refused(name, [np.ones((2, 3)), np.ones(shape)], (2, 3), shape)


@pytest.mark.parametrize("shape", [(5, 4), (5, 1), (3, 5, 3), (1, 5, 3), (2, 5, 4), (3,), (1, 2, 5, 3)])
def test_negatives_that_do_not_fit_are_refused_with_both(shape):
    refused("contrastive", [np.ones((2, 3)), np.ones((2, 3)), np.ones(shape)], (2, 3), shape)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 4)])
def test_labels_of_another_shape_are_refused_with_both(shape):
    labels, wrong, logits = np.zeros(2, int), np.zeros(shape, int), np.ones((2, 4))
    refused("decoupled_kd", [logits, logits, wrong], (2, 4), shape)
    refused("mixed_cross_entropy", [logits, wrong, labels, np.ones(2)], (2, 4), shape)
    refused("mixed_cross_entropy", [logits, labels, wrong, np.ones(2)], (2, 4), shape)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (1, 2)])
def test_shares_of_another_shape_are_refused_with_both(shape):
    # (2, 1) would broadcast, and every sample would be mixed by every other's share.
    labels = np.array([0, 1])
    refused("mixed_cross_entropy", [np.ones((2, 4)), labels, 1 - labels, np.ones(shape)], (2,), shape)


@pytest.mark.parametrize("name", ["soft_cross_entropy", "decoupled_kd", "dist", "standardized_kd", "contrastive"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(name, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        loss_of(name, *make_inputs(name, 0), temperature=temperature)


def test_one_class_has_no_others():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        loss_of("decoupled_kd", np.ones((2, 1)), np.ones((2, 1)), [0, 0], temperature=1.0)
    assert loss_of("standardized_kd", [[3.0], [4.0]], [[1.0], [5.0]]).item() == 0
