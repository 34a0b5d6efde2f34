"""What the loopback server of the example says: an assistant that knows most answers of a folder, and a judge by words.

Both speak through the same protocol as any server does. Which questions the assistant gets wrong depends on question
and picture alone, and the judge compares words, so that every run comes to the same table.
"""

import base64
import hashlib
import re

from medmax_fast.eval.asking import CAPTION, DESCRIPTION
from medmax_fast.eval.questions import load_questions
from medmax_fast.eval.text_metrics import text_metrics

# Of the questions, about this share is answered wrong.
WRONG = 0.25


class Assistant:
    """answer(body) of chat_server.serve: the message to a request about the questions of an evaluation folder."""

    def __init__(self, folder: str):
        self._known = {}
        data = load_questions(folder)
        for question in data.questions:
            image = data.cluster(question) if question.task.shows_image else ""
            text = question.prompt
            if question.task.kind == "caption":
                text = CAPTION
            elif question.task.question_type == "detailed_description":
                text = DESCRIPTION
            self._known[text, image] = question

    def __call__(self, body: dict) -> str:
        if body["messages"][0]["role"] == "system":
            return judge(body["messages"])
        parts = body["messages"][0]["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        text = next(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        image = hashlib.sha256(base64.b64decode(urls[0].split(",", 1)[1])).hexdigest() if urls else ""
        question = self._known[text, image] if (text, image) in self._known else self._known[text.split("\n")[0], image]
        digest = hashlib.sha256(f"{question.id}".encode()).digest()
        return self._wrong(question) if digest[0] < 256 * WRONG else self._right(question)

    @staticmethod
    def _right(question) -> str:
        if question.task.kind == "yes_no":
            return f"{question.answer.capitalize()}."
        return f"{question.answer})" if question.task.kind == "letter" else question.reference

    @staticmethod
    def _wrong(question) -> str:
        if question.task.kind == "yes_no":
            return "It looks normal to me."
        if question.task.kind == "letter":
            return chr((ord(question.answer) - ord("A") + 1) % 4 + ord("A"))
        return " ".join(question.reference.split()[: len(question.reference.split()) // 2]) or "I do not know."


def judge(messages: list[dict]) -> str:
    """A verdict by the words that an answer and its reference share; the texts stand between tags in the request."""
    texts = dict(re.findall(r"<(\w+) \w+>\n(.*?)\n</\1 \w+>", messages[1]["content"], re.DOTALL))
    shared = text_metrics(texts.get("answer", ""), texts["reference"])["token_f1"]
    if '"correct"' in messages[1]["content"]:
        return f'{{"correct": {int(shared > 0.6)}}}'
    return f'{{"first": 9, "second": {1 + round(8 * shared)}}}'
