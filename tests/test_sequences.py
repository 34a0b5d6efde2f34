"""A row of text and images becomes the published sequence of ids; every mismatch is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmax_fast.data.sequences import count_images, expand, integer_array, open_tokenizer, ready_ids
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS, IdLayout


@pytest.fixture(scope="module")
def tokenizer(golden):
    return open_tokenizer(golden / "checkpoint")


def test_golden_sequences(golden, tokenizer):
    for line in (golden / "sequences.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer.encode(row["text"])
        images = [np.array(row["image_tokens"])] * count_images(ids, tokenizer.layout)
        found = expand(ids, images, tokenizer.layout)
        assert found.dtype == np.int64 and found.tolist() == row["tokens"]


LAYOUT = IdLayout(0, 1, 2, 3, 4, 8192, 8196, 8197, 8710, 8711, 8712, 9000)
text_ids = st.lists(st.sampled_from([8711, 8711, 8710, 3, *range(8712, 8720)]), max_size=12)


@given(text_ids, st.integers(0, 2**32 - 1))
def test_expansion_equals_splicing(text, seed):
    images = np.random.default_rng(seed).integers(0, 8192, (text.count(8711), IMAGE_CODES))
    expected, remaining = [0], iter(images)
    for i in text:
        expected += [8197, *(next(remaining) + 4).tolist(), 8196] if i == 8711 else [i]
    found = expand(text, list(images), LAYOUT)
    assert found.tolist() == [*expected, 2]
    assert len(found) == 2 + len(text) + len(images) * (IMAGE_IDS - 1)


def test_each_image_gets_its_own_codes():
    images = [np.full(IMAGE_CODES, c, np.uint16) for c in (0, 8191)]
    found = expand([8711, 8710, 8711], images, LAYOUT)
    assert set(found[2:1026]) == {4} and set(found[1029:2053]) == {8195}


BAD = {
    "too few images": ([8711, 8711], 1, IMAGE_CODES, "2 <image> in the text but 1 images"),
    "too many images": ([8710], 1, IMAGE_CODES, "0 <image> in the text but 1 images"),
    "1023 codes": ([8711], 1, 1023, "an image of 1023 codes, expected 1024"),
    "no codes": ([8711], 1, 0, "an image of 0 codes, expected 1024"),
    "an image id in text": ([4711], 0, 0, "the text spells id 4711"),
    "boi in text": ([8197], 0, 0, "the text spells id 8197"),
}


@pytest.mark.parametrize("name", BAD)
def test_mismatches(name):
    text, images, codes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        expand(text, [np.zeros(codes, np.int64)] * images, LAYOUT)


@pytest.mark.parametrize("code", [-1, 8192, 65535])
def test_a_code_outside_the_codebook(code):
    codes = np.zeros(IMAGE_CODES, np.int64)
    codes[77] = code
    with pytest.raises(InputError, match=rf"image code {code} is outside 0\.\.8191"):
        expand([8711], [codes], LAYOUT)


def test_ready_ids():
    assert ready_ids([0, 8999, 2], LAYOUT).tolist() == [0, 8999, 2]
    for tokens, message in {
        (0, 9000): "id 9000 in tokens, expected 0..8999",
        (-1,): "id -1 in tokens",
        (): "empty list",
        (1.5,): "tokens holds float64",
        ("1",): "tokens holds",
        (1, None): "tokens holds object",
        ((1, 2), (3, 4)): "in 2 dimensions",
        ((1, 2), (3,)): "different lengths",
        (2**64,): "tokens holds",
        (2**63,): "tokens holds",
    }.items():
        with pytest.raises(InputError, match=message):
            ready_ids(list(tokens), LAYOUT)
    with pytest.raises(InputError, match="tokens is str, expected a list"):
        integer_array("123", "tokens")


def test_open_tokenizer(golden_checkpoint, tmp_path):
    path = golden_checkpoint / "tokenizer" / "text_tokenizer_modified.json"
    layout = open_tokenizer(golden_checkpoint).layout
    assert (layout.placeholder, layout.image_start, layout.eot) == (8711, 4, 8710)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="md5 .*, expected .*checklist.chk"):
        open_tokenizer(golden_checkpoint)
    path.unlink()
    assert open_tokenizer(golden_checkpoint).layout == layout
    (tmp_path / "nothing").mkdir()
    for folder, message in {"gone": "no such checkpoint folder", "nothing": "no tokenizer file"}.items():
        with pytest.raises(InputError, match=message):
            open_tokenizer(tmp_path / folder)
