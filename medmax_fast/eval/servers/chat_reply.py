"""What a chat-completions server says, made safe: replies, errors and waits in all their dialects, without keys.

Servers differ in where they put text, pictures and reasons; what cannot be read as a reply is a NotAReply, for a
proxy's page comes with status 200 too. Pictures are taken from data: URLs only.
"""

import base64
import email.utils
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from medmax_fast.files import write_json

# Shorter keys are placeholders such as EMPTY, and also words that a model may say.
KEY_LENGTH = 16
_REFUSAL = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|forbidden|cannot find", re.I
)


class NotAReply(ValueError):
    """A response that holds no chat completion; the message says what it holds."""


@dataclass(frozen=True)
class Reply:
    """What the server answered. pictures: image files as bytes. Token counts are None where the server gave none.

    model: by the server's own account, "" if it did not say. unfetched: pictures that came as an address instead.
    cached: read from the cache folder.
    """

    text: str
    pictures: list[bytes] = field(default_factory=list)
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str = ""
    unfetched: int = 0
    cached: bool = False


class Secrets:
    """Removes keys from what a server says."""

    def __init__(self, *secrets: str):
        self._secrets = sorted(filter(None, secrets), key=len, reverse=True)

    def line(self, text: str) -> str:
        """A message for people: one line of at most 300 characters; OpenAI's own messages show both ends of a key."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return re.sub(r"\bsk-[\w*.-]+", "[key]", " ".join(text.split()))[:300]

    def reply(self, text: str) -> str:
        """A text to keep, otherwise unchanged."""
        for secret in self._secrets:
            if len(secret) >= KEY_LENGTH:
                text = text.replace(secret, "[key]")
        # Half a surrogate pair is valid JSON, but no file can hold it.
        return text.encode("utf-8", "replace").decode("utf-8")


def parse_reply(content: bytes, clean: Callable[[str], str]) -> Reply:
    """The Reply in a response's body, all texts passed through clean(); NotAReply if there is none."""
    try:
        return _parse(json.loads(content), clean)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = error_of(content)[0] or "an empty body"
        raise NotAReply(f"200, but not a chat completion: {said}") from error


def _parse(body: dict, clean: Callable[[str], str]) -> Reply:
    choice = body["choices"][0]
    message = choice["message"]
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str)) if parts else content
    if not text:
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError(f"content of type {type(text).__name__}")
    # `images` is OpenRouter's form.
    images = [part["image_url"] for part in [*parts, *(message.get("images") or [])] if "image_url" in part]
    urls = [image if isinstance(image, str) else image["url"] for image in images]
    inline = [url.partition(",")[2] for url in urls if re.match(r"data:[^,]*;base64,", url)]
    usage = body.get("usage") or {}
    return Reply(
        clean(text),
        [base64.b64decode(data) for data in inline],
        clean(str(body.get("model") or "")),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        clean(str(choice.get("finish_reason") or "")),
        len(urls) - len(inline),
    )


def _count(value) -> int | None:
    return value if type(value) is int and value >= 0 else None


def error_of(content: bytes) -> tuple[str, str, str]:
    """(message, code, parameter) of an error's body, "" for what is not there; not yet without keys."""
    text = content[:10000].decode("utf-8", "replace")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        return text, "", ""
    error = body
    for name in ("error", "detail", "message"):
        if isinstance(error, dict) and error.get(name):
            error = error[name]
    details = body["error"] if isinstance(body.get("error"), dict) else body
    found = [details.get(name) for name in ("code", "type", "param")]
    code, kind, param = (value if isinstance(value, str) else "" for value in found)
    return error if isinstance(error, str) else json.dumps(error)[:10000], code or kind, param


def refused_parameter(status: int, content: bytes, sent: list[str]) -> str:
    """Which of the parameters sent the server says it does not know, "" for none."""
    if status not in (400, 422):
        return ""
    message, code, param = error_of(content)
    if not _REFUSAL.search(f"{code} {message}"):
        return ""
    named = [param] if param else re.findall(r"\w+", message)
    return next((name for name in sent if name in named), "")


def seconds_to_wait(retry_after: str) -> float:
    """Seconds that a Retry-After header (a number or a date) asks for, 0 if it cannot be read."""
    if re.fullmatch(r"\d{1,9}(\.\d*)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


# ---- files ----


def write_reply(
    path: Path, reply: Reply, dropped: list[str], model: str, messages: list[dict], max_tokens: int
) -> None:
    """Keep a reply with what identifies its request for a reader, and which parameters the server did not take."""
    fields = asdict(reply)
    del fields["cached"]
    fields["pictures"] = [base64.b64encode(picture).decode() for picture in reply.pictures]
    content = messages[-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    images = sum(part["type"] == "image_url" for part in parts)
    request = {"model": model, "max_tokens": max_tokens, "text": text[:200], "images": images}
    write_json(path, {"request": request, "dropped": dropped, "reply": fields})


def read_reply(path: Path) -> tuple[Reply, list[str]] | None:
    """(reply, dropped) as written by write_reply; None where there is no file, or a damaged one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = dict(stored["reply"])
        fields["pictures"] = [base64.b64decode(picture, validate=True) for picture in fields["pictures"]]
        reply, dropped = Reply(**{**fields, "cached": True}), stored["dropped"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    texts = (reply.text, reply.model, reply.finish_reason)
    good = isinstance(dropped, list) and all(isinstance(text, str) for text in (*texts, *dropped))
    return (reply, dropped) if good else None


def kept_tokens(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(model asked, prompt tokens, completion tokens) of every reply in a cache folder; damaged files are passed by."""
    for path in sorted(folder.glob("*/*.json")):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            prompt, completion = (_count(stored["reply"][name]) or 0 for name in ("prompt_tokens", "completion_tokens"))
            yield str(stored["request"]["model"]), prompt, completion
        except (OSError, ValueError, LookupError, TypeError):
            continue
