"""Resize and crop: the torch reference and the Triton kernels against Pillow itself, bit for bit.

The weights are computed here in plain Python (`pillow_weights`), from the rule and not from the product's code.
"""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medmax_fast.kernels import launch, resample
from medmax_fast.kernels.blocks import entry, override

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu(required=False)
SIDE = 24
BYTES = torch.arange(256, dtype=torch.uint8, device=DEVICE)
# (width, height): at size, up, down, extreme aspects, one pixel thin, primes, and one more or less than the side.
SIZES = [
    (24, 24), (24, 61), (61, 24), (25, 24), (23, 24), (24, 23), (25, 25), (12, 12), (48, 48), (36, 60), (11, 13),
    (97, 101), (53, 29), (127, 31), (31, 127), (1, 1), (1, 7), (7, 1), (1, 40), (2, 3), (200, 9), (9, 200), (160, 26),
    (26, 160), (151, 149), (5, 4),
]  # fmt: skip


def pillow_weights(in_size, out_size, first, count):
    """Starts int32 [count] and weights int32 [count, taps] of the output pixels first .. first + count - 1.

    Pillow's rule for LANCZOS: taps within 3 * max(scale, 1) of the centre, normalised in double, 22 fractional bits
    rounded half away from zero.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    inverse = 1.0 / stretch
    starts, rows = [], []
    for i in range(first, first + count):
        center = (i + 0.5) * scale
        low = max(int(center - 3.0 * stretch + 0.5), 0)
        high = min(int(center + 3.0 * stretch + 0.5), in_size)
        taps = [lanczos((x - center + 0.5) * inverse) for x in range(low, high)]
        total = sum(taps)
        starts.append(low)
        rows.append([int(math.copysign(0.5, tap) + tap / total * (1 << 22)) for tap in taps])
    longest = max(len(row) for row in rows)
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(padded, dtype=torch.int32)


def lanczos(x):
    if not -3.0 <= x < 3.0:
        return 0.0
    if x == 0.0:
        return 1.0
    return math.sin(x * math.pi) / (x * math.pi) * math.sin(x / 3.0 * math.pi) / (x / 3.0 * math.pi)


def geometry(width, height, side):
    """The resized size and the crop's left and top edge."""
    scale = side / min(width, height)
    wide, high = round(scale * width), round(scale * height)
    return wide, high, (wide - side) // 2, (high - side) // 2


def pillow(image, side=SIDE, calls=2):
    """Expected bytes [side, side, 3] of an array [height, width, 3].

    One call of resize for each pass, because newer releases of Pillow turn the order round for tall images.
    """
    height, width, _ = image.shape
    wide, high, left, top = geometry(width, height, side)
    resized = Image.fromarray(image)
    for size in [(wide, height), (wide, high)][-calls:]:
        resized = resized.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized.crop((left, top, left + side, top + side))))


def rows_may_come_first(width, height, side=SIDE):
    """Whether some release of Pillow filters the rows first: 12.2 if height > 100 * width, 13.0 by pixels saved."""
    wide, high, _, _ = geometry(width, height, side)
    return high < height and (height > 100 * width or height - high > 2 * (width - wide))


def random_image(width, height, seed=0):
    """Noise, half of it pushed to the ends of the range, so that sums leave 0..255 and are clamped."""
    generator = np.random.default_rng([seed, width, height])
    noise = generator.integers(0, 256, (height, width, 3))
    return np.where(noise & 1, noise, (noise > 127) * 255).astype(np.uint8)


def plan_of(images, side=SIDE, offsets=None):
    columns, rows = [], []
    for height, width, _ in (image.shape for image in images):
        wide, high, left, top = geometry(width, height, side)
        columns.append(pillow_weights(width, wide, left, side))
        rows.append(pillow_weights(height, high, top, side))
    return resample.plan_resample([image.shape[:2] for image in images], columns, rows, offsets=offsets)


def joined(images):
    return torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(DEVICE)


def assert_equals_pillow(out, images, side=SIDE, values=BYTES):
    assert out.shape == (len(images), 3, side, side) and out.dtype == values.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([pillow(image, side) for image in images]).to(DEVICE)
    assert torch.equal(out.permute(0, 2, 3, 1), values[expected.int()])


@pytest.fixture(autouse=True)
def _tall_blocks():
    # The interpreter takes as long for a row as for a hundred. test_block_sizes runs the kernels' own blocks.
    with override("resample", **({"BLOCK_ROWS": 128} if DEVICE == "cpu" else {})):
        yield


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_equals_pillow(size, impl):
    image = random_image(*size)
    assert_equals_pillow(resample.resample(joined([image]), plan_of([image]), BYTES, impl=impl), [image])


