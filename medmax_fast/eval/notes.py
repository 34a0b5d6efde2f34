"""What a reader should know beside the figures: data that looks wrong, and what was not answered or measured."""

from collections.abc import Mapping

from medmax_fast.eval.questions import EvalData
from medmax_fast.eval.samples import IN_WORDS, Given, Measured
from medmax_fast.eval.tasks import GOLD
from medmax_fast.eval.text_metrics import missing


def run_notes(data: EvalData, backend: dict, answers: Mapping[str, Given], measured: Measured) -> list[str]:
    """Notes on a run, a sentence each, the gravest first; the same for the same answers and verdicts."""
    notes = [*_unanswered(data, answers), *_unjudged(measured), *_undrawn(data, backend, answers), *_data(data)]
    if measured.verdicts is None and any(q.task.judged for q in data.questions):
        notes.append("no judge: open answers, visual chats and interleaved answers are compared word by word only")
    in_words = any(q.task.kind in IN_WORDS and q.reference.strip() for q in data.questions)
    return notes + (missing() if in_words else [])


def _unanswered(data: EvalData, answers: Mapping[str, Given]) -> list[str]:
    failed = [(q.id, answers[q.id]) for q in data.questions if answers[q.id].error is not None]
    if not failed:
        return []
    passing = sum(given.passing for _, given in failed)
    again = "the same command asks again" if passing else "delete the folder answers/ to ask again"
    if 0 < passing < len(failed):
        again = f"the same command asks {passing} of them again"
    name, first = failed[0]
    return [
        f"{len(failed)} of {len(data.questions)} questions got no answer, the first: {name}: {first.error}; {again}"
    ]


def _unjudged(measured: Measured) -> list[str]:
    verdicts = measured.verdicts or {}
    lost = [(name, verdict) for name, verdict in verdicts.items() if verdict.scores is None]
    unread = [name for name, verdict in lost if verdict.error is None]
    notes = []
    if len(unread) < len(lost):
        name, first = next(pair for pair in lost if pair[1].error is not None)
        again = "; the same command asks again" if any(verdict.passing for _, verdict in lost) else ""
        count = f"{len(lost) - len(unread)} of {len(verdicts)} answers"
        notes.append(f"the judge gave no verdict on {count}, the first: {name}: {first.error}{again}")
    if unread:
        notes.append(
            f"the judge's replies to {len(unread)} of {len(verdicts)} answers could not be read, as {unread[0]}"
        )
    return notes


def _undrawn(data: EvalData, backend: dict, answers: Mapping[str, Given]) -> list[str]:
    asked = [answers[q.id] for q in data.questions if q.task.kind == "drawing"]
    empty = sum(not given.pictures and given.error is None for given in asked)
    notes = [f"{empty} of {len(asked)} requests for a picture were answered without one"] if empty else []
    if backend.get("draws") is False and any(q.task.kind == "interleaved" for q in data.questions):
        notes.append("the model does not draw: interleaved answers are text alone")
    return notes


def _data(data: EvalData) -> list[str]:
    notes, seen, repeated = [], set(), []
    odd = [q for q in data.questions if q.task.kind in GOLD and q.answer not in GOLD[q.task.kind]]
    if odd:
        notes.append(
            f"{len(odd)} gold answers are not written as yes, no or A to D exactly, the first {odd[0].answer!r} of "
            f"{odd[0].id}; medmax-v1 never counts such a row right"
        )
    for question in data.questions:
        image = question.path and data.images.get(question.path)
        key = question.task_id, question.prompt, question.answer, image
        if key in seen:
            repeated.append(question.id)
        seen.add(key)
    if repeated:
        notes.append(f"{len(repeated)} rows repeat an earlier one and count again, the first: {repeated[0]}")
    return notes
