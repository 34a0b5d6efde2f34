"""From questions to what a model is asked, in one of three forms, and in batches that do not depend on who answers.

`tuned` is the published form of the fine-tuned models: picture and bare question. `base` is for models that were never
taught to answer: an instruction and the beginning of an answer to go on with. `chat` is for assistants of others, which
answer at length unless they are told not to. Two questions have fixed words in every form, as published: a caption is
asked for with CAPTION, and a detailed description with DESCRIPTION (our wording) in place of the row's own question.

Questions about one image stand in one batch, so that it is encoded once and its part of the prompt computed once.
"""

import hashlib
import json
from collections.abc import Sequence

from medmax_fast.eval.backends.protocol import Ask
from medmax_fast.eval.questions import EvalData, Question

FORMS = ("tuned", "base", "chat")
CAPTION = "Please describe this picture."
DESCRIPTION = (
    "Give a comprehensive analysis of this picture: the kind of image, what it shows, and every finding that matters."
)
# kind of task -> what stands before the question, or behind it.
_BASE = {
    "yes_no": "Look at the picture and answer with yes or no.\n",
    "letter": "Look at the picture and answer with A, B, C or D.\n",
    "open": "Look at the picture and answer in a few words.\n",
}
_CHAT = {
    "yes_no": "\nAnswer with yes or no only.",
    "letter": "\nAnswer with the letter of the right choice only.",
    "open": "\nAnswer in a few words.",
}
# Where a question's text may name its picture.
TAG = "<image>"
# A chat model may put a word or a mark before its one-word answer.
CHAT_WORD = 16

# What a batch is reckoned to cost, in ids: an image, a picture, an answer without a limit, and marks around a question.
IMAGE_IDS, OPEN_END, MARKS = 1026, 512, 8


def ask_of(question: Question, form: str, most: int = 0) -> Ask:
    """The Ask of a question. most: bound of every text budget (0: none)."""
    assert form in FORMS, form
    task, text = question.task, question.prompt
    if task.kind == "caption":
        text = CAPTION
    elif question.task_id == "visual_chat_detailed_description":
        text = DESCRIPTION
    # As published: the tag is taken out, and the picture comes first unless the question ends with it.
    last = text.rstrip().endswith(TAG)
    text, new_tokens = text.replace(TAG, "").strip(), task.new_tokens
    if form == "base" and task.mode == "text":
        text, last = f"{_BASE.get(task.kind, '')}Question: {text}\nAnswer:", False
    elif form == "chat":
        text += _CHAT.get(task.kind, "")
        new_tokens = CHAT_WORD if new_tokens == 1 else new_tokens
    if most and task.mode != "image":
        new_tokens = min(new_tokens or most, most)
    content = [{"type": "text", "text": text}]
    if task.shows_image:
        content.insert(int(last), {"type": "image", "path": str(question.path)})
    return Ask(question.id, content, task.mode, new_tokens, turn=form != "base")


def prompts_hash(data: EvalData, asks: Sequence[Ask]) -> str:
    """SHA-256 of everything that is asked, the names of image files apart, and of what it is compared with."""
    digest = hashlib.sha256()
    for question, ask in zip(data.questions, asks, strict=True):
        texts = [piece.get("text") for piece in ask.content]
        facts = [ask.id, texts, data.cluster(question), ask.mode, ask.new_tokens, ask.turn, question.answer]
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


def batches(data: EvalData, asks: Sequence[Ask], budget: int) -> list[list[int]]:
    """Indices of the questions of each batch, of about `budget` ids (new ones included) or one image's questions.

    Text comes before drawings, which take longest; images in the order of the data.
    """
    groups: dict[tuple, list[int]] = {}
    for index, (question, ask) in enumerate(zip(data.questions, asks, strict=True)):
        # Questions that show no image have nothing in common.
        image = data.cluster(question) if question.task.shows_image else index
        groups.setdefault((ask.mode != "text", image), []).append(index)
    found: list[list[int]] = []
    # Of the last batch: ids so far, and whether it draws; no batch is begun yet.
    total, drawing = budget, None
    for (draws, _), members in sorted(groups.items(), key=lambda item: item[0][0]):
        shared = IMAGE_IDS * data.questions[members[0]].task.shows_image
        for part in _split(members, [_cost(asks[i]) for i in members], max(budget - shared, 1)):
            cost = shared + sum(_cost(asks[i]) for i in part)
            if draws != drawing or total + cost > budget:
                found.append([])
                total, drawing = 0, draws
            found[-1] += part
            total += cost
    return found


def _split(members: list[int], costs: list[int], budget: int) -> list[list[int]]:
    """One image's questions, in parts of at most `budget` ids."""
    parts: list[list[int]] = [[]]
    total = 0
    for member, cost in zip(members, costs, strict=True):
        if parts[-1] and total + cost > budget:
            parts.append([])
            total = 0
        parts[-1].append(member)
        total += cost
    return parts


def _cost(ask: Ask) -> int:
    """Ids of one answer and of the question's text, four characters an id."""
    text = sum(len(piece["text"]) for piece in ask.content if piece["type"] == "text") // 4 + MARKS
    picture = IMAGE_IDS if ask.mode != "text" else 0
    return text + picture + (0 if ask.mode == "image" else ask.new_tokens or OPEN_END)
