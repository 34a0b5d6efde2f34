"""What an answer is worth under both protocols, for every kind of task and everything that can go wrong with it."""

import numpy as np
import pytest
from eval_folder import make_folder

from medmax_fast.eval.judge import Verdict
from medmax_fast.eval.questions import load_questions
from medmax_fast.eval.samples import Given, Measured, Similarities, judge_cases, make_sample, similarities


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_questions(make_folder(tmp_path_factory.mktemp("samples") / "data"))


@pytest.fixture()
def sample(data):
    """sample(kind, given, verdict=, similar=): the sample of the first question of a kind."""

    def make(kind: str, given: Given, verdicts=None, similar=None) -> dict:
        question = next(q for q in data.questions if q.task.kind == kind)
        if verdicts is not None:
            verdicts = {question.id: verdicts} if isinstance(verdicts, Verdict) else {}
        if similar is not None:
            similar = Similarities(*({question.id: v} if v is not None else {} for v in similar))
        return make_sample(question, data, given, Measured(verdicts, similar))

    return make


BOTH, NEITHER, STRICT = ({"medmax-v1": a, "strict": b} for a, b in ((1.0, 1.0), (None, None), (None, 0.0)))
WRONG = {"medmax-v1": 0.0, "strict": 0.0}
FAILED = Given(error="broken image")


def check(row: dict, scores: dict, status: str) -> dict:
    assert (row["scores"], row["status"]) == (pytest.approx(scores) if scores != NEITHER else NEITHER, status)
    return row


def test_closed(sample):
    row = check(sample("yes_no", Given(" Yes", token_ids=(9,))), BOTH, "answered")
    assert row["parsed"] == "yes" and row["token_ids"] == [9] and row["text_metrics"] is None and row["judge"] is None
    # The published rule takes the "yes" in "eyes"; strictly there is no answer.
    check(sample("yes_no", Given("eyes")), {"medmax-v1": 1.0, "strict": 0.0}, "unparsed")
    check(sample("yes_no", Given("no")), WRONG, "answered")
    row = check(sample("yes_no", FAILED), WRONG, "failed")
    assert row["error"] == "broken image" and row["parsed"] is None
    check(sample("letter", Given("B.")), {"medmax-v1": 0.0, "strict": 1.0}, "answered")


def test_open(sample):
    right = check(sample("open", Given("a left lung"), Verdict([1.0], "1")), BOTH, "answered")
    assert right["judge"] == {"scores": [1.0], "reply": "1", "error": None, "passing": False}
    assert right["text_metrics"]["token_recall"] == 1.0
    check(sample("open", Given("a rib"), Verdict([0.0])), WRONG, "answered")
    # A verdict that cannot be read leaves the published denominator, and counts as wrong strictly.
    check(sample("open", Given("a rib"), Verdict(None, "hm")), STRICT, "unparsed")
    check(sample("open", Given("a rib"), Verdict(None, "", "server down", True)), STRICT, "unjudged")
    check(sample("open", FAILED, True), WRONG, "failed")
    # Without a judge there is no accuracy at all.
    check(sample("open", Given("a lung")), NEITHER, "answered")
    # Words that were not said count as none.
    assert check(sample("open", FAILED), NEITHER, "failed")["text_metrics"]["token_f1"] == 0


def test_relative_scores_are_ratios(sample):
    row = sample("chat", Given("A bone."), Verdict([8.0, 6.0], "8 6"))
    check(row, {"medmax-v1": 0.75, "strict": 0.75}, "answered")
    assert row["reference"] == "A rib." and row["domains"] == ["ct"] and row["answer"].startswith("{'gpt4_answer'")
    check(sample("chat", Given("A bone."), Verdict([5.0, 10.0])), {"medmax-v1": 2.0, "strict": 2.0}, "answered")
    check(sample("chat", Given(""), Verdict([1.0, 0.0])), WRONG, "answered")
    check(sample("chat", FAILED, True), STRICT, "failed")
    check(sample("chat", FAILED), NEITHER, "failed")


