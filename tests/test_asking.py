"""Questions as they are put to a model, and the batches in which they go."""

from collections import Counter

import pytest
from eval_folder import CHAT, ROWS, make_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.eval.asking import CAPTION, CHAT_WORD, DESCRIPTION, IMAGE_IDS, ask_of, batches, prompts_hash
from medmax_fast.eval.questions import load_questions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_questions(make_folder(tmp_path_factory.mktemp("asking") / "data"))


def texts(ask) -> list[str]:
    return [piece["text"] for piece in ask.content if piece["type"] == "text"]


def test_the_published_form(data):
    closed, _, letter, free, caption, drawing, mixed, chat, detailed = [ask_of(q, "tuned") for q in data.questions]
    for ask in (closed, letter, free, caption, chat, detailed):
        assert [piece["type"] for piece in ask.content] == ["image", "text"] and ask.mode == "text" and ask.turn
    assert [ask.new_tokens for ask in (closed, letter, free, caption, chat)] == [1, 1, 60, 0, 0]
    assert texts(closed) == ["Is there a mass?"] and closed.content[0]["path"].endswith("a.png")
    assert texts(caption) == [CAPTION] == ["Please describe this picture."] and texts(detailed) == [DESCRIPTION]
    assert (drawing.mode, texts(drawing), len(drawing.content)) == ("image", ["Draw a chest."], 1)
    assert (mixed.mode, mixed.new_tokens, len(mixed.content)) == ("any", 1024, 1)


def test_other_forms(data):
    questions = {q.task.kind: q for q in data.questions}
    base = {kind: ask_of(q, "base") for kind, q in questions.items()}
    assert not any(ask.turn for ask in base.values())
    assert texts(base["letter"]) == [
        "Look at the picture and answer with A, B, C or D.\nQuestion: Which? A: x B: y C: z D: w\nAnswer:"
    ]
    assert "yes or no" in texts(base["yes_no"])[0] and base["yes_no"].new_tokens == 1
    assert texts(base["drawing"]) == ["Draw a chest."]
    chat = {kind: ask_of(q, "chat") for kind, q in questions.items()}
    assert all(ask.turn for ask in chat.values())
    assert texts(chat["yes_no"])[0].startswith("Is it enlarged?\n") and chat["yes_no"].new_tokens == CHAT_WORD
    assert chat["open"].new_tokens == 60 and texts(chat["caption"]) == [CAPTION]
    bounded = {kind: ask_of(q, "tuned", 7).new_tokens for kind, q in questions.items()}
    assert bounded == {"yes_no": 1, "letter": 1, "open": 7, "caption": 7, "drawing": 0, "interleaved": 7, "chat": 7}


def test_the_tag_of_an_image_is_its_place(tmp_path):
    rows = [
        ("slake", "closed", prompt, "yes", "images/a.png")
        for prompt in ("<image>\nIs it?", "Is it?\n<image> ", "I <image> s")
    ]
    questions = load_questions(make_folder(tmp_path / "data", rows)).questions

    def form(name):
        asks = [ask_of(q, name) for q in questions]
        return [[piece.get("text", "image") for piece in ask.content] for ask in asks]

    assert form("tuned") == [["image", "Is it?"], ["Is it?", "image"], ["image", "I  s"]]
    assert form("chat")[1] == ["Is it?\nAnswer with yes or no only.", "image"]
    assert form("base")[1][0] == "image" and "<image>" not in form("base")[2][1]


def test_the_hash_is_of_what_is_asked(data, tmp_path):
    asks = [ask_of(q, "tuned") for q in data.questions]
    assert prompts_hash(data, asks) == prompts_hash(data, list(asks))
    assert prompts_hash(data, asks) != prompts_hash(data, [ask_of(q, "chat") for q in data.questions])
    assert prompts_hash(data, asks) != prompts_hash(data, [ask_of(q, "tuned", 5) for q in data.questions])
    # Not of where the images are.
    moved = load_questions(make_folder(tmp_path / "elsewhere"))
    assert prompts_hash(moved, [ask_of(q, "tuned") for q in moved.questions]) == prompts_hash(data, asks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(ROWS))), min_size=1, max_size=40), st.integers(1, 20_000))
def test_batches_hold_every_question_once(tmp_path_factory, picked, budget):
    data = load_questions(make_folder(tmp_path_factory.mktemp("b") / "data", [ROWS[i] for i in picked]))
    asks = [ask_of(q, "tuned") for q in data.questions]
    found = batches(data, asks, budget)
    assert Counter(i for batch in found for i in batch) == Counter(range(len(asks)))
    assert all(found) and found == batches(data, asks, budget)
    drawing = [{asks[i].mode != "text" for i in batch} for batch in found]
    assert all(len(kinds) == 1 for kinds in drawing) and drawing == sorted(drawing, key=lambda kinds: True in kinds)


def test_questions_about_one_image_stand_together(tmp_path):
    rows = [("slake", "closed", f"Is it {i}?", "yes", f"images/{'ab'[i % 2]}.png") for i in range(20)]
    rows.append(("slake", "open", "What?", "a liver", "images/a.png"))
    data = load_questions(make_folder(tmp_path / "data", rows))
    asks = [ask_of(q, "tuned") for q in data.questions]
    # Room for one image and its questions, not for two.
    found = batches(data, asks, int(1.5 * IMAGE_IDS))
    assert [sorted({data.questions[i].image for i in batch}) for batch in found] == [["images/a.png"], ["images/b.png"]]
    assert len(found[0]) == 11
    assert len(batches(data, asks, 10**6)) == 1
    # Too many for a batch of their own: parts that each hold some of one image.
    parts = batches(data, asks, IMAGE_IDS + 40)
    assert len(parts) > 4 and all(len({data.questions[i].image for i in batch}) == 1 for batch in parts)


def test_a_batch_is_of_the_budget(tmp_path):
    rows = [("visual_chat", "conversation", "What is it?", CHAT, "images/a.png")] * 40
    data = load_questions(make_folder(tmp_path / "data", rows))
    asks = [ask_of(q, "tuned", 100) for q in data.questions]
    assert [len(batch) for batch in batches(data, asks, IMAGE_IDS + 1110)] == [10] * 4