@pytest.mark.parametrize("size", [size for size in SIZES if not rows_may_come_first(*size)])
def test_expected_values_are_those_of_one_call(size):
    image = random_image(*size)
    assert torch.equal(pillow(image, calls=1), pillow(image))


def test_sizes_hold_both_orders():
    tall = [size for size in SIZES if rows_may_come_first(*size)]
    assert len(tall) >= 2 and len(SIZES) - len(tall) >= 20
    # The order matters: filtering the rows first gives other bytes.
    for width, height in tall:
        image = random_image(width, height)
        turned = pillow(np.ascontiguousarray(image.transpose(1, 0, 2))).transpose(0, 1)
        assert not torch.equal(turned, pillow(image))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40), st.integers(0, 9999))
def test_reference_equals_pillow_anywhere(width, height, side, seed):
    image = random_image(width, height, seed)
    assert_equals_pillow(resample.resample_ref(joined([image]), plan_of([image], side), BYTES), [image], side)


@pytest.mark.parametrize("size", [(683, 530), (517, 800), (300, 411), (512, 512), (1153, 512)])
def test_reference_at_the_real_side(size):
    image = random_image(*size)
    assert_equals_pillow(resample.resample_ref(joined([image]), plan_of([image], 512), BYTES), [image], 512)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_batch_of_different_sizes(impl):
    # Images in reverse order, with gaps of 255 and odd addresses between them.
    images = [random_image(*size) for size in [(97, 101), (1, 7), (24, 24), (160, 26), (5, 4), (31, 127)]]
    gaps, offsets, at = [], [], 0
    for n, image in reversed(list(enumerate(images))):
        at += 7 + n
        gaps += [np.full(7 + n, 255, np.uint8), image.ravel()]
        offsets.insert(0, at)
        at += image.size
    plan = plan_of(images, offsets=offsets)
    assert plan.num_bytes == at
    assert len({(fields[6], fields[8]) for fields in plan.table.tolist()}) > 3
    assert_equals_pillow(resample.resample(joined(gaps), plan, BYTES, impl=impl), images)


@pytest.mark.parametrize("blocks", [None, (4, 32), (16, 64)])
def test_block_sizes(blocks):
    # The launch's own blocks; and 13 x 3 bytes, which no block divides, in several blocks of columns.
    numbers = dict(zip(("BLOCK_ROWS", "BLOCK_J"), blocks, strict=True)) if blocks else entry("resample", 90).numbers
    images = [random_image(23, 17), random_image(9, 11), random_image(13, 30)]
    with override("resample", **numbers):
        out = resample.resample(joined(images), plan_of(images, 13), BYTES, impl="triton")
    assert_equals_pillow(out, images, 13)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_values(dtype, impl):
    values = (torch.arange(256, dtype=torch.float64) / 255 * 2 - 1).to(dtype).to(DEVICE)
    images = [random_image(31, 40), random_image(24, 24)]
    out = torch.full((2, 3, SIDE, SIDE), float("nan"), dtype=dtype, device=DEVICE)
    out = out.contiguous(memory_format=torch.channels_last)
    assert resample.resample(joined(images), plan_of(images), values, out=out, impl=impl) is out
    assert_equals_pillow(out, images, values=values)


def checkerboard(width, height, cell):
    y, x = np.indices((height, width)) // cell
    return np.stack([(x + y) % 2, (x + y + 1) % 2, x % 2], axis=-1).astype(np.uint8) * 255


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_overshoot_is_clamped_between_the_passes(impl):
    images = [checkerboard(*size) for size in [(9, 10, 1), (24, 40, 2), (70, 61, 5), (31, 26, 3)]]
    # The guard: sums of the first pass leave 0..255 on both sides, by more than rounding.
    starts, weights = pillow_weights(9, geometry(9, 10, SIDE)[0], 0, SIDE)
    padded = np.pad(images[0][0].astype(np.int64), ((0, weights.shape[1]), (0, 0)))
    sums = [w @ padded[s : s + len(w)] >> 22 for s, w in zip(starts.tolist(), weights.numpy(), strict=True)]
    assert np.min(sums) < -10 and np.max(sums) > 265
    assert_equals_pillow(resample.resample(joined(images), plan_of(images), BYTES, impl=impl), images)


def test_sums_fit_int32():
    for in_size, out_size in [(1, 512), (2, 333), (4, 5), (7, 512), (100, 99), (513, 512), (700, 512), (3000, 24)]:
        _, weights = pillow_weights(in_size, out_size, 0, min(out_size, 60))
        positive = weights.clamp(min=0).long().sum(1).max().item()
        assert 2**22 <= positive < 1.3 * 2**22
        assert 255 * positive + 2**21 < 2**31 - 2**29


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fresh_values(impl, fresh_seed, poisoned):
    """Pictures of other sizes, and another side, on every run."""
    draw = random.Random(fresh_seed)
    side = draw.randint(20, 60)
    sizes = [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(4)] + [(draw.randint(300, 700), 311)]
    images = [random_image(*size, fresh_seed) for size in sizes]
    assert_equals_pillow(resample.resample(joined(images), plan_of(images, side), BYTES, impl=impl), images, side)
    assert poisoned


