"""From answers to samples: each question with the answer, what it is worth under both protocols, and why.

A score is None where a protocol leaves a question out of its mean. `medmax-v1` does that as published: with an open
answer whose verdict cannot be read, a picture that was not drawn, a caption that is empty. `strict` leaves nothing out:
all of these count as 0. A question that got no answer at all is wrong under both, where the figure is an accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medmax_fast.config import PROTOCOLS
from medmax_fast.eval.judge import Case, Verdict
from medmax_fast.eval.questions import EvalData, Question
from medmax_fast.eval.scoring import score
from medmax_fast.eval.similarity import cosine
from medmax_fast.eval.text_metrics import text_metrics

# An image task's answer is compared in words too, where the data has words for it.
IN_WORDS = ("open", "interleaved", "chat", "caption")

Scores = dict[str, float | None]
_NONE: Scores = dict.fromkeys(PROTOCOLS)


@dataclass(frozen=True)
class Given:
    """An answer as it is kept: text, pictures as paths relative to the run, new ids.

    error: why there is none; passing: whether another time may bring one.
    """

    text: str = ""
    pictures: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    error: str | None = None
    passing: bool = False


@dataclass(frozen=True)
class Similarities:
    """Cosines by question id, where there are any: of image and text, and of drawing and reference."""

    image_text: Mapping[str, float] = field(default_factory=dict)
    image_image: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What others say of the answers, None where nobody was asked; a judge's verdicts are by question id."""

    verdicts: Mapping[str, Verdict] | None = None
    similar: Similarities | None = None


def judge_cases(questions: list[Question], answers: Mapping[str, Given]) -> list[Case]:
    """What the judge is asked: every open, interleaved and chat question that has an answer."""
    return [
        Case(q.id, q.task.judged, q.prompt, q.reference, answers[q.id].text, q.context)
        for q in questions
        if q.task.judged and answers[q.id].error is None
    ]


def similarities(questions: list[Question], answers: Mapping[str, Given], folders: dict, encoder) -> Similarities:
    """Cosines of captions with their images, of drawings with their prompts, and of drawings with reference images.

    folders: `data` and `run`, which pictures are relative to. Of several pictures in one answer the first counts.
    """
    # Pictures by their names within the data or the run, so that the order does not depend on where these folders are.
    text_pairs, image_pairs = {}, {}
    for question in questions:
        given, shown = answers[question.id], ("data", question.image)
        drawn = ("run", given.pictures[0]) if given.pictures else None
        if question.task.kind == "caption" and given.text.strip():
            text_pairs[question.id] = (shown, given.text)
        elif question.task.kind == "drawing" and drawn:
            text_pairs[question.id] = (drawn, question.prompt)
        elif question.task.kind == "interleaved" and drawn and question.path:
            image_pairs[question.id] = (drawn, shown)
    names = sorted({name for name, _ in text_pairs.values()} | {name for pair in image_pairs.values() for name in pair})
    texts = sorted({text for _, text in text_pairs.values()})
    rows, errors = encoder.images([folders[place] / name for place, name in names])
    images = {name: row for name, row, error in zip(names, rows, errors, strict=True) if error is None}
    words = dict(zip(texts, encoder.texts(texts), strict=True))
    return Similarities(
        _cosines({key: (images[name], words[text]) for key, (name, text) in text_pairs.items() if name in images}),
        _cosines({key: (images[a], images[b]) for key, (a, b) in image_pairs.items() if a in images and b in images}),
    )


def _cosines(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    if not pairs:
        return {}
    first, second = (np.stack(rows) for rows in zip(*pairs.values(), strict=True))
    return dict(zip(pairs, cosine(first, second).tolist(), strict=True))


def make_sample(question: Question, data: EvalData, given: Given, measured: Measured) -> dict:
    """One line of samples.jsonl."""
    marks = _marks(question, given, measured) if given.error is None else _failed(question, measured)
    verdict = (measured.verdicts or {}).get(question.id)
    in_words = question.task.kind in IN_WORDS and question.reference.strip()
    return {
        "id": question.id,
        "task": question.task_id,
        "metric": question.task.metric,
        "source": question.source,
        "domains": list(question.domains),
        "question": question.prompt,
        "answer": question.answer,
        "reference": question.reference,
        "output": given.text,
        "image": question.image,
        "pictures": list(given.pictures),
        **marks,
        "judge": None if verdict is None else {k: getattr(verdict, k) for k in ("scores", "reply", "error", "passing")},
        "text_metrics": text_metrics(given.text, question.reference) if in_words else None,
        "error": given.error,
        "token_ids": list(given.token_ids),
        "cluster": data.cluster(question),
    }


def _marks(question: Question, given: Given, measured: Measured) -> dict:
    """Scores and status of an answer."""
    kind = question.task.kind
    if kind in ("yes_no", "letter"):
        marked = score(kind, question.answer, given.text)
        scores: dict[str, float | None] = {name: float(marked[name]) for name in PROTOCOLS}
        return _mark(scores, "answered" if marked["parsed"] else "unparsed", marked["parsed"])
    if question.task.judged:
        image = None
        if kind == "interleaved" and question.path and measured.similar:
            image = _pair(measured.similar.image_image.get(question.id))
        return _mark(*_judged(question, measured.verdicts), image_similarity=image)
    made = given.pictures if kind == "drawing" else given.text.strip()
    if measured.similar is None:
        return _mark(_NONE, "answered" if made else "unparsed")
    value = measured.similar.image_text.get(question.id)
    return _mark(_pair(value), "unparsed" if value is None else "answered")


def _failed(question: Question, measured: Measured) -> dict:
    """Scores of a question without an answer; None under both protocols only where the task is not measured at all."""
    kind, image = question.task.kind, None
    if kind in ("yes_no", "letter") or (kind == "open" and measured.verdicts is not None):
        return _mark(dict.fromkeys(PROTOCOLS, 0.0), "failed")
    if kind == "interleaved" and question.path and measured.similar:
        image = _pair(None)
    by = measured.verdicts if question.task.judged else measured.similar
    return _mark(_NONE if by is None else _pair(None), "failed", image_similarity=image)


def _mark(scores: Scores, status: str, parsed: str | None = None, image_similarity: Scores | None = None) -> dict:
    return {"scores": dict(scores), "status": status, "parsed": parsed, "image_similarity": image_similarity}


def _judged(question: Question, verdicts: Mapping[str, Verdict] | None) -> tuple[Scores, str]:
    """Scores and status of an answer that a judge was to see."""
    if verdicts is None:
        return _NONE, "answered"
    verdict = verdicts[question.id]
    if verdict.scores is None:
        return _pair(None), "unjudged" if verdict.error else "unparsed"
    value = verdict.scores[0] if question.task.judged == "accuracy" else verdict.scores[1] / verdict.scores[0]
    return dict.fromkeys(PROTOCOLS, float(value)), "answered"


def _pair(value: float | None) -> Scores:
    """What there is no value of is left out by one protocol and nothing to the other."""
    return {"medmax-v1": value, "strict": 0.0 if value is None else value}
