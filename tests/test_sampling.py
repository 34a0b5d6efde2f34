"""Sampling: both paths against a float64 oracle, ids equal wherever rounding cannot decide between two of them."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.kernels import sampling
from medmax_fast.kernels.launch import INTERPRETED
from medmax_fast.kernels.sampling import pick_image, pick_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"]
# How far from a border between two ids rounding may decide; the reference adds up in float64, as the oracle does.
TOLERANCES = {"torch": 1e-9, "triton": sampling.TOLERANCE}
pytestmark = [
    pytest.mark.gpu(required=False),
    pytest.mark.usefixtures("bf16_to_nearest", "poisoned"),
    # The interpreter's numpy takes a difference of infinities where its value is not used.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
EXTREMES = [(t, p) for t in (0.01, 1.0, 100.0) for p in (0.0, 1e-6, 0.9, 1.0)]


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """The interpreter adapts the whole language whenever a kernel calls a function; once for each module will do."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    adapted = set()

    def call(function, *arguments, **options):
        if id(function.fn.__globals__) not in adapted:
            interpreter._patch_lang(function.fn)
            adapted.add(id(function.fn.__globals__))
        return function.rewrite()(*arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def penalized(row, allowed, seen, penalty):
    """x of one row of `pick_text`, in fp32."""
    row, penalty = row.astype(np.float32), np.float32(penalty)
    row = np.where(seen, np.where(row > 0, row / penalty, row * penalty), row)
    return np.where(allowed, row, np.float32(-np.inf))


def guided(full, image, none, text_scale, image_scale):
    """x of one row of `pick_image`, in fp32."""
    full, image, none = (part.astype(np.float32) for part in (full, image, none))
    return none + np.float32(image_scale) * (image - none) + np.float32(text_scale) * (full - image)


def choose(x, temperature, top_p, uniform, tolerance=0.0):
    """The id of one row by the definition in float64, and all ids that are right to within the tolerance."""
    if np.isnan(x).any() or x.max() == -np.inf:
        return -1, {-1}
    best = int(x.argmax())
    if temperature == 0:
        return best, {best}
    away = np.where(x == x[best], 0.0, x.astype(np.float64) - x[best].astype(np.float64))
    weights = np.exp(away / temperature)
    probability = weights / weights.sum()
    order = np.lexsort((np.arange(len(x)), -x))
    before = np.empty(len(x))
    before[order] = np.cumsum(probability[order]) - probability[order]
    right = set()
    for shift in (-tolerance, tolerance, 0.0):
        kept = (before < top_p + shift) | (top_p >= 1) | (np.arange(len(x)) == order[0])
        cumulative = np.cumsum(np.where(kept, probability, 0.0))
        threshold, drawable = uniform * cumulative[-1], np.flatnonzero(kept & (probability > 0))
        reached = cumulative[drawable]
        id_ = int(drawable[min(np.searchsorted(reached, threshold, side="right"), len(drawable) - 1)])
        near = (reached + tolerance >= threshold) & (np.append(0.0, reached[:-1]) - tolerance <= threshold)
        right |= {id_, *drawable[near].tolist()}
    return id_, right


def check(found, rows, temperatures, top_ps, uniforms, tolerance):
    """Every id is right to within the tolerance, and nearly all are the oracle's own."""
    assert found.dtype == torch.int64 and found.shape == (len(rows),)
    equal = 0
    for id_, x, *row in zip(found.tolist(), rows, temperatures, top_ps, uniforms, strict=True):
        exact, right = choose(x, *(float(value) for value in row), tolerance)
        assert id_ in right, (id_, exact, len(right), row)
        equal += id_ == exact
    assert equal >= 0.9 * len(rows)


def make_text(R, V, dtype=torch.float32, seed=0, spread=3.0, A=3, S=4):
    """Arguments of `pick_text`: settings of every kind, a fifth of the ids forbidden, a fifth seen."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return torch.tensor(values)[torch.randint(0, len(values), (R,), generator=generator)]

    logits = (torch.randn(R, V, generator=generator) * spread).to(dtype)
    allowed = torch.rand(A, V, generator=generator) > 0.2
    allowed[:, torch.randint(0, V, (1,), generator=generator)] = True
    seen = torch.rand(S, V, generator=generator) < 0.2
    rules, slots = (torch.randint(0, n, (R,), generator=generator) for n in (A, S))
    parts = pick(0.7, 1.0, 1.3), pick(0.0, 0.3, 1.0, 2.5), pick(0.3, 0.9, 0.999, 1.0)
    uniforms = torch.rand(R, generator=generator)
    arguments = (logits, allowed, rules, seen, slots, torch.stack(parts, 1), uniforms)
    return tuple(argument.to(DEVICE) for argument in arguments)


def check_text(arguments, impl, tolerance=None):
    found = pick_text(*arguments, impl=impl)
    logits, allowed, rules, seen, slots, settings_R3, uniforms = (part.cpu() for part in arguments)
    rows = [
        penalized(*(part.numpy() for part in (logits[r].float(), allowed[rules[r]], seen[slots[r]], settings_R3[r, 0])))
        for r in range(len(logits))
    ]
    check(found, rows, settings_R3[:, 1], settings_R3[:, 2], uniforms, tolerance or TOLERANCES[impl])
    return found


def plain_text(logits, settings_R3, uniforms):
    """Arguments of `pick_text` for rows that may take every id and have seen none."""
    R, V = logits.shape
    mask, index = torch.ones(1, V, dtype=torch.bool), torch.zeros(R, dtype=torch.int64)
    settings_R3 = torch.as_tensor(settings_R3, dtype=torch.float32)
    arguments = (logits, mask, index, ~mask, index, settings_R3, torch.as_tensor(uniforms, dtype=torch.float32))
    return tuple(argument.to(DEVICE) for argument in arguments)


# Rows, vocabulary and type: one id, two, less than a block, a block, several and a part of one.
SHAPES = [
    (6, 1, torch.float32),
    (8, 2, torch.bfloat16),
    (12, 1000, torch.float32),
    (8, 1000, torch.float16),
    (8, 8192, torch.bfloat16),
    (10, 10212, torch.float32),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("R", "V", "dtype"), SHAPES, ids=str)
def test_text_matches_float64(R, V, dtype, impl):
    check_text(make_text(R, V, dtype, seed=V), impl)


def test_fresh_values(fresh_seed):
    """Other sizes, logits and settings on every run."""
    draw = random.Random(fresh_seed)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    check_text(make_text(20, draw.randint(500, 9000), dtype, fresh_seed, draw.choice([0.3, 3.0, 10.0])), "triton")
    check_image(make_image(20, draw.randint(500, 8192), dtype, fresh_seed), "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("V", [512, 700])
def test_blocks_of_a_row(V, impl, monkeypatch):
    # Blocks that fill the row, and that do not; ties that end within a block and within an earlier one.
    monkeypatch.setattr(sampling, "BLOCK", 256)
    arguments = make_text(10, V)
    arguments[0].copy_((arguments[0] / 2).round())
    arguments[5][:, 1], arguments[5][:, 2] = 1.0, torch.linspace(0.02, 0.98, 10)
    check_text(arguments, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_is_kept_than_the_reference_sorts_first(impl, monkeypatch):
    monkeypatch.setattr(sampling, "REF_LIKELIEST", 16)
    check_text(make_text(8, 300, spread=0.1), impl)


def hard_rows(V):
    """Rows that break careless code, by name."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(V, generator=generator)
    at, many = V // 3, torch.arange(V)
    signed_zeros = torch.where(many % 2 == 0, -0.0, 0.0)
    return {
        # One id of probability 1 - 1e-9 at temperature 1, and one of probability 1.
        "peaked": torch.full((V,), -20.7 - np.log(V)).index_fill(0, torch.tensor(at), 0.0),
        "certain": noise.index_fill(0, torch.tensor(at), 3e4),
        "flat": torch.full((V,), 1.25),
        "zeros": torch.zeros(V),
        "signed zeros": signed_zeros,
        "around zero": torch.where(many % 3 == 0, noise * 1e-20, signed_zeros),
        "nearly flat": 1.0 + 2.0**-22 * torch.randint(0, 8, (V,), generator=generator),
        "few values": (noise * 2).round(),
        "one allowed": torch.full((V,), -torch.inf).index_fill(0, torch.tensor(at), -3.0),
        "huge": noise * 1e38,
        "huge negative": -3e38 + noise,
        "tiny": noise * 1e-38,
        "some at -inf": torch.where(many % 2 == 0, noise, -torch.inf),
        "some at +inf": torch.where(many % 7 == 3, torch.inf, noise),
        "rising": torch.linspace(-50, 50, V),
        "falling": torch.linspace(50, -50, V),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", hard_rows(9))
def test_hard_rows(name, impl, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 128)
    row = hard_rows(200)[name]
    cases = [(t, p, u) for t, p in EXTREMES for u in (0.0, 0.5, 1 - 2.0**-24)]
    # The interpreter is slow: each row its own seventh of the cases.
    cases = cases if impl == "torch" else cases[list(hard_rows(9)).index(name) % 7 :: 7]
    cases.append((0.0, 0.5, 0.5))
    arguments = plain_text(row.repeat(len(cases), 1), [(1.0, t, p) for t, p, _ in cases], [u for *_, u in cases])
    found = check_text(arguments, impl)
    image = torch.stack([arguments[0]] * 3)
    if row.isfinite().all():
        # All streams alike: guidance changes nothing, whatever its scales.
        settings_R4 = torch.cat([torch.full((len(cases), 2), 2.0, device=DEVICE), arguments[5][:, 1:]], 1)
        columns = pick_image(image, settings_R4, arguments[6], impl=impl)
        check(columns, [row.numpy()] * len(cases), *arguments[5][:, 1:].cpu().T, arguments[6].cpu(), TOLERANCES[impl])
        assert columns[-1] == found[-1] == row.argmax()


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_values_are_kept_in_the_order_of_ids(impl, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 128)
    # Of 512 equal values half are kept: ids 0 to 255, and each uniform number finds its own.
    uniforms = torch.tensor([0.0, 0.25, 0.5, 1 - 2.0**-24])
    logits = torch.full((4, 512), -3.0)
    arguments = plain_text(logits, [(1.0, 1.0, 0.5)] * 4, uniforms)
    expected = torch.tensor([0, 64, 128, 255])
    assert torch.equal(pick_text(*arguments, impl=impl).cpu(), expected)
    settings_R4 = torch.tensor([(1.0, 1.0, 1.0, 0.5)] * 4, device=DEVICE)
    columns = pick_image(arguments[0].expand(3, -1, -1), settings_R4, arguments[6], impl=impl)
    assert torch.equal(columns.cpu(), expected)


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2.0**-23, -1.0, 20.0, 1e-30, -3e38, -float("inf")]),
    st.floats(-30, 30, width=32),
)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25, deadline=None)
@given(
    row=st.lists(st.tuples(VALUES, st.sampled_from([True, True, False]), st.booleans()), min_size=1, max_size=40),
    setting=st.tuples(st.floats(0.5, 2, width=32), st.floats(0.125, 8, width=32), st.floats(0, 1, width=32)),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    greedy=st.sampled_from([False, False, True]),
)
def test_any_row(impl, row, setting, uniform, greedy):
    values, allowed, seen = zip(*row, strict=True)
    logits, allowed, seen = torch.tensor([values]), torch.tensor([allowed]), torch.tensor([seen])
    index = torch.zeros(1, dtype=torch.int64)
    setting = torch.tensor([setting])
    setting[0, 1] *= not greedy
    arguments = (logits, allowed, index, seen, index, setting, torch.tensor([uniform]))
    check_text(tuple(argument.to(DEVICE) for argument in arguments), impl)