def test_writes_every_byte_and_no_other():
    images = [random_image(30, 50), random_image(26, 20)]
    plan, rows = plan_of(images), 5
    J = 3 * SIDE
    results = []
    for poison in (0, 255):
        mid = torch.full((plan.mid_rows + 2 * rows, J), poison, dtype=torch.uint8, device=DEVICE)
        out = torch.full((2 + 2, SIDE, SIDE, 3), poison, dtype=torch.uint8, device=DEVICE)
        inner = out[1:-1].permute(0, 3, 1, 2)
        pixels = torch.full((plan.num_bytes + 200,), poison, dtype=torch.uint8, device=DEVICE)
        pixels[100:-100] = joined(images)
        resample._resample_triton(pixels[100:-100], plan.to(DEVICE), BYTES, mid[rows:-rows], inner)
        assert (mid[:rows] == poison).all() and (mid[-rows:] == poison).all()
        assert (out[0] == poison).all() and (out[-1] == poison).all()
        assert_equals_pillow(inner, images)
        results.append(mid[rows:-rows])
    assert torch.equal(*results)


def test_padding_taps_read_nothing_outside_the_image():
    # Taps beyond the last column or row get a weight behind the plan's back: where they are masked nothing changes.
    images = [random_image(20, 20), random_image(24, 24), random_image(60, 57)]
    plan = plan_of(images)
    changed = 0
    for (_, width, first, rows, _, *blocks), image in zip(plan.table.tolist(), images, strict=True):
        assert first == 0 and rows == image.shape[0]
        for at, taps, size in ((blocks[0], blocks[1], width), (blocks[2], blocks[3], rows)):
            starts, *weights = plan.packed[at : at + (1 + taps) * SIDE].view(1 + taps, SIDE)
            for t, weight in enumerate(weights):
                weight[starts + t >= size] = 1 << 22
                changed += int((starts + t >= size).sum())
    assert changed > 25
    pixels = joined([*images, np.full((9, 9, 3), 255, np.uint8)])
    assert_equals_pillow(resample.resample(pixels, plan, BYTES, impl="triton"), images)


def test_plan_reads_only_what_the_crop_needs():
    # 24 x 240 keeps the rows 108..131 as they are: two taps more before them, none after, where weights are 0.
    plan = plan_of([random_image(24, 240), random_image(300, 48)])
    (_, _, first, rows, mid_row, *_), (offset, width, top, all_rows, next_row, *_) = plan.table.tolist()
    assert (first, first + rows, mid_row) == (106, 132, 0)
    assert (offset, width, top, all_rows, next_row) == (24 * 240 * 3, 300, 0, 48, rows)
    assert (plan.mid_rows, plan.max_rows, plan.num_bytes) == (rows + 48, 48, 3 * (24 * 240 + 300 * 48))
    # Shrunk and grown: from the first tap to the last that has a weight, far less than the whole height.
    for width, height in ((50, 400), (13, 90)):
        starts, weights = pillow_weights(height, *geometry(width, height, SIDE)[1:4:2], SIDE)
        weighted = starts[:, None] + weights.ne(0) * torch.arange(1, weights.shape[1] + 1)
        _, _, first, rows, *_ = plan_of([random_image(width, height)]).table.tolist()[0]
        assert (first, first + rows) == (starts.min(), weighted.max())
        assert rows < height / 2


def test_plan_cuts_padding_and_takes_arrays():
    starts, weights = pillow_weights(31, 24, 0, 24)
    expected = resample.plan_resample([(31, 31)], [(starts, weights)], [(starts, weights)])
    wider = torch.cat([weights, torch.zeros(24, 9, dtype=torch.int32)], dim=1)
    scattered = torch.stack([wider, wider], dim=2)[..., 0]
    assert not scattered.is_contiguous()
    sizes = torch.tensor([[31, 31]], dtype=torch.int32)
    plan = resample.plan_resample(sizes, [(starts.numpy(), wider.numpy())], [(starts, scattered)])
    assert torch.equal(plan.packed, expected.packed)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strided_inputs(impl):
    images = [random_image(30, 25)]
    pixels = joined(images).repeat_interleave(2)[::2]
    values = BYTES.repeat_interleave(3)[::3]
    assert not pixels.is_contiguous() and not values.is_contiguous()
    assert_equals_pillow(resample.resample(pixels, plan_of(images), values, impl=impl), images)