def test_captions_and_drawings(sample):
    half = {"medmax-v1": 0.5, "strict": 0.5}
    row = check(sample("caption", Given("A slide."), similar=(0.5, None)), half, "answered")
    assert row["text_metrics"]["exact_match"] == 1
    check(sample("caption", Given(" "), similar=(None, None)), STRICT, "unparsed")
    check(sample("caption", FAILED, similar=(None, None)), STRICT, "failed")
    check(sample("caption", Given("A slide.")), NEITHER, "answered")
    row = check(
        sample("drawing", Given(pictures=("p.png",)), similar=(-0.1, None)),
        {"medmax-v1": -0.1, "strict": -0.1},
        "answered",
    )
    assert row["pictures"] == ["p.png"] and row["text_metrics"] is None
    check(sample("drawing", Given("I cannot draw."), similar=(None, None)), STRICT, "unparsed")
    check(sample("drawing", Given("I cannot draw.")), NEITHER, "unparsed")


def test_interleaved_pictures_are_compared_where_there_is_a_reference(tmp_path):
    rows = [("mm_out", "pmc", "Show it", "text", image) for image in ("images/a.png", "")]
    data = load_questions(make_folder(tmp_path / "data", rows))
    first, second = data.questions
    verdicts = {q.id: Verdict([4.0, 4.0]) for q in data.questions}
    drew = Given("text", ("p.png",))
    measured = Measured(verdicts, Similarities(image_image={first.id: 0.25}))
    assert make_sample(first, data, drew, measured)["image_similarity"] == {"medmax-v1": 0.25, "strict": 0.25}
    assert make_sample(second, data, drew, measured)["image_similarity"] is None
    nothing = Measured(verdicts, Similarities())
    assert make_sample(first, data, Given("text"), nothing)["image_similarity"] == STRICT
    assert make_sample(first, data, FAILED, nothing)["image_similarity"] == STRICT
    assert make_sample(first, data, drew, Measured(verdicts))["image_similarity"] is None


def test_the_judge_sees_what_it_needs(data):
    answers = {q.id: Given(f"answer {q.id}") for q in data.questions}
    chat = next(q for q in data.questions if q.task.kind == "chat")
    answers[chat.id] = FAILED
    cases = judge_cases(data.questions, answers)
    assert [(case.kind, case.question, case.reference, case.context) for case in cases] == [
        ("accuracy", "What is shown?", "a lung", ""),
        ("relative", "Draw it", "free text", ""),
        ("relative", "", "A rib.", "A scan.\nSee it."),
    ]
    assert all(case.answer == f"answer {case.id}" for case in cases)


class FixedEncoder:
    """A picture is its mean colour, a text its first letters: enough to see who is compared with whom."""

    def images(self, paths):
        from PIL import Image, UnidentifiedImageError

        rows, errors = [], []
        for path in paths:
            try:
                rows.append(np.asarray(Image.open(path).convert("RGB"), float).mean((0, 1)))
                errors.append(None)
            except UnidentifiedImageError:
                rows.append(np.full(3, np.nan))
                errors.append("broken")
        return np.array(rows, np.float32), errors

    def texts(self, texts):
        return np.array([[float(text.count(c)) for c in "rgb"] for text in texts], np.float32).reshape(-1, 3)


def test_who_is_compared_with_whom(tmp_path):
    rows = [
        ("image_captioning", "quilt", "", "gold", "images/a.png"),
        ("image_captioning", "quilt", "", "gold", "images/b.png"),
        ("image_generation", "quilt", "bbb", "rr", "images/b.png"),
        ("image_generation", "quilt", "rb", "", ""),
        ("image_generation", "quilt", "r", "", ""),
        ("mm_out", "pmc", "p", "t", "images/b.png"),
    ]
    data = load_questions(make_folder(tmp_path / "data", rows))
    run = tmp_path / "run"
    run.mkdir()
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(run / "red.png")
    (run / "broken.png").write_text("no picture")
    caption, empty, drawing, prompted, broken, mixed = [q.id for q in data.questions]
    answers = {
        caption: Given("rb"),
        empty: Given(" "),
        drawing: Given(pictures=("red.png",)),
        prompted: Given(pictures=("red.png", "broken.png")),
        broken: Given(pictures=("broken.png",)),
        mixed: Given("t", ("red.png",)),
    }
    found = similarities(data.questions, answers, {"data": data.folder, "run": run}, FixedEncoder())
    # a.png is red, b.png blue. A drawing goes with its prompt, as published, whatever the answer says.
    expected = {caption: 0.5**0.5, drawing: 0.0, prompted: 0.5**0.5}
    assert found.image_text == pytest.approx(expected) and found.image_image == pytest.approx({mixed: 0.0})
