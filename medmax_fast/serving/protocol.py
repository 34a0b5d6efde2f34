"""Requests of OpenAI's chat-completions protocol, read strictly: what cannot be honoured is refused by name.

A request becomes a Chat: turns whose images are still data: URLs, and settings of generate's Request. Absent settings
have the published values, not OpenAI's. null is the same as absent everywhere.
"""

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

from medmax_fast.generate.requests import Request
from medmax_fast.runtime import InputError, one_line
from medmax_fast.serving.conversation import Turn

_KINDS = {float: "a number", int: "a whole number", bool: "true or false", list: "a list"}
# Settings by their names here: the type, and the field of Request.
_SETTINGS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "max_new_tokens"),
    "max_completion_tokens": (int, "max_new_tokens"),
    "seed": (int, "seed"),
    "greedy": (bool, "greedy"),
}
_SETTINGS |= {
    name: (float, name)
    for name in (
        *("temperature", "top_p", "repetition_penalty", "image_temperature", "image_top_p"),
        *("guidance_text", "guidance_image"),
    )
}
# What says nothing about the answer, and what may be said because it asks for nothing that is not done anyway.
_NOTES = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_NEUTRAL: dict[str, list] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "stop": [[]],
    "tools": [[]],
    "tool_choice": ["auto", "none"],
    "parallel_tool_calls": [False, True],
    "functions": [[]],
    "function_call": ["auto", "none"],
    "response_format": [{"type": "text"}],
    "store": [False],
    "service_tier": ["auto", "default"],
}
_READ = ("model", "messages", "modalities", "n", "stream", "stream_options")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MODES = {("text",): "text", ("image",): "image", ("image", "text"): "any"}
_SEEDS = 1 << 63


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form. param: the part of the request that is to blame."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None, **headers):
        super().__init__(one_line(message, 1000))
        self.param, self.status, self.code = param, status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        """The JSON of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Chat:
    """A request: turns with images as {"type": "image", "url", "where"}, and fields of generate's Request."""

    turns: list[Turn]
    settings: dict
    n: int
    stream: bool
    include_usage: bool


def read_chat(body: bytes | bytearray, model: str, most_choices: int) -> Chat:
    """The Chat in a request's body; ApiError names what is wrong with it."""
    fields = _object(body)
    if "model" not in fields:
        raise ApiError(f"model is missing, expected {model!r}", "model")
    if fields["model"] != model:
        message = f"model {_shown(fields['model'])} does not exist here, expected {model!r}"
        raise ApiError(message, "model", 404, "model_not_found")
    for name, value in fields.items():
        if name in _NEUTRAL and not any(_equal(value, good) for good in _NEUTRAL[name]):
            raise ApiError(f"{name} {_shown(value)} is not supported", name, code="unsupported_parameter")
        if name not in (*_READ, *_SETTINGS, *_NOTES, *_NEUTRAL):
            raise ApiError(f"unknown parameter {_shown(name)}", name, code="unknown_parameter")
    n = _typed(fields, "n", int, 1)
    if not 1 <= n <= most_choices:
        raise ApiError(f"n {n}: expected 1 to {most_choices}", "n")
    stream = _typed(fields, "stream", bool, False)
    options = fields.get("stream_options", {})
    if options and not stream:
        raise ApiError("stream_options without stream", "stream_options")
    if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        raise ApiError(f"stream_options {_shown(options)}: expected include_usage alone", "stream_options")
    return Chat(_turns(fields), _settings(fields), n, stream, _typed(options, "include_usage", bool, False))


