"""The grammar of generation, walked at random: whatever a model picks, the rules of a sequence hold."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.generate import grammar
from medmax_fast.generate.grammar import Due, Rules
from medmax_fast.vocab import IMAGE_CODES, IdLayout, TextTokenizer

LAYOUT = IdLayout(
    bos=0,
    pad=1,
    eos=2,
    unk=3,
    image_start=4,
    num_codes=8192,
    eoi=8196,
    boi=8197,
    eot=8710,
    placeholder=8711,
    text_start=8712,
    vocab_size=9000,
)


TEXT = [set(np.flatnonzero(grammar.text_mask(LAYOUT, [], boi)).tolist()) for boi in (False, True)]


def allowed(state, rules):
    """The ids that may come next, from `due`."""
    what = grammar.due(state, rules)
    if what is Due.TEXT:
        return TEXT[grammar.may_begin_image(rules, state.length)]
    if what is Due.IMAGE:
        return range(LAYOUT.image_start, LAYOUT.image_end)
    return {LAYOUT.eoi} if what is Due.EOI else set()


def walk(rules, prompt_length, boi_rate, eos_rate, seed):
    """New ids of a random walk through what is allowed, and the states on the way."""
    random = Random(seed)
    state, ids, states = grammar.begin(rules, prompt_length), [], []
    while not state.done:
        choices = allowed(state, rules)
        assert choices, state
        if grammar.due(state, rules) is Due.TEXT:
            wished = LAYOUT.boi if random.random() < boi_rate else LAYOUT.eos if random.random() < eos_rate else 0
            new = wished if wished in choices else random.randrange(LAYOUT.text_start, LAYOUT.vocab_size)
        else:
            new = random.choice(list(choices)) if len(choices) == 1 else random.randrange(4, 8196)
        assert new in choices
        states.append(state)
        ids.append(new)
        state = grammar.advance(state, rules, new, LAYOUT)
    return ids, [*states, state]


@settings(deadline=None)
@given(
    st.sampled_from(grammar.MODES),
    st.integers(1, 300),
    st.integers(1, 3000),
    st.integers(1, 4096),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([0.0, 0.02]),
    st.integers(0, 2**32),
)
def test_every_walk_keeps_the_rules(mode, budget, prompt_length, max_length, boi_rate, eos_rate, seed):
    rules = Rules(mode, budget, max_length)
    if prompt_length >= max_length or (mode == "image" and not grammar.room_for_image(prompt_length, max_length)):
        return
    ids, states = walk(rules, prompt_length, boi_rate, eos_rate, seed)
    assert prompt_length + len(ids) <= max_length
    assert [state.length for state in states] == list(range(prompt_length, prompt_length + len(ids) + 1))
    # Read the ids as a sequence, from scratch: exactly 1,024 image ids between boi and eoi, budgets, eos.
    text, image, inside = 0, 0, mode == "image"
    for position, new in enumerate(ids, prompt_length):
        if inside and image < IMAGE_CODES:
            assert LAYOUT.image_start <= new < LAYOUT.image_end
            image += 1
        elif inside:
            assert new == LAYOUT.eoi and mode == "any"
            text, image, inside = 0, 0, False
        elif new == LAYOUT.boi:
            assert mode == "any" and position + 1026 < max_length
            inside = True
        else:
            assert new == LAYOUT.eos or new >= LAYOUT.text_start
            text += 1
            # boi counts as an id of text.
            assert text <= budget
            assert new != LAYOUT.eos or position == prompt_length + len(ids) - 1
    if mode == "image":
        assert len(ids) == IMAGE_CODES
    else:
        assert not inside, "a picture that was begun is finished"
        full = prompt_length + len(ids) == max_length
        assert full or ids[-1] == LAYOUT.eos or text == budget or states[-2].text_left == 1


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 2000), st.integers(2, 4096), st.integers(0, 2**32))
def test_what_is_due_ahead_does_not_depend_on_the_ids(budget, prompt_length, max_length, seed):
    """The engine picks before it has read; `due` with `ahead` must agree with the states that come of it."""
    rules = Rules("any", budget, max_length)
    if prompt_length >= max_length:
        return
    ids, states = walk(rules, prompt_length, 0.05, 0.0, seed)
    for i, state in enumerate(states[:-1]):
        for ahead in range(1, 4):
            between = ids[i : i + ahead]
            # Text up to eos or boi, or image ids, whose kind the host knows before it reads them.
            if len(between) < ahead or any(new in (LAYOUT.eos, LAYOUT.boi, LAYOUT.eoi) for new in between):
                break
            said, then = grammar.due(state, rules, ahead), grammar.due(states[i + ahead], rules)
            assert said is then or (said is Due.NOTHING and then is Due.EOI)


def test_a_pick_of_the_wrong_kind_is_caught():
    text = grammar.begin(Rules("any", 5, 4096), 3)
    for new in (LAYOUT.pad, LAYOUT.eoi, LAYOUT.image_start, LAYOUT.eot):
        with pytest.raises(AssertionError):
            grammar.advance(text, Rules("any", 5, 4096), new, LAYOUT)
    with pytest.raises(AssertionError):
        grammar.advance(text, Rules("text", 5, 4096), LAYOUT.boi, LAYOUT)
    drawing = grammar.begin(Rules("image", 5, 4096), 3)
    with pytest.raises(AssertionError):
        grammar.advance(drawing, Rules("image", 5, 4096), LAYOUT.text_start, LAYOUT)


@given(st.integers(0, 5000), st.integers(1027, 4096), st.sampled_from(grammar.MODES))
def test_a_picture_that_is_begun_always_fits(position, max_length, mode):
    if grammar.may_begin_image(Rules(mode, 1, max_length), position):
        assert mode == "any"
        # boi at `position`, then 1,024 image ids and eoi.
        assert position + 1 + 1024 + 1 <= max_length


def test_text_mask_holds_text_and_eos_alone(golden):
    tokenizer = TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")
    layout = tokenizer.layout
    for boi in (False, True):
        found = set(np.flatnonzero(grammar.text_mask(layout, tokenizer.unwritable, boi)))
        expected = set(range(layout.text_start, layout.vocab_size)) - set(tokenizer.unwritable) | {layout.eos}
        assert found == expected | ({layout.boi} if boi else set())
    assert tokenizer.unwritable, "the reference's quirk needs a name that begins with <"


IMAGE = [LAYOUT.bos, LAYOUT.boi, *range(4, 1028), LAYOUT.eoi]


@pytest.mark.parametrize(
    ("ids", "text_scale", "image_scale", "streams"),
    [
        ([*IMAGE, 8800, LAYOUT.boi], 3.0, 1.2, 2),
        ([*IMAGE, 8800, LAYOUT.boi], 3.0, 1.0, 1),
        ([*IMAGE, 8800, LAYOUT.boi], 2.0, 2.0, 1),
        ([*IMAGE, 8800, LAYOUT.boi], 1.0, 1.0, 0),
        ([*IMAGE, 8800, LAYOUT.boi], 1.0, 1.2, 2),
        ([0, 8800, LAYOUT.boi], 3.0, 1.2, 1),
        ([0, 8800, LAYOUT.boi], 3.0, 1.0, 1),
        ([0, 8800, LAYOUT.boi], 1.0, 1.0, 0),
    ],
)
def test_guidance_has_the_streams_it_weighs(ids, text_scale, image_scale, streams):
    """And what stands in for a missing stream leaves the guided logits as they are with all three."""
    prompts = grammar.guides(ids, text_scale, image_scale, LAYOUT)
    assert len(prompts) == streams
    # Numbers for the logits: of the full prompt 7, of its images alone 5, of nothing 2.
    image, none = grammar.images_only(ids, LAYOUT), [LAYOUT.bos, LAYOUT.boi]
    value = {tuple(ids): 7.0, tuple(none): 2.0} | ({tuple(image): 5.0} if image != none else {})
    full, *found = (value[tuple(prompt)] for prompt in (ids, *prompts))
    i, u = (found[0], found[-1]) if found else (full, full)
    true_i, true_u = value[tuple(image)], value[tuple(none)]
    guided = true_u + image_scale * (true_i - true_u) + text_scale * (full - true_i)
    assert u + image_scale * (i - u) + text_scale * (full - i) == pytest.approx(guided)


def test_split_pieces():
    image = list(range(4, 1028))
    ids = [8800, 8801, LAYOUT.boi, *image, LAYOUT.eoi, 8802, LAYOUT.eos]
    assert grammar.split_pieces(ids, LAYOUT) == [("text", [8800, 8801]), ("image", image), ("text", [8802])]
    assert grammar.split_pieces([LAYOUT.eos], LAYOUT) == []
