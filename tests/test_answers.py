"""Answers on disk: batches that are whole or not there, errors that pass, damage that is named."""

import json

import numpy as np
import pytest
from PIL import Image

from medmax_fast.eval.answers import Answers
from medmax_fast.eval.backends.protocol import Answer
from medmax_fast.runtime import InputError

BATCHES = [["a", "b"], ["c"], ["d", "e", "f"]]


def said(name: str, text: str = "yes") -> Answer:
    return Answer(name, [{"type": "text", "text": text}], [9000])


@pytest.fixture()
def answers(tmp_path) -> Answers:
    return Answers(tmp_path, BATCHES)


def publish_all(answers: Answers) -> None:
    for number, batch in enumerate(BATCHES):
        answers.publish(number, {"kind": "test"}, {}, [said(name, name * 2) for name in reversed(batch)])


def test_what_is_published_is_read(answers, tmp_path):
    assert answers.left() == [0, 1, 2]
    picture = np.random.default_rng().integers(0, 256, (8, 9, 3), dtype=np.uint8)
    drawn = Answer("c", [{"type": "text", "text": "Look: "}, {"type": "image", "pixels": picture}], [5, 6])
    publish_all(answers)
    answers.publish(1, {"kind": "test"}, {}, [drawn])
    assert answers.left() == []
    facts, found = answers.read()
    assert facts == {"kind": "test"} and list(found) == list("abcdef")
    assert found["a"].text == "aa" and found["a"].token_ids == (9000,) and found["a"].error is None
    (name,) = found["c"].pictures
    assert np.array_equal(np.asarray(Image.open(tmp_path / name)), picture) and found["c"].text == "Look: "


def test_facts_of_all_batches_are_united(answers):
    for number, batch in enumerate(BATCHES):
        facts = {"model": "m", "reported": [f"snapshot-{number % 2}"]}
        answers.publish(number, facts, {}, map(said, batch))
    assert answers.read()[0] == {"model": "m", "reported": ["snapshot-0", "snapshot-1"]}


def test_a_lost_or_invented_answer_is_our_mistake(answers):
    with pytest.raises(AssertionError, match="lost or invented"):
        answers.publish(0, {}, {}, [said("a")])
    with pytest.raises(AssertionError, match="lost or invented"):
        answers.publish(1, {}, {}, [said("c"), said("x")])
    assert answers.left() == [0, 1, 2]


def test_errors_that_may_have_passed_are_asked_again(answers):
    publish_all(answers)
    assert answers.to_ask_again() == {}
    down = Answer("e", error="server down", passing=True)
    broken = Answer("f", error="no image")
    answers.publish(2, {}, {}, [said("d", "kept"), down, broken])
    again, digest = answers.to_ask_again(), answers.digest()
    assert again == {2: answers.state(2)} and answers.left() == []
    kept = answers.kept(2)
    assert set(kept) == {"d", "f"} and set(answers.kept(0)) == {"a", "b"}
    answers.publish(2, {}, kept, [said("e", "now")])
    _, found = answers.read()
    assert (found["d"].text, found["e"].text, found["f"].error) == ("kept", "now", "no image")
    assert answers.to_ask_again() == {} and answers.state(2) != again[2] and answers.digest() != digest
    # The same answers, whenever they came, are the same files.
    once = answers.digest()
    answers.publish(2, {}, answers.kept(2), [])
    assert answers.digest() == once


def test_facts_of_kept_answers_are_kept(answers):
    publish_all(answers)
    told = {"model": "m", "reported": ["a"], "dropped": ["seed"]}
    answers.publish(2, told, {}, [said("d"), said("e"), Answer("f", error="down", passing=True)])
    digest = answers.digest()
    answers.publish(2, {"model": "m", "reported": ["b"], "dropped": []}, answers.kept(2), [said("f")])
    facts, _ = answers.read()
    assert (facts["reported"], facts["dropped"]) == (["a", "b"], ["seed"]) and answers.digest() != digest
    with pytest.raises(InputError, match="answers by models of model 'm' and 'other'"):
        answers.publish(2, {"model": "other"}, answers.kept(2), [])
    with pytest.raises(InputError, match="answers by models of model 'm' and 'other'"):
        answers.check_model({"model": "other"})
    answers.check_model({"model": "m", "kind": "test"})


def test_answers_of_two_models_are_not_one_run(answers):
    for number, batch in enumerate(BATCHES):
        answers.publish(number, {"kind": "hf", "revision": "ab"[number % 2]}, {}, map(said, batch))
    with pytest.raises(InputError, match="answers by models of revision 'a' and 'b'; choose another --output"):
        answers.read()


def test_text_that_no_file_can_hold(answers):
    odd = "half \ud83d, line\u2028end, nul \0"
    answers.publish(1, {}, {}, [said("c", odd)])
    answers.publish(0, {}, {}, map(said, BATCHES[0]))
    answers.publish(2, {}, {}, map(said, BATCHES[2]))
    assert answers.read()[1]["c"].text == "half ?, line\u2028end, nul \0"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [lines[0], "{broken}", *lines[2:]], r"00002.jsonl: line 2: not valid JSON"),
        (lambda lines: [*lines, lines[1]], r"00002.jsonl: line 5: id 'd' is unknown or given twice"),
        (lambda lines: [lines[0], lines[1].replace('"d"', '"x"'), *lines[2:]], "line 2: id 'x' is unknown"),
        (lambda lines: lines[:2], r"00002.jsonl: 1 answers, expected 3; delete the file to ask again"),
        (lambda lines: [lines[0], '{"id": "d"}', *lines[2:]], "line 2: not an answer by medmax eval; delete the file"),
        (lambda lines: [], r"00002.jsonl: 0 answers, expected 3"),
    ],
)
def test_damage_is_named(answers, tmp_path, damage, message):
    publish_all(answers)
    path = tmp_path / "answers" / "00002.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0]) == {"kind": "test"}
    path.write_text("".join(line + "\n" for line in damage(lines)))
    with pytest.raises(InputError, match=message):
        answers.read()