def image_data(piece: dict) -> bytes:
    """The bytes of an image piece of a Chat, whose address must be a data: URL."""
    url, where = piece["url"], piece["where"]
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:[^,]*;base64", head, re.IGNORECASE):
        raise ApiError(
            f"{where}: {_shown(url)} is not a data: URL; this server fetches nothing, "
            "send the image itself as data:image/png;base64,...",
            where,
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ApiError(f"{where}: not base64 ({error})", where) from error


# ---- fields ----


def _object(body: bytes | bytearray) -> dict:
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ApiError(f"the body is a JSON {type(fields).__name__}, expected an object")
    return _without_nulls(fields)


def _equal(value, other) -> bool:
    # 0.0 is 0, but false is not.
    return value == other and (type(value) is bool) == (type(other) is bool)


def _no_number(name: str):
    raise ValueError(f"{name} is no number")


def _without_nulls(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


def _shown(value) -> str:
    return one_line(ascii(value), 100)


def _typed(fields: dict, name: str, kind: type, default):
    value = fields.get(name, default)
    # Whole numbers are numbers; true and false are not.
    good = type(value) in ((float, int) if kind is float else (kind,))
    if not good:
        raise ApiError(f"{name} {_shown(value)}: expected {_KINDS[kind]}", name)
    return value


def _settings(fields: dict) -> dict:
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise ApiError("max_tokens and max_completion_tokens: expected one of them", "max_tokens")
    settings: dict[str, Any] = {"mode": _mode(fields)}
    names: dict[str, str] = {}
    for name, (kind, field) in _SETTINGS.items():
        if name in fields:
            settings[field], names[field] = _typed(fields, name, kind, None), name
    # Who asks for the likeliest text would wonder at a picture that is another one each time.
    if settings.get("temperature") == 0:
        settings.setdefault("image_temperature", 0.0)
    if not -_SEEDS <= settings.get("seed", 0) < _SEEDS:
        raise ApiError(f"seed {_shown(settings['seed'])}: expected a whole number of 64 bits", "seed")
    try:
        Request("", content=[], **settings).check()
    except InputError as error:
        field, _, rest = str(error).partition(" ")
        raise ApiError(f"{names[field]} {rest}", names[field]) from error
    return settings


def _mode(fields: dict) -> str:
    modalities = _typed(fields, "modalities", list, ["text"])
    mode = _MODES.get(tuple(sorted(map(str, modalities))))
    if mode is None:
        message = f'modalities {_shown(modalities)}: expected ["text"], ["image"] or ["text", "image"]'
        raise ApiError(message, "modalities", code="unsupported_parameter")
    return mode


# ---- messages ----


def _turns(fields: dict) -> list[Turn]:
    messages = _typed(fields, "messages", list, ())
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _turn(message, where: str) -> Turn:
    if not isinstance(message, dict):
        raise ApiError(f"{where} {_shown(message)}: expected an object", where)
    # What clients send back of an answer holds empty lists for what it did not do.
    message = {name: value for name, value in message.items() if value not in (None, [])}
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(f"{where}.role {_shown(role)}: expected one of {', '.join(_ROLES)}", f"{where}.role")
    known = {"role", "content", "name"} | ({"images"} if role == "assistant" else set())
    for name in message.keys() - known:
        raise ApiError(f"{where}: {_shown(name)} is not supported in a message of the {role}", where)
    content = message.get("content", "")
    if isinstance(content, str):
        pieces = [_text(content, f"{where}.content")]
    elif isinstance(content, list):
        pieces = [_piece(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    else:
        raise ApiError(f"{where}.content {_shown(content)}: expected a string or a list of parts", f"{where}.content")
    images = message.get("images", [])
    if images and not isinstance(content, str):
        raise ApiError(f"{where}: images beside a list of parts, expected one of them", where)
    if not isinstance(images, list):
        raise ApiError(f"{where}.images {_shown(images)}: expected a list", f"{where}.images")
    return Turn(_ROLES[role], _with_images(pieces, images, f"{where}.images") if images else pieces)


def _with_images(text: list[dict], images: list, where: str) -> list[dict]:
    """A text with its images at their offsets, at its end where there is none."""
    (whole,) = (piece["text"] for piece in text)
    pieces, begin = [], 0
    for i, image in enumerate(images):
        piece = _piece(image, f"{where}[{i}]")
        offset = image.get("offset")
        offset = len(whole) if offset is None else offset
        if type(offset) is not int or piece["type"] != "image" or not begin <= offset <= len(whole):
            raise ApiError(
                f"{where}[{i}]: expected an image_url with an offset, in rising order, of at most {len(whole)}",
                f"{where}[{i}]",
            )
        pieces += [{"type": "text", "text": whole[begin:offset]}, piece]
        begin = offset
    return [*pieces, {"type": "text", "text": whole[begin:]}]


def _piece(part, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"], where)
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str):
            return {"type": "image", "url": url, "where": where}
    found = f"a part of type {_shown(kind)}" if kind not in (None, "text", "image_url") else _shown(part)
    raise ApiError(
        f'{where}: {found}, expected {{"type": "text", "text"}} or {{"type": "image_url", "image_url"}}', where
    )


def _text(text: str, where: str) -> dict:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"{where}: half of a surrogate pair, which is no text", where) from error
    return {"type": "text", "text": text}