def test_random_plans_agree():
    # Any weights, not only those of a filter: the kernels do what the reference does.
    generator = random.Random(5)
    columns, rows, sizes = [], [], [(40, 33), (19, 64)]
    for height, width in sizes:
        for blocks, size in ((columns, width), (rows, height)):
            T = generator.randrange(3, 9)
            starts = [generator.randrange(0, size - T + 1) for _ in range(10)]
            weights = [[generator.randrange(-(1 << 20), 1 << 21) for _ in range(T)] for _ in range(10)]
            blocks.append((torch.tensor(starts, dtype=torch.int32), torch.tensor(weights, dtype=torch.int32)))
    plan = resample.plan_resample(sizes, columns, rows)
    pixels = torch.randint(0, 256, (plan.num_bytes,), generator=torch.Generator().manual_seed(1)).byte().to(DEVICE)
    expected = resample.resample(pixels, plan, BYTES, impl="torch")
    assert expected.unique().numel() > 50
    assert torch.equal(resample.resample(pixels, plan, BYTES, impl="triton"), expected)


TAPS = (torch.zeros(8, dtype=torch.int32), torch.ones(8, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("sizes", "columns", "rows", "offsets", "message"),
    [
        ([], [], [], None, r"\[0, 0, 0\] images: expected the same number, at least 1"),
        ([(4, 4)], [TAPS, TAPS], [TAPS], None, r"\[1, 2, 1\] images"),
        ([(4, 4)], [TAPS], [TAPS], [0, 9], r"\[1, 1, 1, 2\] images"),
        ([(4, 4)], [TAPS], [TAPS], [-1], "image 0 begins at byte -1"),
        ([(4, 1)], [TAPS], [TAPS], None, r"columns of image 0: taps reach from pixel 0 to 1, expected 0\.\.0"),
        ([(4, 4)], [TAPS], [(TAPS[0] - 1, TAPS[1])], None, "rows of image 0: taps reach from pixel -1"),
        ([(4, 4)], [TAPS], [(TAPS[0] + 2**31 - 1, TAPS[1])], None, "to 2147483648, expected"),
        ([(4, 4)], [TAPS], [(TAPS[0][:7], TAPS[1])], None, r"starts \[7\], weights \[8, 2\], expected \[8\]"),
        ([(4, 4)], [TAPS], [(TAPS[0], TAPS[1][:, 0])], None, r"weights \[8\], expected \[8\], \[8, T\]"),
        ([(4, 4)], [(TAPS[0], TAPS[1].long())], [TAPS], None, "weights torch.int64, expected torch.int32"),
    ],
)
def test_bad_plans(sizes, columns, rows, offsets, message):
    with pytest.raises(ValueError, match=message):
        resample.plan_resample(sizes, columns, rows, offsets=offsets)


NHWC = {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": torch.zeros(47, dtype=torch.uint8)}, r"\[47\]: expected torch.uint8, at least \[48\]"),
        ({"pixels": torch.zeros(4, 12, dtype=torch.uint8)}, r"pixels torch.uint8 \[4, 12\]"),
        ({"pixels": torch.zeros(48)}, "pixels torch.float32"),
        ({"values": torch.zeros(255)}, r"values torch.float32 \[255\]"),
        ({"values": torch.zeros(256, dtype=torch.int64)}, "values torch.int64"),
        ({"values": torch.zeros(256, device="meta")}, "on meta: expected .* on cpu"),
        ({"out": torch.zeros(1, 3, 8, 8)}, "channels_last"),
        ({"out": torch.zeros(1, 3, 8, 8, dtype=torch.float16).to(**NHWC)}, "out torch.float16"),
        ({"out": torch.zeros(2, 3, 8, 8).to(**NHWC)}, r"expected torch.float32 \[1, 3, 8, 8\] on cpu"),
        ({"impl": "cuda"}, "impl 'cuda': expected 'auto', 'triton' or 'torch'"),
    ],
)
def test_bad_arguments(arguments, message):
    call = {"pixels": torch.zeros(48, dtype=torch.uint8), "values": torch.zeros(256), **arguments}
    with pytest.raises(ValueError, match=message):
        resample.resample(plan=resample.plan_resample([(4, 4)], [TAPS], [TAPS]), **call)


def test_without_triton_or_gpu(monkeypatch):
    pixels, plan = torch.zeros(48, dtype=torch.uint8), resample.plan_resample([(4, 4)], [TAPS], [TAPS])
    values = torch.arange(256, dtype=torch.float32)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on cpu, expected a GPU"):
        resample.resample(pixels, plan, values, impl="triton")
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resample.resample(pixels, plan, values, impl="triton")
    assert resample.resample(pixels, plan, values).eq(0).all()