def stratified(R):
    return (torch.arange(R) + 0.5) / R


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_follow_the_probabilities_that_are_kept(impl):
    R, V = 14 if impl == "triton" and DEVICE == "cpu" else 20000, 40
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    probability = (logits.double() / 0.8).softmax(0)
    ordered, order = probability.sort(descending=True)
    probability[order[ordered.cumsum(0) - ordered >= 0.85]] = 0
    probability /= probability.sum()
    assert 5 < (probability > 0).sum() < 30
    # Evenly spaced uniform numbers: each id is drawn as often as its share says, to within one.
    arguments = plain_text(logits.repeat(R, 1), [(1.0, 0.8, 0.85)] * R, stratified(R))
    settings_R4 = torch.tensor([(3.0, 1.2, 0.8, 0.85)] * R, device=DEVICE)
    image = arguments[0].expand(3, -1, -1)
    for ids in (pick_text(*arguments, impl=impl), pick_image(image, settings_R4, arguments[6], impl=impl)):
        counts = torch.bincount(ids.cpu(), minlength=V)
        assert (counts - R * probability).abs().max() < 1.01
        assert (counts[probability == 0] == 0).all()
    # The guard: without top-p other ids are drawn.
    arguments[5][:, 2] = 1.0
    assert (probability[pick_text(*arguments, impl="torch").cpu()] == 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_does_not_depend_on_the_others(impl, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 128)
    logits, allowed, rules, seen, slots, settings_R3, uniforms = make_text(5, 200, seed=11)
    together = pick_text(logits, allowed, rules, seen, slots, settings_R3, uniforms, impl=impl)
    for rows in ([2], [4, 0, 3]):
        part = (logits[rows], allowed, rules[rows], seen, slots[rows], settings_R3[rows], uniforms[rows])
        assert torch.equal(pick_text(*part, impl=impl), together[rows])
    image, settings_R4, uniforms = make_image(5, 200)
    together = pick_image(image, settings_R4, uniforms, impl=impl)
    for rows in ([2], [4, 0, 3]):
        part = (image[:, rows].contiguous(), settings_R4[rows], uniforms[rows])
        assert torch.equal(pick_image(*part, impl=impl), together[rows])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_are_only_read(dtype, impl):
    logits, allowed, rules, seen, slots, settings_R3, uniforms = make_text(3, 177, dtype)
    rest = (settings_R3, uniforms)
    expected = pick_text(logits, allowed, rules, seen, slots, *rest, impl=impl)
    wide = torch.full((10, 401), torch.nan, dtype=dtype, device=DEVICE)
    wide[1:7:2, 100:277] = logits
    kept = wide.clone()
    masks = []
    for mask in (allowed, seen):
        masks.append(torch.ones(2 * len(mask), 200, dtype=torch.bool, device=DEVICE)[::2, 11:188])
        masks[-1].copy_(mask)
    found = pick_text(wide[1:7:2, 100:277], masks[0], rules, masks[1], slots, *rest, impl=impl)
    assert torch.equal(found, expected) and torch.equal(wide.nan_to_num(9), kept.nan_to_num(9))

    image, *rest = make_image(3, 177, dtype)
    expected = pick_image(image, *rest, impl=impl)
    wide = torch.full((3, 5, 401), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, 1:4, 100:277] = image
    kept = wide.clone()
    assert torch.equal(pick_image(wide[:, 1:4, 100:277], *rest, impl=impl), expected)
    assert torch.equal(wide.nan_to_num(9), kept.nan_to_num(9))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_noticed_where_it_counts(impl, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 128)
    logits, allowed, rules, seen, slots, settings_R3, uniforms = make_text(8, 200)
    allowed[:, [7, 190]], allowed[:, 8] = True, False
    settings_R3[:, 1] = torch.tensor([0.0, 1.0], device=DEVICE).repeat(4)
    good = pick_text(logits, allowed, rules, seen, slots, settings_R3, uniforms, impl=impl)
    assert (good >= 0).all()
    # Rows 0 to 3 have a NaN, rows 4 and 5 one that is not allowed, row 6 has nothing to choose from.
    logits[[0, 1], 7] = torch.nan
    logits[[2, 3], 190] = torch.nan
    logits[4:6, 8] = torch.nan
    logits[6] = -torch.inf
    found = pick_text(logits, allowed, rules, seen, slots, settings_R3, uniforms, impl=impl)
    assert (found[[0, 1, 2, 3, 6]] == -1).all() and torch.equal(found[[4, 5, 7]], good[[4, 5, 7]])

    image, settings_R4, uniforms = make_image(8, 200)
    good = pick_image(image, settings_R4, uniforms, impl=impl)
    for stream in range(3):
        image[stream, 2 * stream, 199] = image[stream, 2 * stream + 1, 0] = torch.nan
    found = pick_image(image, settings_R4, uniforms, impl=impl)
    assert (found[:6] == -1).all() and torch.equal(found[6:], good[6:]) and (good >= 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_uniform_number_rounded_to_one_draws_the_last_that_is_kept(impl):
    logits = torch.full((2, 50), -torch.inf)
    logits[:, [3, 20, 30]] = torch.tensor([1.0, 2.0, 0.0])
    found = pick_text(*plain_text(logits, [(1.0, 1.0, 1.0), (1.0, 1.0, 0.8)], [1.0, 1.0]), impl=impl)
    assert found.tolist() == [30, 20]


def make_image(R, V, dtype=torch.float32, seed=0):
    """Arguments of `pick_image`: settings of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return torch.tensor(values)[torch.randint(0, len(values), (R,), generator=generator)]

    logits = (torch.randn(3, R, V, generator=generator) * 2).to(dtype)
    parts = pick(0.0, 1.0, 3.0), pick(0.0, 1.0, 1.2), pick(0.0, 0.7, 1.0), pick(0.2, 0.9, 1.0)
    uniforms = torch.rand(R, generator=generator)
    return tuple(argument.to(DEVICE) for argument in (logits, torch.stack(parts, 1), uniforms))


def check_image(arguments, impl):
    logits, settings_R4, uniforms = (part.cpu() for part in arguments)
    streams = logits.float().numpy()
    rows = [guided(*streams[:, r], *settings_R4[r, :2].tolist()) for r in range(len(settings_R4))]
    found = pick_image(*arguments, impl=impl)
    check(found, rows, settings_R4[:, 2], settings_R4[:, 3], uniforms, TOLERANCES[impl])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("R", "V", "dtype"), SHAPES[:-1], ids=str)
def test_image_matches_float64(R, V, dtype, impl):
    check_image(make_image(R, V, dtype, seed=V), impl)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_no_rows(impl):
    for found in (
        pick_text(*make_text(0, 9), impl=impl),
        pick_image(torch.ones(3, 0, 9, device=DEVICE), *(part[:0] for part in make_image(1, 9)[1:]), impl=impl),
    ):
        assert found.shape == (0,) and found.dtype == torch.int64


X, M, N = torch.ones(2, 3), torch.ones(1, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
G, U = torch.ones(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits_RV": X[0]}, r"logits \[3\]"),
        ({"logits_RV": X[:, :0]}, "V of at least 1"),
        ({"logits_RV": X.double()}, "float64"),
        ({"logits_RV": torch.ones(3, 2).t()}, "contiguous rows"),
        ({"allowed_AV": M[:, :2]}, r"allowed \[1, 2\]"),
        ({"allowed_AV": M.float()}, "allowed .*float32"),
        ({"seen_SV": torch.ones(3, 2, dtype=torch.bool).t()}, "seen .*contiguous rows"),
        ({"rules_R": N.int()}, "rules .*int32"),
        ({"slots_R": N[:1]}, r"slots \[1\]"),
        ({"settings_R3": torch.ones(2, 4)}, r"settings \[2, 4\]"),
        ({"settings_R3": torch.ones(3, 2).t()}, "settings .*contiguous"),
        ({"uniforms_R": U.double()}, "uniforms .*float64"),
        ({"uniforms_R": U.to("meta")}, "uniforms on meta"),
        ({"impl": "cuda"}, "impl 'cuda'"),
    ],
)
def test_bad_arguments_of_text(changed, message):
    arguments = {"logits_RV": X, "allowed_AV": M, "rules_R": N, "seen_SV": M, "slots_R": N}
    with pytest.raises(ValueError, match=message):
        pick_text(**(arguments | {"settings_R3": G, "uniforms_R": U} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits_GRV": X}, r"logits \[2, 3\]"),
        ({"logits_GRV": torch.ones(2, 2, 3)}, r"logits \[2, 2, 3\]"),
        ({"logits_GRV": torch.ones(3, 2, 8193)}, "1 to 8192"),
        ({"logits_GRV": torch.ones(3, 2, 3).int()}, "int32"),
        ({"settings_R4": G}, r"settings \[2, 3\]"),
        ({"uniforms_R": U[:1]}, r"uniforms \[1\]"),
        ({"settings_R4": torch.ones(2, 4, device="meta")}, "settings on meta"),
        ({"impl": "cuda"}, "impl 'cuda'"),
    ],
)
def test_bad_arguments_of_images(changed, message):
    arguments = {"logits_GRV": torch.ones(3, 2, 3), "settings_R4": torch.ones(2, 4), "uniforms_R": U}
    with pytest.raises(ValueError, match=message):
        pick_image(**(arguments | changed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_sizes_and_a_cuda_graph(dtype):
    text, image = make_text(64, 65536, dtype), make_image(64, 8192, dtype)
    for impl in IMPLS:
        check_text(text, impl)
        check_image(image, impl)
    eager = pick_text(*text), pick_image(*image)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pick_text(*text), pick_image(*image)
    # Other settings reach the recorded launches through the same tensors.
    others = make_text(64, 65536, dtype, seed=9)[5], make_image(64, 8192, dtype, seed=9)[1]
    for given_settings in ((text[5].clone(), image[1].clone()), others):
        text[5].copy_(given_settings[0])
        image[1].copy_(given_settings[1])
        graph.replay()
        eager = pick_text(*text), pick_image(*image)
        for found, want in zip(captured, eager, strict=True):
            assert torch.equal(found, want)
